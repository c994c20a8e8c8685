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

from ..language import spans
from . import backward_work, mbarriers, ring, work

SLOTS = gl.constexpr(2)
NUMBERS = gl.constexpr(12)
"""Room for those of a slot: whether there is a tile, and up to nine that say where; a multiple of four, so
that four can be read at once."""


class Board(NamedTuple):
    """Where announcements stand.

    Fields:
        numbers: shared memory, ``NUMBERS`` int32 a slot: whether there is a tile, 1 or 0, and where it is.
        full: one barrier a slot; a phase of it ends when an announcement stands there.
        empty: one barrier a slot; a phase of it ends when everyone has heard it.
    """

    numbers: Any
    full: Any
    empty: Any


@gluon.jit
def make_board(HEARERS: gl.constexpr):
    """An empty board before ``HEARERS`` partitions."""
    full, empty = ring.make_barriers(SLOTS, HEARERS)
    return Board(_room(), full, empty)


@gluon.jit
def make_board_of(barriers, HEARERS: gl.constexpr):
    """An empty board before ``HEARERS`` warpgroups, each warp of which waits by itself.

    Args:
        barriers: of :mod:`fap_kernels.hopper.mbarriers`.
    """
    READERS: gl.constexpr = mbarriers.WARPS * HEARERS
    full, empty = mbarriers.of_ring(barriers, mbarriers.ANNOUNCEMENTS, SLOTS, READERS)
    return Board(_room(), full, empty)


@gluon.jit
def _room():
    SINGLE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.int32, [SLOTS * NUMBERS, 1], SINGLE)


@gluon.jit
def announce(board, number, call, there: gl.constexpr, tile):
    """Say that tile number ``number`` of this program is ``tile``, or that there is none; for one warp.

    Without a board, nothing is said.
    """
    if board is not None:
        if call.cu_seqlens_q is not None or call.cu_seqlens_k is not None:
            place = (
                tile.batch, tile.head, tile.first_query, tile.q_start, tile.seqlen_q, tile.k_start,
                tile.seqlen_k,
            )  # fmt: skip
            _say(board, number, there, place)
        else:
            _say(board, number, there, (tile.batch, tile.head, tile.first_query))


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
    slot = number % SLOTS
    mbarrier.wait(board.full.index(slot), number // SLOTS & 1)
    there, n = _read_all(board, slot, 9, WARPS)
    mbarrier.arrive(board.empty.index(slot))
    return there > 0, backward_work.KeyTile(n[0], n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8])


@gluon.jit
def tile_at(operands, number, turn, BLOCK_M: gl.constexpr, PAIRED: gl.constexpr):
    """The turn of tile number ``number``, whether there is one, and the tile; for a warpgroup.

    Where nothing is announced, it is the first one from ``turn`` on. Else each warp waits by itself for the
    announcement, as :mod:`fap_kernels.hopper.mbarriers` has it.

    Args:
        operands: the :class:`fap_kernels.hopper.forward.Operands`.
    """
    call, board = operands.call, operands.board
    if board is None:
        turn, tile = work.next_tile(call, turn, BLOCK_M, PAIRED)
        return turn, work.there_is(call, turn, PAIRED), tile
    else:
        slot = number % SLOTS
        # Of other sequences the rest is known.
        PACKED: gl.constexpr = call.cu_seqlens_q is not None or call.cu_seqlens_k is not None
        mbarriers.wait(operands, mbarriers.ANNOUNCEMENTS, slot, number // SLOTS & 1)
        there, n = _read_all(board, slot, 7 if PACKED else 3, 4)
        # The slot is given back once all of it has come, which takes an instruction that waits for it: none
        # of the numbers is negative, and no compiler knows.
        known = there
        for number_of in gl.static_range(len(n)):
            known |= n[number_of]
        mbarriers.give_back(operands, mbarriers.ANNOUNCEMENTS, slot, pred=known >= 0)
        if PACKED:
            q_batch = 0 if call.cu_seqlens_q is not None else n[0]
            k_batch = 0 if call.cu_seqlens_k is not None else n[0]
            tile = work.Tile(n[0], n[1], n[2], q_batch, n[3], n[4], k_batch, n[5], n[6])
        else:
            q_batch, q_start, seqlen_q = spans.span_of(None, None, call.seqlen_q, n[0])
            k_batch, k_start, seqlen_k = spans.span_of(None, None, call.seqlen_k, n[0])
            tile = work.Tile(n[0], n[1], n[2], q_batch, q_start, seqlen_q, k_batch, k_start, seqlen_k)
        return turn, there > 0, tile


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
def _read_all(board, slot, COUNT: gl.constexpr, WARPS: gl.constexpr):
    """Whether a slot's announcement is of a tile, 1 or 0, and the ``COUNT`` numbers that say where it is."""
    first = slot * NUMBERS
    there = _read(board.numbers, first, WARPS)
    place = ()
    for n in gl.static_range(COUNT):
        place += (_read(board.numbers, first + 1 + n, WARPS),)  # type: ignore[assignment]
    return there, place


@gluon.jit
def _write(numbers, place, value):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    numbers.index(place).store(gl.full([1], value, gl.int32, LAYOUT))


@gluon.jit
def _read(numbers, place, WARPS: gl.constexpr):
    LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.max(numbers.index(place).load(LAYOUT), 0)
