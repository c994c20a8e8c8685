"""Announcements: the warp that fetches says what comes next, where the others cannot know it.

That is which query tile of packed sequences comes next. To find out takes a bisection, for which the
warpgroups that multiply have neither the time, at the end of each tile, nor the registers. The warp that
fetches knows two key tiles earlier than they need to. Or it is the query tile, in the backward the key tile,
of which that warp has drawn the ticket.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from . import backward_work, ring, work
from .config import MOST_DRAWN

SLOTS = gl.constexpr(2)
NUMBERS = gl.constexpr(10)
MOST = gl.constexpr(MOST_DRAWN)


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
def make_drawn():
    """Room for the tickets that a program has drawn."""
    single: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.int32, [MOST, 1], single)


@gluon.jit
def keep(drawn, number, turn):
    """Write down the turn of tile number ``number``; for one warp."""
    _write(drawn, number, turn)


@gluon.jit
def kept(drawn, number):
    """The turn of tile number ``number``, for the warp that has written it down."""
    return _read(drawn, number, 1)


@gluon.jit
def announce(board, number, there: gl.constexpr, tile):
    """Say that tile number ``number`` of this program is ``tile``, or that there is none; for one warp.

    Without a board, nothing is said.
    """
    if board is not None:
        place = (
            tile.batch, tile.head, tile.first_query, tile.q_start, tile.seqlen_q, tile.k_start, tile.seqlen_k,
        )  # fmt: skip
        _say(board, number, there, place)


@gluon.jit
def announce_keys(board, number, there: gl.constexpr, tile):
    """Say that key tile number ``number`` of this program is ``tile``, or that there is none.

    For one warp.
    """
    place = (
        tile.batch, tile.head_k, tile.first_key, tile.q_batch, tile.q_start, tile.seqlen_q, tile.k_batch,
        tile.k_start, tile.seqlen_k,
    )  # fmt: skip
    _say(board, number, there, place)


@gluon.jit
def keys_at(board, number, WARPS: gl.constexpr):
    """Whether there is a key tile number ``number``, and the tile; for a partition of so many warps."""
    there, n = _hear(board, number, 9, WARPS)
    return there, backward_work.KeyTile(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8])


@gluon.jit
def tile_at(board, number, call, turn, BLOCK_M: gl.constexpr, PAIRED: gl.constexpr):
    """The turn of tile number ``number``, whether there is one, and the tile; for four warps.

    Where nothing is announced, it is the first one from ``turn`` on.
    """
    if board is None:
        turn, tile = work.next_tile(call, turn, BLOCK_M, PAIRED)
        return turn, work.there_is(call, turn, PAIRED), tile
    else:
        there, n = _hear(board, number, 7, 4)
        q_batch = 0 if call.cu_seqlens_q is not None else n[0]
        k_batch = 0 if call.cu_seqlens_k is not None else n[0]
        return turn, there, work.Tile(n[0], n[1], n[2], q_batch, n[3], n[4], k_batch, n[5], n[6])


@gluon.jit
def _say(board, number, there: gl.constexpr, place):
    """Write announcement ``number``, with the numbers that say where the tile is, once its slot is empty."""
    slot = number % SLOTS
    mbarrier.wait(board.empty.index(slot), (number // SLOTS & 1) ^ 1)
    first = slot * NUMBERS
    _write(board.numbers, first, 1 if there else 0)
    for n in gl.static_range(len(place)):
        _write(board.numbers, first + 1 + n, place[n])
    mbarrier.arrive(board.full.index(slot))


@gluon.jit
def _hear(board, number, COUNT: gl.constexpr, WARPS: gl.constexpr):
    """Whether announcement ``number`` is of a tile, and the ``COUNT`` numbers that say where it is."""
    slot = number % SLOTS
    mbarrier.wait(board.full.index(slot), number // SLOTS & 1)
    first = slot * NUMBERS
    there = _read(board.numbers, first, WARPS) > 0
    place = ()
    for n in gl.static_range(COUNT):
        place += (_read(board.numbers, first + 1 + n, WARPS),)  # type: ignore[assignment]
    mbarrier.arrive(board.empty.index(slot))
    return there, place


@gluon.jit
def _write(numbers, place, value):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    numbers.index(place).store(gl.full([1], value, gl.int32, LAYOUT))


@gluon.jit
def _read(numbers, place, WARPS: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.max(numbers.index(place).load(LAYOUT), 0)
