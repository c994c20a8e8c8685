"""What a program of the Hopper forward works on: query tile after query tile, and the keys that each visits.

Plain ``@triton.jit`` without a launch of its own, so that the warp that fetches and the warpgroups that
multiply find the same tiles in the same order without a word between them.

A *turn* here numbers what one program works on: its first query tile, its second, ... The turns that
warpgroups take at the tensor cores are another matter, and all in :mod:`fap_kernels.hopper.turns`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..language import masks, spans, tiles

CLUSTER = tl.constexpr(2)
"""Programs that share an item, where any do."""


class Call(NamedTuple):
    """What one launch computes.

    Fields:
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k: where packed sequences lie, or None.
        entries, slots: how many sequences there are, and slots for the tiles that are handed out, as
            :class:`fap_kernels.language.spans.Slots` says; None where they are not packed.
        nheads, group: query heads, and how many of them share a key head.
        seqlen_q, seqlen_k: the lengths, or what no packed sequence exceeds.
        window_left, window_right: as in :class:`fap_kernels.language.masks.Window`.
        items: what the programs share: query tiles, or pairs of them; key tiles in the backward.
        heads_beside: so many heads, or in the backward key heads, are worked on side by side; None where one
            comes after the other, as where sequences are packed, or query tiles paired.
        tickets: address of a 0, from which programs draw the numbers of their items; None where each knows
            them beforehand.
        cluster: not None where two programs, of numbers side by side, share each item, and sweep the same
            keys: one has its first half, the other its second one.
    """

    cu_seqlens_q: Any
    cu_seqlens_k: Any
    seqused_q: Any
    seqused_k: Any
    entries: Any
    slots: Any
    nheads: Any
    group: Any
    seqlen_q: Any
    seqlen_k: Any
    window_left: Any
    window_right: Any
    items: Any
    heads_beside: Any
    tickets: Any
    cluster: Any


class Tile(NamedTuple):
    """One query tile: whose it is, and where its sequence lies."""

    batch: Any
    head: Any
    first_query: Any
    q_batch: Any
    q_start: Any
    seqlen_q: Any
    k_batch: Any
    k_start: Any
    seqlen_k: Any


class Sweep(NamedTuple):
    """The key tiles that a query tile visits, from the last one down.

    Fields:
        top: first key of the first tile visited; the next one is ``BLOCK_N`` below.
        count: tiles visited, at least one, though all of its keys may be hidden.
    """

    top: Any
    count: Any


class Phases(NamedTuple):
    """What some rows of a query tile need of each step of its sweep.

    Fields:
        settled: after this many steps every row that sees a key in an unmasked tile has met one.
        unmasked_end: steps from ``settled`` up to here need no mask; all others do.
    """

    settled: Any
    unmasked_end: Any


@triton.jit
def program(call):
    """Which program this is; those of a cluster count as one."""
    if call.cluster is None:
        return tl.program_id(0)
    else:
        return tl.program_id(0) // CLUSTER


@triton.jit
def programs(call):
    """How many programs there are; those of a cluster count as one."""
    if call.cluster is None:
        return tl.num_programs(0)
    else:
        return tl.num_programs(0) // CLUSTER


@triton.jit
def rows_before(call, BLOCK: tl.constexpr):
    """How many rows of its items a program leaves to its cluster's first one, which has ``BLOCK`` of each."""
    if call.cluster is None:
        return 0
    else:
        return tl.program_id(0) % CLUSTER * BLOCK


@triton.jit
def first_turn(call):
    """A program's first turn."""
    if call.tickets is not None:
        return program(call)
    else:
        return 0


@triton.jit
def turn_after(call, turn):
    """The turn after ``turn``; where tickets are drawn, this draws one."""
    if call.tickets is not None:
        return programs(call) + draw(call)
    else:
        return turn + 1


@triton.jit
def draw(call):
    """Draw a ticket; the first one is 0."""
    return tl.atomic_add(call.tickets, 1, sem="relaxed")


@triton.jit
def item_of(call, turn, PAIRED: tl.constexpr):
    """Which item a program has at a turn: the turn is its ticket, or it has every ``programs``-th item.

    With ``PAIRED`` an item takes two turns.
    """
    if call.tickets is not None:
        tl.static_assert(not PAIRED, "a program has both tiles of a pair, and tickets are drawn for one")
        return turn
    elif PAIRED:
        return program(call) + turn // 2 * programs(call)
    else:
        return program(call) + turn * programs(call)


@triton.jit
def place_of(call, turn, BLOCK_M: tl.constexpr, PAIRED: tl.constexpr):
    """Batch entry, head and first query of a turn's item, and whether there is such an item.

    With ``PAIRED``, for sequences that are not packed, an item is the n-th query tile from the end of a
    sequence and the n-th from its start: under a causal mask all pairs have the same work, and programs that
    take equally many end together.
    """
    item = tl.minimum(item_of(call, turn, PAIRED), call.items - 1)
    ITEM: tl.constexpr = BLOCK_M if call.cluster is None else BLOCK_M * CLUSTER
    if PAIRED:
        tl.static_assert(call.cu_seqlens_q is None, "sequences of different lengths have no pairs")
        count = tl.cdiv(call.seqlen_q, ITEM)
        pairs = tl.cdiv(count, 2)
        number = item % pairs
        opposite = count - 1 - number
        late = turn % 2 == 0
        row = item // pairs
        exists = late | (number != opposite)
        first_query = tl.where(late, opposite, number) * ITEM
        return row // call.nheads, row % call.nheads, first_query, exists
    elif call.heads_beside is not None:
        batch, head, first_query = tiles.place_beside(
            item, call.nheads, call.heads_beside, call.items, call.seqlen_q, ITEM,
            call.window_right is not None,
        )  # fmt: skip
        return batch, head, first_query, item >= 0  # always there: next_tile wants a tensor
    else:
        packed = None
        if call.cu_seqlens_q is not None:
            packed = spans.Slots(call.cu_seqlens_q, call.entries, call.slots)
        batch, head, first_query = tiles.place_of(
            item, call.nheads, call.seqlen_q, packed, ITEM, call.window_right is not None
        )
        return batch, head, first_query, item >= 0


@triton.jit
def there_is(call, turn, PAIRED: tl.constexpr):
    """Whether a program has an item at a turn."""
    return item_of(call, turn, PAIRED) < call.items


@triton.jit
def next_tile(call, turn, BLOCK_M: tl.constexpr, PAIRED: tl.constexpr):
    """The first turn from ``turn`` on that has a query tile, and that tile.

    Where none has, the turn has no item, and the tile is some tile.
    """
    turn = tl.cast(turn, tl.int32)
    batch, head, first_query, exists = place_of(call, turn, BLOCK_M, PAIRED)
    if PAIRED or call.cu_seqlens_q is not None:
        exists = exists & _reaches(call, batch, first_query)
        while there_is(call, turn, PAIRED) & (not exists):
            turn = turn_after(call, turn)
            batch, head, first_query, exists = place_of(call, turn, BLOCK_M, PAIRED)
            exists = exists & _reaches(call, batch, first_query)
    q_batch, q_start, seqlen_q = spans.span_of(call.cu_seqlens_q, call.seqused_q, call.seqlen_q, batch)
    k_batch, k_start, seqlen_k = spans.span_of(call.cu_seqlens_k, call.seqused_k, call.seqlen_k, batch)
    first_query += rows_before(call, BLOCK_M)
    return turn, Tile(batch, head, first_query, q_batch, q_start, seqlen_q, k_batch, k_start, seqlen_k)


@triton.jit
def _reaches(call, batch, first_query):
    """Whether a batch entry has a query at ``first_query``."""
    _, _, length = spans.span_of(call.cu_seqlens_q, call.seqused_q, call.seqlen_q, batch)
    return first_query < length


@triton.jit
def sweep_of(call, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The key tiles that a query tile visits, or its whole item, if a cluster shares it."""
    ITEM: tl.constexpr = BLOCK_M if call.cluster is None else BLOCK_M * CLUSTER
    diagonal = tile.seqlen_k - tile.seqlen_q
    window = masks.Window(call.window_left, call.window_right, diagonal, tile.seqlen_q, tile.seqlen_k)
    visit = tiles.keys_to_visit(window, tile.first_query - rows_before(call, BLOCK_M), ITEM, BLOCK_N)
    count = tl.maximum(tl.cdiv(tl.maximum(visit.end - visit.start, 0), BLOCK_N), 1)
    return Sweep(visit.start + (count - 1) * BLOCK_N, count)


@triton.jit
def steps_above(call, tile, sweep, first_row, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """How many steps of their query tile's sweep come before the first key that ``ROWS`` queries see.

    All but one at most, since every row takes a step even if it sees no key.
    """
    diagonal = tile.seqlen_k - tile.seqlen_q
    window = masks.Window(call.window_left, call.window_right, diagonal, tile.seqlen_q, tile.seqlen_k)
    visit = tiles.keys_to_visit(window, first_row, ROWS, BLOCK_N)
    above = tl.maximum(sweep.top + BLOCK_N - tl.maximum(visit.end, 0), 0) // BLOCK_N
    return tl.minimum(above, sweep.count - 1)


@triton.jit
def phases_of(call, tile, sweep, first_row, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """What the ``ROWS`` queries from ``first_row`` on need of each step of their query tile's sweep."""
    diagonal = tile.seqlen_k - tile.seqlen_q
    window = masks.Window(call.window_left, call.window_right, diagonal, tile.seqlen_q, tile.seqlen_k)
    visit = tiles.keys_to_visit(window, first_row, ROWS, BLOCK_N)
    end = sweep.top + BLOCK_N
    masked = tl.maximum(end - visit.outer, 0) // BLOCK_N
    unmasked_end = tl.minimum(tl.maximum(end - visit.inner, 0) // BLOCK_N, sweep.count)
    # The rows are settled once the first of them is, since the last key that a row sees lies above that of
    # the row before it. Where the first row's lies below the masked tiles, it is in the tile after them.
    last_key = tile.seqlen_k - 1
    if call.window_right is not None:
        last_key = tl.minimum(last_key, first_row + diagonal + call.window_right)
    settled = tl.where((masked > 0) & (last_key >= visit.outer), masked, masked + 1)
    return Phases(tl.minimum(settled, sweep.count), unmasked_end)
