"""What programs of the backward begin with: a share of what goes before it, and of what comes after.

Launches of their own, for delta before the backward and dQ behind it, read and write all of out, dout and dQ
in memory: some 110 us for 16,384 tokens of 2048 columns, in which nothing is multiplied. So each program
begins with two shares of them, while its own tiles are on their way: as many rows of a head as one of that
head's programs stands for.

- Of a head that comes later it *prepares* delta, the LSE, and zeros to add dQ to, or to count in.
- Of a head that is done it *finishes* dQ: brings the sums, scaled and rounded, to their place.

To the first heads, which nobody can prepare, a launch before the backward is left; to the last, behind which
too few programs begin, one behind it.

Program ``p`` prepares the share that goes with item ``p + lead``, and finishes that of item ``p - lag``. Who
waits for whom, by two counters of each key head: its programs for all that prepare it, and those that finish
it for all that send its dQ. Both wait for programs of smaller numbers alone, since ``lead`` and ``lag`` are
no less than the items of the heads that are worked on side by side; so, as :mod:`fap_kernels.hopper.order`
says, none waits forever. As a rule all is there, since both are larger by more than what runs at a time; but
not so much larger that what is handed on has left the L2 cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from ..language import grid, parts, rows
from ..language.scores import LOG2E
from . import backward_tiles, backward_work, order, ring, work
from .backward_tiles import ROWS
from .compat import barrier, reinterpret, tma_store

TILES = gl.constexpr(2)
"""So many of 64 x 64 a warpgroup finishes at a time, side by side."""

NUMBERS = gl.constexpr(8192)
"""So many of out, and of dout, a warpgroup reads at a time."""

PREPARING = gl.constexpr(8)
"""Warps of a program that prepare."""


class Ahead(NamedTuple):
    """What it takes to prepare.

    Fields:
        out, out_strides, dout, dout_strides: addresses, and strides of (batch, seqlen, nheads) in elements.
        softmax_lse, dlse: addresses of contiguous vectors, ``dlse`` None for zeros.
        lse, delta: addresses of what is written, as :mod:`fap_kernels.backward.delta` does.
        lift: the LSE is lowered by so much.
    """

    out: Any
    out_strides: Any
    dout: Any
    dout_strides: Any
    softmax_lse: Any
    dlse: Any
    lse: Any
    delta: Any
    lift: Any


@gluon.jit
def wait_until_prepared(operands, tile, BLOCK_N: gl.constexpr):
    """Wait until a key tile's head is prepared, if programs of this launch do that."""
    if operands.lead is not None:
        warps = backward_work.programs_of_head(operands.call, BLOCK_N) * PREPARING
        prepared_here = work.program(operands.call) >= operands.lead
        order.wait_for(_progress(operands, tile.batch, tile.head_k), gl.where(prepared_here, warps, 0))


@gluon.jit
def count_sent(operands, tile):
    """Count that this warp has sent all of a key tile's dQ that it sends, once that has arrived."""
    if operands.lag is not None:
        order.count_when_added(_progress(operands, tile.batch, tile.head_k) + 1)


@gluon.jit
def begin(
    WARPGROUP: gl.constexpr, operands, memory, FIRST: gl.constexpr, STEP: gl.constexpr,
    SENDERS: gl.constexpr, LOWER: gl.constexpr, HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Prepare and finish what one of two warpgroups has of this program's shares.

    Args:
        memory: shared memory, whose places ``FIRST`` and ``FIRST + STEP`` for tiles of dQ nobody else writes
            until this warpgroup has written something that is waited for.
        SENDERS: how many warps of a program count what they have sent.
        LOWER: what the sums have to be multiplied by, besides softmax_scale.
    """
    if operands.progress is not None:
        # Counters are zeros, and vectors may be written, once the kernel before has ended.
        grid.wait_for_previous()
    if operands.lead is not None:
        coming = work.program(operands.call) + operands.lead
        if coming < operands.call.items:
            _prepare(WARPGROUP, operands, coming, HEAD_DIM, WIDTH, BLOCK_N)
    if operands.lag is not None:
        done = work.program(operands.call) - operands.lag
        if done >= 0:
            _finish(WARPGROUP, operands, memory, done, FIRST, STEP, SENDERS, LOWER, WIDTH, BLOCK_N)


@gluon.jit
def _prepare(
    WARPGROUP: gl.constexpr, operands, item, HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Prepare what a warpgroup has of an item's share, and count each of its warps."""
    call = operands.call
    HEIGHT: gl.constexpr = NUMBERS // WIDTH
    APART: gl.constexpr = 2 * HEIGHT if call.cluster is None else 2 * HEIGHT * work.CLUSTER
    share = backward_work.share_of(call, item, BLOCK_N, ROWS)
    first = share.first + WARPGROUP * HEIGHT + work.rows_before(call, 2 * HEIGHT)
    for member in range(call.group):
        head = share.head_k * call.group + member
        for row in range(first, share.end, APART):
            _prepare_rows(operands, share.batch, head, row, HEAD_DIM, WIDTH, HEIGHT)
    order.count_when_stored(_progress(operands, share.batch, share.head_k))


@gluon.jit
def _prepare_rows(
    operands, batch, head, row, HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr, HEIGHT: gl.constexpr
):
    """Write delta and the LSE of some rows, as the delta kernel does, and zeros to add to, or to count in."""
    call, ahead = operands.call, operands.ahead
    # Sixteen bytes a thread, a row after the other.
    TILE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    query = row + gl.arange(0, HEIGHT, gl.SliceLayout(1, TILE))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, TILE))
    exists = query < call.seqlen_q
    there = exists[:, None] & (column < HEAD_DIM)[None, :]
    out_rows = rows.Rows(ahead.out, ahead.out_strides, None, None, batch, None, call.seqlen_q, None)
    dout_rows = rows.Rows(ahead.dout, ahead.dout_strides, None, None, batch, None, call.seqlen_q, None)
    out = gl.load(rows.addresses(out_rows, head, 0, query, column), mask=there, other=0.0)
    dout = gl.load(rows.addresses(dout_rows, head, 0, query, column), mask=there, other=0.0)
    vector = (batch * call.nheads + head).to(gl.int64) * call.seqlen_q + query
    row_lse = gl.load(ahead.softmax_lse + vector, mask=exists, other=float("inf"))
    row_delta = parts.row_dot((out,), (dout,))
    if ahead.dlse is not None:
        row_delta -= gl.load(ahead.dlse + vector, mask=exists, other=0.0)
    position = (batch * call.nheads + head).to(gl.int64) * operands.rows_padded + row
    place = position + gl.arange(0, HEIGHT, gl.SliceLayout(1, TILE))
    gl.store(ahead.lse + place, row_lse * LOG2E - ahead.lift)
    gl.store(ahead.delta + place, -row_delta)
    if operands.additions is None:
        LINE: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
        number = gl.arange(0, NUMBERS, LINE)
        gl.store(operands.dq_sums + position * WIDTH + number, gl.zeros([NUMBERS], gl.float32, LINE))
    else:
        gl.store(operands.additions + position // ROWS, 0)


@gluon.jit
def _finish(
    WARPGROUP: gl.constexpr, operands, memory, item, FIRST: gl.constexpr, STEP: gl.constexpr,
    SENDERS: gl.constexpr, LOWER: gl.constexpr, WIDTH: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Bring what a warpgroup has of an item's share to its place.

    Of 128 columns two warpgroups have every second 64 rows each, of 256 half of the columns.
    """
    call, dq_part0 = operands.call, operands.dq
    SHAPE: gl.constexpr = [memory.shape[0] * memory.shape[1] // ROWS] + dq_part0.block_shape
    places = reinterpret(memory, dq_part0.dtype, SHAPE, dq_part0.layout)
    left, right = places.index(FIRST), places.index(FIRST + STEP)
    share = backward_work.share_of(call, item, BLOCK_N, ROWS)
    # Of many keys and few queries most shares are empty.
    warps = gl.where(share.first < share.end, backward_work.programs_of_head(call, BLOCK_N) * SENDERS, 0)
    order.wait_for(_progress(operands, share.batch, share.head_k) + 1, warps)
    ALL_COLUMNS: gl.constexpr = WIDTH == TILES * ROWS
    FIRST_COLUMN: gl.constexpr = 0 if ALL_COLUMNS else WARPGROUP * TILES * ROWS
    OWN_ROW: gl.constexpr = WARPGROUP * ROWS if ALL_COLUMNS else 0
    HEIGHT: gl.constexpr = 2 * ROWS if ALL_COLUMNS else ROWS
    APART: gl.constexpr = HEIGHT if call.cluster is None else HEIGHT * work.CLUSTER
    first = share.first + OWN_ROW + work.rows_before(call, HEIGHT)
    for member in range(call.group):
        head = share.head_k * call.group + member
        for row in range(first, share.end, APART):
            _finish_rows(operands, left, right, share.batch, head, row, FIRST_COLUMN, LOWER, WIDTH)
    tma.store_wait(0)
    barrier()


@gluon.jit
def _finish_rows(
    operands, left, right, batch, head, row, FIRST_COLUMN: gl.constexpr, LOWER: gl.constexpr,
    WIDTH: gl.constexpr,
):  # fmt: skip
    """Bring 64 rows of two tiles side by side to their place."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    dq_part0 = operands.dq
    position = (batch * operands.call.nheads + head).to(gl.int64) * operands.rows_padded + row
    there = True
    if operands.additions is not None:
        there = gl.load(operands.additions + position // ROWS, cache_modifier=".cg") > 0
    start = operands.dq_sums + position * WIDTH + FIRST_COLUMN * ROWS
    factor = operands.score.scale * LOWER
    left_dq = backward_tiles.sums_at(start, there, SUMS) * factor
    right_dq = backward_tiles.sums_at(start + ROWS * ROWS, there, SUMS) * factor
    tma.store_wait(0)  # what was sent from there before
    barrier()
    ring.matrix(left, ROWS, ROWS).store(left_dq.to(dq_part0.dtype))
    ring.matrix(right, ROWS, ROWS).store(right_dq.to(dq_part0.dtype))
    fence_async_shared()
    tma_store(dq_part0, [batch, head, row, FIRST_COLUMN], left)
    tma_store(dq_part0, [batch, head, row, FIRST_COLUMN + ROWS], right)


@gluon.jit
def _progress(operands, batch, head_k):
    """Address of a key head's two counters."""
    nheads_k = operands.call.nheads // operands.call.group
    return operands.progress + 2 * (batch * nheads_k + head_k)
