"""What programs of the backward begin with: a share of what goes before it, and of what comes after.

Launches of their own, for delta before the backward and dQ behind it, read and write all of out, dout and dQ
in memory: some 110 us for 16,384 tokens of 2048 columns, in which nothing is multiplied. So each program
begins with two shares of them, while its own tiles are on their way: as many rows of a head as one of that
head's programs stands for.

- Of a head that comes later it *prepares* delta, the LSE, and zeros to add dQ to, or to count in.
- Of a head that is done it *finishes* dQ: brings the sums, scaled and rounded, to their place.

To the first heads, which nobody can prepare, a launch before the backward is left; to the last, behind which
too few programs begin, one behind it.

Both are chains of waiting for memory, so two warpgroups have one each.

Program ``p`` prepares the share that goes with item ``p + lead``, and finishes that of item ``p - lag``. Who
waits for whom, by two counters of each key head: its programs for all that prepare it, and those that finish
it for all that send its dQ. Both wait for programs of smaller numbers alone, since ``lead`` and ``lag`` are
no less than the items of the heads that are worked on side by side; so, as :mod:`fap_kernels.hopper.order`
says, none waits forever, though in the relay a program may prepare its share only once its own head is. As a
rule all is there, since both are larger by more than what runs at a time; but
not so much larger that what is handed on has left the L2 cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from ..language import grid, parts, rows
from ..language.scores import LOG2E
from . import backward_tiles, backward_work, barriers, order, ring, work
from .backward_tiles import ROWS
from .compat import barrier, reinterpret, tma_store


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
def wait_until_prepared(operands, tile, COUNTS: gl.constexpr, BLOCK_N: gl.constexpr):
    """Wait until a key tile's head is prepared, if programs of this launch do that.

    Args:
        COUNTS: how often a program counts that it has prepared its share.
    """
    if operands.lead is not None:
        counts = backward_work.programs_of_head(operands.call, BLOCK_N) * COUNTS
        prepared_here = work.program(operands.call) >= operands.lead
        order.wait_for(_progress(operands, tile.batch, tile.head_k), gl.where(prepared_here, counts, 0))


@gluon.jit
def count_sent(operands, tile):
    """Count that this warp has sent all of a key tile's dQ that it sends, once that has arrived."""
    if operands.lag is not None:
        order.count_when_added(_progress(operands, tile.batch, tile.head_k) + 1)


@gluon.jit
def prepare(
    operands, NUMBERS: gl.constexpr, THREADS: gl.constexpr, HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Prepare this program's share, if it has one, and leave it to others to count that.

    Who counts must wait until all that was stored can be seen, in which time this warpgroup can multiply.

    Args:
        NUMBERS: how many of out, and of dout, to have in registers at a time.
        THREADS: of this warpgroup and of those that count, by :func:`count_prepared`.
    """
    if operands.lead is not None:
        call = operands.call
        item = work.program(call) + operands.lead
        if item < call.items:
            HEIGHT: gl.constexpr = NUMBERS // WIDTH
            APART: gl.constexpr = HEIGHT if call.cluster is None else HEIGHT * work.CLUSTER
            share = backward_work.share_of(call, item, BLOCK_N, ROWS)
            # What is written is no kernel's before this one any more, nor are counters.
            grid.wait_for_previous()
            for member in range(call.group):
                head = share.head_k * call.group + member
                for row in range(share.first + work.rows_before(call, HEIGHT), share.end, APART):
                    _prepare_rows(operands, share, head, row, HEAD_DIM, WIDTH, HEIGHT)
            barriers.arrive(barriers.PREPARED, THREADS)


@gluon.jit
def count_prepared(operands, THREADS: gl.constexpr, BLOCK_N: gl.constexpr):
    """Count, for each warp here, that this program has prepared its share, if it has one."""
    if operands.lead is not None:
        item = work.program(operands.call) + operands.lead
        if item < operands.call.items:
            share = backward_work.share_of(operands.call, item, BLOCK_N, ROWS)
            barriers.meet(barriers.PREPARED, THREADS)
            order.count_when_stored(_progress(operands, share.batch, share.head_k))


@gluon.jit
def _prepare_rows(
    operands, share, head, row, HEAD_DIM: gl.constexpr, WIDTH: gl.constexpr, HEIGHT: gl.constexpr
):
    """Write delta and the LSE of some rows, as the delta kernel does, and zeros to add to, or to count in."""
    call, ahead, batch = operands.call, operands.ahead, share.batch
    # Sixteen bytes a thread, a row after the other.
    TILE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [4, 1], [1, 0])
    query = row + gl.arange(0, HEIGHT, gl.SliceLayout(1, TILE))
    column = gl.arange(0, WIDTH, gl.SliceLayout(0, TILE))
    exists = query < gl.minimum(call.seqlen_q, share.end)
    there = exists[:, None] & (column < HEAD_DIM)[None, :]
    out_rows = rows.Rows(ahead.out, ahead.out_strides, None, None, batch, None, call.seqlen_q, None)
    dout_rows = rows.Rows(ahead.dout, ahead.dout_strides, None, None, batch, None, call.seqlen_q, None)
    out = gl.load(rows.addresses(out_rows, head, 0, query, column), mask=there, other=0.0)
    dout = gl.load(rows.addresses(dout_rows, head, 0, query, column), mask=there, other=0.0)
    vector = (batch * call.nheads + head).to(gl.int64) * call.seqlen_q + query
    row_lse = gl.load(ahead.softmax_lse + vector, mask=exists, other=float("inf"))
    position = (batch * call.nheads + head).to(gl.int64) * operands.rows_padded + row
    if operands.additions is None:
        # While the loads are on their way.
        LINE: gl.constexpr = gl.BlockedLayout([4], [32], [4], [0])
        number = gl.arange(0, HEIGHT * WIDTH, LINE)
        own = row + number // (ROWS * WIDTH) * ROWS < share.end
        zeros = gl.zeros([HEIGHT * WIDTH], gl.float32, LINE)
        gl.store(operands.dq_sums + position * WIDTH + number, zeros, mask=own)
    else:
        for part in gl.static_range((HEIGHT + ROWS - 1) // ROWS):
            if row + part * ROWS < share.end:
                gl.store(operands.additions + position // ROWS + part, 0)
    row_delta = parts.row_dot((out,), (dout,))
    if ahead.dlse is not None:
        row_delta -= gl.load(ahead.dlse + vector, mask=exists, other=0.0)
    place = position + gl.arange(0, HEIGHT, gl.SliceLayout(1, TILE))
    gl.store(ahead.lse + place, row_lse * LOG2E - ahead.lift, mask=query < share.end)
    gl.store(ahead.delta + place, -row_delta, mask=query < share.end)


@gluon.jit
def finish(
    operands, memory, AT_ONCE: gl.constexpr, SENDERS: gl.constexpr, LOWER: gl.constexpr, WIDTH: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Start to bring this program's share of dQ to its place, if it has one; then comes :func:`settle`.

    Args:
        memory: shared memory for ``2 * AT_ONCE`` tiles of dQ or more, at a multiple of 1024 bytes, that
            nobody else writes before this warpgroup has settled.
        AT_ONCE: how many pairs of 64 x 64 tiles, one or two, to have in registers.
        SENDERS: how many warps of a program count what they have sent.
        LOWER: what the sums have to be multiplied by, besides softmax_scale.
    """
    if operands.lag is not None:
        item = work.program(operands.call) - operands.lag
        if item >= 0:
            _finish(operands, memory, item, AT_ONCE, SENDERS, LOWER, WIDTH, BLOCK_N)


@gluon.jit
def settle(operands):
    """Wait until the shared memory that :func:`finish` was given is no longer read."""
    if operands.lag is not None:
        tma.store_wait(0)
        barrier()


@gluon.jit
def _finish(
    operands, memory, item, AT_ONCE: gl.constexpr, SENDERS: gl.constexpr, LOWER: gl.constexpr,
    WIDTH: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    call, dq_part0 = operands.call, operands.dq
    SHAPE: gl.constexpr = [2 * AT_ONCE] + dq_part0.block_shape
    ROOM: gl.constexpr = memory.shape[0] * memory.shape[1] * memory.shape[2] * memory.dtype.primitive_bitwidth
    gl.static_assert(2 * AT_ONCE * dq_part0.block_type.nbytes * 8 <= ROOM, "there is no room for the tiles")
    places = reinterpret(memory, dq_part0.dtype, SHAPE, dq_part0.layout)
    share = backward_work.share_of(call, item, BLOCK_N, ROWS)
    # Of many keys and few queries most shares are empty.
    counts = gl.where(share.first < share.end, backward_work.programs_of_head(call, BLOCK_N) * SENDERS, 0)
    # The counters are zeros once the kernel before this one has ended.
    grid.wait_for_previous()
    order.wait_for(_progress(operands, share.batch, share.head_k) + 1, counts)
    # A pair is 64 rows of 128 columns.
    PAIRS_ACROSS: gl.constexpr = WIDTH // (2 * ROWS)
    HEIGHT: gl.constexpr = ROWS * AT_ONCE if PAIRS_ACROSS == 1 else ROWS
    APART: gl.constexpr = HEIGHT if call.cluster is None else HEIGHT * work.CLUSTER
    for member in range(call.group):
        head = share.head_k * call.group + member
        for row in range(share.first + work.rows_before(call, HEIGHT), share.end, APART):
            for pair in gl.static_range(0, HEIGHT // ROWS * PAIRS_ACROSS, AT_ONCE):
                _finish_pairs(operands, places, share, head, row, pair, AT_ONCE, LOWER, WIDTH)


@gluon.jit
def _finish_pairs(
    operands, places, share, head, row, PAIR: gl.constexpr, AT_ONCE: gl.constexpr, LOWER: gl.constexpr,
    WIDTH: gl.constexpr,
):  # fmt: skip
    """Bring pairs of tiles of ``row`` and what follows to their place, from number ``PAIR`` on."""
    first = _pair_sums(operands, share, head, row, PAIR, LOWER, WIDTH)
    if AT_ONCE == 2:
        second = _pair_sums(operands, share, head, row, PAIR + 1, LOWER, WIDTH)
    settle(operands)  # what was sent from there before
    _send_pair(operands, places, 0, share, head, row, PAIR, first, WIDTH)
    if AT_ONCE == 2:
        _send_pair(operands, places, 2, share, head, row, PAIR + 1, second, WIDTH)


@gluon.jit
def _pair_sums(operands, share, head, row, PAIR: gl.constexpr, LOWER: gl.constexpr, WIDTH: gl.constexpr):
    """A pair of tiles of dQ."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    position = (share.batch * operands.call.nheads + head).to(gl.int64) * operands.rows_padded + row
    below: gl.constexpr = PAIR // (WIDTH // (2 * ROWS))
    there = row + below * ROWS < share.end
    if operands.additions is not None:
        counter = operands.additions + position // ROWS + below
        there = there & (gl.load(counter, mask=there, other=0, cache_modifier=".cg") > 0)
    start = operands.dq_sums + position * WIDTH + PAIR * 2 * ROWS * ROWS
    factor = operands.score.scale * LOWER
    left = backward_tiles.sums_at(start, there, SUMS) * factor
    right = backward_tiles.sums_at(start + ROWS * ROWS, there, SUMS) * factor
    return left, right


@gluon.jit
def _send_pair(
    operands, places, PLACE: gl.constexpr, share, head, row, PAIR: gl.constexpr, pair, WIDTH: gl.constexpr
):
    """Round a pair of tiles of dQ, and start its way to memory from two places."""
    left, right = places.index(PLACE), places.index(PLACE + 1)
    ring.matrix(left, ROWS, ROWS).store(pair[0].to(operands.dq.dtype))
    ring.matrix(right, ROWS, ROWS).store(pair[1].to(operands.dq.dtype))
    fence_async_shared()
    ACROSS: gl.constexpr = WIDTH // (2 * ROWS)
    query = row + PAIR // ACROSS * ROWS
    COLUMN: gl.constexpr = PAIR % ACROSS * 2 * ROWS
    if query < share.end:
        tma_store(operands.dq, [share.batch, head, query, COLUMN], left)
        tma_store(operands.dq, [share.batch, head, query, COLUMN + ROWS], right)


@gluon.jit
def _progress(operands, batch, head_k):
    """Address of a key head's two counters."""
    nheads_k = operands.call.nheads // operands.call.group
    return operands.progress + 2 * (batch * nheads_k + head_k)
