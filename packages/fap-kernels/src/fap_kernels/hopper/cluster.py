"""Clusters: two programs side by side, each of which fetches half of what both read.

Where two programs sweep the same keys, each of them needs every tile in its own shared memory, but the L2
cache need not be read twice: the TMA unit can write what it fetches into the shared memory of both. So a ring
that they share has an *owner*, the one of the two that fetches its tiles for both; keys have one and values
the other. A stage is filled again once the readers in both programs have given it back to its owner.

    program 0    wait until K's stage is free in both, expect K, fetch K for both
                 wait until V has come before, expect V
    program 1    wait until K has come before, expect K
                 wait until V's stage is free in both, expect V, fetch V for both

Nobody expects a tile before the one before it has come; where tiles are given back to the other program, that
alone tells that its barrier may be used again.

Gluon offers none of this for programs that are not one and the same, so it is assembly here. It needs to know
what Gluon does not tell: where in shared memory tiles and barriers lie, and where the kernel's tensor maps
are. Triton lays out shared memory by size, the largest allocation first, so those of known sizes lie in this
order from the start; and tensor maps are kernel parameters, which have names. ``tests/test_hopper.py`` looks
for both in what each version of Triton makes of the kernels.

Neither program may address the other one before it has begun, nor after it has ended. So all warps say that
they are there, and those that address the other program wait for all; and where a program may be addressed
though it has nothing left to wait for, the same again at the end. The hardware counts all warps of a program,
those too that Triton adds to fill up a warpgroup: they are given a function that does nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr as unwrap
from triton.experimental.gluon.language._core import builtin

from .compat import as_int, assemble

__all__ = [
    "BARRIERS",
    "DESCRIPTOR",
    "EMPTY",
    "STAGES",
    "VECTOR",
    "Shared",
    "Vector",
    "arrive",
    "fill",
    "give_back",
    "publish_barriers",
    "wait",
]

DESCRIPTOR = gl.constexpr(9)
"""Kernel parameters that a descriptor of four dimensions is: its map, four sides, four strides."""

VECTOR = gl.constexpr(3)
"""The same of one dimension."""

STAGES = gl.constexpr(4)
"""At most, of a shared ring of the backward: so many barriers of each kind there are."""

BARRIERS = gl.constexpr((768, 512))
"""Bytes that the barriers of the backward's first shared ring take, and of its second, behind them: more than
anything else but tiles and the numbers of their rows, so that it is known where they lie. They are two
allocations, or Triton would have the warps of a warpgroup meet between waiting for one and for the other. The
forward's are those of :mod:`fap_kernels.hopper.mbarriers`."""

EMPTY = gl.constexpr(8 * STAGES.value)
"""How far behind the barriers of filled stages those of empty ones lie, in bytes."""

PANEL = 64
"""Columns that the TMA unit fetches at once: 128 bytes of them, as wide as shared memory's swizzle."""


class Shared(NamedTuple):
    """Where a ring lies in the shared memory of both programs that share it, in bytes from its start.

    Fields:
        first: the ring's first tile among those of its allocation.
        tiles: the first tile.
        full, empty: the barrier of the first stage; the others follow.
        owner: which program fetches.
    """

    first: Any
    tiles: Any
    full: Any
    empty: Any
    owner: Any


@builtin
def publish_barriers(_semantic: Any = None) -> None:
    """Let the other program see barriers that this thread has set up, once it has met this one."""
    assemble("fence.mbarrier_init.release.cluster; mov.u32 $0, 0;", [], _semantic)


@builtin
def arrive(_semantic: Any = None) -> None:
    """Tell both programs that this warp is here; all warps of both must."""
    assemble("barrier.cluster.arrive.release.aligned; mov.u32 $0, 0;", [], _semantic)


@builtin
def wait(_semantic: Any = None) -> None:
    """Wait until all warps of both programs have arrived. A warp may arrive again only after that."""
    assemble("barrier.cluster.wait.acquire.aligned; mov.u32 $0, 0;", [], _semantic)


@builtin
def give_back(shared: Any, stage: Any, pred: Any = True, _semantic: Any = None) -> None:
    """Tell the owner of a ring that this warp no longer needs a stage.

    It has waited for all that read the tile, so nothing of the memory's order is asked for.
    """
    text = """{
        .reg .pred elected, wanted;
        .reg .u32 barrier;
        elect.sync _|elected, -1;
        setp.ne.u32 wanted, $4, 0;
        and.pred elected, elected, wanted;
        mov.u32 barrier, global_smem;
        add.u32 barrier, barrier, $2;
        mad.lo.u32 barrier, $1, 8, barrier;
        mapa.shared::cluster.u32 barrier, barrier, $3;
        @elected mbarrier.arrive.shared::cluster.b64 _, [barrier];
        mov.u32 $0, 0;
    }"""
    _, _, _, empty, owner = shared
    assemble(text, [stage, empty, owner, as_int(pred, _semantic)], _semantic)


class Vector(NamedTuple):
    """A number for each row of a tile, to be fetched with it.

    Fields:
        descriptor: of all of them, one-dimensional.
        position: the first row's.
        place: where the first stage's lie in shared memory, in bytes from its start; the others' follow.
    """

    descriptor: Any
    position: Any
    place: Any


@builtin
def fill(
    shared: Any, stage: Any, phase: Any, descriptor: Any, parameter: Any, kernel: Any, coordinates: Any,
    vector: Any = None, vector_parameter: Any = None, meeting: Any = None, warp: Any = None, _semantic: Any = None,
) -> None:  # fmt: skip
    """Fetch a tile into a stage of a shared ring, if this program owns it, or else expect it; for one warp.

    With a ``meeting`` for the four warps of a warpgroup, each of which fetches a quarter of the columns. All
    wait, and meet before, so that none can still wait when what it waits for is over for the second time.

    Args:
        phase: as for :func:`fap_kernels.hopper.ring.fill`.
        descriptor: of the tensor, ``(batch, nheads, seqlen, head_dim)``.
        parameter: the number of its tensor map among the kernel's parameters, which is how many come before.
        kernel: its name.
        coordinates: where the tile begins.
        vector, vector_parameter: a :class:`Vector` of numbers of its rows, and its map's number, or None.
        meeting: the number of a named barrier.
    """
    block, kernel, meeting = descriptor.type.block_type, unwrap(kernel), unwrap(meeting)
    columns, size = block.shape[-1], block.nbytes
    bytes_expected = size
    fetch = """@{} cp.async.bulk.tensor.{}d.shared::cluster.global.mbarrier::complete_tx::bytes\
.multicast::cluster [place], [map, {{{}}}], [full], both;"""
    loads = f"""
        mov.b64 map, {kernel}_param_{unwrap(parameter)};
        cvta.param.u64 map, map;
        mov.u32 tile, global_smem;
        add.u32 tile, tile, $3;
        mad.lo.u32 tile, $1, {size}, tile;"""
    operands = [*coordinates[:-1]]
    if meeting is None:
        alone, first = "", "elected"
        for panel in range(columns // PANEL):
            loads += f"""
        mov.u32 column, {panel * PANEL};
        add.u32 place, tile, {panel * PANEL * size // columns};
        {fetch.format("elected", 4, "column, $9, $8, $7")}"""
    else:
        assert columns == 4 * PANEL, "there is a warp for each of four parts"
        # The first lane's number, since no other is known to be that of the whole warp.
        alone, first = f"""
        bar.sync {meeting}, 128;
        mov.u32 warp, $12;
        setp.eq.and.u32 first, warp, 0, elected;""", "first"
        loads += f"""
        mul.lo.u32 column, warp, {PANEL};
        mad.lo.u32 place, warp, {size // 4}, tile;
        {fetch.format("elected", 4, "column, $9, $8, $7")}
        and.pred first, first, own;"""
    if unwrap(vector) is not None:
        numbers, position, place = vector
        size = numbers.type.block_type.nbytes
        bytes_expected += size
        operands += [position, place]
        loads += f"""
        mov.b64 map, {kernel}_param_{unwrap(vector_parameter)};
        cvta.param.u64 map, map;
        mov.u32 place, global_smem;
        add.u32 place, place, $11;
        mad.lo.u32 place, $1, {size}, place;
        {fetch.format(first, 1, "$10")}"""
    text = f"""{{
        .reg .pred elected, own, over, first;
        .reg .u32 self, barrier, full, tile, place, column, warp;
        .reg .u64 map;
        .reg .u16 both;
        mov.u32 self, %cluster_ctarank;
        setp.eq.u32 own, self, $6;
        mov.u32 full, global_smem;
        mad.lo.u32 full, $1, 8, full;
        add.u32 barrier, full, $5;
        add.u32 full, full, $4;
        @!own mov.u32 barrier, full;
        again:
        mbarrier.try_wait.parity.shared.b64 over, [barrier], $2;
        @!over bra.uni again;
        elect.sync _|elected, -1;{alone}
        @{first} mbarrier.arrive.expect_tx.shared.b64 _, [full], {bytes_expected};
        and.pred elected, elected, own;
        mov.u16 both, 3;{loads}
        mov.u32 $0, 0;
    }}"""
    if meeting is not None:
        operands.append(warp)
    _, tiles, full, empty, owner = shared
    before = _semantic.xor_(_semantic.to_tensor(phase), _semantic.to_tensor(1))
    assemble(text, [stage, before, tiles, full, empty, owner, *operands], _semantic)
