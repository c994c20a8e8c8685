"""flash_attn_with_kvcache on the back end ``cuda``, against a stand-in that records what it receives."""

from __future__ import annotations

import sys
import types

import pytest
import torch

import fap_api
from fap_api.backends.base import NewKeys, Places, Score
from fap_api.backends.cuda import CudaBackend
from fap_api.backends.torch_ import TorchBackend


@pytest.fixture
def flash_attn(monkeypatch):
    """Stand in for flash_attn.flash_attn_interface on CPU tensors; returns the list of calls."""
    calls = []

    def flash_attn_with_kvcache(q, k_cache, v_cache, **given):
        calls.append({"q": q, "k_cache": k_cache, "v_cache": v_cache, **given})
        left, right = given["window_size"]
        assert given["causal"] == ((left, right) == (-1, 0))
        assert given["return_softmax_lse"] is True
        angles = None if given["rotary_cos"] is None else (given["rotary_cos"], given["rotary_sin"])
        places = Places(
            *(given[f"cache_{name}"] for name in ("seqlens", "batch_idx", "leftpad")), given["block_table"]
        )
        new = None
        if given["k"] is not None:
            new = NewKeys(given["k"], given["v"], places.seqlens, angles, given["rotary_interleaved"])
        score = Score(given["softmax_scale"], left, right, given["softcap"], given["alibi_slopes"], 0.0)
        return TorchBackend().cached_forward(q, k_cache, v_cache, new, places, score, given["num_splits"])

    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    real = CudaBackend.unsupported_reasons

    def unsupported_reasons(self, problem):
        return [reason for reason in real(self, problem) if "got tensors on cpu" not in reason]

    monkeypatch.setattr(CudaBackend, "unsupported_reasons", unsupported_reasons)
    return calls


def draw(head_dim=16, dtype=torch.float16, page_size=None):
    """Arguments of a call by name: two sequences, three queries, three new keys, a capacity of 512."""
    pages = (2, 512) if page_size is None else (2 * (512 // page_size), page_size)
    call = {
        "q": torch.randn(2, 3, 4, head_dim, dtype=dtype),
        **{name: torch.randn(*pages, 2, head_dim, dtype=dtype) for name in ("k_cache", "v_cache")},
        **{name: torch.randn(2, 3, 2, head_dim, dtype=dtype) for name in ("k", "v")},
        "cache_seqlens": torch.tensor([5, 300], dtype=torch.int32),
    }
    if page_size is not None:
        table = torch.arange(pages[0]).flip(0).view(2, -1)
        call["block_table"] = table.to(torch.int32)
    return call


ANGLES = torch.rand(512, 8) * 6
OPTIONS = {
    "plain": {},
    "causal, rotary": {
        "causal": True,
        "rotary_cos": ANGLES.cos().half(),
        "rotary_sin": ANGLES.sin().half(),
        "rotary_interleaved": False,
    },
    "window, softcap": {"window_size": (7, 3), "softcap": 2.0, "softmax_scale": 0.3, "num_splits": 3},
    "leftpad, batch index": {
        "cache_leftpad": torch.tensor([2, 0], dtype=torch.int32),
        "cache_batch_idx": torch.tensor([1, 0], dtype=torch.int32),
    },
    "alibi": {"alibi_slopes": torch.rand(4)},
}


@pytest.mark.parametrize("page_size", [None, 256])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_exact_call(flash_attn, options, page_size):
    if page_size is not None and "cache_leftpad" in options:
        pytest.skip("pages exclude both")
    call = draw(page_size=page_size)
    right = {name: x.clone() for name, x in call.items()}
    with fap_api.use_backend("cuda"):
        results = fap_api.flash_attn_with_kvcache(**call, **options, return_softmax_lse=True)
    expected = fap_api.flash_attn_with_kvcache(**right, **options, return_softmax_lse=True)
    results += call["k_cache"], call["v_cache"]
    expected += right["k_cache"], right["v_cache"]
    for mine, theirs in zip(results, expected, strict=True):
        assert torch.equal(mine, theirs)
    (given,) = flash_attn
    for name in call:
        assert given[name] is call[name] or given[name].data_ptr() == call[name].data_ptr()
    for name, value in options.items():
        if name != "softmax_scale" and not isinstance(value, torch.Tensor):
            assert given[name] == value


def test_without_new_keys(flash_attn):
    call = {name: x for name, x in draw().items() if name not in ("k", "v", "cache_seqlens")}
    with fap_api.use_backend("cuda"):
        out = fap_api.flash_attn_with_kvcache(**call)
    assert torch.equal(out, fap_api.flash_attn_with_kvcache(**call))
    assert flash_attn[0]["k"] is flash_attn[0]["rotary_cos"] is flash_attn[0]["cache_seqlens"] is None


@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({"dtype": torch.float32}, {}, "float16 and bfloat16 only, got torch.float32"),
        ({"head_dim": 20}, {}, "head dimension divisible by 8, got 20"),
        ({"page_size": 16}, {}, "page size divisible by 256, got 16"),
        (
            {},
            {"alibi_slopes": torch.rand(4), "causal": True, "return_softmax_lse": True},
            "softmax_lse under causal ALiBi",
        ),
    ],
)
def test_what_it_lacks_is_said_beforehand(flash_attn, change, options, says):
    with fap_api.use_backend("cuda"), pytest.raises(RuntimeError, match=says):
        fap_api.flash_attn_with_kvcache(**draw(**change), **options)
    assert not flash_attn


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [None, 256])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_real_flash_attn(options, page_size):
    pytest.importorskip("flash_attn")
    if page_size is not None and "cache_leftpad" in options:
        pytest.skip("pages exclude both")
    options = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in options.items()}
    call = {name: x.cuda() for name, x in draw(page_size=page_size).items()}
    results = []
    for name in ("cuda", "torch"):
        mine = {n: x.clone() for n, x in call.items()}
        with fap_api.use_backend(name):
            results.append(
                (fap_api.flash_attn_with_kvcache(**mine, **options), mine["k_cache"], mine["v_cache"])
            )
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
