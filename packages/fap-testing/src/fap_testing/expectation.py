"""What a case's results must be: oracle and baseline side by side, ready to check any of the tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fap_testing.inputs import CaseInputs, make_inputs
from fap_testing.reference import (
    AttentionGradients,
    attention_baseline_gradients,
    attention_reference_gradients,
)
from fap_testing.tolerances import BASELINE_FACTOR, assert_close_to_oracle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from fap_testing.cases import Case

__all__ = ["Expectation", "expect"]

_ROUNDED = ("out", "dq", "dk", "dv")
_ENOUGH_ROWS = 64
_MOST_REDRAWS = 12
_REDRAW_SEED = 1_000_003


@dataclass(frozen=True, slots=True, eq=False)
class Expectation:
    """The right results of one call, and how far plain PyTorch in the same dtype strays from them.

    Attributes:
        case: what was computed.
        oracle: float64 results.
        baseline: the same from plain PyTorch in the inputs' dtype.
        allowance: for each tensor, what its baseline's error leaves out; see :func:`expect`.
        factor, atol: the errors allowed, as for :func:`fap_testing.tolerances.error_bound`. To a default
            atol, ``factor * allowance`` is added.
    """

    case: Case
    oracle: AttentionGradients
    baseline: AttentionGradients
    allowance: Mapping[str, float]
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
            extra = self.factor * self.allowance.get(name, 0.0) if self.atol is None else 0.0
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

    In 16 bits, the baseline's own error is no fair measure in two ways, for which the result makes an
    allowance. Flash-attention's backward pass takes ``delta = rowsum(dout * out)`` from the stored out, so
    out's rounding enters dq and dk; eager PyTorch has no such step. And with a few rows, the baseline's error
    is a matter of luck; so the worst of several draws of the same case counts.

    Args:
        inputs: from :func:`fap_testing.inputs.make_inputs`.
        keep_mask: bool ``(batch, nheads, seqlen_q, seqlen_k)``; required iff the case has dropout.
        use_dout, use_dlse: whether the gradients come from a gradient of out, of the LSE, or (the default)
            of both. At least one.
        factor, atol: the errors allowed, as for :func:`fap_testing.tolerances.error_bound`.
    """

    def measure(drawn: CaseInputs) -> _Sample:
        dout = drawn.dout if use_dout else None
        dlse = drawn.dlse if use_dlse else None
        return _measure(drawn, dout, dlse, {**drawn.options, "keep_mask": keep_mask})

    own = measure(inputs)
    allowance: dict[str, float] = {}
    if inputs.q.dtype in (torch.float16, torch.bfloat16):
        errors = [own.errors(), *(measure(drawn).errors() for drawn in _redraws(inputs))]
        for name, error in own.baseline_errors().items():
            allowance[name] = max(sample[name] for sample in errors) - error
    return Expectation(inputs.case, own.oracle, own.baseline, allowance, factor, atol)


class _Sample(NamedTuple):
    """One draw of a case: the truth, the baseline, and what the baseline's out does to dq and dk."""

    oracle: AttentionGradients
    baseline: AttentionGradients
    stored_out_errors: Mapping[str, float]

    def baseline_errors(self) -> dict[str, float]:
        """The baseline's largest error in each tensor but the LSE, which is no 16-bit matter."""
        pairs = {name: (getattr(self.baseline, name), getattr(self.oracle, name)) for name in _ROUNDED}
        return {name: _largest(actual - oracle) for name, (actual, oracle) in pairs.items()}

    def errors(self) -> dict[str, float]:
        """The same, with the error of reading the stored out."""
        return {n: error + self.stored_out_errors.get(n, 0.0) for n, error in self.baseline_errors().items()}


def _measure(
    inputs: CaseInputs, dout: torch.Tensor | None, dlse: torch.Tensor | None, options: dict[str, Any]
) -> _Sample:
    oracle = attention_reference_gradients(inputs.q, inputs.k, inputs.v, dout, dlse, **options)
    baseline = attention_baseline_gradients(inputs.q, inputs.k, inputs.v, dout, dlse, **options)
    if dout is None or inputs.q.dtype not in (torch.float16, torch.bfloat16):
        return _Sample(oracle, baseline, {})
    # An error of delta acts as a gradient of the LSE with the opposite sign does, so the oracle can tell.
    delta_error = ((baseline.out.double() - oracle.out) * dout.double()).sum(-1).transpose(1, 2)
    effect = attention_reference_gradients(inputs.q, inputs.k, inputs.v, None, delta_error, **options)
    return _Sample(oracle, baseline, {"dq": _largest(effect.dq), "dk": _largest(effect.dk)})


def _redraws(inputs: CaseInputs) -> Iterator[CaseInputs]:
    """Draw the same case again, the more often the fewer rows it has."""
    case = inputs.case
    rows = case.batch * min(case.seqlen_q * case.nheads, case.seqlen_k * case.nheads_k)
    draws = min(_MOST_REDRAWS, _ENOUGH_ROWS // rows) if rows else 0
    for seed in range(_REDRAW_SEED, _REDRAW_SEED + draws):
        yield make_inputs(case, dtype=inputs.q.dtype, device=inputs.q.device, seed=seed, poison=False)


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
