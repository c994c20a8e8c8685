"""How wrong a result may be: at most twice as wrong as PyTorch in the same dtype, plus a stated atol."""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["BASELINE_FACTOR", "ErrorBound", "assert_close_to_oracle", "error_bound"]

BASELINE_FACTOR = 2.0

# Two float32 computations that are equally right differ by chance, most where cancellation leaves plain
# PyTorch exact. Against a flash-attention in another order of summation, the largest excess over twice the
# baseline's error was 6.5e-6 of the oracle's magnitude, over the quick cases and six seeds.
_FLOAT32_NOISE = 1e-5
_FLOAT64_NOISE = 1e-12


@dataclass(frozen=True, slots=True)
class ErrorBound:
    """The largest error allowed: ``factor * baseline_error + atol``, for the maximum and the RMS error alike.

    Attributes:
        factor: how many times the baseline's error.
        max_error, rms_error: the baseline's own errors against the oracle.
        atol: absolute allowance, see :func:`error_bound`.
    """

    factor: float
    max_error: float
    rms_error: float
    atol: float

    @property
    def max_allowed(self) -> float:
        """The largest allowed absolute error of any element."""
        return self.factor * self.max_error + self.atol

    @property
    def rms_allowed(self) -> float:
        """The largest allowed root mean square of the errors."""
        return self.factor * self.rms_error + self.atol


def error_bound(
    oracle: torch.Tensor,
    baseline: torch.Tensor,
    *,
    dtype: torch.dtype,
    factor: float = BASELINE_FACTOR,
    atol: float | None = None,
    extra_atol: float = 0.0,
) -> ErrorBound:
    """Derive the allowed error of a result from the oracle and from a baseline of the same dtype.

    Args:
        oracle: the float64 truth.
        baseline: what plain PyTorch computes in the dtype under test; see ``attention_baseline``.
        dtype: of the result under test.
        factor: how many times the baseline's error is allowed.
        atol: absolute allowance. None stands for the larger of two, with m the oracle's largest magnitude:
            the noise of accumulation, ``1e-5 * max(1, m)`` (1e-12 in float64; 16-bit dtypes accumulate in
            float32), and one unit in the last place of dtype at m: half of it rounds any result, half makes
            up for a baseline that was lucky in a tensor of few elements.
        extra_atol: added to atol, for an error that the baseline does not make.

    Raises:
        ValueError: the baseline has a NaN or an infinity where the oracle has none: it can bound nothing.
    """
    oracle = oracle.to(torch.float64)
    finite = torch.isfinite(oracle)
    error = (baseline.to(oracle) - oracle)[finite].abs()
    if not torch.isfinite(error).all():
        raise ValueError(
            f"the baseline in {baseline.dtype} is not finite where the oracle is: it bounds no error"
        )
    if atol is None:
        magnitude = _max(oracle[finite].abs())
        noise = _FLOAT64_NOISE if dtype == torch.float64 else _FLOAT32_NOISE
        atol = max(noise * max(1.0, magnitude), torch.finfo(dtype).eps * magnitude)
    return ErrorBound(factor, _max(error), _rms(error), atol + extra_atol)


def assert_close_to_oracle(
    actual: torch.Tensor,
    oracle: torch.Tensor,
    baseline: torch.Tensor,
    *,
    name: str,
    case: object = "",
    factor: float = BASELINE_FACTOR,
    atol: float | None = None,
    extra_atol: float = 0.0,
) -> None:
    """Assert that a result's error against the oracle is at most twice the baseline's, plus an atol.

    Both the largest and the root mean square error are held to the bound. NaN never passes; infinities must
    stand exactly where the oracle has them, with its sign.

    Args:
        actual: the result under test, in its own dtype.
        oracle: the float64 truth, of the same shape.
        baseline: plain PyTorch's result in the same dtype, of the same shape.
        name: of the tensor, for the message.
        case: what was computed, for the message.
        factor, atol, extra_atol: as for :func:`error_bound`.

    Raises:
        AssertionError: with the case, the tensor's name, both errors, and the worst element.
    """
    what = f"{name} of case {case}" if str(case) else name
    if actual.shape != oracle.shape:
        raise AssertionError(f"{what} has shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}")
    # Strides of 0 or an odd layout must not decide how the comparison is done.
    oracle = oracle.detach().to(torch.float64)
    measured = actual.detach().to(oracle)
    _assert_same_infinities(measured, oracle, what)
    bound = error_bound(
        oracle, baseline.detach(), dtype=actual.dtype, factor=factor, atol=atol, extra_atol=extra_atol
    )
    finite = torch.isfinite(oracle)
    error = torch.where(finite, measured - oracle, 0.0).abs()
    worst, rms = _max(error), _rms(error[finite])
    if worst <= bound.max_allowed and rms <= bound.rms_allowed:
        return
    index = _first_index(error == worst)
    raise AssertionError(
        f"{what} is too far from the oracle ({actual.dtype}, shape {tuple(actual.shape)}):\n"
        f"  max error {worst:.3e}, allowed {bound.max_allowed:.3e} "
        f"= {factor:g} * {bound.max_error:.3e} (PyTorch in the same dtype) + {bound.atol:.3e}\n"
        f"  rms error {rms:.3e}, allowed {bound.rms_allowed:.3e} "
        f"= {factor:g} * {bound.rms_error:.3e} + {bound.atol:.3e}\n"
        f"  worst at {index}: got {measured[index].item():.8g}, oracle {oracle[index].item():.8g}, "
        f"PyTorch {baseline[index].item():.8g}\n"
        f"  {int((error > bound.max_allowed).sum())} of {error.numel()} elements exceed the max error allowed"
    )


def _assert_same_infinities(measured: torch.Tensor, oracle: torch.Tensor, what: str) -> None:
    wrong = measured.isnan() | ((measured.isinf() | oracle.isinf()) & (measured != oracle))
    if wrong.any():
        index = _first_index(wrong)
        raise AssertionError(
            f"{what} has {int(wrong.sum())} of {wrong.numel()} elements that are NaN, or infinite where the "
            f"oracle is not, or the reverse; the first at {index}: got {measured[index].item()}, "
            f"oracle {oracle[index].item()}"
        )


def _first_index(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])


def _max(x: torch.Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def _rms(x: torch.Tensor) -> float:
    return float(x.square().mean().sqrt()) if x.numel() else 0.0
