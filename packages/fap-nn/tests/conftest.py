"""Attention written out, for the modules to be compared with."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def _plain_attention(q, k, v, *, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None):
    (seqlen_q, nheads), (seqlen_k, nheads_k) = q.shape[1:3], k.shape[1:3]
    k, v = (x.repeat_interleave(nheads // nheads_k, dim=2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[3])
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    # How far a key lies behind the query, where the last query stands at the last key.
    behind = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q - torch.arange(seqlen_k)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(q.dtype)[..., None, None] * behind.abs()
    left, right = window_size[0], 0 if causal else window_size[1]
    hidden = torch.zeros_like(behind, dtype=torch.bool)
    hidden |= (behind > left) & (left >= 0)
    hidden |= (-behind > right) & (right >= 0)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, 0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


@pytest.fixture
def plain_attention() -> Callable[..., torch.Tensor]:
    """Return attention as its definition says it, for small inputs of any floating-point dtype."""
    return _plain_attention


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
