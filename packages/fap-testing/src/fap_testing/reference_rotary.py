"""Rotary position embeddings, plainly: the float64 oracle, and the same rounded to the inputs' own dtype."""

from __future__ import annotations

from itertools import pairwise

import torch

__all__ = ["rotary_baseline", "rotary_reference"]


def rotary_reference(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """Rotate the leading features of every head in float64, differentiably: the oracle for apply_rotary_emb.

    Token t of sequence b has position ``seqlen_offsets[b] + t``. Its pair i of features ``(x, y)`` becomes
    ``(x * cos - y * sin, x * sin + y * cos)`` with cos and sin of that position and pair (Su et al., 2021).

    Args:
        x: ``(batch, seqlen, nheads, head_dim)``; with cu_seqlens ``(total, nheads, head_dim)``.
        cos, sin: ``(seqlen_rotary, rotary_dim / 2)`` with ``rotary_dim <= head_dim``; features from
            rotary_dim on pass unchanged.
        interleaved: pair features 2i and 2i + 1 (GPT-J); else i and i + rotary_dim / 2 (GPT-NeoX, LLaMA).
        seqlen_offsets: one number, or ``(batch,)``.
        cu_seqlens: ``(batch + 1,)``, integers that begin with 0 and never fall. Rows beyond the last pass
            unchanged.
        max_seqlen: at least the longest sequence's length; required iff cu_seqlens is given.

    Returns:
        float64, in the shape of x.

    Raises:
        ValueError: shapes that do not fit together, or a position that the table does not have.
    """
    return _rotated(x, cos, sin, torch.float64, interleaved, seqlen_offsets, cu_seqlens, max_seqlen)


def rotary_baseline(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """Rotate in float32 at least and round once, to x's dtype: the error of this is the yardstick.

    Arguments as for :func:`rotary_reference`.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return _rotated(x, cos, sin, wide, interleaved, seqlen_offsets, cu_seqlens, max_seqlen).to(x.dtype)


def _rotated(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dtype: torch.dtype,
    interleaved: bool,
    seqlen_offsets: int | torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
) -> torch.Tensor:
    _check_tables(x, cos, sin, packed=cu_seqlens is not None)
    x, cos, sin = (tensor.to(dtype) for tensor in (x, cos, sin))
    if (cu_seqlens is None) != (max_seqlen is None):
        raise ValueError("cu_seqlens and max_seqlen go together, got one without the other")
    if cu_seqlens is None:
        offsets = _offsets(seqlen_offsets, x.shape[0])
        turned = [_rotate(row, cos, sin, interleaved, o) for row, o in zip(x, offsets, strict=True)]
        return torch.stack(turned) if turned else x
    bounds = [int(bound) for bound in cu_seqlens]
    lengths = [end - start for start, end in pairwise(bounds)]
    if not bounds or bounds[0] != 0 or min(lengths, default=0) < 0 or bounds[-1] > x.shape[0]:
        raise ValueError(
            f"cu_seqlens must begin with 0, never fall and end within {x.shape[0]} rows, got {bounds}"
        )
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        raise ValueError(f"max_seqlen must be at least {max(lengths)}, got {max_seqlen}")
    offsets = _offsets(seqlen_offsets, len(lengths))
    parts = x[: bounds[-1]].split(lengths)
    turned = [_rotate(part, cos, sin, interleaved, o) for part, o in zip(parts, offsets, strict=True)]
    return torch.cat([*turned, x[bounds[-1] :]])


def _rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool, offset: int
) -> torch.Tensor:
    """Rotate one sequence ``(seqlen, nheads, head_dim)`` whose first token has position ``offset``."""
    end = offset + x.shape[0]
    if offset < 0 or (x.shape[0] and end > cos.shape[0]):
        raise ValueError(
            f"cos and sin have {cos.shape[0]} positions, needed are those from {offset} to {end}"
        )
    half = cos.shape[1]
    # One angle for all heads of a token.
    c, s = cos[offset:end, None], sin[offset:end, None]
    if interleaved:
        a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        turned = torch.stack((a * c - b * s, a * s + b * c), dim=-1).flatten(-2)
    else:
        a, b = x[..., :half], x[..., half : 2 * half]
        turned = torch.cat((a * c - b * s, a * s + b * c), dim=-1)
    return torch.cat((turned, x[..., 2 * half :]), dim=-1)


def _offsets(seqlen_offsets: int | torch.Tensor, batch: int) -> list[int]:
    if not isinstance(seqlen_offsets, torch.Tensor):
        return [int(seqlen_offsets)] * batch
    if tuple(seqlen_offsets.shape) != (batch,):
        raise ValueError(
            f"seqlen_offsets must be a number or (batch,) = ({batch},), got {tuple(seqlen_offsets.shape)}"
        )
    return [int(offset) for offset in seqlen_offsets]


def _check_tables(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, packed: bool) -> None:
    expected = "(total, nheads, head_dim) with cu_seqlens" if packed else "(batch, seqlen, nheads, head_dim)"
    if x.dim() != (3 if packed else 4):
        raise ValueError(f"x must be {expected}, got shape {tuple(x.shape)}")
    if cos.dim() != 2 or cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos and sin must both be (seqlen_rotary, rotary_dim / 2) with rotary_dim <= {x.shape[-1]}, "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
