"""What a case's results must be: oracle and baseline side by side, ready to check any of the tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fap_testing.reference import (
    AttentionGradients,
    attention_baseline_gradients,
    attention_reference_gradients,
)
from fap_testing.tolerances import BASELINE_FACTOR, assert_close_to_oracle

if TYPE_CHECKING:
    import torch

    from fap_testing.cases import Case
    from fap_testing.inputs import CaseInputs

__all__ = ["Expectation", "expect"]


@dataclass(frozen=True, slots=True, eq=False)
class Expectation:
    """The right results of one call, and how far plain PyTorch in the same dtype strays from them.

    Attributes:
        case: what was computed.
        oracle: float64 results.
        baseline: the same from plain PyTorch in the inputs' dtype.
        factor, atol: the errors allowed, as for :func:`fap_testing.tolerances.error_bound`.
    """

    case: Case
    oracle: AttentionGradients
    baseline: AttentionGradients
    factor: float = BASELINE_FACTOR
    atol: float | None = None

    def check(self, **tensors: torch.Tensor) -> None:
        """Assert that results are as close to the oracle as :func:`assert_close_to_oracle` asks.

        Args:
            tensors: any of ``out``, ``softmax_lse``, ``dq``, ``dk``, ``dv``. Rows without keys are held to
                exact zeros in out and dq.

        Raises:
            AssertionError: a tensor is wrong.
            TypeError: a name that is none of these, or no tensor at all.
        """
        unknown = sorted(set(tensors) - set(AttentionGradients._fields))
        if unknown or not tensors:
            accepted = ", ".join(AttentionGradients._fields)
            raise TypeError(f"check takes any of {accepted}, got {', '.join(unknown) or 'nothing'}")
        keyless = self.oracle.softmax_lse.isinf().transpose(1, 2)
        for name, actual in tensors.items():
            oracle = getattr(self.oracle, name)
            baseline = getattr(self.baseline, name)
            assert_close_to_oracle(
                actual, oracle, baseline, name=name, case=self.case, factor=self.factor, atol=self.atol
            )
            if name in ("out", "dq") and actual[keyless].count_nonzero():
                raise AssertionError(f"{name} of case {self.case} must be exactly 0 in rows without keys")


def expect(
    inputs: CaseInputs,
    *,
    keep_mask: torch.Tensor | None = None,
    use_dout: bool = True,
    use_dlse: bool = True,
    factor: float = BASELINE_FACTOR,
    atol: float | None = None,
) -> Expectation:
    """Compute what a case's out, softmax_lse, dq, dk and dv must be.

    Args:
        inputs: from :func:`fap_testing.inputs.make_inputs`.
        keep_mask: bool ``(batch, nheads, seqlen_q, seqlen_k)``; required iff the case has dropout.
        use_dout, use_dlse: whether the gradients come from a gradient of out, of the LSE, or (the default)
            of both. At least one.
        factor, atol: the errors allowed, as for :func:`fap_testing.tolerances.error_bound`.
    """
    dout = inputs.dout if use_dout else None
    dlse = inputs.dlse if use_dlse else None
    arguments = (inputs.q, inputs.k, inputs.v, dout, dlse)
    return Expectation(
        case=inputs.case,
        oracle=attention_reference_gradients(*arguments, **inputs.options, keep_mask=keep_mask),
        baseline=attention_baseline_gradients(*arguments, **inputs.options, keep_mask=keep_mask),
        factor=factor,
        atol=atol,
    )
