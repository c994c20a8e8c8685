"""Compute again, by the online softmax of the portable kernel, the query tiles whose LSE holds a NaN.

That is how :mod:`fap_kernels.hopper.forward` marks rows whose weights outgrew their reference. On ordinary
inputs there are none, and this kernel reads the LSE once and ends. Nothing waits for the host.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..forward.kernel import compute_tile
from ..language import grid, masks, rows, scores, spans, tiles
from ..launch import UNSPECIALIZED


@triton.jit(do_not_specialize=UNSPECIALIZED)
def hopper_redo_kernel(
    q, q_strides, k, k_strides, v, v_strides, out, out_strides, lse, lse_rows,
    alibi_slopes, alibi_stride, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, entries, slots,
    nheads, group, seqlen_q, seqlen_k, tile_count, window_left, window_right, softmax_scale, softcap,
    HEAD_DIM: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, FOLD_SCALE: tl.constexpr,
    SCAN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write ``out`` and ``lse`` of marked query tiles.

    Grid: one program for each ``SCAN`` query tiles of the ``tile_count`` that there are.
    """
    first = tl.program_id(0) * SCAN
    index = tl.minimum(first + tl.arange(0, SCAN), tile_count - 1)
    packed = spans.Slots(cu_seqlens_q, entries, slots) if cu_seqlens_q is not None else None
    batch, head, first_query = tiles.place_of(index, nheads, seqlen_q, packed, BLOCK_M, False)
    q_batch, q_start, length = spans.span_of(cu_seqlens_q, seqused_q, seqlen_q, batch)
    row = first_query[:, None] + tl.arange(0, BLOCK_M)[None, :]
    exists = row < (length + index * 0)[:, None]
    marks = rows.vector_of(lse, (nheads * lse_rows, lse_rows), q_batch, head, q_start)[:, None] + row
    if OVERLAP:
        grid.wait_for_previous()
    values = tl.load(marks, mask=exists, other=0.0)
    if tl.max(tl.max((values != values).to(tl.int32), 1), 0) > 0:
        for number in range(first, tl.minimum(first + SCAN, tile_count)):
            _redo(
                number, q, q_strides, k, k_strides, v, v_strides, out, out_strides, lse, lse_rows,
                alibi_slopes, alibi_stride, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, entries, slots,
                nheads, group, seqlen_q, seqlen_k, window_left, window_right, softmax_scale, softcap,
                HEAD_DIM, PART0, PART1, BLOCK_M, BLOCK_N, STAGES, FOLD_SCALE,
            )  # fmt: skip


@triton.jit
def _redo(
    number, q, q_strides, k, k_strides, v, v_strides, out, out_strides, lse, lse_rows,
    alibi_slopes, alibi_stride, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, entries, slots,
    nheads, group, seqlen_q, seqlen_k, window_left, window_right, softmax_scale, softcap,
    HEAD_DIM: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, FOLD_SCALE: tl.constexpr,
):  # fmt: skip
    """Compute query tile ``number`` if it is marked."""
    packed = spans.Slots(cu_seqlens_q, entries, slots) if cu_seqlens_q is not None else None
    batch, head, first_query = tiles.place_of(number, nheads, seqlen_q, packed, BLOCK_M, False)
    q_batch, q_start, seqlen_q = spans.span_of(cu_seqlens_q, seqused_q, seqlen_q, batch)
    k_batch, k_start, seqlen_k = spans.span_of(cu_seqlens_k, seqused_k, seqlen_k, batch)
    entry_lse = rows.vector_of(lse, (nheads * lse_rows, lse_rows), q_batch, head, q_start)
    row = first_query + tl.arange(0, BLOCK_M)
    values = tl.load(entry_lse + row, mask=row < seqlen_q, other=0.0)
    if tl.max((values != values).to(tl.int32), 0) > 0:
        q_packed = q_start if cu_seqlens_q is not None else None
        k_packed = k_start if cu_seqlens_k is not None else None
        window = masks.Window(window_left, window_right, seqlen_k - seqlen_q, seqlen_q, seqlen_k)
        slopes = alibi_slopes + batch * alibi_stride if alibi_slopes is not None else None
        score = scores.Scores(softmax_scale, softmax_scale if FOLD_SCALE else None, softcap, slopes)
        q_rows = rows.Rows(q, q_strides, None, None, q_batch, q_packed, seqlen_q, None)
        k_rows = rows.Rows(k, k_strides, None, None, k_batch, k_packed, seqlen_k, None)
        v_rows = rows.Rows(v, v_strides, None, None, k_batch, k_packed, seqlen_k, None)
        out_rows = rows.Rows(out, out_strides, None, None, q_batch, q_packed, seqlen_q, None)
        compute_tile(
            head, head // group, first_query, q_rows, k_rows, v_rows, out_rows, entry_lse, window, score,
            None, HEAD_DIM, PART0, PART1, BLOCK_M, BLOCK_N, STAGES,
        )  # fmt: skip
