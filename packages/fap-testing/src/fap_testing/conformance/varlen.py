"""Does a subject compute packed sequences rightly: out, LSE and gradients against the oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fap_testing.cases import FEATURES, Case
from fap_testing.conformance.calls import (
    CallResult,
    NonconformityError,
    call,
    check_refusal,
    keep_mask_of,
    require_that,
    seeded,
)
from fap_testing.conformance.subject import Subject, UnsupportedError
from fap_testing.expectation import expect_varlen
from fap_testing.inputs_varlen import make_varlen_inputs

if TYPE_CHECKING:
    from fap_testing.cases_varlen import VarlenCase
    from fap_testing.conformance.subject import VarlenSubject
    from fap_testing.inputs_varlen import VarlenInputs

__all__ = ["as_dense", "check_varlen_case", "check_varlen_result"]


def check_varlen_case(subject: VarlenSubject, case: VarlenCase, dtype: torch.dtype) -> None:
    """Check that a subject computes one case rightly, on poisoned inputs, forward and backward.

    Raises:
        AssertionError: a wrong result, or inputs written to.
        UnsupportedError: the subject declares that it does not support the case, and indeed refused it.
    """
    inputs = make_varlen_inputs(case, dtype=dtype, device=subject.device, seed=subject.seed)
    declared = subject.unsupported_in(case)
    knows_mask = subject.provides("lse", case) and subject.provides("dropout_mask", case)
    if case.dropout_p > 0.0 and not declared and not knows_mask:
        raise UnsupportedError(
            "declared unsupported: the dropout mask, without which no oracle knows the result"
        )
    # A subject draws its dropout mask from torch's generator: seeded, so that a failure can be repeated.
    with seeded(subject.device, subject.seed):
        if declared:
            check_refusal(
                declared,
                lambda: call(subject, inputs),
                lambda result: check_varlen_result(subject, inputs, result),
            )
        else:
            check_varlen_result(subject, inputs, call(subject, inputs))


def check_varlen_result(subject: VarlenSubject, inputs: VarlenInputs, result: CallResult) -> None:
    """Check a call's results against the oracle, with the dropout mask that the call itself reports."""
    case = inputs.case
    keep_mask = None
    if case.dropout_p > 0.0:
        if result.s_dmask is None:
            raise NonconformityError("S_dmask is missing, so the dropout mask is unknown")
        require_that(
            result.s_dmask.dtype == inputs.q.dtype,
            f"S_dmask must have q's dtype {inputs.q.dtype}, got {result.s_dmask.dtype}",
        )
        longest = (max(case.seqlens_q, default=0), max(case.seqlens_k, default=0))
        padded = Case(
            name=case.name, batch=case.batch, seqlen_q=longest[0], seqlen_k=longest[1],
            nheads=case.nheads, nheads_k=case.nheads_k,
        )  # fmt: skip
        keep_mask = keep_mask_of(result.s_dmask, padded)
    elif result.s_dmask is not None:
        require_that(
            result.s_dmask.numel() == 0,
            f"S_dmask must be empty when dropout_p is 0, got shape {tuple(result.s_dmask.shape)}",
        )
    use_dlse = subject.provides("lse", case) and subject.provides("lse_gradient", case)
    expect_varlen(inputs, keep_mask=keep_mask, use_dlse=use_dlse).check(**result.tensors())
    inputs.assert_untouched()


def as_dense(subject: VarlenSubject) -> Subject:
    """Return a subject that packs a dense batch, so that what dense attention must do is asked of it too.

    Sequences of one length side by side are a batch, so gradients, dropout, determinism and refusals of
    flash_attn_varlen_func have to be those of flash_attn_func.
    """

    def attention(q: Any, k: Any, v: Any, *positional: Any, **options: Any) -> Any:
        batch, seqlen_q = q.shape[:2]
        returned = subject.attention(
            *(x.flatten(0, 1) for x in (q, k, v)),
            *(_equal_lengths(x, q.device) for x in (q, k)),
            *(seqlen_q, k.shape[1]),
            *positional,
            **options,
        )
        if isinstance(returned, torch.Tensor):
            return returned.unflatten(0, (batch, seqlen_q))
        out, lse, s_dmask = returned
        return (
            out.unflatten(0, (batch, seqlen_q)),
            lse.unflatten(1, (batch, seqlen_q)).transpose(0, 1),
            s_dmask,
        )

    shared = {names for names in subject.unsupported if set(names.split("+")) <= FEATURES.keys()}
    return Subject(
        attention=attention,
        dtypes=subject.dtypes,
        device=subject.device,
        unsupported=shared,
        repeats=subject.repeats,
        seed=subject.seed,
    )


def _equal_lengths(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    batch, seqlen = x.shape[:2]
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * seqlen
