"""Rotary position embeddings: those of fap_api, and how FlashMHA applies them to separate q and k."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fap_api.rotary import RotaryEmbedding, apply_rotary_emb

if TYPE_CHECKING:
    import torch

__all__ = ["RotaryEmbedding", "apply_rotary_emb", "rotate"]


def rotate(
    rotary: RotaryEmbedding,
    q: torch.Tensor,
    k: torch.Tensor,
    offset: int | torch.Tensor = 0,
    max_seqlen: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q and k ``(batch, seqlen, heads, head_dim)`` rotated by their positions, in new tensors.

    Args:
        rotary: has the angles.
        offset: the position of the first row: a number, or int32 ``(batch,)``.
        max_seqlen: the positions that there are; None for those from 0 up to the last row.
    """
    if max_seqlen is None:
        max_seqlen = max(q.shape[1], k.shape[1])
    cos, sin, cos_k, sin_k = rotary.tables(max_seqlen, q.device)
    interleaved = rotary.interleaved
    return (
        apply_rotary_emb(q, cos, sin, interleaved, seqlen_offsets=offset),
        apply_rotary_emb(k, cos_k, sin_k, interleaved, seqlen_offsets=offset),
    )
