"""Exported, saved and loaded, attention computes the same for other sizes: dense, packed and from a cache."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.export import Dim

import fap_api

pytestmark = pytest.mark.filterwarnings("default")


class Dense(nn.Module):
    def forward(self, q, k, v):
        return fap_api.flash_attn_func(q, k, v, causal=True, window_size=(5, 0), return_attn_probs=True)[:2]


class Packed(nn.Module):
    def forward(self, q, k, v, cu_seqlens):
        # No sequence is longer than all of them together.
        total = q.shape[0]
        return fap_api.flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, total, total, causal=True)


class Decode(nn.Module):
    def forward(self, q, k_cache, v_cache, k, v, cache_seqlens):
        return fap_api.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=cache_seqlens, causal=True
        )


def draw_dense(batch, seqlen):
    return tuple(torch.randn(batch, seqlen, heads, 8) for heads in (4, 2, 2))


def draw_packed(*lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32)
    return *(torch.randn(sum(lengths), heads, 8) for heads in (4, 2, 2)), bounds


def draw_decode(batch, capacity):
    caches = (torch.randn(batch, capacity, 2, 8) for _ in range(2))
    new = (torch.randn(batch, 1, 2, 8) for _ in range(2))
    return torch.randn(batch, 1, 4, 8), *caches, *new, torch.randint(capacity, (batch,), dtype=torch.int32)


BATCH, SEQLEN = Dim("batch", max=64), Dim("seqlen", min=2, max=4096)
ROWS, TOTAL = {0: BATCH, 1: SEQLEN}, {0: Dim("total", min=2, max=4096)}
ONE_EACH = {0: BATCH}
ROUND_TRIPS = {
    "dense": (Dense, draw_dense(2, 9), (ROWS,) * 3, draw_dense(3, 20)),
    "packed": (
        Packed,
        draw_packed(5, 0, 9),
        (TOTAL, TOTAL, TOTAL, {0: Dim("bounds", min=2, max=64)}),
        draw_packed(3, 11, 2, 1),
    ),
    "decode": (
        Decode,
        draw_decode(2, 16),
        (ONE_EACH, ROWS, ROWS, ONE_EACH, ONE_EACH, ONE_EACH),
        draw_decode(3, 40),
    ),
}


@pytest.mark.parametrize("kind", ROUND_TRIPS)
def test_round_trip(kind):
    module, example, sizes, other = ROUND_TRIPS[kind]
    exported = torch.export.export(module(), example, dynamic_shapes=sizes)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for inputs in (example, other):
        mine, theirs = (tuple(x.clone() for x in inputs) for _ in range(2))
        torch.testing.assert_close(loaded(*mine), module()(*theirs))
        # Where there is a cache, it has been written.
        torch.testing.assert_close(mine, theirs)
        assert (kind == "decode") == any(not torch.equal(x, y) for x, y in zip(mine, inputs, strict=True))
