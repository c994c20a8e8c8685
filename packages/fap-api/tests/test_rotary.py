"""Rotary embeddings behind flash-attn's names, held to the oracle, to finite differences and to compilers."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.library import opcheck

import fap_api
from fap_api import _rotary_ops, rotary
from fap_testing.reference_rotary import rotary_baseline, rotary_reference
from fap_testing.tolerances import assert_close_to_oracle

each_convention = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
on_gpu = pytest.mark.gpu
BACKENDS = [
    *[("torch", "cpu", dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)],
    *[
        pytest.param("triton", "cuda", dtype, marks=on_gpu)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ],
    pytest.param("torch", "cuda", torch.bfloat16, marks=on_gpu),
]
each_backend = pytest.mark.parametrize(("backend", "device", "dtype"), BACKENDS, ids=str)
POSITIONS, HEAD_DIM = 50, 16


def tables(rotary_dim=8, device="cpu", dtype=torch.float32):
    angles = torch.rand(POSITIONS, rotary_dim // 2, device=device) * 6
    return angles.cos().to(dtype), angles.sin().to(dtype)


def draw(*shape, device="cpu", dtype=torch.float32):
    return torch.randn(*shape, HEAD_DIM, device=device, dtype=dtype)


CALLS = {
    "from_zero": {},
    "one_offset": {"seqlen_offsets": 7},
    "offsets": {"seqlen_offsets": torch.tensor([0, 38, 5], dtype=torch.int32)},
    "wide_offsets": {"seqlen_offsets": torch.tensor([0, 38, 5])},
    "packed": {"cu_seqlens": torch.tensor([0, 5, 5, 17], dtype=torch.int32), "max_seqlen": 12},
    "packed_offsets": {
        "cu_seqlens": torch.tensor([0, 5, 5, 17], dtype=torch.int32),
        "max_seqlen": 13,
        "seqlen_offsets": torch.tensor([3, 0, 38], dtype=torch.int32),
    },
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def of_call(call, device="cpu", dtype=torch.float32):
    """Rows for a call: three sequences of 12, or 17 packed rows and 3 of no sequence."""
    shape = (20, 3) if "cu_seqlens" in call else (3, 12, 3)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in call.items()}
    return draw(*shape, device=device, dtype=dtype), options


@each_call
@each_convention
@each_backend
@pytest.mark.parametrize("rotary_dim", [2, 12, 16])
def test_against_the_oracle(backend, device, dtype, interleaved, call, rotary_dim):
    x, options = of_call(call, device, dtype)
    options["interleaved"] = interleaved
    given = x.clone()
    cos, sin = tables(rotary_dim, device, dtype)
    with fap_api.use_backend(backend):
        turned = fap_api.apply_rotary_emb(x, cos, sin, **options)
        in_place = given.clone()
        assert fap_api.apply_rotary_emb(in_place, cos, sin, inplace=True, **options) is in_place
    assert torch.equal(x, given)
    assert torch.equal(in_place, turned)
    expected, baseline = (f(x, cos, sin, **options) for f in (rotary_reference, rotary_baseline))
    assert_close_to_oracle(turned, expected, baseline, name="x", case=str(options))
    assert torch.equal(turned[..., rotary_dim:], x[..., rotary_dim:])


@each_call
@each_convention
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in_place"])
def test_gradients(interleaved, call, inplace):
    x, options = of_call(call, dtype=torch.float64)
    x.requires_grad_()
    cos, sin = tables(dtype=torch.float64)

    def turned(x):
        # A leaf cannot be written to.
        return fap_api.apply_rotary_emb(x * 1, cos, sin, interleaved, inplace, **options)

    assert torch.autograd.gradcheck(turned, x, fast_mode=True)
    assert torch.autograd.gradgradcheck(turned, x, fast_mode=True)


def test_in_place_on_a_view_reaches_what_it_is_a_view_of():
    leaf, weights = (
        draw(2, 6, 3, 2, dtype=torch.float64).requires_grad_(),
        draw(2, 6, 3, 2, dtype=torch.float64),
    )
    cos, sin = tables(dtype=torch.float64)
    qkv = leaf * 1
    rotary.apply_rotary_emb_qkv_(qkv, cos, sin)
    (got,) = torch.autograd.grad((qkv * weights).sum(), leaf)
    q, k, v = (leaf[:, :, i] for i in range(3))
    right = torch.stack([fap_api.apply_rotary_emb(q, cos, sin), fap_api.apply_rotary_emb(k, cos, sin), v], 2)
    (expected,) = torch.autograd.grad((right * weights).sum(), leaf)
    torch.testing.assert_close(qkv, right)
    torch.testing.assert_close(got, expected)


def test_what_autograd_saved_is_not_overwritten_unnoticed():
    x = draw(1, 4, 2).requires_grad_()
    y = x.exp()
    fap_api.apply_rotary_emb(y, *tables(), inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_convention
def test_the_torch_function_takes_angles_of_each_row(interleaved):
    x, (cos, sin) = draw(2, 12, 3), tables()
    plain = rotary.apply_rotary_emb_torch(x, cos[:12], sin[:12], interleaved)
    assert torch.equal(plain, fap_api.apply_rotary_emb(x, cos, sin, interleaved))
    rows = torch.stack((torch.arange(12), torch.arange(12) + 5))
    of_each = rotary.apply_rotary_emb_torch(x, cos[rows], sin[rows], interleaved)
    offsets = torch.tensor([0, 5])
    assert torch.equal(of_each, fap_api.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets))


@each_convention
@pytest.mark.parametrize("of_keys", [False, True], ids=["same", "keys_of_their_own"])
@pytest.mark.parametrize("layout", ["packed", "strided", "grouped"])
def test_packed_queries_and_keys(interleaved, of_keys, layout):
    cos, sin = tables()
    cos_k, sin_k = tables() if of_keys else (None, None)
    heads = {"num_heads_q": 4} if layout == "grouped" else {}
    qkv = draw(2, 12, 8) if heads else draw(2, 12, 3, 4)
    if layout == "strided":
        qkv = qkv.transpose(2, 3).contiguous().transpose(2, 3)
    q, k, v = qkv.split([4, 2, 2], dim=2) if heads else qkv.unbind(2)
    options = {"interleaved": interleaved, "seqlen_offsets": 3}
    right = (
        fap_api.apply_rotary_emb(q, cos, sin, **options),
        fap_api.apply_rotary_emb(k, *((cos_k, sin_k) if of_keys else (cos, sin)), **options),
        v.clone(),
    )
    assert rotary.apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, **options, **heads) is qkv
    for got, expected in zip((q, k, v), right, strict=True):
        assert torch.equal(got, expected)


def test_bounds_and_offsets_may_have_strides():
    x, (cos, sin), call = draw(20, 3), tables(), CALLS["packed_offsets"]
    strided = {
        name: torch.stack((given, -given), dim=1)[:, 0] if isinstance(given, torch.Tensor) else given
        for name, given in call.items()
    }
    expected = fap_api.apply_rotary_emb(x, cos, sin, **call)
    assert torch.equal(fap_api.apply_rotary_emb(x, cos, sin, **strided), expected)


def test_packed_keys():
    kv, (cos, sin) = draw(2, 12, 2, 3), tables()
    k, v = (x.clone() for x in kv.unbind(2))
    assert rotary.apply_rotary_emb_kv_(kv, cos, sin, seqlen_offsets=4) is kv
    assert torch.equal(kv[:, :, 0], fap_api.apply_rotary_emb(k, cos, sin, seqlen_offsets=4))
    assert torch.equal(kv[:, :, 1], v)


class TestModule:
    def written_out(self, x, dim, base, scale_base=None, length=0, sign=1):
        """Multiplication by exp(i * angle), the definition, times xPos's scale."""
        position = torch.arange(x.shape[1], dtype=torch.float64)
        fraction = torch.arange(0, dim, 2, dtype=torch.float64) / dim
        factor = torch.polar(torch.ones(()).double(), position[:, None] / base**fraction)
        if scale_base is not None:
            factor = factor * ((fraction + 0.4) / 1.4) ** (
                sign * (position[:, None] - length // 2) / scale_base
            )
        half = dim // 2
        turned = torch.complex(x[..., :half].double(), x[..., half:dim].double()) * factor[:, None]
        return torch.cat((turned.real, turned.imag, x[..., dim:].double()), dim=-1)

    @pytest.mark.parametrize("scale_base", [None, 8.0])
    def test_it_rotates_in_place(self, scale_base):
        module = rotary.RotaryEmbedding(8, 100.0, scale_base=scale_base)
        qkv = draw(2, 9, 3, 2)
        q, k, v = (x.clone() for x in qkv.unbind(2))
        assert module(qkv) is qkv
        expected = [self.written_out(x, 8, 100.0, scale_base, 9, s) for x, s in ((q, 1), (k, -1))]
        for got, right in zip(qkv.unbind(2), (*expected, v), strict=True):
            torch.testing.assert_close(got, right.float())

        grouped, kv = torch.cat((q, k, v), dim=2), torch.stack((k, v), dim=2)
        module(grouped, num_heads_q=2)
        assert torch.equal(grouped, qkv.flatten(2, 3))
        q_alone, kv_alone = module(q, kv)
        assert q_alone is q
        assert kv_alone is kv
        assert torch.equal(torch.cat((q, kv.flatten(2, 3)), dim=2), grouped)

    @pytest.mark.parametrize("scale_base", [None, 8.0])
    def test_offsets_continue_a_sequence(self, scale_base):
        module = rotary.RotaryEmbedding(8, scale_base=scale_base)
        whole = draw(2, 9, 3, 2)
        tail, by_tensor = whole[:, 5:].clone(), whole[:, 5:].clone()
        module(whole, max_seqlen=9)
        module(tail, seqlen_offset=5, max_seqlen=9)
        module(by_tensor, seqlen_offset=torch.tensor([5, 5]), max_seqlen=9)
        torch.testing.assert_close(tail, whole[:, 5:])
        assert torch.equal(by_tensor, tail)

    def test_under_xpos_scores_fall_with_distance_alone(self):
        module = rotary.RotaryEmbedding(8, scale_base=8.0)
        q, kv = (
            torch.ones(1, 40, 1, 8, dtype=torch.float64),
            torch.ones(1, 40, 2, 1, 8, dtype=torch.float64),
        )
        q, kv = module(q, kv)
        scores = q[0, :, 0] @ kv[0, :, 0, 0].T
        for distance in (0, 1, 9):
            diagonal = scores.diagonal(-distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)

    def test_tables_are_made_once_and_grow(self):
        module = rotary.RotaryEmbedding(8)
        first = module.tables(20)
        assert module.tables(10).cos is first.cos
        grown = module.tables(30)
        assert torch.equal(grown.cos[:20], first.cos)
        assert rotary.RotaryEmbedding(8, scale_base=8.0).tables(10).cos.shape == (10, 4)
        assert not module.state_dict()
        assert torch.equal(copy.deepcopy(module).tables(30).sin, grown.sin)

    def test_tables_of_inference_serve_training(self):
        module = rotary.RotaryEmbedding(8)
        with torch.inference_mode():
            module(draw(1, 4, 3, 2))
        leaf = draw(1, 4, 3, 2).requires_grad_()
        module(leaf * 1).sum().backward()
        assert leaf.grad is not None

    def test_fake_tables_are_not_kept(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        module = rotary.RotaryEmbedding(8)
        with FakeTensorMode():
            module(torch.randn(1, 4, 3, 2, HEAD_DIM))
        assert type(module.tables(4).cos) is torch.Tensor

    @pytest.mark.gpu
    def test_tables_of_a_graph_are_not_kept(self):
        """They have values only once the graph is replayed."""
        module = rotary.RotaryEmbedding(8)
        qkv = draw(1, 4, 3, 2, device="cuda")
        module(qkv.clone())
        torch.cuda.synchronize()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            module(qkv.clone(), seqlen_offset=30)
        right = rotary.RotaryEmbedding(8)(qkv.clone(), seqlen_offset=30)
        torch.testing.assert_close(module(qkv.clone(), seqlen_offset=30), right)

    def test_half_precision_does_not_reach_the_angles(self):
        module = rotary.RotaryEmbedding(8).to(torch.bfloat16)
        assert module.tables(300).cos.dtype == torch.float32

    @pytest.mark.parametrize(("settings"), [{"dim": 3}, {"dim": 0}, {"base": 0.0}, {"scale_base": -1.0}])
    def test_wrong_settings_are_refused(self, settings):
        with pytest.raises(ValueError, match=f"rotary {next(iter(settings))} must be"):
            rotary.RotaryEmbedding(**{"dim": 8, **settings})

    def test_a_tensor_of_offsets_needs_max_seqlen(self):
        with pytest.raises(RuntimeError, match="max_seqlen must be given where seqlen_offset is a tensor"):
            rotary.RotaryEmbedding(8)(draw(2, 4, 3, 2), seqlen_offset=torch.tensor([1, 2]))


# PyTorch's forward mode compiles some of itself with its own deprecated compiler.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_forward_mode_tangents_are_refused_rather_than_lost():
    x, (cos, sin) = draw(2, 12, 3), tables()
    with pytest.raises(RuntimeError, match="x must not carry a forward-mode tangent"):
        torch.func.jvp(lambda x: fap_api.apply_rotary_emb(x, cos, sin), (x,), (x,))


class TestChoice:
    def test_the_choice_of_a_package_for_attention_leaves_it_open(self, monkeypatch):
        x, (cos, sin) = draw(2, 12, 3), tables()
        right = fap_api.apply_rotary_emb(x, cos, sin)
        for name in ("torch", "cuda", "flag_gems"):
            with fap_api.use_backend(name):
                assert torch.equal(fap_api.apply_rotary_emb(x, cos, sin), right)

    def test_triton_runs_there_or_says_why_not(self):
        with (
            fap_api.use_backend("triton"),
            pytest.raises(RuntimeError, match="'triton' was chosen by .*use_backend.* got cpu"),
        ):
            fap_api.apply_rotary_emb(draw(2, 12, 3), *tables())


@each_call
@pytest.mark.parametrize(
    ("backend", "device"), [("torch", "cpu"), pytest.param("triton", "cuda", marks=on_gpu)], ids=str
)
def test_opcheck(call, backend, device):
    x, options = of_call(call, device)
    offsets = options.get("seqlen_offsets", 0)
    start = (0, offsets.int()) if isinstance(offsets, torch.Tensor) else (offsets, None)
    packed = options.get("cu_seqlens"), options.get("max_seqlen")
    arguments = (*tables(device=device), True, *start, *packed, False, backend)
    opcheck(_rotary_ops.rotary, (x.clone().requires_grad_(), *arguments))
    opcheck(_rotary_ops.rotary_, (x, *arguments))


@pytest.fixture
def compile_counter():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


@pytest.mark.smoke
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("inplace", [False, True], ids=["new", "in_place"])
def test_compiles_in_one_graph_for_all_offsets(compile_counter, inplace):
    cos, sin = tables()

    def loss(x, offsets):
        y = x * 1
        return (fap_api.apply_rotary_emb(y, cos, sin, inplace=inplace, seqlen_offsets=offsets) * y).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = draw(2, 12, 3).requires_grad_()
    for n in range(4):
        offsets = torch.tensor([n, 9 * n], dtype=torch.int32)
        got, expected = (torch.autograd.grad(f(x, offsets), x)[0] for f in (compiled, loss))
        torch.testing.assert_close(got, expected)
    assert compile_counter["unique_graphs"] == 1


@pytest.mark.filterwarnings("default")
def test_the_module_compiles(compile_counter):
    module = rotary.RotaryEmbedding(8)
    compiled = torch.compile(
        lambda qkv, n: module(qkv * 1, seqlen_offset=n), fullgraph=True, backend="aot_eager"
    )
    qkv = draw(2, 12, 3, 2)
    for n in (0, 3, 4, 9):
        torch.testing.assert_close(compiled(qkv, n), module(qkv.clone(), seqlen_offset=n))
    assert compile_counter["unique_graphs"] <= 3


INTERPRETED = """
import torch, fap_api
torch.manual_seed(0)
angles = torch.rand(50, 4) * 6
cos, sin = angles.cos(), angles.sin()
bounds = torch.tensor([0, 5, 5, 17], dtype=torch.int32)
for shape, options in (
    ((3, 12, 3, 16), {"seqlen_offsets": torch.tensor([0, 38, 5])}),
    ((3, 12, 3, 16), {"interleaved": True, "seqlen_offsets": 7, "inplace": True}),
    ((20, 3, 16), {"cu_seqlens": bounds, "max_seqlen": 12}),
):
    x, weights, results = torch.randn(shape), torch.randn(shape), []
    for backend in ("triton", "torch"):
        leaf = x.clone().requires_grad_()
        with fap_api.use_backend(backend):
            y = fap_api.apply_rotary_emb(leaf * 1, cos, sin, **options)
            results.append((y, torch.autograd.grad((y * weights).sum(), leaf)[0]))
    for mine, right in zip(*results):
        torch.testing.assert_close(mine, right)
"""


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernel runs there")
def test_the_kernel_in_the_interpreter(interpreted):
    interpreted(INTERPRETED)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@each_call
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_nothing_waits_for_the_device(backend, call):
    x, options = of_call(call, "cuda")
    cos, sin = tables(device="cuda")
    with fap_api.use_backend(backend):
        fap_api.apply_rotary_emb(x, cos, sin, **options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            fap_api.apply_rotary_emb(x, cos, sin, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
