"""flash_attn_varlen_func on the back ends that call other packages, against a stand-in that records.

The stand-in computes with the torch back end, and deviates where flash-attn deviates from its documentation.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
import torch

import fap_api
from fap_api.backends import registry
from fap_api.backends.base import Score
from fap_api.backends.cuda import CudaBackend
from fap_api.backends.torch_ import TorchBackend
from fap_kernels.packing import Packing
from fap_testing.cases_varlen import VarlenCase, select_varlen
from fap_testing.expectation import expect_varlen
from fap_testing.inputs_varlen import make_varlen_inputs

TORCH = TorchBackend()


@pytest.fixture
def flash_attn(monkeypatch):
    """Stand in for flash_attn.flash_attn_interface on CPU tensors; returns the list of calls."""
    calls = []

    def score_of(p, scale, causal, left, right, softcap, slopes, longest_k):
        """Take the window as the package does, which is not always as it documents it."""
        assert causal == ((left, right) == (-1, 0))
        left, right = (-1 if bound >= longest_k else bound for bound in (left, right))
        if left >= 0 > right:
            right = longest_k
        return Score(scale, left, right, softcap, slopes, p)

    def offset(q, packing, score):
        """What the package's LSE is too much: under causal ALiBi it adds slope * j alone."""
        extra = torch.zeros(q.shape[1], len(q))
        if score.alibi_slopes is None or (score.window_left, score.window_right) != (-1, 0):
            return extra
        bounds_q = packing.cu_seqlens_q.tolist()
        lengths_k = (packing.cu_seqlens_k.diff() if packing.seqused_k is None else packing.seqused_k).tolist()
        slopes = score.alibi_slopes.expand(packing.batch, q.shape[1])
        for b in range(packing.batch):
            start, end = bounds_q[b : b + 2]
            diagonal = torch.arange(end - start) + lengths_k[b] - (end - start)
            extra[:, start:end] = slopes[b][:, None] * diagonal
        return extra

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None,
    ):  # fmt: skip
        calls.append(("forward", locals()))
        assert not (max_seqlen_q == 1 and q.shape[1] != k.shape[-2]), "an empty sequence crashes this"
        page_size = 0 if block_table is None else k.shape[1]
        longest = (max_seqlen_q, max_seqlen_k)
        packing = Packing(cu_seqlens_q, cu_seqlens_k, *longest, None, seqused_k, block_table, page_size)
        window = window_size_left, window_size_right
        score = score_of(dropout_p, softmax_scale, causal, *window, softcap, alibi_slopes, max_seqlen_k)
        out, lse, rng_state = TORCH.varlen_forward(q, k, v, packing, score)
        rng_state = torch.empty(2, dtype=torch.int64) if rng_state is None else rng_state
        return out, lse + offset(q, packing, score), torch.empty(0), rng_state

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        deterministic, rng_state=None,
    ):  # fmt: skip
        calls.append(("backward", locals()))
        assert max_seqlen_k > 0, "a grid without programs"
        packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        window = window_size_left, window_size_right
        score = score_of(dropout_p, softmax_scale, causal, *window, softcap, alibi_slopes, max_seqlen_k)
        lse = softmax_lse - offset(q, packing, score)
        results = TORCH.varlen_backward(
            dout, q, k, v, out, lse, None, rng_state, packing, score, deterministic
        )
        for target, result in zip((dq, dk, dv), results, strict=True):
            target.copy_(result)
        return torch.empty(0)

    interface = types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    real = CudaBackend.unsupported_reasons

    def unsupported_reasons(self, problem):
        return [reason for reason in real(self, problem) if "got tensors on cpu" not in reason]

    monkeypatch.setattr(CudaBackend, "unsupported_reasons", unsupported_reasons)
    return calls


def reasons(backend, inputs, **options):
    tensors, call = (inputs.q, inputs.k, inputs.v), inputs.lengths | inputs.options | options
    return "; ".join(fap_api.explain_varlen(*tensors, **call).reasons[backend])


def check(inputs):
    """Hold a call on the back end ``cuda`` to the oracle: forward with the LSE, and the gradients of out."""
    call = inputs.lengths | inputs.options
    expected = expect_varlen(inputs, use_dlse=False)
    out, lse, _ = fap_api.flash_attn_varlen_func(inputs.q, inputs.k, inputs.v, **call, return_attn_probs=True)
    expected.check(out=out, softmax_lse=lse)
    if inputs.block_table is None and inputs.seqused_k is None:
        leaves = inputs.leaves()
        out = fap_api.flash_attn_varlen_func(*leaves, **call)
        dq, dk, dv = torch.autograd.grad(out, leaves, inputs.dout)
        expected.check(out=out.detach(), dq=dq, dk=dk, dv=dv)


CASES = [
    case
    for case in select_varlen("quick")
    if case.name.startswith(
        ("window", "gqa", "alibi", "layout", "seqused_k", "combined_window", "head_dim_5", "lengths_no_keys")
    )
]
LENGTHS: dict[str, Any] = {"seqlens_q": (17, 0, 3), "seqlens_k": (300, 20, 1)}
PAGED = VarlenCase(name="paged", page_size=256, causal=True, alibi="batch_head", **LENGTHS)


class TestCuda:
    def test_the_exact_calls(self, flash_attn):
        case = VarlenCase(name="calls", causal=True, softcap=2.0, softmax_scale=0.2, head_dim=36, **LENGTHS)
        inputs = make_varlen_inputs(case, dtype=torch.float16)
        with fap_api.use_backend("cuda"):
            out = fap_api.flash_attn_varlen_func(
                *inputs.leaves(), **inputs.lengths, **inputs.options, deterministic=True
            )
        out.sum().backward()
        (forward, given), (backward, given_back) = flash_attn
        assert (forward, backward) == ("forward", "backward")
        expected = {
            "max_seqlen_q": 17,
            "max_seqlen_k": 300,
            "dropout_p": 0.0,
            "softmax_scale": 0.2,
            "causal": True,
            "window_size_left": -1,
            "window_size_right": 0,
            "softcap": 2.0,
            "alibi_slopes": None,
        }
        assert expected.items() <= given.items()
        assert expected.items() <= given_back.items()
        assert (given["return_softmax"], given["block_table"], given["seqused_k"]) == (False, None, None)
        assert given_back["deterministic"] is True
        assert given_back["rng_state"] is None
        for call in (given, given_back):
            for name in ("q", "k", "v"):
                assert call[name].shape[-1] == 40
                assert call[name].stride(-1) == 1
            for side in "qk":
                assert call[f"cu_seqlens_{side}"].is_contiguous()
                assert torch.equal(call[f"cu_seqlens_{side}"], inputs.lengths[f"cu_seqlens_{side}"])

    @pytest.mark.parametrize("case", [*CASES, PAGED], ids=str)
    def test_results_and_gradients(self, flash_attn, case):
        inputs = make_varlen_inputs(case, dtype=torch.float16)
        with fap_api.use_backend("cuda"):
            if reasons("cuda", inputs):
                pytest.skip(reasons("cuda", inputs))
            check(inputs)
        assert flash_attn

    def test_dropout_keeps_its_state_for_the_backward(self, flash_attn):
        inputs = make_varlen_inputs(VarlenCase(name="dropout", **LENGTHS), dtype=torch.float16)
        with fap_api.use_backend("cuda"):
            fap_api.flash_attn_varlen_func(*inputs.leaves(), **inputs.lengths, dropout_p=0.5).sum().backward()
        state = flash_attn[1][1]["rng_state"]
        assert (state.dtype, state.shape) == (torch.int64, (2,))

    @pytest.mark.parametrize(
        ("case", "options", "says"),
        [
            ({"seqused_q": (3, 0, 1)}, {}, "no seqused_q"),
            ({"page_size": 16}, {}, "page size divisible by 256, got 16"),
            ({"page_size": 256, "head_dim": 20}, {}, "head dimension divisible by 8, got 20"),
            ({"page_size": 256}, {"dropout_p": 0.5}, "leave dropout out"),
            ({}, {"dropout_p": 0.5, "return_attn_probs": True}, "S_dmask"),
            ({}, {"max_seqlen_q": 400, "window_size": (3, -1)}, "takes window_size"),
            ({}, {"max_seqlen_q": 0}, "no empty calls"),
        ],
    )
    def test_what_it_lacks_is_said_beforehand(self, flash_attn, case, options, says):
        inputs = make_varlen_inputs(VarlenCase(name="lacks", **LENGTHS, **case), dtype=torch.float16)
        assert says in reasons("cuda", inputs, **options)
        call = inputs.lengths | inputs.options | options
        with fap_api.use_backend("cuda"), pytest.raises(RuntimeError, match=f"{says}.*explain_varlen"):
            fap_api.flash_attn_varlen_func(inputs.q, inputs.k, inputs.v, **call)
        assert not flash_attn

    def test_lengths_in_use_have_no_backward(self, flash_attn):
        case = VarlenCase(name="seqused", seqused_k=(200, 20, 0), **LENGTHS)
        inputs = make_varlen_inputs(case, dtype=torch.float16)
        call = inputs.lengths | inputs.options
        with fap_api.use_backend("cuda"), pytest.raises(RuntimeError, match="backward has no seqused_k"):
            fap_api.flash_attn_varlen_func(*inputs.leaves(), **call)


def test_flag_gems_is_not_asked():
    inputs = make_varlen_inputs(VarlenCase(name="flag_gems", **LENGTHS), dtype=torch.float16)
    assert "packed sequences (cu_seqlens)" in reasons("flag_gems", inputs)
    with pytest.raises(NotImplementedError, match="without cu_seqlens"):
        registry.BACKENDS["flag_gems"].varlen_forward()


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES[::4], PAGED], ids=str)
def test_the_real_flash_attn(case):
    pytest.importorskip("flash_attn")
    inputs = make_varlen_inputs(case, dtype=torch.bfloat16, device="cuda")
    with fap_api.use_backend("cuda"):
        if reasons("cuda", inputs):
            pytest.skip(reasons("cuda", inputs))
        check(inputs)
