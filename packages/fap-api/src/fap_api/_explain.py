"""Telling which back end a call would take, and why each other one would not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fap_api._call import Options, describe
from fap_api.backends import select
from fap_api.backends.registry import BACKENDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """Which back end one call would take. ``str()`` of it is meant to be read.

    Attributes:
        backend: the name of the back end that would run the call; None if the call would raise.
        chosen_by: what made the choice: ``use_backend`` or the environment variable.
        reasons: for every back end, why it cannot run the call; empty for those that can.
        error: the message that the call would raise with, or None.
    """

    backend: str | None
    chosen_by: str
    reasons: Mapping[str, tuple[str, ...]]
    error: str | None = None

    def __str__(self) -> str:
        head = (
            f"attention would run on {self.backend!r}"
            if self.error is None
            else f"attention would raise: {self.error}"
        )
        lines = [f"{head} ({self.chosen_by})"]
        for name, reasons in self.reasons.items():
            if name == self.backend:
                continue
            if not reasons:
                lines.append(f"  {name}: could run it too")
            lines.extend(f"  {name}: {reason}" for reason in reasons)
        return "\n".join(lines)


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Explanation:
    """Tell, without running it, which back end an attention call would take and why no other.

    Arguments as for :func:`fap_api.flash_attn_func`; whether a gradient is needed follows from the tensors
    and the gradient mode.

    Raises:
        RuntimeError, ValueError, TypeError: the arguments are wrong, whatever the back end.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    problem = describe(q, k, v, options)
    _, chosen_by = select.setting()
    reasons = {name: tuple(select.reasons_against(name, problem)) for name in BACKENDS}
    try:
        return Explanation(select.choose(problem), chosen_by, reasons)
    except (ImportError, RuntimeError) as error:
        return Explanation(None, chosen_by, reasons, str(error))
