"""What a program of the Hopper backward works on: a key tile, or several, and the queries that see it.

Plain ``@triton.jit`` without a launch of its own, so that the warp that fetches and the warpgroups that
multiply find the same tiles in the same order; which key tile it is, is announced where programs draw them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..language import masks, spans, tiles
from . import work


class KeyTile(NamedTuple):
    """One key tile: whose it is, and where its sequence lies."""

    batch: Any
    head_k: Any
    first_key: Any
    q_batch: Any
    q_start: Any
    seqlen_q: Any
    k_batch: Any
    k_start: Any
    seqlen_k: Any


class Sweep(NamedTuple):
    """The query tiles that a key tile visits, the same ones of each of the heads that share its key head.

    Fields:
        start: first query of the first tile. This and what follows counts upwards, whichever way is swept.
        hidden: so many tiles from there on see none of the keys.
        leading: those from there up to this one need a mask, because of ``window_right`` or the keys' end.
        unmasked_end: those from there up to this one need none; all others do, because of ``window_left``.
        count: how many tiles there are.
        tiles_before, steps_before: how many key tiles the program has worked on before, and how many steps
            that took, where it stays for several.
    """

    start: Any
    hidden: Any
    leading: Any
    unmasked_end: Any
    count: Any
    tiles_before: Any
    steps_before: Any


@triton.jit
def key_tile_of(call, index, BLOCK_N: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Key tile number ``index``, or this program's of a cluster's pair of them.

    Under a causal mask a head's first keys have the most work, and come first unless ``LAST_FIRST``.
    """
    nheads_k = call.nheads // call.group
    if call.heads_beside is None:
        tl.static_assert(call.cluster is None, "packed sequences have no pairs of key tiles")
        packed = spans.Slots(call.cu_seqlens_k, call.entries, call.slots)
        batch, head_k, first_key = tiles.place_of(index, nheads_k, None, packed, BLOCK_N, LAST_FIRST)
    else:
        ITEM: tl.constexpr = BLOCK_N if call.cluster is None else BLOCK_N * work.CLUSTER
        batch, head_k, first_key = tiles.place_beside(
            index, nheads_k, call.heads_beside, call.items, call.seqlen_k, ITEM, LAST_FIRST
        )
        first_key += work.rows_before(call, BLOCK_N)
    q_batch, q_start, seqlen_q = spans.span_of(call.cu_seqlens_q, call.seqused_q, call.seqlen_q, batch)
    k_batch, k_start, seqlen_k = spans.span_of(call.cu_seqlens_k, call.seqused_k, call.seqlen_k, batch)
    return KeyTile(batch, head_k, first_key, q_batch, q_start, seqlen_q, k_batch, k_start, seqlen_k)


@triton.jit
def sweep_of(call, tile, tiles_before, steps_before, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The query tiles that a key tile visits, or a cluster's pair; none where no such keys exist."""
    # Queries that do not exist need no mask: their LSE is +inf, which makes their weights 0.
    OWN_END: tl.constexpr = call.window_left is None
    ITEM: tl.constexpr = BLOCK_N if call.cluster is None else BLOCK_N * work.CLUSTER
    first_key = tile.first_key - work.rows_before(call, BLOCK_N)
    diagonal = tile.seqlen_k - tile.seqlen_q
    window = masks.Window(call.window_left, call.window_right, diagonal, tile.seqlen_q, tile.seqlen_k)
    visit = tiles.queries_to_visit(window, first_key, ITEM, BLOCK_M, OWN_END)
    end = tl.where(first_key < tile.seqlen_k, visit.end, 0)
    # Keys that do not exist do need one. They are zeros, but exp(0 - LSE) of a row whose logits are all far
    # below 0 is infinite, and infinity times zero would be added to dQ.
    whole = first_key + ITEM <= tile.seqlen_k
    inner = tl.where(whole, tl.minimum(visit.inner, end), end)
    outer = tl.where(whole, tl.minimum(visit.outer, end), end)
    return Sweep(
        visit.start,
        0,
        _tiles_in(visit.start, inner, BLOCK_M),
        _tiles_in(visit.start, outer, BLOCK_M),
        _tiles_in(visit.start, end, BLOCK_M),
        tiles_before,
        steps_before,
    )


@triton.jit
def own_sweep_of(call, tile, sweep, first_key, ROWS: tl.constexpr, BLOCK_M: tl.constexpr):
    """The ``sweep`` of a key tile as those ``ROWS`` of its keys go along with it that start at ``first_key``.

    Under a causal mask the first query tile may see keys before them alone, and all do if they do not exist.
    """
    OWN_END: tl.constexpr = call.window_left is None
    diagonal = tile.seqlen_k - tile.seqlen_q
    window = masks.Window(call.window_left, call.window_right, diagonal, tile.seqlen_q, tile.seqlen_k)
    visit = tiles.queries_to_visit(window, first_key, ROWS, BLOCK_M, OWN_END)
    hidden = tl.minimum(tl.maximum(visit.start - sweep.start, 0) // BLOCK_M, sweep.count)
    hidden = tl.where(first_key < tile.seqlen_k, hidden, sweep.count)
    leading, unmasked_end = tl.maximum(sweep.leading, hidden), tl.maximum(sweep.unmasked_end, hidden)
    return Sweep(
        sweep.start, hidden, leading, unmasked_end, sweep.count, sweep.tiles_before, sweep.steps_before
    )


@triton.jit
def _tiles_in(start, end, BLOCK_M: tl.constexpr):
    return tl.cdiv(tl.maximum(end - start, 0), BLOCK_M)


@triton.jit
def tiles_after(call, tile, first_query, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many key tiles behind this one visit the query tile at ``first_query``, which this one visits.

    First and last query of a sweep never fall from a key tile to the next one. So the key tiles that visit a
    query tile lie side by side, and the last one of them is the last one whose sweep starts early enough.
    """
    end = tile.seqlen_k
    if call.window_right is not None:
        diagonal = tile.seqlen_k - tile.seqlen_q
        end = tl.minimum(end, first_query + BLOCK_M + diagonal + call.window_right)
    return (end - 1) // BLOCK_N - tile.first_key // BLOCK_N


@triton.jit
def tiles_before(call, tile, first_query, BLOCK_N: tl.constexpr):
    """How many key tiles before this one visit the query tile at ``first_query``, which this one visits.

    They lie side by side, as :func:`tiles_after` says, and the first one is the first one whose sweep ends
    late enough: the one that holds the first key in the window of the tile's first query.
    """
    first_key = 0
    if call.window_left is not None:
        diagonal = tile.seqlen_k - tile.seqlen_q
        first_key = tl.maximum(first_query + diagonal - call.window_left, 0)
    return tile.first_key // BLOCK_N - first_key // BLOCK_N


@triton.jit
def first_query_of(sweep, number, BLOCK_M: tl.constexpr, DOWNWARDS: tl.constexpr):
    """First query of a sweep's tile number ``number``, counted from the last one on if ``DOWNWARDS``."""
    if DOWNWARDS:
        number = sweep.count - 1 - number
    return sweep.start + number * BLOCK_M


class Share(NamedTuple):
    """Rows of all query heads of a key head: those that an item of its key tiles stands for.

    Fields:
        batch, head_k: whose they are.
        first, end: they go from the one up to the other, both multiples of 64; none if that is less.
    """

    batch: Any
    head_k: Any
    first: Any
    end: Any


@triton.jit
def share_of(call, item, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    """The share of a head's queries that goes with item number ``item`` of its keys; none are packed.

    All have the same number of tiles of ``ROWS`` rows, but the last ones, which may have fewer, or none.
    """
    ITEM: tl.constexpr = BLOCK_N if call.cluster is None else BLOCK_N * work.CLUSTER
    batch, head_k, first_key = tiles.place_beside(
        item, call.nheads // call.group, call.heads_beside, call.items, call.seqlen_k, ITEM, False
    )
    end = tl.cdiv(call.seqlen_q, ROWS) * ROWS
    rows = tl.cdiv(end // ROWS, tl.cdiv(call.seqlen_k, ITEM)) * ROWS
    first = first_key // ITEM * rows
    return Share(batch, head_k, first, tl.minimum(first + rows, end))


@triton.jit
def programs_of_head(call, BLOCK_N: tl.constexpr):
    """How many programs have key tiles of one head, where none are packed."""
    if call.cluster is None:
        return tl.cdiv(call.seqlen_k, BLOCK_N)
    else:
        return tl.cdiv(call.seqlen_k, BLOCK_N * work.CLUSTER) * work.CLUSTER


@triton.jit
def vector_position(call, tile, head, first_query, rows_padded, PADDING: tl.constexpr):
    """Where a head's numbers from ``first_query`` on lie in the vectors of one number a query row."""
    start = spans.padded_start(call.cu_seqlens_q, tile.q_start, tile.batch, PADDING)
    return (tile.q_batch * call.nheads + head) * rows_padded + start + first_query
