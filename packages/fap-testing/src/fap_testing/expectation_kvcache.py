"""What a KV-cache case's results must be, the caches included: oracle and baseline side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fap_testing._samples import SIXTEEN_BITS, redraw_seeds
from fap_testing.inputs_kvcache import make_kvcache_inputs
from fap_testing.reference_kvcache import KVCacheResult, kvcache_baseline, kvcache_reference
from fap_testing.tolerances import BASELINE_FACTOR, assert_close_to_oracle

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fap_testing.inputs_kvcache import KVCacheInputs

__all__ = ["KVCacheExpectation", "expect_kvcache"]

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True, eq=False)
class KVCacheExpectation:
    """The right results of one call, and how far plain PyTorch in the same dtype strays from them.

    Attributes:
        inputs: what was computed.
        oracle: float64 results.
        baseline: the same from plain PyTorch in the inputs' dtype.
        allowance: for each tensor, what its baseline's error leaves out; see :func:`expect_kvcache`.
        factor, atol: the errors allowed, as for :func:`fap_testing.tolerances.error_bound`. To a default
            atol, ``factor * allowance`` is added.
    """

    inputs: KVCacheInputs
    oracle: KVCacheResult
    baseline: KVCacheResult
    allowance: Mapping[str, float]
    factor: float = BASELINE_FACTOR
    atol: float | None = None

    def check(self, **tensors: torch.Tensor) -> None:
        """Assert that results are as close to the oracle as :func:`assert_close_to_oracle` asks.

        Args:
            tensors: any of ``out``, ``softmax_lse``, ``k_cache``, ``v_cache``. Rows without keys are held to
                exact zeros in out. In the caches, only what was rotated is allowed an error: all else must be
                bitwise what was appended, or what was there before.

        Raises:
            AssertionError: a tensor is wrong.
            TypeError: a name that is none of these, or no tensor at all.
        """
        unknown = sorted(set(tensors) - set(KVCacheResult._fields))
        if unknown or not tensors:
            accepted = ", ".join(KVCacheResult._fields)
            raise TypeError(f"check takes any of {accepted}, got {', '.join(unknown) or 'nothing'}")
        for name, actual in tensors.items():
            if name in ("k_cache", "v_cache"):
                self._check_cache(name, actual)
                continue
            self._check_close(name, actual, getattr(self.oracle, name), getattr(self.baseline, name))
            keyless = self.oracle.softmax_lse.isinf().transpose(-2, -1)
            if name == "out" and actual[keyless].count_nonzero():
                raise AssertionError(f"out of case {self.inputs.case} must be exactly 0 in rows without keys")

    def _check_cache(self, name: str, actual: torch.Tensor) -> None:
        case, written = self.inputs.case, self.inputs.written
        before = self.inputs.before[("k_cache", "v_cache").index(name)]
        if actual.shape != before.shape or actual.dtype != before.dtype:
            raise AssertionError(
                f"{name} of case {case} must stay {before.dtype} {tuple(before.shape)}, "
                f"got {actual.dtype} {tuple(actual.shape)}"
            )
        oracle, baseline = (getattr(result, name)[written] for result in (self.oracle, self.baseline))
        rotary_dim = case.rotary_dim if name == "k_cache" else 0
        _require_same_bits(
            actual[~written], before[~written], f"{name} of case {case} was changed where nothing is appended"
        )
        _require_same_bits(
            actual[written][..., rotary_dim:],
            oracle[..., rotary_dim:].to(actual.dtype),
            f"{name} of case {case} does not hold what was appended",
        )
        if rotary_dim:
            rotated = (x[..., :rotary_dim] for x in (actual[written], oracle, baseline))
            self._check_close(name, *rotated)

    def _check_close(
        self, name: str, actual: torch.Tensor, oracle: torch.Tensor, baseline: torch.Tensor
    ) -> None:
        extra = self.factor * self.allowance.get(name, 0.0) if self.atol is None else 0.0
        options: dict[str, Any] = {"factor": self.factor, "atol": self.atol, "extra_atol": extra}
        assert_close_to_oracle(actual, oracle, baseline, name=name, case=self.inputs.case, **options)


def expect_kvcache(
    inputs: KVCacheInputs, *, factor: float = BASELINE_FACTOR, atol: float | None = None
) -> KVCacheExpectation:
    """Compute what out, softmax_lse and the caches must be, before or after the call that is to be checked.

    In 16 bits and with few rows, the baseline's error is a matter of luck, as its rounding of rotated queries
    and keys is; so the worst of several draws of the same case counts.

    Args:
        inputs: from :func:`fap_testing.inputs_kvcache.make_kvcache_inputs`.
        factor, atol: the errors allowed, as for :func:`fap_testing.tolerances.error_bound`.
    """
    own = _measure(inputs)
    allowance: dict[str, float] = {}
    if inputs.q.dtype in SIXTEEN_BITS:
        case, dtype, device = inputs.case, inputs.q.dtype, inputs.q.device
        seeds = redraw_seeds(case.batch * case.seqlen_q * case.nheads)
        others = [
            _measure(make_kvcache_inputs(case, dtype=dtype, device=device, seed=seed, poison=False)).errors()
            for seed in seeds
        ]
        allowance = {
            name: max([error, *(other[name] for other in others)]) - error
            for name, error in own.errors().items()
        }
    return KVCacheExpectation(inputs, own.oracle, own.baseline, allowance, factor, atol)


class _Sample(NamedTuple):
    """One draw of a case: the truth and the baseline."""

    oracle: KVCacheResult
    baseline: KVCacheResult

    def errors(self) -> dict[str, float]:
        """The baseline's largest error where something was computed."""
        pairs = {
            name: (getattr(self.baseline, name), getattr(self.oracle, name)) for name in self.oracle._fields
        }
        return {name: _largest(actual - oracle) for name, (actual, oracle) in pairs.items()}


def _measure(inputs: KVCacheInputs) -> _Sample:
    # The caches as they were made: a call that has run since has changed them.
    tensors = (inputs.q, *inputs.before)
    return _Sample(
        kvcache_reference(*tensors, **inputs.options), kvcache_baseline(*tensors, **inputs.options)
    )


def _largest(error: torch.Tensor) -> float:
    # NaN is poison, or inf - inf: rows without keys.
    return float(error.nan_to_num(0.0).abs().max()) if error.numel() else 0.0


def _require_same_bits(actual: torch.Tensor, expected: torch.Tensor, message: str) -> None:
    bits = _BITS[actual.element_size()]
    differing = actual.contiguous().view(bits) != expected.contiguous().view(bits)
    if differing.any():
        index = tuple(int(i) for i in differing.nonzero()[0])
        raise AssertionError(
            f"{message}: {int(differing.sum())} of {differing.numel()} elements differ, "
            f"the first one got {actual[index].item()}, expected {expected[index].item()}"
        )
