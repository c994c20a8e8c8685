"""Rings of shared-memory tiles between the warp that fetches and the warpgroups that multiply."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ..language.rows import WRAPPING_ROWS
from . import cluster, mbarriers
from .compat import tma_load, tma_store


class Ring(NamedTuple):
    """Tiles that are filled and given back in turn.

    Fields:
        tiles: shared memory, one tile a stage; a tile has the shape of the descriptor's block.
        full: one barrier a stage; a phase of it ends when the tile has arrived.
        empty: one barrier a stage; a phase of it ends when every reader has given the tile back.
    """

    tiles: Any
    full: Any
    empty: Any


@gluon.jit
def make_tiles(like, COUNT: gl.constexpr):
    """Room for ``COUNT`` tiles of the descriptor ``like``."""
    return gl.allocate_shared_memory(like.dtype, [COUNT] + like.block_shape, like.layout)


@gluon.jit
def make_ring(tiles, barriers, WHICH: gl.constexpr, STAGES: gl.constexpr, READERS: gl.constexpr):
    """A ring of ``STAGES`` empty ones of these tiles, each read by ``READERS`` warpgroups.

    Args:
        barriers, WHICH: all rings' barriers, and which ring this is, of :mod:`fap_kernels.hopper.mbarriers`.
    """
    full, empty = mbarriers.of_ring(barriers, WHICH, STAGES, mbarriers.WARPS * READERS)
    return Ring(tiles, full, empty)


@gluon.jit
def make_shared_barriers(WHICH: gl.constexpr, STAGES: gl.constexpr, GIVEN_BACK: gl.constexpr):
    """``full`` and ``empty`` of the first or the second shared ring, one behind the other in memory.

    ``empty`` waits for ``GIVEN_BACK`` to give a stage back; what does is :mod:`fap_kernels.hopper.cluster`.
    """
    KINDS: gl.constexpr = cluster.BARRIERS[WHICH] // (8 * cluster.STAGES)
    full, empty = mbarriers.of_ring(mbarriers.make(KINDS, cluster.STAGES), 0, STAGES, GIVEN_BACK)
    cluster.publish_barriers()
    return full, empty


@gluon.jit
def make_barriers(STAGES: gl.constexpr, READERS: gl.constexpr):
    """Two barriers a stage, as in :class:`Ring`: ``full``, to be told once, and ``empty``, by each reader."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=READERS)
    return full, empty


@gluon.jit
def make_full(STAGES: gl.constexpr):
    """The ``full`` of them alone, for tiles that are given back by other means."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
    return full


@gluon.jit
def advance(stage, phase, STAGES: gl.constexpr):
    """The next stage of a ring, and the phase that its barriers are in."""
    stage += 1
    wrapped = stage == STAGES
    return gl.where(wrapped, 0, stage), gl.where(wrapped, phase ^ 1, phase)


@gluon.jit
def fill(ring, stage, phase, rows, head, first):
    """Fetch the tile of rows from ``first`` on into a stage, as soon as its readers have given it back."""
    # A barrier that has never completed a phase counts as having completed the one before the first.
    mbarrier.wait(ring.empty.index(stage), phase ^ 1)
    mbarrier.expect(ring.full.index(stage), rows.part0.block_type.nbytes)
    coordinates = coordinates_of(rows, head, first)
    tma_load(rows.part0, coordinates, ring.full.index(stage), ring.tiles.index(stage))


@gluon.jit
def tile(ring, shared, stage):
    """The tile of a stage, of a ring that two programs share where there is ``shared``."""
    if shared is None:
        return ring.tiles.index(stage)
    else:
        return ring.tiles.index(shared.first + stage)


class NumberedTiles(NamedTuple):
    """Tiles of rows beside a number for each row; they are given back by other means, so without ``empty``.

    Fields:
        tiles, full: as in :class:`Ring`.
        numbers: shared memory, a float32 vector a stage.
    """

    tiles: Any
    numbers: Any
    full: Any


@gluon.jit
def make_numbered_tiles(like, vector, STAGES: gl.constexpr):
    """Room for ``STAGES`` blocks of the descriptor ``like``, and of the descriptor ``vector``."""
    tiles = make_tiles(like, STAGES)
    numbers = gl.allocate_shared_memory(vector.dtype, [STAGES] + vector.block_shape, vector.layout)
    return NumberedTiles(tiles, numbers, make_full(STAGES))


@gluon.jit
def fill_numbered(numbered, stage, rows, head, first, vector, position):
    """Fetch a tile of rows and its numbers, from ``position`` of the vector on, into a stage that is free."""
    full = numbered.full.index(stage)
    mbarrier.expect(full, rows.part0.block_type.nbytes + vector.block_type.nbytes)
    tma_load(rows.part0, coordinates_of(rows, head, first), full, numbered.tiles.index(stage))
    tma_load(vector, [position], full, numbered.numbers.index(stage))


@gluon.jit
def drain(tile, rows, head, first, FIRST_COLUMN: gl.constexpr = 0):
    """Write a tile of shared memory to those rows from ``first`` on, and columns, that exist."""
    tma_store(rows.part0, coordinates_of(rows, head, first, FIRST_COLUMN), tile)


@gluon.jit
def coordinates_of(rows, head, first, FIRST_COLUMN: gl.constexpr = 0):
    """Where a descriptor finds a tile; ``fap_kernels.language.rows.WRAPPING_ROWS`` explains packed rows."""
    if rows.packed is None:
        return [rows.batch, head, first, FIRST_COLUMN]
    else:
        row = WRAPPING_ROWS - rows.length + first
        return [WRAPPING_ROWS, rows.packed + rows.length, head, row, FIRST_COLUMN]


@gluon.jit
def matrix(tile, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """A tile of shared memory without its leading dimensions of one."""
    return tile.reshape([ROWS, COLUMNS])
