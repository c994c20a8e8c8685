"""Rotary position embeddings in PyTorch operations, on any device and without waiting for it."""

from __future__ import annotations

import torch

from fap_api.backends._chunks import wide_dtype

__all__ = ["packed_positions", "positions_from", "rotate"]


def rotate(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    interleaved: bool,
    conjugate: bool = False,
) -> torch.Tensor:
    """Return ``x`` with its leading features turned by the angles of its rows' positions.

    A pair ``(a, b)`` becomes ``(a * cos - b * sin, a * sin + b * cos)`` (Su et al., "RoFormer", 2021), in
    float32 (float64 for float64) and rounded once.

    Args:
        x: ``(..., nheads, headdim)``.
        cos, sin: ``(rows, rotary_dim / 2)`` with ``rotary_dim <= headdim``.
        positions: integers ``(...)``; those outside ``0 .. rows - 1`` turn nothing.
        interleaved: pair features 2 i and 2 i + 1, else i and ``rotary_dim / 2 + i``.
        conjugate: turn backwards, which is the gradient of turning.
    """
    rows, half = cos.shape
    if rows == 0:
        return x.clone(memory_format=torch.contiguous_format)
    wide = wide_dtype(x.dtype)
    unknown = ((positions < 0) | (positions >= rows))[..., None]
    index = positions.clamp(0, rows - 1)
    # One angle for all heads of a row.
    c = cos[index].to(wide).masked_fill(unknown, 1.0)[..., None, :]
    s = sin[index].to(wide).masked_fill(unknown, 0.0)[..., None, :]
    if conjugate:
        s = -s
    # Neighbours are pairs in (..., half, 2), halves in (..., 2, half).
    shape, pair = ((half, 2), -1) if interleaved else ((2, half), -2)
    a, b = x[..., : 2 * half].to(wide).unflatten(-1, shape).unbind(pair)
    turned = torch.stack((a * c - b * s, a * s + b * c), pair).flatten(-2).to(x.dtype)
    return torch.cat((turned, x[..., 2 * half :]), dim=-1)


def positions_from(offsets: torch.Tensor | int, seqlen: int, device: torch.device) -> torch.Tensor:
    """Return the positions of rows that begin at ``offsets``: ``(1, seqlen)``, or ``(batch, seqlen)``."""
    row = torch.arange(seqlen, device=device)
    return (row + offsets)[None] if isinstance(offsets, int) else row + offsets.long()[:, None]


def packed_positions(offsets: torch.Tensor | int, cu_seqlens: torch.Tensor, total: int) -> torch.Tensor:
    """Return the position of each of ``total`` packed rows ``(total,)``, -1 for those of no sequence."""
    row = torch.arange(total, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, row, right=True) - 1
    batch = cu_seqlens.shape[0] - 1
    outside = (sequence < 0) | (sequence >= batch)
    if batch == 0:
        return torch.full_like(row, -1)
    sequence = sequence.clamp(0, batch - 1)
    position = row - cu_seqlens.long()[sequence]
    position += offsets if isinstance(offsets, int) else offsets.long()[sequence]
    return position.masked_fill(outside, -1)
