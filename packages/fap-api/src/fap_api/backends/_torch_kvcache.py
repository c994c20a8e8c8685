"""A cache of keys and values in PyTorch operations: appending to it, and reading it.

Where the lengths are on the host, each sequence's keys are cut out and attended to by the dense code. Where
reading them would wait for the device, the whole capacity is visited under a mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fap_api.backends._chunks import ChunkedCall, Tile
from fap_api.backends._torch_rotary import positions_from, rotate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fap_api.backends.base import NewKeys, Places, Score

__all__ = ["CachedCall", "append", "every_row", "known_to_the_host", "sequences"]


def append(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    new: NewKeys,
    places: Places,
    *,
    local: bool,
) -> torch.Tensor:
    """Write new keys and values behind each sequence's last ones; return q, rotated as they are.

    A sequence that they do not all fit keeps what it has.

    Args:
        local: queries have positions of their own, from the first new one on; else all have the first.
    """
    capacity, seqlen_new, k = places.capacity(k_cache), new.k.shape[1], new.k
    position = positions_from(new.start, seqlen_new, q.device)
    if new.angles is not None:
        k = rotate(k, *new.angles, position, interleaved=new.interleaved)
        of_queries = positions_from(new.start, q.shape[1] if local else 1, q.device).expand(q.shape[:2])
        q = rotate(q, *new.angles, of_queries, interleaved=new.interleaved)
    if seqlen_new > 0 and capacity > 0:
        fits = (new.start + seqlen_new <= capacity)[:, None, None, None]
        rows = _rows(k_cache, places, position.clamp(0, capacity - 1))
        for cache, x in ((k_cache, k), (v_cache, new.v)):
            cache.index_put_(rows, torch.where(fits, x, cache[rows]))
    return q


def known_to_the_host(x: torch.Tensor) -> bool:
    """Whether lengths on the device of ``x`` can be read without waiting for it."""
    return x.device.type == "cpu"


def sequences(
    k_cache: torch.Tensor, v_cache: torch.Tensor, places: Places, batch: int, seqlen_new: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the keys and values of each sequence, ``(1, seqlen_k, nheads_k, headdim)``, padding left out."""
    capacity, page_size = places.capacity(k_cache), k_cache.shape[1]
    lengths = _lengths(places, batch, capacity, k_cache.device).tolist()
    pads = [0] * batch if places.leftpad is None else places.leftpad.tolist()
    entries = range(batch) if places.batch_idx is None else places.batch_idx.tolist()
    for b, (length, pad, entry) in enumerate(zip(lengths, pads, entries, strict=True)):
        end = min(length + seqlen_new, capacity)
        if places.block_table is None:
            k, v = (cache[entry : entry + 1] for cache in (k_cache, v_cache))
        else:
            pages = places.block_table[b, : -(-end // page_size)]
            k, v = (cache[pages].flatten(0, 1)[None] for cache in (k_cache, v_cache))
        yield k[:, pad:end], v[:, pad:end]


def every_row(cache: torch.Tensor, places: Places) -> torch.Tensor:
    """Return all rows that sequences may have, ``(batch, capacity, nheads_k, headdim)``."""
    if places.block_table is not None:
        # Entries beyond a sequence's pages may be anything.
        return cache[places.block_table.clamp(0, max(cache.shape[0] - 1, 0))].flatten(1, 2)
    return cache if places.batch_idx is None else cache[places.batch_idx]


class CachedCall(ChunkedCall):
    """A chunked call in which each sequence has keys from ``leftpad`` up to a length on the device.

    Args:
        k: ``(batch, capacity, nheads_k, headdim)``.
        places: whose lengths, ``seqlen_new`` more than before, and left padding count.
    """

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, score: Score, places: Places, seqlen_new: int
    ) -> None:
        super().__init__(q, k, score)
        lengths = (_lengths(places, len(q), self.seqlen_k, q.device) + seqlen_new).clamp(0, self.seqlen_k)
        pads = torch.zeros_like(lengths) if places.leftpad is None else places.leftpad
        self._ends, self._pads = (self._by_head(x) for x in (lengths, pads))

    def exists(self) -> torch.Tensor:
        """Return which keys count, bool ``(heads, seqlen_k)``."""
        position = self.position[: self.seqlen_k]
        return ((position >= self._pads) & (position < self._ends))[:, 0, 0]

    def tiles(self, heads: slice, queries: slice) -> Iterator[Tile]:
        """Yield the tiles of one row block: all of them, as the host does not know which hold keys."""
        step = 256
        for key in range(0, self.seqlen_k, step):
            yield Tile(heads, queries, slice(key, min(key + step, self.seqlen_k)))

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.long()[:, None].expand(-1, self.heads // max(len(x), 1)).reshape(-1, 1, 1, 1)

    def _distance(self, tile: Tile) -> torch.Tensor:
        diagonal = self.position[tile.queries, None] + self._ends[tile.heads] - self.seqlen_q
        return self.position[tile.keys] - diagonal

    def _hidden(self, tile: Tile) -> torch.Tensor:
        key = self.position[tile.keys]
        hidden = (key < self._pads[tile.heads]) | (key >= self._ends[tile.heads])
        left, right = self.score.window_left, self.score.window_right
        if left >= 0 or right >= 0:
            distance = self._distance(tile)
            if left >= 0:
                hidden = hidden | (distance < -left)
            if right >= 0:
                hidden = hidden | (distance > right)
        return hidden


def _lengths(places: Places, batch: int, capacity: int, device: torch.device) -> torch.Tensor:
    """Return how many keys each sequence has, int64 ``(batch,)``."""
    if places.seqlens is not None:
        return places.seqlens.long()
    return torch.full((batch,), capacity, dtype=torch.int64, device=device)


def _rows(cache: torch.Tensor, places: Places, position: torch.Tensor) -> tuple[Any, torch.Tensor]:
    """Return what indexes a cache at positions ``(batch, n)``."""
    if places.block_table is not None:
        page_size = cache.shape[1]
        page = places.block_table.long().gather(1, position // page_size)
        return page.clamp(0, cache.shape[0] - 1), position % page_size
    batch = len(position)
    entry = torch.arange(batch, device=cache.device) if places.batch_idx is None else places.batch_idx.long()
    return entry[:, None].expand_as(position), position
