"""dQ of key heads that are done, brought to its place by programs of the backward that have just begun.

A launch behind the backward would read all sums of dQ from memory again, some 40 us for 16,384 tokens of 2048
columns. Here each program begins with a share of them instead, while its own tiles are on their way: so many
rows of another head as one of that head's programs stands for. To the last heads, behind which too few
programs begin, a launch behind the backward is left.

Program number ``p`` has the share that goes with item ``p - lag``. It waits until all programs of that item's
head are done, by a counter of the warps that have sent all of their tiles. They all have smaller numbers than
``p``, since ``lag`` is no less than the programs of the heads that are worked on side by side: so, as
:mod:`fap_kernels.hopper.order` says, none waits forever. And it is so much more that they are done as a rule,
but not so much that the sums have left the L2 cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from ..language import grid
from . import backward_tiles, backward_work, order, ring, work
from .backward_tiles import ROWS
from .compat import barrier, reinterpret, tma_store

TILES = gl.constexpr(2)
"""So many of 64 x 64 a warpgroup brings to their place at a time, side by side."""


class Finishing(NamedTuple):
    """What it takes besides dQ and its sums.

    Fields:
        heads_done: a counter for each key head, 0 at first, of the warps that have sent all their tiles.
        lag: by how much the item is smaller whose share a program has.
    """

    heads_done: Any
    lag: Any


@gluon.jit
def count(operands, tile):
    """Count that this warp has sent all of a key tile's dQ that it sends, once that has arrived."""
    if operands.finishing is not None:
        order.count_when_added(_counter(operands, tile.batch, tile.head_k))


@gluon.jit
def finish_share(
    WARPGROUP: gl.constexpr, operands, memory, FIRST: gl.constexpr, STEP: gl.constexpr,
    SENDERS: gl.constexpr, LOWER: gl.constexpr, WIDTH: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Bring what one of two warpgroups has of this program's share to its place, if it has one.

    Of 128 columns that is every second 64 rows, of 256 one half of the columns.

    Args:
        memory: shared memory, whose places ``FIRST`` and ``FIRST + STEP`` for tiles of dQ nobody else writes
            until this warpgroup has written something that is waited for.
        SENDERS: how many warps of a program count.
        LOWER: what the sums have to be multiplied by, besides softmax_scale.
    """
    if operands.finishing is not None:
        item = work.program(operands.call) - operands.finishing.lag
        if item >= 0:
            _finish(WARPGROUP, operands, memory, item, FIRST, STEP, SENDERS, LOWER, WIDTH, BLOCK_N)


@gluon.jit
def _finish(
    WARPGROUP: gl.constexpr, operands, memory, item, FIRST: gl.constexpr, STEP: gl.constexpr,
    SENDERS: gl.constexpr, LOWER: gl.constexpr, WIDTH: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Bring what a warpgroup has of item number ``item``'s share to its place."""
    call, dq_part0 = operands.call, operands.dq
    SHAPE: gl.constexpr = [memory.shape[0] * memory.shape[1] // ROWS] + dq_part0.block_shape
    places = reinterpret(memory, dq_part0.dtype, SHAPE, dq_part0.layout)
    left, right = places.index(FIRST), places.index(FIRST + STEP)
    share = backward_work.share_of(call, item, BLOCK_N, ROWS)
    # The counters are zeros once the kernel before has ended.
    grid.wait_for_previous()
    order.wait_for(_counter(operands, share.batch, share.head_k), share.programs * SENDERS)
    ALL_COLUMNS: gl.constexpr = WIDTH == TILES * ROWS
    FIRST_COLUMN: gl.constexpr = 0 if ALL_COLUMNS else WARPGROUP * TILES * ROWS
    OWN_ROW: gl.constexpr = WARPGROUP * ROWS if ALL_COLUMNS else 0
    WARPGROUPS: gl.constexpr = 2 if ALL_COLUMNS else 1
    TOGETHER: gl.constexpr = 1 if call.cluster is None else work.CLUSTER
    first = share.first + OWN_ROW + work.rows_before(call, WARPGROUPS * ROWS)
    for member in range(call.group):
        head = share.head_k * call.group + member
        for row in range(first, share.end, WARPGROUPS * TOGETHER * ROWS):
            _finish_rows(operands, left, right, share.batch, head, row, FIRST_COLUMN, LOWER, WIDTH)
    tma.store_wait(0)
    barrier()


@gluon.jit
def _finish_rows(
    operands, left, right, batch, head, row, FIRST_COLUMN: gl.constexpr, LOWER: gl.constexpr,
    WIDTH: gl.constexpr,
):  # fmt: skip
    """Bring 64 rows to their place, of two tiles side by side."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    dq_part0 = operands.dq
    position = (batch * operands.call.nheads + head) * operands.rows_padded + row
    there = True
    if operands.additions is not None:
        there = gl.load(operands.additions + position // ROWS, cache_modifier=".cg") > 0
    start = operands.dq_sums + position.to(gl.int64) * WIDTH + FIRST_COLUMN * ROWS
    factor = operands.score.scale * LOWER
    left_dq = backward_tiles.sums_at(start, there, SUMS) * factor
    right_dq = backward_tiles.sums_at(start + ROWS * ROWS, there, SUMS) * factor
    tma.store_wait(0)  # what was sent from there before
    ring.matrix(left, ROWS, ROWS).store(left_dq.to(dq_part0.dtype))
    ring.matrix(right, ROWS, ROWS).store(right_dq.to(dq_part0.dtype))
    fence_async_shared()
    tma_store(dq_part0, [batch, head, row, FIRST_COLUMN], left)
    tma_store(dq_part0, [batch, head, row, FIRST_COLUMN + ROWS], right)


@gluon.jit
def _counter(operands, batch, head_k):
    nheads_k = operands.call.nheads // operands.call.group
    return operands.finishing.heads_done + batch * nheads_k + head_k
