"""The name flash_attn while the shim holds it: modules, metadata, private functions, and what comes back."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect
import subprocess
import sys

import pytest
import torch

import fap_api
from fap_api import _kvcache_ops
from fap_api.integrations import flash_attn_shim

PUBLIC = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
NAMES = {
    "flash_attn": ["__version__", *PUBLIC],
    "flash_attn.flash_attn_interface": [
        *PUBLIC,
        *[
            "_flash_attn_forward",
            "_flash_attn_backward",
            "_flash_attn_varlen_forward",
            "_flash_attn_varlen_backward",
        ],
        *[
            "_wrapped_flash_attn_forward",
            "_wrapped_flash_attn_backward",
            "_get_block_size_n",
            "USE_TRITON_ROCM",
        ],
    ],
    "flash_attn.bert_padding": [
        "unpad_input",
        "pad_input",
        "unpad_input_for_concatenated_sequences",
        "index_first_axis",
        "index_put_first_axis",
        "index_first_axis_residual",
    ],
    "flash_attn.layers.rotary": [
        "apply_rotary_emb",
        "apply_rotary_emb_func",
        "apply_rotary_emb_torch",
        "apply_rotary_emb_qkv_",
        "apply_rotary_emb_kv_",
        "RotaryEmbedding",
    ],
}
# The score's arguments, in the order of flash-attn 2.8, which its callers rely on.
SCORE = [
    "dropout_p",
    "softmax_scale",
    "causal",
    "window_size_left",
    "window_size_right",
    "softcap",
    "alibi_slopes",
]
BOUNDS = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
SAVED = ["dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv"]
ARGUMENTS = {
    "_flash_attn_forward": [*"qkv", *SCORE, "return_softmax"],
    "_flash_attn_varlen_forward": [
        *"qkv",
        *BOUNDS,
        *SCORE,
        *["return_softmax", "block_table", "leftpad_k", "seqused_k", "zero_tensors", "num_splits"],
    ],
    "_flash_attn_backward": [*SAVED, *SCORE, "deterministic", "rng_state"],
    "_flash_attn_varlen_backward": [*SAVED, *BOUNDS, *SCORE, "deterministic", "rng_state", "zero_tensors"],
}


# Here transformers' tests may have run before.
pytestmark = pytest.mark.filterwarnings("ignore:transformers has been imported before")


@pytest.fixture
def shim():
    """Install the shim, over a flash-attn if there is one, and return its interface module."""
    flash_attn_shim.install(replace=True)
    yield importlib.import_module("flash_attn.flash_attn_interface")
    flash_attn_shim.uninstall()


@pytest.fixture
def nothing_installed():
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is installed here")


@pytest.mark.parametrize("module", NAMES)
def test_every_name_is_there(shim, module):
    found = importlib.import_module(module)
    assert [name for name in NAMES[module] if not hasattr(found, name)] == []
    assert found.__spec__.name == module


def test_the_usual_imports_work(shim):
    program = {}
    exec(
        "import flash_attn.layers.rotary\n"
        "from flash_attn import flash_attn_func, __version__\n"
        "from flash_attn.bert_padding import pad_input\n"
        "flash_attn.flash_attn_interface.flash_attn_func is flash_attn_func",
        program,
    )
    assert program["__version__"] == "2.8.4"
    with pytest.raises(ModuleNotFoundError, match=r"flash_attn\.ops"):
        importlib.import_module("flash_attn.ops.rms_norm")


def test_libraries_that_look_before_they_import_find_it(shim):
    assert importlib.util.find_spec("flash_attn").name == "flash_attn"
    assert importlib.metadata.version("flash_attn") == importlib.metadata.version("Flash-Attn") == "2.8.4"
    assert importlib.metadata.packages_distributions()["flash_attn"][0] == "flash-attn"
    assert importlib.metadata.metadata("flash-attn")["Name"] == "flash-attn"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_those_that_callers_introspect(shim, name):
    specification = inspect.getfullargspec(getattr(shim, name))
    assert specification.args == ARGUMENTS[name]
    assert (specification.varargs, specification.varkw, specification.kwonlyargs) == (None, None, [])


@pytest.mark.parametrize("name", PUBLIC)
def test_public_signatures_are_fap_apis(shim, name):
    assert inspect.signature(getattr(shim, name)) == inspect.signature(getattr(fap_api, name))


def draw(heads_k=2):
    q = torch.randn(2, 9, 4, 8)
    k, v = torch.randn(2, 2, 11, heads_k, 8)
    return q, k, v


OPTIONS = {"softmax_scale": 0.3, "causal": True, "softcap": 2.0}
SPLIT = {"window_size_left": 6, "window_size_right": -1, "dropout_p": 0.0}


def test_forward_and_backward_are_the_halves_of_flash_attn_func(shim):
    q, k, v = draw()
    slopes = torch.rand(4)
    out, lse, s_dmask, rng_state = shim._flash_attn_forward(
        q, k, v, **OPTIONS, **SPLIT, alibi_slopes=slopes, return_softmax=False
    )
    tensors = [x.requires_grad_() for x in (q, k, v)]
    expected, expected_lse, _ = fap_api.flash_attn_func(
        *tensors, **OPTIONS, window_size=(6, -1), alibi_slopes=slopes, return_attn_probs=True
    )
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert not out.requires_grad
    assert (s_dmask.numel(), rng_state.dtype, rng_state.shape) == (0, torch.int64, (2,))

    # Gradients are written where the caller wants them, here into one tensor for keys and values.
    dout, dq, dkv = torch.randn_like(out), torch.empty_like(q), torch.empty(2, 11, 2, 2, 8)
    softmax_d = shim._flash_attn_backward(
        dout,
        *tensors,
        out,
        lse,
        dq,
        dkv[:, :, 0],
        dkv[:, :, 1],
        **OPTIONS,
        **SPLIT,
        alibi_slopes=slopes,
        deterministic=False,
    )
    gradients = torch.autograd.grad(expected, tensors, dout)
    for dx, right in zip((dq, dkv[:, :, 0], dkv[:, :, 1]), gradients, strict=True):
        assert torch.equal(dx, right)
    assert softmax_d.shape == (2, 4, 128)
    torch.testing.assert_close(softmax_d[:, :, :9], torch.einsum("bqhd,bqhd->bhq", dout, out))


def test_packed_halves(shim):
    bounds = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    places = bounds, bounds, 5, 5
    tensors = [torch.randn(9, heads, 8).requires_grad_() for heads in (4, 2, 2)]
    expected, expected_lse, _ = fap_api.flash_attn_varlen_func(
        *tensors, *places, **OPTIONS, return_attn_probs=True
    )
    out, lse, s_dmask, rng_state = shim._flash_attn_varlen_forward(*tensors, *places, 0.0, **OPTIONS)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert (s_dmask.numel(), rng_state.shape) == (0, (2,))
    dout = torch.randn_like(out)
    gradients = [torch.empty_like(x) for x in tensors]
    options = OPTIONS | SPLIT | {"window_size_left": -1, "alibi_slopes": None, "deterministic": True}
    softmax_d = shim._flash_attn_varlen_backward(dout, *tensors, out, lse, *gradients, *places, **options)
    for dx, right in zip(gradients, torch.autograd.grad(expected, tensors, dout), strict=True):
        assert torch.equal(dx, right)
    assert softmax_d.shape == (4, 9 + 3 * 128)
    torch.testing.assert_close(softmax_d[:, :9], torch.einsum("qhd,qhd->hq", dout, out))


def test_dropout_is_repeated_from_rng_state_and_marked_in_s_dmask(shim):
    q, k, v = draw(heads_k=4)
    split = SPLIT | {"dropout_p": 0.5, "window_size_left": -1, "alibi_slopes": None}
    out, lse, s_dmask, rng_state = shim._flash_attn_forward(q, k, v, **OPTIONS, **split, return_softmax=True)
    assert s_dmask.shape == (2, 4, 128, 128)
    # In units of each row's largest weight, as flash-attn with one block for all keys would have it.
    torch.testing.assert_close(s_dmask[:, :, :9].abs().amax(-1), torch.ones(2, 4, 9))
    scores = 2.0 * torch.tanh(0.3 * torch.einsum("bqhd,bkhd->bhqk", q, k) / 2.0)
    scores = scores.masked_fill(torch.ones(9, 11, dtype=torch.bool).triu(3), -torch.inf)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    torch.testing.assert_close(s_dmask[:, :, :9, :11].abs(), weights)
    kept = torch.where(torch.signbit(s_dmask[:, :, :9, :11]), 0.0, scores.softmax(-1) * 2.0)
    torch.testing.assert_close(out, torch.einsum("bhqk,bkhd->bqhd", kept, v))
    dout, dv = torch.randn_like(out), torch.empty_like(v)
    gradients = None, None, dv
    shim._flash_attn_backward(
        dout, q, k, v, out, lse, *gradients, **OPTIONS, **split, deterministic=False, rng_state=rng_state
    )
    torch.testing.assert_close(dv, torch.einsum("bhqk,bqhd->bkhd", kept, dout))
    _, _, public = shim.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
    torch.testing.assert_close(public[:, :, :9].abs().amax(-1), torch.ones(2, 4, 9))
    assert shim._get_block_size_n(q.device, 8, True, True) >= s_dmask.shape[-1]


def test_keys_in_pages_raise_in_the_backward_pass_alone(shim):
    q = torch.randn(5, 4, 8, requires_grad=True)
    pages = torch.randn(2, 3, 16, 2, 8)
    places = torch.tensor([0, 5], dtype=torch.int32), torch.tensor([0, 20], dtype=torch.int32), 5, 20
    table = torch.tensor([[2, 0]], dtype=torch.int32)
    names = ["q", "k", "v", *BOUNDS]
    by_name = dict(zip(names, (q, *pages, *places), strict=True))
    out = shim.flash_attn_varlen_func(**by_name, causal=True, block_table=table)
    with torch.no_grad():
        expected = fap_api.flash_attn_varlen_func(q, *pages, *places, causal=True, block_table=table)
    assert torch.equal(out, expected)
    with pytest.raises(RuntimeError, match="keys and values in pages have none"):
        out.sum().backward()


@pytest.mark.parametrize("new", [0, 1])
def test_lengths_beyond_the_pages_raise_wherever_they_are(shim, new, monkeypatch):
    # On a device fap_api itself does not read them.
    monkeypatch.setattr(_kvcache_ops, "check_on_host", lambda *_: None)
    q, k = torch.randn(2, 1, 4, 8), torch.randn(2, 1, 2, 8)
    lengths = torch.tensor([32 - new, 5], dtype=torch.int32)
    call = {
        "cache_seqlens": lengths,
        "block_table": torch.tensor([[0, 1], [2, 3]], dtype=torch.int32),
    } | ({"k": k, "v": k} if new else {})
    pages = torch.randn(2, 4, 16, 2, 8)
    expected = fap_api.flash_attn_with_kvcache(q, *pages.clone(), **call)
    assert torch.equal(shim.flash_attn_with_kvcache(q, *pages, **call), expected)
    before = pages.clone()
    call["cache_seqlens"] = call["cache_seqlens"] + 1
    with pytest.raises(RuntimeError, match="do not fit the pages of block_table, which hold 32"):
        shim.flash_attn_with_kvcache(q, *pages, **call)
    assert torch.equal(pages, before)
    with pytest.raises(RuntimeError, match="block_table"):
        shim.flash_attn_with_kvcache(q, *pages, **call | {"block_table": call["block_table"][0]})
    with pytest.raises(TypeError, match="k must be a torch.Tensor, got list"):
        shim.flash_attn_with_kvcache(q, *pages, **call | {"k": [1.0], "v": k, "cache_seqlens": lengths})


def test_what_the_halves_refuse(shim):
    q, k, v = draw()
    nothing = OPTIONS | SPLIT | {"alibi_slopes": None}
    with pytest.raises(RuntimeError, match="return_softmax must be False without dropout"):
        shim._flash_attn_forward(q, k, v, **nothing, return_softmax=True)
    out, lse, _, _ = shim._flash_attn_forward(q, k, v, **nothing, return_softmax=False)
    dropped = nothing | {"dropout_p": 0.5}
    with pytest.raises(RuntimeError, match="rng_state must be what the forward pass returned"):
        shim._flash_attn_backward(out, q, k, v, out, lse, None, None, None, **dropped, deterministic=False)
    bounds = torch.tensor([0, 9], dtype=torch.int32)
    packed = *(x[0, :9] for x in (q, k, v)), bounds, bounds, 9, 9, 0.0, 0.3, False
    with pytest.raises(RuntimeError, match="num_splits > 1 is not supported for packed sequences, got 2"):
        shim._flash_attn_varlen_forward(*packed, num_splits=2)
    with pytest.raises(RuntimeError, match="leftpad_k must be None"):
        shim._flash_attn_varlen_forward(
            *(x[0, :9] for x in (q, k, v)), bounds, bounds, 9, 9, 0.0, 0.3, False, leftpad_k=bounds
        )


def test_the_original_package_is_out_of_reach_meanwhile(shim):
    q, k, v = draw()
    assert "cuda" not in fap_api.available_backends()
    with fap_api.use_backend("cuda"), pytest.raises(ImportError, match=r"flash_attn_shim at present"):
        fap_api.flash_attn_func(q, k, v)


@pytest.mark.usefixtures("nothing_installed")
def test_uninstalling_leaves_nothing():
    finders = list(sys.meta_path)
    flash_attn_shim.install()
    flash_attn_shim.install()
    assert flash_attn_shim.installed()
    flash_attn_shim.uninstall()
    flash_attn_shim.uninstall()
    assert sys.meta_path == finders
    assert not [name for name in sys.modules if name.startswith("flash_attn")]
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn")


def test_installing_too_late_for_transformers_warns(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", sys)
    with pytest.warns(UserWarning, match="import it afterwards"):
        flash_attn_shim.install(replace=True)
    flash_attn_shim.uninstall()


@pytest.mark.usefixtures("nothing_installed")
def test_an_installed_package_is_hidden_only_on_request(tmp_path, monkeypatch):
    package = tmp_path / "flash_attn"
    package.mkdir()
    (package / "__init__.py").write_text("from flash_attn import inner\n")
    (package / "inner.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match=r"replace must be True to hide the installed flash_attn \(.*tmp"):
        flash_attn_shim.install()
    theirs = importlib.import_module("flash_attn")
    with pytest.raises(RuntimeError, match="replace must be True"):
        flash_attn_shim.install()
    flash_attn_shim.install(replace=True)
    try:
        assert importlib.import_module("flash_attn").flash_attn_func is not None
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("flash_attn.inner")
    finally:
        flash_attn_shim.uninstall()
    assert importlib.import_module("flash_attn") is theirs
    assert importlib.import_module("flash_attn.inner") is theirs.inner
    del sys.modules["flash_attn"], sys.modules["flash_attn.inner"]


def run(program):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.usefixtures("nothing_installed")
def test_importing_installs_nothing():
    program = "import sys, fap_api.integrations.flash_attn_shim; print('flash_attn' in sys.modules)"
    assert run(program).strip() == "False"


TRANSFORMERS = """
import copy
import torch

torch.cuda.is_available = lambda: True  # transformers asks for a GPU before it takes flash-attn
import fap_api
from fap_api.backends.torch_ import TorchBackend
from fap_api.integrations import flash_attn_shim

flash_attn_shim.install(replace=True)
import transformers

calls = []
for name in ("forward", "varlen_forward"):
    method = getattr(TorchBackend, name)
    setattr(TorchBackend, name, lambda self, *a, _m=method, _n=name: calls.append(_n) or _m(self, *a))

assert transformers.utils.is_flash_attn_2_available()
config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, dtype=torch.bfloat16,
)
torch.manual_seed(0)
eager = transformers.LlamaForCausalLM(config).to(torch.bfloat16).eval()
flash = copy.deepcopy(eager)
eager.set_attn_implementation("eager")
flash.set_attn_implementation("flash_attention_2")
ids = torch.randint(3, 64, (2, 10))
mask = torch.ones_like(ids)
mask[1, :4] = 0
packed = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6]])
with fap_api.use_backend("torch"):
    for inputs in (
        {"input_ids": ids},
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids[:1], "position_ids": packed, "use_cache": False},
    ):
        expected, got = (model(**inputs).logits for model in (eager, flash))
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        torch.testing.assert_close(got[real], expected[real], rtol=2e-2, atol=2e-2)
print(*calls)
"""


def test_transformers_runs_flash_attention_2_unmodified():
    pytest.importorskip("transformers", minversion="5.0")
    assert run(TRANSFORMERS).split() == ["forward"] * 2 + ["varlen_forward"] * 4
