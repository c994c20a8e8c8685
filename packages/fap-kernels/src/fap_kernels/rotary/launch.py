"""Plan a rotation: tensors and options in, a launch out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..launch import Launch, strides_of
from .kernel import rotary_kernel

if TYPE_CHECKING:
    import torch

__all__ = ["ROWS", "angle_arguments", "plan_rotary"]

ROWS = 16
"""Rows of a program: little work each, so that short sequences make programs enough."""


def angle_arguments(
    head_dim: int, cos: torch.Tensor, sin: torch.Tensor, *, copy_rest: bool
) -> dict[str, Any]:
    """The arguments by which a kernel knows the angles and the columns that they turn."""
    half = cos.shape[1]
    rest = head_dim - 2 * half
    return {
        "cos": cos.contiguous(),
        "sin": sin.contiguous(),
        "table_rows": cos.shape[0],
        "HEAD_DIM": head_dim,
        "HALF": half,
        "WIDTH": power_of_two(half),
        "REST": power_of_two(rest) if copy_rest and rest else 0,
    }


def power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def plan_rotary(
    x: torch.Tensor,
    out: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    offsets: torch.Tensor | int,
    cu_seqlens: torch.Tensor | None,
    seqlen: int,
    *,
    interleaved: bool,
    conjugate: bool,
) -> Launch:
    """The launch that writes ``out``; x and out ``(batch, seqlen, nheads, head_dim)``.

    Packed tensors come as one batch entry, with ``seqlen`` the most rows of a sequence. ``out`` may be ``x``.
    """
    nheads, head_dim = x.shape[2:]
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    by_tensor = not isinstance(offsets, int)
    return Launch(
        kernel=rotary_kernel,
        programs=batch * -(-seqlen * nheads // ROWS),
        arguments={
            "x": x,
            "x_strides": strides_of(x),
            "out": out,
            "out_strides": strides_of(out),
            "offsets": offsets if by_tensor else None,
            "offset": 0 if by_tensor else offsets,
            "cu_seqlens": cu_seqlens,
            "nheads": nheads,
            "seqlen": seqlen,
            **angle_arguments(head_dim, cos, sin, copy_rest=out is not x),
            "ROWS": ROWS,
            "INTERLEAVED": interleaved,
            "CONJUGATE": conjugate,
        },
        num_warps=4,
    )
