"""Checks on arguments that only the functional API has; the rest is ``AttentionProblem.describe``."""

from __future__ import annotations

import torch

from fap_kernels.errors import WrongType
from fap_kernels.packing import check_index, check_length

__all__ = ["check_one_packing", "check_tensor", "refuse_tangents", "split_packed"]


def check_tensor(name: str, x: object) -> None:
    """Raise a TypeError unless ``x`` is a tensor."""
    if not isinstance(x, torch.Tensor):
        raise WrongType(f"{name} must be a torch.Tensor, got {type(x).__name__}")


def split_packed(
    name: str, packed: torch.Tensor, parts: int, rows: str = "batch, seqlen"
) -> tuple[torch.Tensor, ...]:
    """Return the parts of a packed tensor ``(*rows, parts, nheads, headdim)`` as views.

    Args:
        name: what the caller knows the tensor by.
        packed: the tensor.
        parts: how many there must be.
        rows: names of the dimensions before them.

    Raises:
        TypeError: not a tensor.
        RuntimeError: another shape.
    """
    check_tensor(name, packed)
    dim = rows.count(",") + 1
    if packed.dim() != dim + 3 or packed.shape[dim] != parts:
        raise RuntimeError(
            f"{name} must have shape ({rows}, {parts}, nheads, headdim), got {tuple(packed.shape)}"
        )
    # unbind's backward is one stack; indexing part by part would fill a whole zero tensor for each.
    return packed.unbind(dim)


def check_one_packing(qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int | torch.Tensor) -> int:
    """Check the one set of lengths of packed self-attention by its own names; return ``max_seqlen``.

    Raises:
        RuntimeError: ``cu_seqlens`` of another shape, dtype or device.
        ValueError, TypeError: ``max_seqlen`` is no integer of at least 0, or ``cu_seqlens`` no tensor.
    """
    check_index("cu_seqlens", cu_seqlens, qkv.device)
    if cu_seqlens.shape[0] < 1:
        raise RuntimeError("cu_seqlens must have shape (batch + 1,), got shape (0,)")
    return check_length("max_seqlen", max_seqlen)


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
