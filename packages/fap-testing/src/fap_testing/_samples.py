"""How wrong plain PyTorch is on one draw of a case, and what that leaves out."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from fap_testing.reference import AttentionGradients

__all__ = ["SIXTEEN_BITS", "Sample", "allowance_of", "measure_sample", "redraw_seeds"]

SIXTEEN_BITS = (torch.float16, torch.bfloat16)
_ROUNDED = ("out", "dq", "dk", "dv")
_ENOUGH_ROWS = 64
_MOST_REDRAWS = 12
_REDRAW_SEED = 1_000_003


class Gradients(Protocol):
    """Attention and its gradients, of tensors and options that are settled."""

    def __call__(self, dout: torch.Tensor | None, dlse: torch.Tensor | None) -> AttentionGradients: ...


class Sample(NamedTuple):
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


def measure_sample(
    oracle: Gradients, baseline: Gradients, dout: torch.Tensor | None, dlse: torch.Tensor | None
) -> Sample:
    """Compute a draw's truth and baseline, and how far the rounding of out reaches in a backward pass."""
    truth, plain = oracle(dout, dlse), baseline(dout, dlse)
    if dout is None or plain.out.dtype not in SIXTEEN_BITS:
        return Sample(truth, plain, {})
    # An error of delta acts as a gradient of the LSE with the opposite sign does, so the oracle can tell.
    delta_error = ((plain.out.double() - truth.out) * dout.double()).sum(-1).transpose(-2, -1)
    effect = oracle(None, delta_error)
    return Sample(truth, plain, {"dq": _largest(effect.dq), "dk": _largest(effect.dk)})


def allowance_of(own: Sample, others: Iterable[Sample]) -> dict[str, float]:
    """Return what the own baseline's error leaves out of the worst error of all draws, for each tensor."""
    errors = [own.errors(), *(sample.errors() for sample in others)]
    return {name: max(e[name] for e in errors) - error for name, error in own.baseline_errors().items()}


def redraw_seeds(rows: int) -> range:
    """Return the seeds to draw a case again with, the more the fewer rows it has."""
    draws = min(_MOST_REDRAWS, _ENOUGH_ROWS // rows) if rows else 0
    return range(_REDRAW_SEED, _REDRAW_SEED + draws)


def _largest(x: torch.Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0
