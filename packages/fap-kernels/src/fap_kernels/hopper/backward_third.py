"""The third warpgroup of the Hopper backward: it makes dQ of what the other two hand on.

It multiplies dS, which comes in a slot of the exchange, by the keys, in tiles of 64 x 64, and has the TMA
unit add them up in memory, by itself or, where the order is fixed, by other warps. Where no warp is left to
fetch, it does that too: between its products it refills the stages that the others have given back.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..language import grid
from . import announcements, backward_tiles, backward_work, barriers, order, ring
from .backward_tiles import DELTA, DOUTS, KEY_TILES, LSE, NUMBERS, QUERIES, ROWS, THREADS
from .compat import reinterpret, tma_add, tma_store

SLOTS = gl.constexpr(2)
"""Of the exchange."""

ALL = gl.constexpr(384)
"""Threads of the three warpgroups."""

MEETING = barriers.QUERIES_FREE
"""Where the warps of the third warpgroup meet to fetch, in a cluster, where stages are given back otherwise."""

RELAY = gl.constexpr("hopper_backward_relay_kernel")
"""The kernel in which no warp is left to fetch."""


class Handover(NamedTuple):
    """Barriers about each place of the staging memory, between who fills it and the warp that sends from it.

    Fields:
        full: a phase of it ends when a tile is there.
        empty: a phase of it ends when the tile has left.
    """

    full: Any
    empty: Any


@gluon.jit
def make_handover(PLACES: gl.constexpr):
    """Barriers for empty places."""
    full, empty = ring.make_barriers(PLACES, 1)
    return Handover(full, empty)


@gluon.jit
def make_dq(
    operands, parts, HANDING_ON: gl.constexpr, LOWER: gl.constexpr, WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PADDING: gl.constexpr,
):  # fmt: skip
    """Make dQ of a program's only key tile, which it fetches, and query tiles as stages become free.

    Args:
        parts: the descriptors of q, k, v, dout, lse and -delta.
        HANDING_ON: how many warpgroups write into each slot; each waits for the slots by a barrier of its
            own, ``SLOT_FREE`` the first and ``SLOT_FREE_TOO`` the second.
        LOWER: what dS has to be multiplied by, besides softmax_scale.
    """
    tile, sweep = backward_tiles.work_of(operands, BLOCK_M, BLOCK_N)
    steps = operands.call.group * sweep.count
    warp = gl.inline_asm_elementwise(
        "{ mov.u32 $0, %tid.x; shr.u32 $0, $0, 5; shfl.sync.idx.b32 $0, $0, 0, 31, -1; and.b32 $0, $0, 3; }",
        "=r,r", [steps], gl.int32, is_pure=False, pack=1,
    )
    backward_tiles.begin(operands, True)
    keys = backward_tiles.keys_of(operands, 0)
    _fetch_first(operands, warp, keys, parts, tile, sweep, steps, BLOCK_M, STAGES, PADDING)
    mbarrier.wait(operands.k_full, 0, pred=steps > 0)
    _make_steps(
        operands, keys, (parts, warp), tile, sweep, steps, 0, HANDING_ON, LOWER, WIDTH, BLOCK_M, BLOCK_N,
        STAGES, PADDING, False,
    )  # fmt: skip
    tma.store_wait(0)


@gluon.jit
def make_dq_of_all(
    operands, HANDING_ON: gl.constexpr, LOWER: gl.constexpr, WIDTH: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PADDING: gl.constexpr,
):  # fmt: skip
    """Make dQ of one key tile after the other, as they are announced; another warp fetches.

    ``handed`` is of how many steps it has handed dQ to the warps that send. The arguments are those of
    :func:`make_dq`.
    """
    grid.wait_for_previous()
    number, steps_before, handed = 0, 0, 0
    there, tile = announcements.keys_at(operands.board, 0, 4)
    while there:
        sweep = backward_work.sweep_of(operands.call, tile, number, steps_before, BLOCK_M, BLOCK_N)
        steps = operands.call.group * sweep.count
        place = number % KEY_TILES
        k = operands.k.index(place)
        mbarrier.wait(operands.k_full.index(place), number // KEY_TILES & 1)
        if operands.dq is None:
            _make_steps(
                operands, k, None, tile, sweep, steps, handed, HANDING_ON, LOWER, WIDTH, BLOCK_M, BLOCK_N,
                STAGES, PADDING, False,
            )  # fmt: skip
        elif tile.first_key == 0:
            # Nobody adds after the first key tile. Before it writes through the staging memory, what was
            # handed on there must have left.
            _wait_until_sent(operands, handed, WIDTH, BLOCK_M)
            _make_steps(
                operands, k, None, tile, sweep, steps, handed, HANDING_ON, LOWER, WIDTH, BLOCK_M, BLOCK_N,
                STAGES, PADDING, True,
            )  # fmt: skip
            tma.store_wait(0)
        else:
            _make_steps(
                operands, k, None, tile, sweep, steps, handed, HANDING_ON, LOWER, WIDTH, BLOCK_M, BLOCK_N,
                STAGES, PADDING, False,
            )  # fmt: skip
        mbarrier.arrive(operands.keys_free.index(place))
        handed += _steps_handed_on(operands, tile, steps)
        number += 1
        steps_before += steps
        there, tile = announcements.keys_at(operands.board, number, 4)
    tma.store_wait(0)


@gluon.jit
def _steps_handed_on(operands, tile, steps):
    """Of how many of a key tile's ``steps`` dQ goes to the warps that send: of none where it is finished."""
    if operands.dq is None:
        return steps
    else:
        return gl.where(tile.first_key == 0, 0, steps)


@gluon.jit
def _wait_until_sent(operands, handed, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr):
    """Wait until all that was handed on, in so many steps, has left the staging memory."""
    PLACES: gl.constexpr = operands.staging.shape[0]
    turns = handed * (BLOCK_M * WIDTH // (ROWS * ROWS) // PLACES)
    for place in gl.static_range(PLACES):
        mbarrier.wait(operands.handover.empty.index(place), (turns - 1) & 1, pred=turns > 0)


@gluon.jit
def _fetch_first(
    operands, warp, keys, parts, tile, sweep, steps, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    PADDING: gl.constexpr,
):  # fmt: skip
    """Fetch the key tile, and as many query tiles as there is room for."""
    if steps > 0:
        backward_tiles.fill_keys(operands, operands.k_full, keys, parts[1], tile)
    grid.wait_for_previous()
    for step in range(gl.minimum(steps, STAGES)):
        _fetch_queries(operands, warp, parts, tile, sweep, step, BLOCK_M, STAGES, PADDING)
        if step == 0:
            values = backward_tiles.values_of(operands, 0)
            backward_tiles.fill_keys(operands, operands.v_full, values, parts[2], tile)
        _fetch_douts(operands, warp, parts, tile, sweep, step, BLOCK_M, STAGES, PADDING)


@gluon.jit
def _fetch_queries(
    operands, warp, parts, tile, sweep, step, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, PADDING: gl.constexpr
):
    """Fetch the queries of a step as soon as their stage is free."""
    if operands.q_shared is None:
        if step >= STAGES:
            barriers.meet(barriers.QUERIES_FREE + step % STAGES, ALL)
        backward_tiles.fill(
            operands, operands.queries, parts[0], parts[4], tile, sweep, step, BLOCK_M, STAGES, PADDING
        )
    else:
        backward_tiles.fill_shared(
            operands, operands.q_shared, parts[0], parts[4], NUMBERS, tile, sweep, step, RELAY, QUERIES, LSE,
            BLOCK_M, STAGES, PADDING, MEETING, warp,
        )  # fmt: skip


@gluon.jit
def _fetch_douts(
    operands, warp, parts, tile, sweep, step, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, PADDING: gl.constexpr
):
    """The same of the output's gradient."""
    if operands.dout_shared is None:
        if step >= STAGES:
            barriers.meet(barriers.DOUTS_FREE + step % STAGES, ALL)
        backward_tiles.fill(
            operands, operands.douts, parts[3], parts[5], tile, sweep, step, BLOCK_M, STAGES, PADDING
        )
    else:
        PLACE: gl.constexpr = NUMBERS + STAGES * parts[4].block_type.nbytes
        backward_tiles.fill_shared(
            operands, operands.dout_shared, parts[3], parts[5], PLACE, tile, sweep, step, RELAY, DOUTS, DELTA,
            BLOCK_M, STAGES, PADDING, MEETING, warp,
        )  # fmt: skip


@gluon.jit
def _make_steps(
    operands, k, parts, tile, sweep, steps, handed, HANDING_ON: gl.constexpr, LOWER: gl.constexpr,
    WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PADDING: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """Make dQ of all steps of a key tile."""
    for step in range(steps):
        _make_tiles(
            operands, k, parts, tile, sweep, step, steps, handed, HANDING_ON, LOWER, WIDTH, BLOCK_M, BLOCK_N,
            STAGES, PADDING, LAST,
        )  # fmt: skip


@gluon.jit
def _make_tiles(
    operands, k, parts, tile, sweep, step, steps, handed, HANDING_ON: gl.constexpr, LOWER: gl.constexpr,
    WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PADDING: gl.constexpr, LAST: gl.constexpr,
):  # fmt: skip
    """Make all of dQ of a step, 64 x 64 at a time, and have it added, or written if this is the ``LAST``.

    With ``parts`` it fetches what is needed ``STAGES`` steps later, as soon as there is room.
    """
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    HANDED: gl.constexpr = (HANDING_ON + 1) * 128
    ACROSS: gl.constexpr = WIDTH // ROWS
    PARTS: gl.constexpr = BLOCK_M // ROWS * ACROSS
    PLACES: gl.constexpr = operands.staging.shape[0]
    call = operands.call
    at, later = sweep.steps_before + step, step + STAGES
    slot = at % SLOTS
    head = tile.head_k * call.group + step // sweep.count
    first_query = backward_tiles.first_query_of(operands, sweep, step % sweep.count, BLOCK_M)
    position = backward_work.vector_position(call, tile, head, first_query, operands.rows_padded, PADDING)
    keys = ring.matrix(k, BLOCK_N, WIDTH)
    ds = operands.exchange.index(slot)
    if LAST:
        before = backward_work.tiles_after(call, tile, first_query, BLOCK_M, BLOCK_N)
        counter = operands.additions + position // ROWS
        order.wait_for(counter, before)
    barriers.meet(barriers.GRADIENTS_THERE + slot, HANDED)
    for part in gl.static_range(PARTS):
        dq = gl.zeros([ROWS, ROWS], gl.float32, DQ)
        if LAST:
            if part > 0 and part % ACROSS == 0:
                order.wait_for(counter + part // ACROSS, before)
            start = position.to(gl.int64) * WIDTH + part * ROWS * ROWS
            dq = _sums(operands, start, before > 0, dq)
        left = ds.slice(part // ACROSS * ROWS, ROWS, 1).permute([1, 0])
        right = keys.slice(part % ACROSS * ROWS, ROWS, 1)
        dq = warpgroup_mma(left, right, dq, use_acc=LAST, is_async=True)
        if parts is not None and part == 0:  # noqa: SIM102 - whether it is None is known to the compiler
            if later < steps:
                _fetch_douts(operands, parts[1], parts[0], tile, sweep, later, BLOCK_M, STAGES, PADDING)
        dq = warpgroup_mma_wait(0, [dq])
        if part == PARTS - 1:
            barriers.arrive(barriers.SLOT_FREE + slot, THREADS)
            if HANDING_ON == 2:
                barriers.arrive(barriers.SLOT_FREE_TOO + slot, THREADS)
        place = operands.staging.index(part % PLACES)
        if LAST:
            row = first_query + part // ACROSS * ROWS
            dq = dq * (operands.score.scale * LOWER)
            _write(operands.dq, place, dq, [tile.q_batch, head, row, part % ACROSS * ROWS], PLACES)
        elif operands.handover is not None:
            turn = (handed + step) * (PARTS // PLACES) + part // PLACES
            _hand_over(operands, place, dq, part % PLACES, turn)
        else:
            _add(operands, place, dq, _line_of(operands, position, part, WIDTH), PLACES)
    if parts is not None:  # noqa: SIM102
        if later < steps:
            _fetch_queries(operands, parts[1], parts[0], tile, sweep, later, BLOCK_M, STAGES, PADDING)


@gluon.jit
def send_dq(
    PLACE: gl.constexpr, operands, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    PADDING: gl.constexpr,
):  # fmt: skip
    """Have the TMA unit add the tiles of dQ that come to one place, in their order; for a warp by itself."""
    ACROSS: gl.constexpr = WIDTH // ROWS
    PARTS: gl.constexpr = BLOCK_M // ROWS * ACROSS
    PLACES: gl.constexpr = operands.staging.shape[0]
    call = operands.call
    lines = _as_lines(operands, operands.staging.index(PLACE))
    grid.wait_for_previous()
    number, handed = 0, 0
    there, tile = announcements.keys_at(operands.board, 0, 1)
    while there:
        sweep = backward_work.sweep_of(call, tile, number, 0, BLOCK_M, BLOCK_N)
        steps = _steps_handed_on(operands, tile, call.group * sweep.count)
        for step in range(steps):
            head = tile.head_k * call.group + step // sweep.count
            first_query = backward_tiles.first_query_of(operands, sweep, step % sweep.count, BLOCK_M)
            position = backward_work.vector_position(
                call, tile, head, first_query, operands.rows_padded, PADDING
            )
            # Rows of 64 have a counter each, and no two places have parts of the same rows.
            counter = operands.additions + position // ROWS + PLACE // ACROSS
            before = backward_work.tiles_after(call, tile, first_query, BLOCK_M, BLOCK_N)
            order.wait_for(counter, before)
            for part in gl.static_range(PLACE, PARTS, PLACES):
                turn = (handed + step) * (PARTS // PLACES) + part // PLACES
                mbarrier.wait(operands.handover.full.index(PLACE), turn & 1)
                coordinates = [_line_of(operands, position, part, WIDTH), 0]
                if before == 0:
                    tma_store(operands.dq_acc, coordinates, lines)
                else:
                    tma_add(operands.dq_acc, coordinates, lines)
                tma.store_wait(0)
                mbarrier.arrive(operands.handover.empty.index(PLACE))
            order.count_when_added(counter)
        handed += steps
        number += 1
        there, tile = announcements.keys_at(operands.board, number, 1)


@gluon.jit
def _line_of(operands, position, part: gl.constexpr, WIDTH: gl.constexpr):
    """The first line of a part of dQ in ``dq_acc``."""
    HEIGHT: gl.constexpr = operands.dq_acc.block_shape[0]
    LINE: gl.constexpr = operands.dq_acc.block_shape[1]
    return position // (LINE // WIDTH) + part * HEIGHT


@gluon.jit
def _as_lines(operands, place):
    """A place of the staging memory as what is added to ``dq_acc``."""
    return reinterpret(place, gl.float32, operands.dq_acc.block_shape, operands.dq_acc.layout)


@gluon.jit
def _hand_over(operands, place, dq, PLACE: gl.constexpr, turn):
    """Leave a tile of dQ to the warp that sends it, once the one before has left."""
    mbarrier.wait(operands.handover.empty.index(PLACE), (turn & 1) ^ 1)
    _as_lines(operands, place).store(backward_tiles.as_registers_hold_it(dq))
    fence_async_shared()
    mbarrier.arrive(operands.handover.full.index(PLACE))


@gluon.jit
def _add(operands, place, dq, line, PLACES: gl.constexpr):
    """Have the TMA unit add a tile of dQ to those of other key tiles."""
    lines = _as_lines(operands, place)
    tma.store_wait(PLACES - 1)  # what was sent from there before
    lines.store(backward_tiles.as_registers_hold_it(dq))
    fence_async_shared()
    tma_add(operands.dq_acc, [line, 0], lines)


@gluon.jit
def _write(dq_part0, place, dq, coordinates, PLACES: gl.constexpr):
    """Round a finished tile of dQ, and start its way to memory."""
    tile = reinterpret(place, dq_part0.dtype, dq_part0.block_shape, dq_part0.layout)
    tma.store_wait(PLACES - 1)  # what was sent from there before
    ring.matrix(tile, ROWS, ROWS).store(dq.to(dq_part0.dtype))
    fence_async_shared()
    tma_store(dq_part0, coordinates, tile)


@gluon.jit
def _sums(operands, start, there, zeros):
    """What other key tiles have added to a tile of dQ, to go on from; zeros unless ``there``."""
    LINES: gl.constexpr = backward_tiles.as_registers_hold_it(zeros).type.layout
    line = gl.arange(0, 16, gl.SliceLayout(1, LINES))[:, None]
    number = gl.arange(0, 256, gl.SliceLayout(0, LINES))[None, :]
    # They were added in the L2 cache. No other cache may answer.
    sums = gl.load(
        operands.dq_sums + start + line * 256 + number, mask=there, other=0.0, cache_modifier=".cg"
    )
    return gl.convert_layout(backward_tiles.as_matrix(sums), zeros.type.layout, assert_trivial=True)
