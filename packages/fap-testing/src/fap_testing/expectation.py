"""What a case's results must be: oracle and baseline side by side, ready to check any of the tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fap_testing.reference import (
    AttentionGradients,
    attention_baseline_gradients,
    attention_reference_gradients,
)
from fap_testing.tolerances import BASELINE_FACTOR, assert_close_to_oracle

if TYPE_CHECKING:
    from collections.abc import Mapping

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
        stored_out_error: how far dq and dk stray, by name, for reading out as the baseline rounded it. Eager
            PyTorch does not read it, but flash-attention's backward pass does: it takes
            ``delta = rowsum(dout * out)`` from the stored out.
        factor, atol: the errors allowed, as for :func:`fap_testing.tolerances.error_bound`. To a default
            atol, ``factor * stored_out_error`` is added.
    """

    case: Case
    oracle: AttentionGradients
    baseline: AttentionGradients
    stored_out_error: Mapping[str, float]
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
            extra = self.factor * self.stored_out_error.get(name, 0.0) if self.atol is None else 0.0
            options: dict[str, Any] = {"factor": self.factor, "atol": self.atol, "extra_atol": extra}
            assert_close_to_oracle(actual, oracle, baseline, name=name, case=self.case, **options)
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
    options = {**inputs.options, "keep_mask": keep_mask}
    oracle = attention_reference_gradients(inputs.q, inputs.k, inputs.v, dout, dlse, **options)
    baseline = attention_baseline_gradients(inputs.q, inputs.k, inputs.v, dout, dlse, **options)
    return Expectation(
        case=inputs.case,
        oracle=oracle,
        baseline=baseline,
        stored_out_error=_stored_out_error(inputs, oracle, baseline, options) if use_dout else {},
        factor=factor,
        atol=atol,
    )


def _stored_out_error(
    inputs: CaseInputs, oracle: AttentionGradients, baseline: AttentionGradients, options: dict[str, Any]
) -> dict[str, float]:
    """What the baseline's error in out does to dq and dk through delta.

    An error of delta acts as a gradient of the LSE with the opposite sign does, so the oracle can tell.
    """
    if (
        inputs.q.dtype not in (torch.float16, torch.bfloat16)
        or oracle.dq.numel() == 0
        or oracle.dk.numel() == 0
    ):
        return {}
    delta_error = ((baseline.out.double() - oracle.out) * inputs.dout.double()).sum(-1).transpose(1, 2)
    effect = attention_reference_gradients(inputs.q, inputs.k, inputs.v, None, delta_error, **options)
    return {"dq": float(effect.dq.abs().max()), "dk": float(effect.dk.abs().max())}
