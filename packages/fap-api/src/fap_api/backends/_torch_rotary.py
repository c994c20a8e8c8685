"""Rotary position embeddings in PyTorch operations, on any device and without waiting for it."""

from __future__ import annotations

import torch

from fap_api.backends._chunks import wide_dtype

__all__ = ["packed_positions", "positions_from", "rotate", "turn"]


def turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Return ``x`` with the pairs of its leading features turned, ``(a, b)`` to ``(a c - b s, a s + b c)``.

    In float32 (float64 for float64), rounded once (Su et al., "RoFormer", arXiv:2104.09864).

    Args:
        x: ``(..., nheads, headdim)``.
        cos, sin: ``(..., rotary_dim / 2)``, one angle for all heads of a row.
        interleaved: pair features 2 i and 2 i + 1, else i and ``rotary_dim / 2 + i``.
    """
    half, wide = cos.shape[-1], wide_dtype(x.dtype)
    c, s = (t.to(wide)[..., None, :] for t in (cos, sin))
    # Neighbours are pairs in (..., half, 2), halves in (..., 2, half).
    shape, pair = ((half, 2), -1) if interleaved else ((2, half), -2)
    a, b = x[..., : 2 * half].to(wide).unflatten(-1, shape).unbind(pair)
    turned = torch.stack((a * c - b * s, a * s + b * c), pair).flatten(-2).to(x.dtype)
    return torch.cat((turned, x[..., 2 * half :]), dim=-1)


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

    Args:
        x: ``(..., nheads, headdim)``.
        cos, sin: ``(rows, rotary_dim / 2)`` with ``rotary_dim <= headdim``.
        positions: integers ``(...)``; those outside ``0 .. rows - 1`` turn nothing.
        interleaved: as for :func:`turn`.
        conjugate: turn backwards, which is the gradient of turning.
    """
    rows = cos.shape[0]
    if rows == 0:
        return x.clone(memory_format=torch.contiguous_format)
    unknown = ((positions < 0) | (positions >= rows))[..., None]
    index = positions.clamp(0, rows - 1)
    c, s = cos[index].masked_fill(unknown, 1.0), sin[index].masked_fill(unknown, 0.0)
    return turn(x, c, -s if conjugate else s, interleaved=interleaved)


def positions_from(offsets: torch.Tensor | int, seqlen: int, device: torch.device) -> torch.Tensor:
    """Return the positions of rows that begin at ``offsets``: ``(1, seqlen)``, or ``(batch, seqlen)``."""
    row = torch.arange(seqlen, device=device)
    return row + offsets.long()[:, None] if isinstance(offsets, torch.Tensor) else (row + offsets)[None]


def packed_positions(
    offsets: torch.Tensor | int, cu_seqlens: torch.Tensor, max_seqlen: int, total: int
) -> torch.Tensor:
    """Return the position of each of ``total`` packed rows ``(total,)``, -1 for rows of no sequence."""
    row = torch.arange(total, device=cu_seqlens.device)
    batch = cu_seqlens.shape[0] - 1
    if batch == 0:
        return torch.full_like(row, -1)
    # PyTorch copies bounds that are not contiguous itself, but warns about it.
    sequence = torch.searchsorted(cu_seqlens.contiguous(), row.to(cu_seqlens.dtype), right=True) - 1
    outside = (sequence < 0) | (sequence >= batch)
    sequence = sequence.clamp(0, batch - 1)
    within = row - cu_seqlens.long()[sequence]
    offset = offsets.long()[sequence] if isinstance(offsets, torch.Tensor) else offsets
    return (within + offset).masked_fill(outside | (within >= max_seqlen), -1)
