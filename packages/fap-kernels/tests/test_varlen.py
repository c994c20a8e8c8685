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
    target,
)
from fap_testing.cases_varlen import VarlenCase, select_varlen
from fap_testing.expectation import expect_varlen
from fap_testing.inputs_varlen import make_varlen_inputs

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
