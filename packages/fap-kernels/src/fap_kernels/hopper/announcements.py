"""Announcements: the warp that fetches says what comes next, where the others cannot know it.

That is which query tile of packed sequences comes next. To find out takes a bisection, for which the
warpgroups that multiply have neither the time, at the end of each tile, nor the registers. The warp that
fetches knows two key tiles earlier than they need to. In the backward it is the key tile of which that warp
has drawn the ticket.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from . import backward_work, ring, work

SLOTS = gl.constexpr(2)
NUMBERS = gl.constexpr(10)


class Board(NamedTuple):
    """Where announcements stand.

    Fields:
        numbers: shared memory, ``NUMBERS`` int32 a slot: whether there is a tile, and where it is.
        full: one barrier a slot; a phase of it ends when an announcement stands there.
        empty: one barrier a slot; a phase of it ends when everyone has heard it.
    """

    numbers: Any
    full: Any
    empty: Any


@gluon.jit
def make_board(HEARERS: gl.constexpr):
    """An empty board before ``HEARERS`` partitions."""
    single: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    numbers = gl.allocate_shared_memory(gl.int32, [SLOTS * NUMBERS, 1], single)
    full, empty = ring.make_barriers(SLOTS, HEARERS)
    return Board(numbers, full, empty)


@gluon.jit
def announce(board, number, there: gl.constexpr, tile):
    """Say that tile number ``number`` of this program is ``tile``, or that there is none; for one warp.

    Without a board, nothing is said.
    """
    if board is not None:
        slot, first = _free_slot(board, number)
        _write(board.numbers, first, 1 if there else 0)
        _write(board.numbers, first + 1, tile.batch)
        _write(board.numbers, first + 2, tile.head)
        _write(board.numbers, first + 3, tile.first_query)
        _write(board.numbers, first + 4, tile.q_start)
        _write(board.numbers, first + 5, tile.seqlen_q)
        _write(board.numbers, first + 6, tile.k_start)
        _write(board.numbers, first + 7, tile.seqlen_k)
        mbarrier.arrive(board.full.index(slot))


@gluon.jit
def announce_keys(board, number, there: gl.constexpr, tile):
    """Say that key tile number ``number`` of this program is ``tile``, or that there is none.

    For one warp.
    """
    slot, first = _free_slot(board, number)
    _write(board.numbers, first, 1 if there else 0)
    _write(board.numbers, first + 1, tile.batch)
    _write(board.numbers, first + 2, tile.head_k)
    _write(board.numbers, first + 3, tile.first_key)
    _write(board.numbers, first + 4, tile.q_batch)
    _write(board.numbers, first + 5, tile.q_start)
    _write(board.numbers, first + 6, tile.seqlen_q)
    _write(board.numbers, first + 7, tile.k_batch)
    _write(board.numbers, first + 8, tile.k_start)
    _write(board.numbers, first + 9, tile.seqlen_k)
    mbarrier.arrive(board.full.index(slot))


@gluon.jit
def keys_at(board, number, WARPS: gl.constexpr):
    """Whether there is a key tile number ``number``, and the tile; for a partition of so many warps."""
    slot = number % SLOTS
    mbarrier.wait(board.full.index(slot), number // SLOTS & 1)
    first = slot * NUMBERS
    there = _read(board.numbers, first, WARPS) > 0
    batch = _read(board.numbers, first + 1, WARPS)
    head_k = _read(board.numbers, first + 2, WARPS)
    first_key = _read(board.numbers, first + 3, WARPS)
    q_batch = _read(board.numbers, first + 4, WARPS)
    q_start = _read(board.numbers, first + 5, WARPS)
    seqlen_q = _read(board.numbers, first + 6, WARPS)
    k_batch = _read(board.numbers, first + 7, WARPS)
    k_start = _read(board.numbers, first + 8, WARPS)
    seqlen_k = _read(board.numbers, first + 9, WARPS)
    mbarrier.arrive(board.empty.index(slot))
    tile = backward_work.KeyTile(
        batch, head_k, first_key, q_batch, q_start, seqlen_q, k_batch, k_start, seqlen_k
    )
    return there, tile


@gluon.jit
def tile_at(board, number, call, turn, BLOCK_M: gl.constexpr, PAIRED: gl.constexpr):
    """The turn of tile number ``number``, whether there is one, and the tile; for four warps.

    Where nothing is announced, it is the first one from ``turn`` on.
    """
    if board is None:
        turn, tile = work.next_tile(call, turn, BLOCK_M, PAIRED)
        return turn, work.there_is(call, turn, PAIRED), tile
    else:
        there, tile = _hear(board, number)
        return turn, there, tile


@gluon.jit
def _hear(board, number):
    slot = number % SLOTS
    mbarrier.wait(board.full.index(slot), number // SLOTS & 1)
    first = slot * NUMBERS
    there = _read(board.numbers, first, 4) > 0
    batch = _read(board.numbers, first + 1, 4)
    head = _read(board.numbers, first + 2, 4)
    first_query = _read(board.numbers, first + 3, 4)
    q_start = _read(board.numbers, first + 4, 4)
    seqlen_q = _read(board.numbers, first + 5, 4)
    k_start = _read(board.numbers, first + 6, 4)
    seqlen_k = _read(board.numbers, first + 7, 4)
    mbarrier.arrive(board.empty.index(slot))
    return there, work.Tile(batch, head, first_query, 0, q_start, seqlen_q, 0, k_start, seqlen_k)


@gluon.jit
def _free_slot(board, number):
    """The slot of announcement ``number``, once it is empty, and where its numbers begin."""
    slot = number % SLOTS
    mbarrier.wait(board.empty.index(slot), (number // SLOTS & 1) ^ 1)
    return slot, slot * NUMBERS


@gluon.jit
def _write(numbers, place, value):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    numbers.index(place).store(gl.full([1], value, gl.int32, LAYOUT))


@gluon.jit
def _read(numbers, place, WARPS: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.max(numbers.index(place).load(LAYOUT), 0)
