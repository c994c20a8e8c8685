"""The attention weights written out, one tile a program."""

from __future__ import annotations

import triton
import triton.language as tl

from ..language import dropout as drop
from ..language import masks, parts, rows, scores, softmax, spans
from ..launch import UNSPECIALIZED


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_probabilities_kernel(
    q, q_strides, q_part0, q_part1, k, k_strides, k_part0, k_part1,
    lse, lse_rows, weights, alibi_slopes, alibi_stride, rng_state,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, block_table, table_stride, page_bits,
    nheads, group, seqlen_q, seqlen_k, rows_stored, columns_stored, window_left, window_right,
    softmax_scale, softcap, keep_threshold,
    HEAD_DIM: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FOLD_SCALE: tl.constexpr,
):  # fmt: skip
    """Write one tile of ``(batch, nheads, rows_stored, columns_stored)`` weights, dropped ones negative."""
    across = columns_stored // BLOCK_N
    pid = tl.program_id(0).to(tl.int64)
    first_key = (pid % across * BLOCK_N).to(tl.int32)
    down = rows_stored // BLOCK_M
    first_query = (pid // across % down * BLOCK_M).to(tl.int32)
    place = (pid // across // down).to(tl.int32)
    batch, head = place // nheads, place % nheads
    q_batch, q_start, seqlen_q = spans.span_of(cu_seqlens_q, seqused_q, seqlen_q, batch)
    k_batch, k_start, seqlen_k = spans.span_of(cu_seqlens_k, seqused_k, seqlen_k, batch)
    q_packed = q_start if cu_seqlens_q is not None else None
    k_packed = k_start if cu_seqlens_k is not None else None
    pages = rows.Pages(block_table + batch * table_stride, page_bits) if block_table is not None else None

    queries = (first_query + tl.arange(0, BLOCK_M))[:, None]
    keys = (first_key + tl.arange(0, BLOCK_N))[None, :]
    window = masks.Window(window_left, window_right, seqlen_k - seqlen_q, seqlen_q, seqlen_k)
    slopes = alibi_slopes + batch * alibi_stride if alibi_slopes is not None else None
    score = scores.Scores(softmax_scale, softmax_scale if FOLD_SCALE else None, softcap, slopes)
    q_rows = rows.Rows(q, q_strides, q_part0, q_part1, q_batch, q_packed, seqlen_q, None)
    k_rows = rows.Rows(k, k_strides, k_part0, k_part1, k_batch, k_packed, seqlen_k, pages)
    q_tile = rows.load(q_rows, head, first_query, BLOCK_M, HEAD_DIM, PART0, PART1, True)
    k_tile = rows.load(k_rows, head // group, first_key, BLOCK_N, HEAD_DIM, PART0, PART1, True)
    entry_lse = rows.vector_of(lse, (nheads * lse_rows, lse_rows), q_batch, head, q_start)
    row_lse = tl.load(entry_lse + queries, mask=queries < seqlen_q, other=float("inf"))
    distances = masks.distance(window, queries, keys)
    x = scores.logits(score, head, parts.contract(q_tile, k_tile), distances)
    seen = masks.visible(window, queries, keys) & (queries < seqlen_q)
    weight = softmax.weights_of(tl.where(seen, x, float("-inf")), scores.unit(score), row_lse * scores.LOG2E)
    if rng_state is not None:
        dropout = drop.Dropout(rng_state, batch * nheads, keep_threshold, None)
        weight = tl.where(drop.survives(dropout, head, queries, keys) | (seen == 0), weight, -weight)
    matrix = (batch * nheads + head).to(tl.int64)
    address = weights + (matrix * rows_stored + queries) * columns_stored + keys
    tl.store(address, weight.to(weights.dtype.element_ty))
