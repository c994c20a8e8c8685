"""Checks on arguments that only the functional API has; the rest is ``AttentionProblem.describe``."""

from __future__ import annotations

import torch

__all__ = ["refuse_tangents", "split_packed"]


def split_packed(name: str, packed: torch.Tensor, parts: int) -> tuple[torch.Tensor, ...]:
    """Return the parts of a packed tensor ``(batch, seqlen, parts, nheads, headdim)`` as views.

    Raises:
        TypeError: not a tensor.
        RuntimeError: another shape.
    """
    if not isinstance(packed, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(packed).__name__}")
    if packed.dim() != 5 or packed.shape[2] != parts:
        raise RuntimeError(
            f"{name} must have shape (batch, seqlen, {parts}, nheads, headdim), got {tuple(packed.shape)}"
        )
    # unbind's backward is one stack; indexing part by part would fill a whole zero tensor for each.
    return packed.unbind(2)


def refuse_tangents(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise where forward-mode differentiation would otherwise lose its tangents without a word.

    Raises:
        RuntimeError: q, k or v carries a tangent.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if torch.autograd.forward_ad.unpack_dual(x).tangent is not None:
            raise RuntimeError(
                f"{name} must not carry a forward-mode tangent, got one; accepted: reverse-mode only"
            )
