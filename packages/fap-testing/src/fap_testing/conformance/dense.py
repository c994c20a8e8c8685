"""Does a subject compute a case rightly: out, LSE and gradients against the oracle, inputs left alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fap_testing.conformance.calls import (
    CallResult,
    NonconformityError,
    call,
    check_refusal,
    keep_mask_of,
    require_that,
    seeded,
)
from fap_testing.conformance.subject import UnsupportedError
from fap_testing.expectation import expect
from fap_testing.inputs import make_inputs

if TYPE_CHECKING:
    import torch

    from fap_testing.cases import Case
    from fap_testing.conformance.subject import Subject
    from fap_testing.inputs import CaseInputs

__all__ = ["check_case", "check_result"]


def check_case(subject: Subject, case: Case, dtype: torch.dtype) -> None:
    """Check that a subject computes one case rightly, on poisoned inputs, forward and backward.

    Raises:
        AssertionError: a wrong result, or inputs written to.
        UnsupportedError: the subject declares that it does not support the case, and indeed refused it.
    """
    inputs = make_inputs(case, dtype=dtype, device=subject.device, seed=subject.seed)
    declared = subject.unsupported_in(case)
    if (
        case.dropout_p > 0.0
        and not declared
        and not (subject.provides("lse", case) and subject.provides("dropout_mask", case))
    ):
        raise UnsupportedError(
            "declared unsupported: the dropout mask, without which no oracle knows the result"
        )
    # A subject draws its dropout mask from torch's generator: seeded, so that a failure can be repeated.
    with seeded(subject.device, subject.seed):
        if declared:
            check_refusal(declared, lambda: call(subject, inputs), lambda r: check_result(subject, inputs, r))
        else:
            check_result(subject, inputs, call(subject, inputs))


def check_result(subject: Subject, inputs: CaseInputs, result: CallResult, **gradients: bool) -> None:
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
        keep_mask = keep_mask_of(result.s_dmask, case)
    elif result.s_dmask is not None:
        require_that(
            result.s_dmask.numel() == 0,
            f"S_dmask must be empty when dropout_p is 0, got shape {tuple(result.s_dmask.shape)}",
        )
    gradients = {
        "use_dout": True,
        "use_dlse": subject.provides("lse", inputs.case) and subject.provides("lse_gradient", inputs.case),
        **gradients,
    }
    expect(inputs, keep_mask=keep_mask, **gradients).check(**result.tensors())
    inputs.assert_untouched()
