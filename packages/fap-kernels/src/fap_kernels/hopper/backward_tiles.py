"""What the schedules of the Hopper backward share: how tiles come, are weighed, and leave as gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from ..language import masks, rows, scores
from ..language import softmax as weights
from . import backward_work, cluster, hiding, ring, softmax, work
from .compat import reinterpret, tma_load
from .config import LIFT

ROWS = softmax.ROWS
THREADS = gl.constexpr(256)
"""Of two warpgroups."""

WITH_ANOTHER = gl.constexpr(288)
"""Of them and a warp: the one that fetches, or one that sends."""

KEY_TILES = gl.constexpr(2)
"""So many have programs that stay room for: the next one comes while one is worked on."""

QUERIES = gl.constexpr(0)
DOUTS = gl.constexpr(3 * cluster.DESCRIPTOR.value)
LSE = gl.constexpr(6 * cluster.DESCRIPTOR.value)
DELTA = gl.constexpr(6 * cluster.DESCRIPTOR.value + cluster.VECTOR.value)
"""The numbers of their tensor maps among the parameters of each kernel that runs in clusters."""

NUMBERS = gl.constexpr(224 << 10)
BARRIERS = gl.constexpr(225 << 10)
"""Where the numbers of rows lie in the shared memory of a cluster's programs, and where barriers. All tiles
lie before them: at 128 columns 128 KB that the TMA unit fills, 64 KB of dQ, 32 KB of dS; above, 192, 16 and
16 KB."""

LOWER = gl.constexpr(2.0**-LIFT)
"""What the LSE is lowered by lifts all weights, and so all gradients, until they leave."""


class Operands(NamedTuple):
    """What the warps of a program share.

    Fields:
        call, score: what to compute.
        q_shared, dout_shared: where two programs share ``queries`` and ``douts``, else None.
        alibi_stride: from one batch entry's ALiBi slopes to the next one's.
        queries, douts: tiles of queries, numbered with their LSE, and of the output's gradient, with -delta.
        k, v, k_full, v_full: the key tile, and what tells when it is there. The keys of a warpgroup are 64 of
            its rows. Its gradients leave through here. Where programs stay there are two of each, for tiles
            that take turns. In a cluster both ``k`` and ``v`` are the allocation that these tiles are in.
        keys_free: barriers that tell when the one or the other may be filled again; None where there is one.
        board: where the warp that fetches announces key tiles to programs that stay, else None.
        exchange: dS of two steps, keys by queries.
        staging: a tile of dQ of two steps, as registers hold it, of which each warpgroup has half. A third
            warpgroup has it to itself, for tiles of 64 x 64.
        dk, dv, dq_acc: descriptors of the results.
        handover: where tiles of dQ are handed to warps that send them, else None.
        dq, dq_sums: where the last one to add finishes dQ, its descriptor and the address of ``dq_acc``.
        additions: how many key tiles were counted that added to each 64 rows of ``dq_acc``; None if none is
            counted, and it holds zeros at first.
        founded: True where the first key tile to visit a query tile stores, and is counted alone, and those
            that follow add in any order; all sweep the queries downwards then. Else None.
        rows_padded: how many rows a head has in ``dq_acc`` and in the vectors.
    """

    call: Any
    score: Any
    q_shared: Any
    dout_shared: Any
    alibi_stride: Any
    queries: Any
    douts: Any
    k: Any
    v: Any
    k_full: Any
    v_full: Any
    keys_free: Any
    board: Any
    exchange: Any
    staging: Any
    dk: Any
    dv: Any
    dq: Any
    dq_acc: Any
    handover: Any
    dq_sums: Any
    additions: Any
    founded: Any
    rows_padded: Any


class Tiles(NamedTuple):
    """Shared memory that is filled by what fetches; the fields are those of :class:`Operands`."""

    queries: Any
    douts: Any
    k: Any
    v: Any
    k_full: Any
    v_full: Any


@gluon.jit
def make_tiles(q_part0, k_part0, v_part0, dout_part0, lse_part0, delta_part0, STAGES: gl.constexpr):
    """Room for a key tile, and for ``STAGES`` tiles of queries and of the output's gradient."""
    gl.static_assert(STAGES <= 2, "there are no more barriers")
    queries = ring.make_numbered_tiles(q_part0, lse_part0, STAGES)
    douts = ring.make_numbered_tiles(dout_part0, delta_part0, STAGES)
    k = gl.allocate_shared_memory(k_part0.dtype, k_part0.block_shape, k_part0.layout)
    v = gl.allocate_shared_memory(v_part0.dtype, v_part0.block_shape, v_part0.layout)
    k_full, v_full = _make_key_barriers()
    return Tiles(queries, douts, k, v, k_full, v_full)


@gluon.jit
def make_shared_tiles(q_part0, k_part0, lse_part0, STAGES: gl.constexpr, GIVEN_BACK: gl.constexpr):
    """The same where two programs of a cluster share queries and the output's gradient.

    All tiles are one allocation, in pieces as large as a key tile: keys, values, queries, gradients. The
    numbers of the latter are another, and their barriers two more. ``k`` and ``v`` are all of the first.

    Args:
        GIVEN_BACK: how many give a stage back, of both programs.
    """
    # A key tile has as many bytes as two tiles of queries, or as one.
    RING: gl.constexpr = STAGES * q_part0.block_type.nbytes // k_part0.block_type.nbytes
    tiles = gl.allocate_shared_memory(k_part0.dtype, [2 + 2 * RING] + k_part0.block_shape, k_part0.layout)
    LENGTH: gl.constexpr = lse_part0.block_shape[0]
    numbers = gl.allocate_shared_memory(lse_part0.dtype, [2, STAGES * LENGTH], lse_part0.layout)
    queries = _shared_tiles(tiles, 2, numbers, 0, q_part0, lse_part0, STAGES, GIVEN_BACK)
    douts = _shared_tiles(tiles, 2 + RING, numbers, 1, q_part0, lse_part0, STAGES, GIVEN_BACK)
    k_full, v_full = _make_key_barriers()
    return Tiles(queries, douts, tiles, tiles, k_full, v_full)


@gluon.jit
def _shared_tiles(
    tiles, FIRST: gl.constexpr, numbers, WHICH: gl.constexpr, like, vector, STAGES: gl.constexpr,
    GIVEN_BACK: gl.constexpr,
):  # fmt: skip
    SHAPE: gl.constexpr = [STAGES] + like.block_shape
    LENGTHS: gl.constexpr = [STAGES] + vector.block_shape
    full, _ = ring.make_shared_barriers(WHICH, STAGES, GIVEN_BACK)
    return ring.NumberedTiles(
        reinterpret(tiles.index(FIRST), like.dtype, SHAPE, like.layout),
        reinterpret(numbers.index(WHICH), vector.dtype, LENGTHS, vector.layout),
        full,
    )


@gluon.jit
def _make_key_barriers():
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    return k_full, v_full


@gluon.jit
def begin(operands, WAIT: gl.constexpr):
    """In a cluster, say that this warp is here; with ``WAIT``, wait for all.

    At the end there is nothing to wait for: each program has waited for all that the other one did to it. No
    warp of it ends before the last of them has, so that those that have only arrived never count as gone.
    """
    if operands.q_shared is not None:
        cluster.arrive()
        if WAIT:
            cluster.wait()


@gluon.jit
def keys_of(operands, step):
    """The key tile of a program that has one alone.

    In a cluster its place is made of the number of a step, which makes 0 of it. No compiler knows that, or the
    addresses of all parts would be kept from step to step, for which there are too few uniform registers. A
    ``step`` that is 0 itself lets them be kept.
    """
    if operands.q_shared is None:
        return operands.k
    else:
        return operands.k.index(step >> 30)


@gluon.jit
def values_of(operands, step):
    """Its tile of values, as :func:`keys_of` finds that of keys."""
    if operands.q_shared is None:
        return operands.v
    else:
        return operands.v.index(1 + (step >> 30))


@gluon.jit
def key_tile_of(operands, item, BLOCK_N: gl.constexpr):
    """Key tile number ``item``."""
    # In a fixed order, a head's last key tile adds first: under a causal mask it starts at later queries than
    # the others, and is always ahead of them.
    LAST_FIRST: gl.constexpr = operands.additions is not None and operands.founded is None
    return backward_work.key_tile_of(operands.call, item, BLOCK_N, LAST_FIRST)


@gluon.jit
def work_of(operands, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """The key tile of a program that has one alone, and its sweep."""
    call = operands.call
    tile = key_tile_of(operands, work.program(call), BLOCK_N)
    return tile, backward_work.sweep_of(call, tile, 0, 0, BLOCK_M, BLOCK_N)


@gluon.jit
def sweep_queries(
    STEP: gl.constexpr, HIDDEN_STEP: gl.constexpr, WARPGROUP: gl.constexpr, operands, tile, sweep, gradients,
    WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Take every query tile that sees the keys into the ``gradients``, head after head.

    They come upwards, or downwards where dQ is founded; steps are numbered in the order in which they come.

    Args:
        STEP: the function that takes in one of them, with or without a mask, and returns the gradients.
        HIDDEN_STEP: the function for one that sees none of them; None where there is no such tile.
        gradients: what a step starts from, zeros at first.
    """
    # Both ways are written out: with a function for each loop other machine code is made of the same steps.
    for member in range(operands.call.group):
        if operands.founded is None:
            if HIDDEN_STEP is not None:
                for number in range(sweep.hidden):
                    step = sweep.steps_before + member * sweep.count + number
                    HIDDEN_STEP(WARPGROUP, operands, step, WIDTH, BLOCK_M, BLOCK_N, STAGES)
            for number in range(sweep.hidden, sweep.leading):
                gradients = STEP(
                    WARPGROUP, operands, tile, sweep, member, number, gradients, WIDTH, BLOCK_M, BLOCK_N,
                    STAGES, True,
                )  # fmt: skip
            for number in range(sweep.leading, sweep.unmasked_end):
                gradients = STEP(
                    WARPGROUP, operands, tile, sweep, member, number, gradients, WIDTH, BLOCK_M, BLOCK_N,
                    STAGES, False,
                )  # fmt: skip
            if operands.call.window_left is not None:
                for number in range(sweep.unmasked_end, sweep.count):
                    gradients = STEP(
                        WARPGROUP, operands, tile, sweep, member, number, gradients, WIDTH, BLOCK_M, BLOCK_N,
                        STAGES, True,
                    )  # fmt: skip
        else:  # the same from the last one to the first
            if operands.call.window_left is not None:
                for number in range(sweep.count - sweep.unmasked_end):
                    gradients = STEP(
                        WARPGROUP, operands, tile, sweep, member, number, gradients, WIDTH, BLOCK_M, BLOCK_N,
                        STAGES, True,
                    )  # fmt: skip
            for number in range(sweep.count - sweep.unmasked_end, sweep.count - sweep.leading):
                gradients = STEP(
                    WARPGROUP, operands, tile, sweep, member, number, gradients, WIDTH, BLOCK_M, BLOCK_N,
                    STAGES, False,
                )  # fmt: skip
            for number in range(sweep.count - sweep.leading, sweep.count - sweep.hidden):
                gradients = STEP(
                    WARPGROUP, operands, tile, sweep, member, number, gradients, WIDTH, BLOCK_M, BLOCK_N,
                    STAGES, True,
                )  # fmt: skip
            if HIDDEN_STEP is not None:
                for number in range(sweep.count - sweep.hidden, sweep.count):
                    step = sweep.steps_before + member * sweep.count + number
                    HIDDEN_STEP(WARPGROUP, operands, step, WIDTH, BLOCK_M, BLOCK_N, STAGES)
    return gradients


@gluon.jit
def first_query_of(operands, sweep, number, BLOCK_M: gl.constexpr):
    """First query of the tile that a sweep comes to as number ``number``."""
    DOWNWARDS: gl.constexpr = operands.founded is not None
    return backward_work.first_query_of(sweep, number, BLOCK_M, DOWNWARDS)


@gluon.jit
def fill_keys(operands, full, place, part, tile):
    """Fetch the tile of keys, or of values, by its descriptor ``part``."""
    packed = tile.k_start if operands.call.cu_seqlens_k is not None else None
    k_rows = rows.Rows(None, None, part, None, tile.k_batch, packed, tile.seqlen_k, None)
    mbarrier.expect(full, part.block_type.nbytes)
    tma_load(part, ring.coordinates_of(k_rows, tile.head_k, tile.first_key), full, place)


@gluon.jit
def fill(
    operands, numbered, part, vector, tile, sweep, step,
    BLOCK_M: gl.constexpr, STAGES: gl.constexpr, PADDING: gl.constexpr,
):  # fmt: skip
    """Fetch the queries of a step, or the output's gradient, and their numbers into a stage that is free."""
    call = operands.call
    member, number = step // sweep.count, step % sweep.count
    head = tile.head_k * call.group + member
    first_query = first_query_of(operands, sweep, number, BLOCK_M)
    packed = tile.q_start if call.cu_seqlens_q is not None else None
    q_rows = rows.Rows(None, None, part, None, tile.q_batch, packed, tile.seqlen_q, None)
    position = backward_work.vector_position(call, tile, head, first_query, operands.rows_padded, PADDING)
    stage = (sweep.steps_before + step) % STAGES
    ring.fill_numbered(numbered, stage, q_rows, head, first_query, vector, position)


@gluon.jit
def fill_shared(
    operands, shared, part, vector, PLACE: gl.constexpr, tile, sweep, step, KERNEL: gl.constexpr,
    MAP: gl.constexpr, VECTOR_MAP: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    PADDING: gl.constexpr, MEETING: gl.constexpr, warp,
):  # fmt: skip
    """The same for both programs of a cluster, once the stage is free in both; or neither, by the other one.

    Args:
        PLACE: where the first stage's numbers lie in shared memory.
        KERNEL, MAP, VECTOR_MAP, MEETING: as for :func:`fap_kernels.hopper.cluster.fill`.
    """
    call = operands.call
    member, number = step // sweep.count, step % sweep.count
    head = tile.head_k * call.group + member
    first_query = first_query_of(operands, sweep, number, BLOCK_M)
    position = backward_work.vector_position(call, tile, head, first_query, operands.rows_padded, PADDING)
    coordinates = [tile.q_batch, head, first_query, 0]
    numbers = cluster.Vector(vector, position, PLACE)
    phase = step // STAGES & 1
    cluster.fill(
        shared, step % STAGES, phase, part, MAP, KERNEL, coordinates, numbers, VECTOR_MAP, MEETING, warp
    )  # fmt: skip


@gluon.jit
def weigh(
    operands, tile, head, first_query, first_key, s, row_lse, BLOCK_M: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """The weights of 64 keys, keys by queries, from their products and the queries' LSE."""
    S: gl.constexpr = s.type.layout
    query = first_query + gl.arange(0, BLOCK_M, gl.SliceLayout(0, S))[None, :]
    key = first_key + gl.arange(0, ROWS, gl.SliceLayout(1, S))[:, None]
    call, score = operands.call, operands.score
    slopes = score.slopes
    if slopes is not None:
        slopes += tile.batch * operands.alibi_stride
    entry_score = scores.Scores(score.scale, score.folded_scale, score.softcap, slopes)
    diagonal = tile.seqlen_k - tile.seqlen_q
    window = masks.Window(call.window_left, call.window_right, diagonal, tile.seqlen_q, tile.seqlen_k)
    x = scores.logits(entry_score, head, s, masks.distance(window, query, key))
    if MASKED:
        x = hiding.hide(window, x, query, key)
    return weights.weights_of(x, scores.unit(entry_score), row_lse[None, :])


@gluon.jit
def as_registers_hold_it(dq):
    """A 64 x 64 accumulator as ``(16, 256)``: each thread's numbers side by side, four at a time.

    :func:`fap_kernels.hopper.query_grads.load_tile` reads it.
    """
    # Rows: warp, half, row of a quad. Columns: group of eight, lane of a quad, neighbour.
    parts = dq.reshape([4, 2, 8, 8, 4, 2])
    return parts.permute([3, 0, 2, 4, 1, 5]).reshape([16, 256])


@gluon.jit
def as_matrix(lines):
    """What :func:`as_registers_hold_it` made of a 64 x 64 tile, as this tile again."""
    return lines.reshape([8, 4, 8, 4, 2, 2]).permute([1, 4, 2, 0, 3, 5]).reshape([ROWS, ROWS])


@gluon.jit
def store(
    operands, place_of_all, WARPGROUP: gl.constexpr, acc, part, tile, WIDTH: gl.constexpr,
    HEIGHT: gl.constexpr,
):  # fmt: skip
    """Round the accumulator of a warpgroup's 64 keys and start its way to memory.

    Args:
        place_of_all: a tile of ``HEIGHT`` rows that nobody reads any more, of which 64 are the warpgroup's.
        part: the descriptor of where they go.
    """
    packed = tile.k_start if operands.call.cu_seqlens_k is not None else None
    k_rows = rows.Rows(None, None, part, None, tile.k_batch, packed, tile.seqlen_k, None)
    ROW_DIMENSION: gl.constexpr = len(place_of_all.shape) - 2
    place = place_of_all.slice(WARPGROUP * ROWS, ROWS, ROW_DIMENSION)
    ring.matrix(place_of_all, HEIGHT, WIDTH).slice(WARPGROUP * ROWS, ROWS, 0).store(acc.to(part.dtype))
    fence_async_shared()
    ring.drain(place, k_rows, tile.head_k, tile.first_key + WARPGROUP * ROWS)
