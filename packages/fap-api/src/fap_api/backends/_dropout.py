"""Position-keyed dropout in PyTorch arithmetic: bit for bit the mask of fap-kernels' Triton kernels.

Whether the weight of query i and key j is kept depends on ``(seed, offset, batch, head, i, j)`` alone, so it
does not depend on how a call is cut into chunks. Random numbers: Philox4x32 with 7 rounds (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

from __future__ import annotations

import math

import torch

__all__ = ["draw_rng_state", "keep_mask"]

_WORD = 0xFFFFFFFF
_ROUNDS = 7
# One counter yields 16 bytes; four counters cover 64 neighbouring keys.
_BLOCK = 64


def draw_rng_state(device: torch.device) -> torch.Tensor:
    """Draw int64 ``(seed, offset)`` from PyTorch's generator of ``device``, without a sync."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)


def keep_mask(
    rng_state: torch.Tensor,
    dropout_p: float,
    heads: torch.Tensor,
    queries: tuple[int, int],
    keys: tuple[int, int],
) -> torch.Tensor:
    """Return which weights dropout keeps, bool ``(*heads.shape, queries, keys)``.

    Args:
        rng_state: int64 ``(seed, offset)``.
        dropout_p: a weight is kept iff its random byte is at most ``floor(255 * (1 - dropout_p))``.
        heads: int64, ``batch_index * nheads + query_head``.
        queries, keys: half-open ranges of absolute indices.
    """
    device = rng_state.device
    first_block, last_block = keys[0] // _BLOCK, -(-keys[1] // _BLOCK)
    words = _philox(
        rng_state,
        torch.arange(first_block * 4, last_block * 4, device=device),
        torch.arange(*queries, device=device)[:, None],
        heads[..., None, None],
    )
    shifts = torch.arange(0, 32, 8, device=device)
    # (counters, 4 words, 4 bytes) -> (blocks, 4 pairs, 8 groups, 2) -> key order (group, pair, parity).
    octets = (torch.stack(words, dim=-1)[..., None] >> shifts) & 0xFF
    octets = octets.unflatten(-3, (last_block - first_block, 4)).flatten(-2).unflatten(-1, (8, 2))
    octets = octets.transpose(-3, -2).flatten(-4)
    start = keys[0] - first_block * _BLOCK
    kept: torch.Tensor = octets[..., start : start + keys[1] - keys[0]] <= math.floor(255 * (1 - dropout_p))
    return kept


def _philox(
    rng_state: torch.Tensor, c0: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    seed, offset = rng_state.unbind()
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    c3 = offset & _WORD
    for _ in range(_ROUNDS):
        # int64 products wrap, which leaves all 64 bits right; only the sign extension of >> needs masking.
        even, odd = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((odd >> 32) & _WORD) ^ c1 ^ k0,
            odd & _WORD,
            ((even >> 32) & _WORD) ^ c3 ^ k1,
            even & _WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1, c2, c3)
    return c0, c1, c2, c3
