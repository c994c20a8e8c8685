"""One attention call cut into tiles of bounded size: operands, visible ranges and scores.

Queries are grouped by the key/value head that they read, so grouped-query attention is one matrix product
per key/value head and k and v are never repeated. Forward, backward and probabilities all make their scores
here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from fap_api.backends._dropout import keep_mask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fap_api.backends.base import Score

__all__ = ["ChunkedCall", "Tile", "grouped", "ungrouped", "wide_dtype"]

# Scores in one tile. Half a dozen temporaries of this size live at once: small enough for a CPU's cache,
# large enough that the cost of launching PyTorch operations stays out of sight.
_TILE_CPU = 2**19
_TILE_ACCELERATOR = 2**24
_ROWS = 256
_KEYS = 256


class Tile(NamedTuple):
    """A block of the score tensor: half-open ranges of key/value heads (over the batch), queries and keys."""

    heads: slice
    queries: slice
    keys: slice


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a call on ``dtype`` computes: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def grouped(x: torch.Tensor, nheads_k: int, dtype: torch.dtype) -> torch.Tensor:
    """Reshape ``(b, s, h, ...)`` to ``(b * nheads_k, h // nheads_k, s, ...)`` contiguous, in ``dtype``."""
    y = x.transpose(1, 2).to(dtype).contiguous()
    return y.view(x.shape[0] * nheads_k, x.shape[2] // nheads_k, x.shape[1], *x.shape[3:])


def ungrouped(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Undo :func:`grouped`: a fresh contiguous tensor of ``like``'s shape and dtype."""
    batch, seqlen, nheads, head_dim = like.shape
    y = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return y.copy_(x.view(batch, nheads, seqlen, head_dim).transpose(1, 2))


class ChunkedCall:
    """The operands of one call, wide and grouped by key/value head, and its scores by tile.

    Args:
        first_batch: number of the first batch entry, from which dropout's mask follows.
    """

    def __init__(self, q: torch.Tensor, k: torch.Tensor, score: Score, first_batch: int = 0) -> None:
        batch, self.seqlen_q, nheads, _ = q.shape
        self.seqlen_k, nheads_k = k.shape[1], k.shape[2]
        self.nheads, self.heads, self.group = nheads, batch * nheads_k, nheads // nheads_k
        self.score = score
        self.first_stream = first_batch * nheads
        self.dtype = wide_dtype(q.dtype)
        # Scores leave the matrix product ready for softcap's tanh, or for the softmax.
        self.q_factor = score.softmax_scale / score.softcap if score.softcap else score.softmax_scale
        self.q = grouped(q, nheads_k, self.dtype) * self.q_factor
        self.k = grouped(k, nheads_k, self.dtype)[:, 0]
        self.position = torch.arange(max(self.seqlen_q, self.seqlen_k), device=q.device)
        self.slopes: torch.Tensor | None = None
        if score.alibi_slopes is not None:
            slopes = score.alibi_slopes.detach().to(self.dtype).expand(batch, nheads)
            self.slopes = slopes.reshape(self.heads, self.group, 1, 1)

    def row_blocks(self) -> Iterator[tuple[slice, slice]]:
        """Yield (heads, queries) until every row has been visited."""
        limit = _TILE_CPU if self.q.device.type == "cpu" else _TILE_ACCELERATOR
        rows = max(1, min(self.seqlen_q, _ROWS // self.group))
        heads = max(1, limit // (rows * self.group * min(max(self.seqlen_k, 1), _KEYS)))
        for head in range(0, self.heads, heads):
            for row in range(0, self.seqlen_q, rows):
                yield slice(head, min(head + heads, self.heads)), slice(row, min(row + rows, self.seqlen_q))

    def tiles(self, heads: slice, queries: slice) -> Iterator[Tile]:
        """Yield the tiles of one row block that hold a visible key, in the order of the keys."""
        shift, (first, last) = self.seqlen_k - self.seqlen_q, (0, self.seqlen_k)
        if self.score.window_left >= 0:
            first = max(first, queries.start + shift - self.score.window_left)
        if self.score.window_right >= 0:
            last = min(last, queries.stop + shift + self.score.window_right)
        for key in range(first, last, _KEYS):
            yield Tile(heads, queries, slice(key, min(key + _KEYS, last)))

    def scores(self, tile: Tile) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return scores ``(heads, group, queries, keys)`` of ``tile``, and softcap's tanh or None.

        Masked scores are -inf.
        """
        rows = self.rows(self.q, tile)
        scores = torch.bmm(rows, self.k[tile.heads, tile.keys].transpose(1, 2))
        scores = scores.view(rows.shape[0], self.group, -1, scores.shape[-1])
        tanh = None
        if self.score.softcap:
            tanh = scores.tanh_()
            scores = tanh * self.score.softcap
        if self.slopes is not None:
            scores.addcmul_(self.slopes[tile.heads], self._distance(tile).abs().to(self.dtype), value=-1.0)
        hidden = self._hidden(tile)
        if hidden is not None:
            scores.masked_fill_(hidden, -torch.inf)
        return scores, tanh

    def rows(self, x: torch.Tensor, tile: Tile) -> torch.Tensor:
        """Return the rows of a grouped tensor that ``tile`` covers, ``(heads, group * queries, ...)``."""
        return x[tile.heads, :, tile.queries].flatten(1, 2)

    def keep(self, tile: Tile, rng_state: torch.Tensor) -> torch.Tensor:
        """Return dropout's keep mask of ``tile``, bool ``(heads, group, queries, keys)``."""
        first, last = (self.first_stream + head * self.group for head in (tile.heads.start, tile.heads.stop))
        heads = torch.arange(first, last, device=rng_state.device).view(-1, self.group)
        span = (tile.queries.start, tile.queries.stop), (tile.keys.start, tile.keys.stop)
        return keep_mask(rng_state, self.score.dropout_p, heads, *span)

    def _distance(self, tile: Tile) -> torch.Tensor:
        diagonal = self.position[tile.queries] + (self.seqlen_k - self.seqlen_q)
        return self.position[tile.keys] - diagonal[:, None]

    def _hidden(self, tile: Tile) -> torch.Tensor | None:
        shift, left, right = self.seqlen_k - self.seqlen_q, self.score.window_left, self.score.window_right
        cut_left = left >= 0 and tile.keys.start < tile.queries.stop - 1 + shift - left
        cut_right = right >= 0 and tile.keys.stop - 1 > tile.queries.start + shift + right
        if not (cut_left or cut_right):
            return None
        distance = self._distance(tile)
        if not cut_left:
            return distance > right
        if not cut_right:
            return distance < -left
        return (distance < -left) | (distance > right)
