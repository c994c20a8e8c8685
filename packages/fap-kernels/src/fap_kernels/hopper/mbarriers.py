"""Barriers of the forward's rings, at which each warp of a warpgroup waits and arrives by itself.

With Gluon's own operations the four warps of a warpgroup meet before each arrival, and between two waits for
barriers of one allocation: up to five times in a step, each for as long as the slowest of them takes. Nothing
asks for it. A product is over for a warp when it has waited for it, and to wait changes nothing. So here is
assembly, and a stage is free once every warp has given it back, not every warpgroup.

Assembly has to know where the barriers lie. Triton lays out shared memory by size, the largest allocation
first. So all barriers of the rings are one allocation, smaller than any tile and larger than whatever else
there may be, and lie behind all tiles; ``tests/test_hopper.py`` looks for them in what each version of Triton
makes of each row. Where a version is not known, these are Gluon's operations after all
(:func:`fap_kernels.hopper.conditions.places_are_known`).
"""

from __future__ import annotations

import math
from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr as unwrap
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from . import cluster
from .compat import as_int, assemble, reinterpret

__all__ = [
    "ALL",
    "KEYS",
    "KIND",
    "MARK",
    "QUERIES",
    "RING",
    "SLOTS",
    "VALUES",
    "WARPS",
    "behind",
    "clear_mark",
    "give_back",
    "make",
    "mark",
    "marked",
    "of_ring",
    "wait",
]

KEYS = gl.constexpr(0)
VALUES = gl.constexpr(1)
QUERIES = gl.constexpr(2)
"""The rings, in the order of their barriers."""

SLOTS = gl.constexpr(8)
"""At most, of a ring: so many barriers of each kind there are."""

KIND = gl.constexpr(8 * SLOTS.value)
"""Bytes of the barriers of a ring's filled slots, behind which come those of its empty ones."""

RING = gl.constexpr(2 * KIND.value)
"""Bytes of a ring's barriers."""

WARPS = gl.constexpr(4)
"""Of a warpgroup."""

ALL = gl.constexpr(12)
"""Rows of barriers that are set aside, of which rings use six and the mark one: 768 bytes, to be the largest
but for tiles."""

MARK = gl.constexpr(6 * KIND.value)
"""How far behind the first of them, in bytes, it stands whether a row of the program's is marked."""


@gluon.jit
def make(ROWS: gl.constexpr, LENGTH: gl.constexpr):
    """Room for barriers: two rows a ring, of ``LENGTH``, and as many more as make it large enough."""
    SINGLE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    return gl.allocate_shared_memory(gl.int64, [ROWS, LENGTH], SINGLE)


@gluon.jit
def of_ring(barriers, WHICH: gl.constexpr, COUNT: gl.constexpr, GIVEN_BACK: gl.constexpr):
    """``full`` and ``empty`` of a ring of ``COUNT`` slots, which wait for so many to give a slot back."""
    LENGTH: gl.constexpr = barriers.shape[1]
    gl.static_assert(COUNT <= LENGTH, "there are no more barriers")
    full = reinterpret(barriers.index(2 * WHICH), gl.int64, [LENGTH, 1], mbarrier.MBarrierLayout())
    empty = reinterpret(barriers.index(2 * WHICH + 1), gl.int64, [LENGTH, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(COUNT):
        mbarrier.init(full.index(slot), count=1)
        mbarrier.init(empty.index(slot), count=GIVEN_BACK)
    return full, empty


@builtin
def behind(tiles: Any, _semantic: Any = None) -> Any:
    """Where the barriers lie, in bytes from the start of shared memory, if these are all tiles or None."""
    return gl.constexpr(_bytes_of(list(tiles)))


@builtin
def wait(operands: Any, which: Any, slot: Any, phase: Any, pred: Any = True, _semantic: Any = None) -> None:
    """Wait until a slot of a ring is filled, unless ``pred`` says that it is not waited for; for each warp.

    Args:
        operands: the :class:`fap_kernels.hopper.forward.Operands`.
        which: the ring, ``KEYS``, ``VALUES`` or ``QUERIES``.
        phase: of the slot's barrier.
    """
    which = unwrap(which)
    if unwrap(operands.assembled) is None:
        full = _ring_of(operands, which).full.index(slot, _semantic=_semantic)
        mbarrier.wait(full, phase, pred=pred, _semantic=_semantic)
        return
    numbers, unless = [slot, phase], ""
    if unwrap(pred) is not True:
        numbers.append(as_int(pred, _semantic))
        unless = "setp.eq.s32 over, $3, 0; @over bra.uni done;"
    text = f"""{{
        .reg .pred over;
        .reg .u32 barrier;
        {unless}
        mov.u32 barrier, global_smem;
        mad.lo.u32 barrier, $1, 8, barrier;
        again:
        mbarrier.try_wait.parity.shared.b64 over, [barrier + {_place_of(operands, which)}], $2;
        @!over bra.uni again;
        done:
        mov.u32 $0, 0;
    }}"""
    assemble(text, numbers, _semantic)


@builtin
def give_back(operands: Any, which: Any, slot: Any, pred: Any = True, _semantic: Any = None) -> None:
    """Let a slot be filled again, as far as this warp is concerned; all four of a warpgroup must.

    The warp has waited for whatever read the slot: a product is over then, and a load once something has used
    what it brought, which is not to be taken for granted right behind it. Where two programs share the ring,
    the warp tells the one that fetches.

    Args:
        operands, which: as for :func:`wait`.
        pred: whether it is given back.
    """
    which = unwrap(which)
    shared = unwrap((operands.k_shared, operands.v_shared, None)[which])
    if shared is not None:
        cluster.give_back(shared, slot, pred, _semantic=_semantic)
        return
    if unwrap(operands.assembled) is None:
        empty = _ring_of(operands, which).empty.index(slot, _semantic=_semantic)
        mbarrier.arrive(empty, count=WARPS.value, pred=pred, _semantic=_semantic)
        return
    numbers, unless = [slot], ""
    if unwrap(pred) is not True:
        numbers.append(as_int(pred, _semantic))
        unless = "setp.ne.s32 wanted, $2, 0; and.pred elected, elected, wanted;"
    text = f"""{{
        .reg .pred elected, wanted;
        .reg .u32 barrier;
        elect.sync _|elected, -1;
        {unless}
        mov.u32 barrier, global_smem;
        mad.lo.u32 barrier, $1, 8, barrier;
        @elected mbarrier.arrive.shared.b64 _, [barrier + {_place_of(operands, which) + KIND.value}];
        mov.u32 $0, 0;
    }}"""
    assemble(text, numbers, _semantic)


@builtin
def clear_mark(operands: Any, _semantic: Any = None) -> None:
    """Say that no row is marked, before there are partitions."""
    text = f"""{{
        .reg .u32 place, none;
        mov.u32 place, global_smem;
        mov.u32 none, 0;
        st.shared.u32 [place + {_mark_of(operands)}], none;
        mov.u32 $0, 0;
    }}"""
    assemble(text, [], _semantic)


@builtin
def mark(operands: Any, row_lse: Any, unless: Any, _semantic: Any = None) -> None:
    """Mark the program, or both of a cluster, if a row's LSE is not a number, ``unless`` that is not 0."""
    places = [""]
    if unwrap(operands.k_shared) is not None:
        places = [f"mapa.shared::cluster.u32 place, own, {program};" for program in (0, 1)]
    space = "shared" if len(places) == 1 else "shared::cluster"
    stores = "".join(f"{place} @marked st.{space}.u32 [place], one;" for place in places)
    text = f"""{{
        .reg .pred marked;
        .reg .u32 own, place, one;
        setp.nan.f32 marked, $1, $1;
        setp.eq.and.u32 marked, $2, 0, marked;
        mov.u32 own, global_smem;
        add.u32 own, own, {_mark_of(operands)};
        mov.u32 place, own;
        mov.u32 one, 1;
        {stores}
        mov.u32 $0, 0;
    }}"""
    gl.inline_asm_elementwise(text, "=r,f,r", [row_lse, unless], gl.int32, False, 1, _semantic=_semantic)


@builtin
def marked(operands: Any, unless: Any, _semantic: Any = None) -> Any:
    """Whether a row was marked, as an int32; 0 ``unless`` that is 0. Those who mark have met those who ask.

    If so, all that this thread had the TMA unit store has arrived: what is computed again goes to the same
    places.
    """
    text = f"""{{
        .reg .pred found;
        .reg .u32 place;
        mov.u32 place, global_smem;
        ld.volatile.shared.u32 $0, [place + {_mark_of(operands)}];
        setp.eq.u32 found, $1, 0;
        @!found mov.u32 $0, 0;
        setp.ne.u32 found, $0, 0;
        @found cp.async.bulk.wait_group 0;
    }}"""
    return gl.inline_asm_elementwise(text, "=&r,r", [unless], gl.int32, False, 1, _semantic=_semantic)


def _mark_of(operands: Any) -> int:
    """Where the mark stands, in bytes from the start of shared memory."""
    return _place_of(operands, 0) + int(MARK.value)


def _ring_of(operands: Any, which: int) -> Any:
    return (operands.k_ring, operands.v_ring, operands.q_ring)[which]


def _place_of(operands: Any, which: int) -> int:
    """Where a ring's barriers lie, in bytes from the start of shared memory: behind all tiles."""
    tiles = [operands.k_ring.tiles, operands.q_ring.tiles, operands.staging]
    if unwrap(operands.k_shared) is None:  # else the tiles of keys and of values are one allocation
        tiles.append(operands.v_ring.tiles)
    return _bytes_of(tiles) + int(which * RING.value)


def _bytes_of(tiles: list[Any]) -> int:
    size = 0
    for memory in tiles:
        if unwrap(memory) is not None:
            sides = [int(unwrap(side)) for side in memory.type.shape]
            size += math.prod(sides) * int(memory.dtype.primitive_bitwidth) // 8
    return size
