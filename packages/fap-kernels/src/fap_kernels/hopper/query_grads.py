"""dQ from where the Hopper backward summed it up, in float32, to where it belongs."""

from __future__ import annotations

import triton
import triton.language as tl

from ..language import grid, rows, spans, tiles
from ..launch import UNSPECIALIZED

ROWS: tl.constexpr = tl.constexpr(64)
"""Rows and columns of a tile of ``dq_acc``."""


@triton.jit(do_not_specialize=UNSPECIALIZED)
def hopper_query_grads_kernel(
    dq_acc, additions, dq, dq_strides, cu_seqlens_q, seqused_q, entries, slots,
    nheads, seqlen_q, rows_padded, first_tile, softmax_scale,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, PADDING: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write ``dq = dq_acc * softmax_scale``. Grid: (batch, query head, 64 queries), the queries fastest.

    With ``first_tile`` it starts with that number of them, those before being at their place already.

    ``dq_acc`` is float32 ``(batch, nheads, rows_padded, WIDTH)``, batch 1 where packed, in tiles of 64 x 64,
    those of the same rows one after the other. ``additions`` is None, or a number for each 64 rows, of
    which ``BLOCK_M`` rows have that of their first ones: where it is 0, ``dq_acc`` may hold anything, since
    nothing was added.
    """
    packed = spans.Slots(cu_seqlens_q, entries, slots) if cu_seqlens_q is not None else None
    index = tl.program_id(0)
    if first_tile is not None:
        index += first_tile
    batch, head, first = tiles.place_of(index, nheads, seqlen_q, packed, ROWS, False)
    q_batch, q_start, seqlen_q = spans.span_of(cu_seqlens_q, seqused_q, seqlen_q, batch)
    if cu_seqlens_q is not None and first >= seqlen_q:
        return
    q_packed = q_start if cu_seqlens_q is not None else None
    start = spans.padded_start(cu_seqlens_q, q_start, batch, PADDING)
    row = (q_batch * nheads + head).to(tl.int64) * rows_padded + start + first
    if OVERLAP:
        grid.wait_for_previous()
    tile = load_tile(dq_acc + row * WIDTH, WIDTH) * softmax_scale
    if additions is not None:
        tile = tl.where(tl.load(additions + row // BLOCK_M * (BLOCK_M // ROWS)) > 0, tile, 0.0)
    dq_rows = rows.Rows(dq, dq_strides, None, None, q_batch, q_packed, seqlen_q, None)
    rows.store(dq_rows, head, first, (tile,), ROWS, HEAD_DIM, WIDTH, 0)


@triton.jit
def load_tile(start, WIDTH: tl.constexpr):
    """64 rows of ``WIDTH`` columns that accumulators of wgmma were stored from, register by register.

    Of 64 x 64 numbers, thread t of a warpgroup's warp w has rows ``16 w + t // 4`` and 8 further down, and of
    each group of eight columns numbers ``2 (t % 4)`` and the next: these four lie side by side, and behind
    them those of the next thread.
    """
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    thread = row // 16 * 32 + row % 8 * 4 + column % 8 // 2
    number = row // 8 % 2 * 2 + column % 2
    return tl.load(start + column // 8 * 512 + thread * 4 + number)
