"""What a case's results must be: oracle and baseline side by side, ready to check any of the tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from fap_testing._samples import SIXTEEN_BITS, Sample, allowance_of, measure_sample, redraw_seeds
from fap_testing.inputs import make_inputs
from fap_testing.inputs_varlen import make_varlen_inputs
from fap_testing.reference import (
    AttentionGradients,
    attention_baseline_gradients,
    attention_reference_gradients,
)
from fap_testing.reference_varlen import (
    attention_varlen_baseline_gradients,
    attention_varlen_reference_gradients,
)
from fap_testing.tolerances import BASELINE_FACTOR, assert_close_to_oracle

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from fap_testing.cases import Case
    from fap_testing.cases_varlen import VarlenCase
    from fap_testing.inputs import CaseInputs
    from fap_testing.inputs_varlen import VarlenInputs

__all__ = ["Expectation", "expect", "expect_varlen"]


@dataclass(frozen=True, slots=True, eq=False)
class Expectation:
    """The right results of one call, and how far plain PyTorch in the same dtype strays from them.

    Attributes:
        case: what was computed; packed sequences' results come without a batch dimension.
        oracle: float64 results.
        baseline: the same from plain PyTorch in the inputs' dtype.
        allowance: for each tensor, what its baseline's error leaves out; see :func:`expect`.
        factor, atol: the errors allowed, as for :func:`fap_testing.tolerances.error_bound`. To a default
            atol, ``factor * allowance`` is added.
    """

    case: Case | VarlenCase
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
        keyless = self.oracle.softmax_lse.isinf().transpose(-2, -1)
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

    def measure(drawn: CaseInputs) -> Sample:
        tensors, options = (drawn.q, drawn.k, drawn.v), {**drawn.options, "keep_mask": keep_mask}
        return measure_sample(
            partial(attention_reference_gradients, *tensors, **options),
            partial(attention_baseline_gradients, *tensors, **options),
            drawn.dout if use_dout else None,
            drawn.dlse if use_dlse else None,
        )

    own = measure(inputs)
    allowance: Mapping[str, float] = {}
    if inputs.q.dtype in SIXTEEN_BITS:
        case = inputs.case
        rows = case.batch * min(case.seqlen_q * case.nheads, case.seqlen_k * case.nheads_k)
        allowance = allowance_of(own, (measure(drawn) for drawn in _redraws(inputs, rows)))
    return Expectation(inputs.case, own.oracle, own.baseline, allowance, factor, atol)


def expect_varlen(
    inputs: VarlenInputs,
    *,
    keep_mask: torch.Tensor | None = None,
    use_dout: bool = True,
    use_dlse: bool = True,
    factor: float = BASELINE_FACTOR,
    atol: float | None = None,
) -> Expectation:
    """Compute what the results of a call over packed sequences must be, as :func:`expect` does for dense.

    Rows that are allocated but not in use are held to out 0, LSE +inf and gradients 0.

    Args:
        inputs: from :func:`fap_testing.inputs_varlen.make_varlen_inputs`.
        keep_mask: bool ``(batch, nheads, >= max_seqlen_q, >= max_seqlen_k)``; required iff the case has
            dropout.
        use_dout, use_dlse, factor, atol: as for :func:`expect`.
    """

    def measure(drawn: VarlenInputs) -> Sample:
        tensors = (drawn.q, drawn.k, drawn.v, drawn.cu_seqlens_q, drawn.cu_seqlens_k)
        options = {**drawn.options, "keep_mask": keep_mask}
        return measure_sample(
            partial(attention_varlen_reference_gradients, *tensors, **options),
            partial(attention_varlen_baseline_gradients, *tensors, **options),
            drawn.dout if use_dout else None,
            drawn.dlse if use_dlse else None,
        )

    own = measure(inputs)
    allowance: Mapping[str, float] = {}
    if inputs.q.dtype in SIXTEEN_BITS:
        case = inputs.case
        pairs = zip(case.used_q, case.used_k, strict=True)
        rows = sum(min(used_q * case.nheads, used_k * case.nheads_k) for used_q, used_k in pairs)
        allowance = allowance_of(own, (measure(drawn) for drawn in _redraws_varlen(inputs, rows)))
    return Expectation(inputs.case, own.oracle, own.baseline, allowance, factor, atol)


def _redraws(inputs: CaseInputs, rows: int) -> Iterator[CaseInputs]:
    for seed in redraw_seeds(rows):
        yield make_inputs(inputs.case, dtype=inputs.q.dtype, device=inputs.q.device, seed=seed, poison=False)


def _redraws_varlen(inputs: VarlenInputs, rows: int) -> Iterator[VarlenInputs]:
    dtype, device = inputs.q.dtype, inputs.q.device
    for seed in redraw_seeds(rows):
        yield make_varlen_inputs(inputs.case, dtype=dtype, device=device, seed=seed, poison=False)
