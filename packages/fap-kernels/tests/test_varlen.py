"""Packed sequences: each as if it were alone, whatever lies before, behind and between them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from conformance import keep_masks

from fap_kernels import (
    attention_varlen_backward,
    attention_varlen_forward,
    attention_varlen_probabilities,
    target,
)
from fap_testing.cases_varlen import VarlenCase, select_varlen
from fap_testing.expectation import expect_varlen
from fap_testing.inputs_varlen import VarlenInputs, make_varlen_inputs

# NumPy warns where a GPU's exp2 overflows to inf as the kernels intend.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")


def check_case(case: VarlenCase, dtype: torch.dtype, device: str) -> None:
    inputs = make_varlen_inputs(case, dtype=dtype, device=device)
    packed = (inputs.q, inputs.k, inputs.v)
    out, lse, rng_state = attention_varlen_forward(*packed, **inputs.lengths, **inputs.options)
    dq, dk, dv = attention_varlen_backward(
        inputs.dout,
        *packed,
        out,
        lse,
        **inputs.lengths,
        **inputs.options,
        dlse=inputs.dlse,
        rng_state=rng_state,
    )
    keep_mask = None if rng_state is None else keep_masks(inputs, rng_state)
    expected = expect_varlen(inputs, keep_mask=keep_mask)
    expected.check(out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv)
    inputs.assert_untouched()


def check_weights(
    inputs: VarlenInputs, lse: torch.Tensor, rng_state: torch.Tensor | None, keep_mask: torch.Tensor | None
) -> None:
    """Each sequence's rows sum to 1, or to 0 without keys; dropped ones are negative, all else is +0."""
    case = inputs.case
    weights = attention_varlen_probabilities(
        inputs.q, inputs.k, lse, **inputs.lengths, **inputs.options, rng_state=rng_state
    )
    longest = (max(case.seqlens_q, default=0), max(case.seqlens_k, default=0))
    assert weights.shape == (case.batch, case.nheads, *(-(-n // 128) * 128 for n in longest))
    start = 0
    for index, (seqlen_q, used_q, used_k) in enumerate(
        zip(case.seqlens_q, case.used_q, case.used_k, strict=True)
    ):
        own = weights[index, :, :used_q, :used_k]
        sums = own.abs().sum(-1, dtype=torch.float32)
        empty = lse[:, start : start + used_q] == torch.inf
        torch.testing.assert_close(sums, torch.where(empty, 0.0, 1.0), atol=2e-2, rtol=0.0)
        dropped = torch.zeros_like(own, dtype=torch.bool)
        if keep_mask is not None:
            dropped = ~keep_mask[index, :, :used_q, :used_k]
        assert not (torch.signbit(own) & ~dropped).any(), "a kept weight counts as dropped"
        assert (torch.signbit(own) | ~dropped | (own == 0)).all(), "a dropped weight counts as kept"
        own.zero_()
        start += seqlen_q
    assert weights.count_nonzero() == 0, "weights beyond the lengths must be 0"
    assert not torch.signbit(weights).any(), "weights beyond the lengths must not count as dropped"


def unpaged(*tags: str) -> list[VarlenCase]:
    return [case for case in select_varlen(*tags) if case.page_size is None]


@pytest.mark.interpreter
@pytest.mark.parametrize("case", unpaged("quick"), ids=str)
def test_float32(case: VarlenCase) -> None:
    check_case(case, torch.float32, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("case", unpaged("quick")[::10], ids=str)
def test_descriptors(case: VarlenCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles fetched by descriptor, as on Hopper, do not read the neighbours."""
    monkeypatch.setattr(target, "INTERPRETER", dataclasses.replace(target.INTERPRETER, descriptors=True))
    # The interpreter of Triton 3.4 asks of strides in elements what a GPU asks of strides in bytes.
    check_case(dataclasses.replace(case, head_dim=48), torch.float32, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "options",
    [{"causal": True, "seqused_q": (12, 3), "seqused_k": (40, 0)}, {"page_size": 16, "window_size": (30, 9)}],
    ids=["seqused", "paged"],
)
def test_weights_written_out(options: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"seqlens_q": (19, 3), "seqlens_k": (40, 5), "nheads_k": 1, "dropout_p": 0.3}
    inputs = make_varlen_inputs(VarlenCase(name="weights", **sizes, **options), dtype=torch.float32)
    packed = (inputs.q, inputs.k, inputs.v)
    _, lse, rng_state = attention_varlen_forward(*packed, **inputs.lengths, **inputs.options)
    keep_mask = None if rng_state is None else keep_masks(inputs, rng_state)
    check_weights(inputs, lse, rng_state, keep_mask)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", unpaged("full"), ids=str)
def test_on_a_gpu(case: VarlenCase, dtype: torch.dtype) -> None:
    check_case(case, dtype, "cuda")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cu_seqlens_q": torch.zeros(3, dtype=torch.int64)}, "cu_seqlens_q must have dtype int32"),
        ({"cu_seqlens_k": torch.zeros(4, dtype=torch.int32)}, r"cu_seqlens_k must have shape .*\(3,\)"),
        ({"cu_seqlens_q": torch.zeros(0, dtype=torch.int32)}, "cu_seqlens_q must have shape"),
        ({"seqused_k": torch.zeros(3, dtype=torch.int32)}, r"seqused_k must have shape \(batch,\) = \(2,\)"),
        ({"cu_seqlens_q": [0, 1, 2]}, "cu_seqlens_q must be a torch.Tensor, got list"),
        ({"max_seqlen_q": 1.5}, "max_seqlen_q must be an integer, got float"),
        ({"max_seqlen_k": -1}, "max_seqlen_k must be at least 0, got -1"),
        ({"max_seqlen_k": 2**31}, "max_seqlen_k must be at most 2147483647, .* got 2147483648"),
        ({"q": torch.zeros(1, 8, 2, 16)}, r"q must have 3 dimensions \(total, nheads, headdim\)"),
        ({"q": None}, "q must be a torch.Tensor, got NoneType"),
        ({"k": torch.zeros(8, 2, 8)}, "k must have q's head dimension 16, got 8"),
    ],
)  # fmt: skip
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    bounds = torch.tensor([0, 4, 8], dtype=torch.int32)
    arguments = dict.fromkeys(("q", "k", "v"), torch.zeros(8, 2, 16)) | {
        "cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": 4, "max_seqlen_k": 4,
    }  # fmt: skip
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        attention_varlen_forward(**arguments | changes)
