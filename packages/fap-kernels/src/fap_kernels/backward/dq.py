"""dQ: one query tile sweeps the keys it sees, as the forward pass does.

tile of queries ──> for each tile of keys it sees:   S = Q K^T,  dP = dO V^T
                                                     P, dS
                                                     dQ += dS K
                ──> dQ * softmax_scale
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..language import dropout as drop
from ..language import masks, parts, rows, scores, spans, tiles
from ..launch import UNSPECIALIZED
from .step import products_grad, recompute_weights


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_dq_kernel(
    q, q_strides, q_part0, q_part1, k, k_strides, k_part0, k_part1, v, v_strides, v_part0, v_part1,
    dout, dout_strides, dout_part0, dout_part1, lse, delta, dq, dq_strides,
    alibi_slopes, alibi_stride, rng_state,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, entries, slots,
    nheads, group, seqlen_q, seqlen_k, rows_padded, window_left, window_right,
    softmax_scale, softcap, keep_threshold, keep_scale,
    HEAD_DIM: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PADDING: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
):  # fmt: skip
    """Write ``dq`` of one query tile. Grid: (batch, query head, query tile), the tile fastest."""
    packed = spans.Slots(cu_seqlens_q, entries, slots) if cu_seqlens_q is not None else None
    batch, head, first_query = tiles.place(nheads, seqlen_q, packed, BLOCK_M, window_right is not None)
    q_batch, q_start, seqlen_q = spans.span_of(cu_seqlens_q, seqused_q, seqlen_q, batch)
    k_batch, k_start, seqlen_k = spans.span_of(cu_seqlens_k, seqused_k, seqlen_k, batch)
    q_packed = q_start if cu_seqlens_q is not None else None
    k_packed = k_start if cu_seqlens_k is not None else None
    if cu_seqlens_q is not None and first_query >= seqlen_q:
        return
    window = masks.Window(window_left, window_right, seqlen_k - seqlen_q, seqlen_q, seqlen_k)
    slopes = alibi_slopes + batch * alibi_stride if alibi_slopes is not None else None
    score = scores.Scores(softmax_scale, softmax_scale if FOLD_SCALE else None, softcap, slopes)
    dropout = None
    if rng_state is not None:
        dropout = drop.Dropout(rng_state, batch * nheads, keep_threshold, keep_scale)
    q_rows = rows.Rows(q, q_strides, q_part0, q_part1, q_batch, q_packed, seqlen_q, None)
    dout_rows = rows.Rows(dout, dout_strides, dout_part0, dout_part1, q_batch, q_packed, seqlen_q, None)
    k_rows = rows.Rows(k, k_strides, k_part0, k_part1, k_batch, k_packed, seqlen_k, None)
    v_rows = rows.Rows(v, v_strides, v_part0, v_part1, k_batch, k_packed, seqlen_k, None)
    q_tile = rows.load(q_rows, head, first_query, BLOCK_M, HEAD_DIM, PART0, PART1, True)
    dout_tile = rows.load(dout_rows, head, first_query, BLOCK_M, HEAD_DIM, PART0, PART1, True)
    start = spans.padded_start(cu_seqlens_q, q_start, batch, PADDING)
    row = (q_batch * nheads + head).to(tl.int64) * rows_padded + start + first_query + tl.arange(0, BLOCK_M)
    row_lse = tl.load(lse + row)
    row_delta = tl.load(delta + row)

    acc = parts.zeros(BLOCK_M, PART0, PART1)
    visit = tiles.keys_to_visit(window, first_query, BLOCK_M, BLOCK_N)
    if window_left is not None:
        for first_key in tl.range(
            visit.start, tl.minimum(visit.inner, visit.end), BLOCK_N, num_stages=STAGES
        ):
            acc = _gather(
                head, head // group, q_tile, dout_tile, k_rows, v_rows, row_lse, row_delta,
                first_query, first_key, window, score, dropout, acc,
                HEAD_DIM, PART0, PART1, BLOCK_M, BLOCK_N, True,
            )  # fmt: skip
    for first_key in tl.range(visit.inner, visit.outer, BLOCK_N, num_stages=STAGES):
        acc = _gather(
            head, head // group, q_tile, dout_tile, k_rows, v_rows, row_lse, row_delta,
            first_query, first_key, window, score, dropout, acc,
            HEAD_DIM, PART0, PART1, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    for first_key in tl.range(visit.outer, visit.end, BLOCK_N, num_stages=STAGES):
        acc = _gather(
            head, head // group, q_tile, dout_tile, k_rows, v_rows, row_lse, row_delta,
            first_query, first_key, window, score, dropout, acc,
            HEAD_DIM, PART0, PART1, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip

    dq_rows = rows.Rows(dq, dq_strides, None, None, q_batch, q_packed, seqlen_q, None)
    rows.store(dq_rows, head, first_query, parts.scale(acc, softmax_scale), BLOCK_M, HEAD_DIM, PART0, PART1)


@triton.jit
def _gather(
    head, head_k, q_tile, dout_tile, k_rows, v_rows, row_lse, row_delta,
    first_query, first_key, window, score, dropout, acc,
    HEAD_DIM: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Add to dQ what the key tile at ``first_key`` contributes."""
    queries = (first_query + tl.arange(0, BLOCK_M))[:, None]
    keys = (first_key + tl.arange(0, BLOCK_N))[None, :]
    k_tile = rows.load(k_rows, head_k, first_key, BLOCK_N, HEAD_DIM, PART0, PART1, MASKED)
    v_tile = rows.load(v_rows, head_k, first_key, BLOCK_N, HEAD_DIM, PART0, PART1, MASKED)
    products = parts.contract(q_tile, k_tile)
    weights = recompute_weights(head, products, row_lse[:, None], queries, keys, window, score, MASKED)
    dweights = parts.contract(dout_tile, v_tile)
    dproducts = products_grad(
        head, products, weights, dweights, row_delta[:, None], queries, keys, score, dropout
    )
    return parts.accumulate(dproducts.to(k_tile[0].dtype), k_tile, acc)
