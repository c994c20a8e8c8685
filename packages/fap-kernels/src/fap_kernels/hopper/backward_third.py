"""The third warpgroup of the Hopper backward: it makes dQ of what the other two hand on, and fetches.

It multiplies dS, which comes in a slot of the exchange, by the keys, in tiles of 64 x 64, and has the TMA
unit add them up in memory. Between its products it refills the stages that the others have given back.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from . import backward_tiles, backward_work, barriers, ring
from .backward_tiles import ROWS, THREADS
from .compat import tma_add

SLOTS = gl.constexpr(2)
"""Of the exchange."""

ALL = gl.constexpr(384)
"""Threads of the three warpgroups."""


@gluon.jit
def make_dq(
    operands, parts, HANDING_ON: gl.constexpr, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PADDING: gl.constexpr,
):  # fmt: skip
    """Fetch the key tile, and query tiles as stages become free; add up dQ.

    Args:
        parts: the descriptors of q, k, v, dout, lse and delta.
        HANDING_ON: how many warpgroups write into each slot; each waits for the slots by a barrier of its
            own, ``SLOT_FREE`` the first and ``SLOT_FREE_TOO`` the second.
    """
    DQ: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    ACROSS: gl.constexpr = WIDTH // ROWS
    PARTS: gl.constexpr = BLOCK_M // ROWS * ACROSS
    HEIGHT: gl.constexpr = operands.dq_acc.block_shape[0]
    LINE: gl.constexpr = operands.dq_acc.block_shape[1]
    PLACES: gl.constexpr = operands.staging.shape[0]
    HANDED: gl.constexpr = (HANDING_ON + 1) * 128
    call = operands.call
    tile = backward_work.key_tile_of(call, gl.program_id(0), operands.heads_beside, BLOCK_N, False)
    sweep = backward_work.sweep_of(call, tile, BLOCK_M, BLOCK_N)
    steps = call.group * sweep.count
    for step in range(gl.minimum(steps, STAGES)):
        if step == 0:
            backward_tiles.fill_keys(operands, operands.k_full, operands.k, parts[1], tile)
        backward_tiles.fill(
            operands, operands.queries, parts[0], parts[4], tile, sweep, step, BLOCK_M, STAGES, PADDING
        )
        if step == 0:
            backward_tiles.fill_keys(operands, operands.v_full, operands.v, parts[2], tile)
        backward_tiles.fill(
            operands, operands.douts, parts[3], parts[5], tile, sweep, step, BLOCK_M, STAGES, PADDING
        )
    k = ring.matrix(operands.k, BLOCK_N, WIDTH)
    no_dq = gl.zeros([ROWS, ROWS], gl.float32, DQ)
    mbarrier.wait(operands.k_full, 0, pred=steps > 0)
    for step in range(steps):
        slot, stage, later = step % SLOTS, step % STAGES, step + STAGES
        head = tile.head_k * call.group + step // sweep.count
        first_query = sweep.start + step % sweep.count * BLOCK_M
        position = backward_work.vector_position(call, tile, head, first_query, operands.rows_padded, PADDING)
        barriers.meet(barriers.GRADIENTS_THERE + slot, HANDED)
        ds = operands.exchange.index(slot)
        for part in gl.static_range(PARTS):
            rows = ds.slice(part // ACROSS * ROWS, ROWS, 1).permute([1, 0])
            columns = k.slice(part % ACROSS * ROWS, ROWS, 1)
            dq = warpgroup_mma(rows, columns, no_dq, use_acc=False, is_async=True)
            if part == 0 and later < steps:
                barriers.meet(barriers.DOUTS_FREE + stage, ALL)
                backward_tiles.fill(
                    operands, operands.douts, parts[3], parts[5], tile, sweep, later, BLOCK_M, STAGES, PADDING
                )
            dq = warpgroup_mma_wait(0, [dq])
            if part == PARTS - 1:
                barriers.arrive(barriers.SLOT_FREE + slot, THREADS)
                if HANDING_ON == 2:
                    barriers.arrive(barriers.SLOT_FREE_TOO + slot, THREADS)
            place = operands.staging.index(part % PLACES)
            tma.store_wait(PLACES - 1)  # what was sent from there before
            place.store(backward_tiles.as_registers_hold_it(dq))
            fence_async_shared()
            tma_add(operands.dq_acc, [position // (LINE // WIDTH) + part * HEIGHT, 0], place)
        if later < steps:
            barriers.meet(barriers.QUERIES_FREE + stage, ALL)
            backward_tiles.fill(
                operands, operands.queries, parts[0], parts[4], tile, sweep, later, BLOCK_M, STAGES, PADDING
            )
    tma.store_wait(0)
