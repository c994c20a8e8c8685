"""dK and dV: one key tile sweeps the queries that see it.

    tile of keys ──> for each query head of its group:
                       for each tile of queries that sees it:   S^T = K Q^T,   P^T = exp(S^T - LSE)
                                                                dV += P^T dO
                                                                dP^T = V dO^T, dS^T = P^T (dP^T - delta)
                                                                dK += dS^T Q
                 ──> dV / (1 - p),  dK * softmax_scale

The tile is held transposed, so that P^T and dS^T enter the products that consume them as they are.
Grouped heads are summed here, in registers: K and V are never repeated and nothing is atomic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..language import dropout as drop
from ..language import masks, parts, rows, scores, spans, tiles
from ..launch import UNSPECIALIZED
from .step import products_grad, recompute_weights


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_dkdv_kernel(
    q, q_strides, q_part0, q_part1, k, k_strides, k_part0, k_part1, v, v_strides, v_part0, v_part1,
    dout, dout_strides, dout_part0, dout_part1, lse, delta, dk, dk_strides, dv, dv_strides,
    alibi_slopes, alibi_stride, rng_state,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, entries, slots,
    nheads_k, group, seqlen_q, seqlen_k, rows_padded, window_left, window_right,
    softmax_scale, softcap, keep_threshold, keep_scale,
    HEAD_DIM: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, PADDING: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
):  # fmt: skip
    """Write ``dk`` and ``dv`` of one key tile. Grid: (batch, key head, key tile), the tile fastest."""
    packed = spans.Slots(cu_seqlens_k, entries, slots) if cu_seqlens_k is not None else None
    batch, head_k, first_key = tiles.place(nheads_k, seqlen_k, packed, BLOCK_N, False)
    nheads = nheads_k * group
    q_batch, q_start, seqlen_q = spans.span_of(cu_seqlens_q, seqused_q, seqlen_q, batch)
    k_batch, k_start, seqlen_k = spans.span_of(cu_seqlens_k, seqused_k, seqlen_k, batch)
    q_packed = q_start if cu_seqlens_q is not None else None
    k_packed = k_start if cu_seqlens_k is not None else None
    if cu_seqlens_k is not None and first_key >= seqlen_k:
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
    k_tile = rows.load(k_rows, head_k, first_key, BLOCK_N, HEAD_DIM, PART0, PART1, True)
    v_tile = rows.load(v_rows, head_k, first_key, BLOCK_N, HEAD_DIM, PART0, PART1, True)
    vectors = tl.cast(q_batch * nheads, tl.int64) * rows_padded
    vectors += spans.padded_start(cu_seqlens_q, q_start, batch, PADDING)
    lse += vectors
    delta += vectors

    dk_acc = parts.zeros(BLOCK_N, PART0, PART1)
    dv_acc = parts.zeros(BLOCK_N, PART0, PART1)
    # Where a tile at the end of the queries reads zeros for those that do not exist, it needs no mask.
    OWN_END: tl.constexpr = window_left is None and window_right is not None
    visit = tiles.queries_to_visit(window, first_key, BLOCK_N, BLOCK_M, OWN_END)
    # One loop over the group's heads and each head's tiles, not a nest: the pipeline runs on from
    # one head to the next, and dK and dV need fewer registers beside it.
    if window_right is not None:
        count = tl.cdiv(tl.minimum(visit.inner, visit.end) - visit.start, BLOCK_M)
        for index in tl.range(0, count * group, num_stages=STAGES):
            dk_acc, dv_acc = _gather(
                head_k * group + index // count, visit.start + index % count * BLOCK_M, first_key,
                k_tile, v_tile, q_rows, dout_rows, lse, delta, rows_padded,
                window, score, dropout, dk_acc, dv_acc,
                HEAD_DIM, PART0, PART1, BLOCK_M, BLOCK_N, True, True,
            )  # fmt: skip
    count = tl.cdiv(visit.outer - visit.inner, BLOCK_M)
    for index in tl.range(0, count * group, num_stages=STAGES):
        dk_acc, dv_acc = _gather(
            head_k * group + index // count, visit.inner + index % count * BLOCK_M, first_key,
            k_tile, v_tile, q_rows, dout_rows, lse, delta, rows_padded,
            window, score, dropout, dk_acc, dv_acc,
            HEAD_DIM, PART0, PART1, BLOCK_M, BLOCK_N, False, OWN_END,
        )  # fmt: skip
    if not OWN_END:
        count = tl.cdiv(visit.end - visit.outer, BLOCK_M)
        for index in tl.range(0, count * group, num_stages=STAGES):
            dk_acc, dv_acc = _gather(
                head_k * group + index // count, visit.outer + index % count * BLOCK_M, first_key,
                k_tile, v_tile, q_rows, dout_rows, lse, delta, rows_padded,
                window, score, dropout, dk_acc, dv_acc,
                HEAD_DIM, PART0, PART1, BLOCK_M, BLOCK_N, True, True,
            )  # fmt: skip

    if dropout is not None:
        dv_acc = parts.scale(dv_acc, dropout.scale)
    dk_acc = parts.scale(dk_acc, softmax_scale)
    dk_rows = rows.Rows(dk, dk_strides, None, None, k_batch, k_packed, seqlen_k, None)
    dv_rows = rows.Rows(dv, dv_strides, None, None, k_batch, k_packed, seqlen_k, None)
    rows.store(dk_rows, head_k, first_key, dk_acc, BLOCK_N, HEAD_DIM, PART0, PART1)
    rows.store(dv_rows, head_k, first_key, dv_acc, BLOCK_N, HEAD_DIM, PART0, PART1)


@triton.jit
def _gather(
    head, first_query, first_key,
    k_tile, v_tile, q_rows, dout_rows, lse, delta, rows_padded,
    window, score, dropout, dk_acc, dv_acc,
    HEAD_DIM: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, BOUNDED: tl.constexpr,
):  # fmt: skip
    """Add to dK and dV what a head's query tile at ``first_query`` contributes."""
    keys = (first_key + tl.arange(0, BLOCK_N))[:, None]
    queries = (first_query + tl.arange(0, BLOCK_M))[None, :]
    q_tile = rows.load(q_rows, head, first_query, BLOCK_M, HEAD_DIM, PART0, PART1, BOUNDED)
    dout_tile = rows.load(dout_rows, head, first_query, BLOCK_M, HEAD_DIM, PART0, PART1, BOUNDED)
    dtype = q_tile[0].dtype
    row = head.to(tl.int64) * rows_padded + first_query + tl.arange(0, BLOCK_M)
    # P goes into dV before dP is made, and each vector is loaded where it is used: in any other order
    # more of them live at once than the registers hold beside dK and dV.
    products = parts.contract(k_tile, q_tile)
    row_lse = tl.load(lse + row)[None, :]
    weights = recompute_weights(head, products, row_lse, queries, keys, window, score, MASKED)
    kept = drop.apply(dropout, head, weights, queries, keys)
    dv_acc = parts.accumulate(kept.to(dtype), dout_tile, dv_acc)
    dweights = parts.contract(v_tile, dout_tile)
    row_delta = tl.load(delta + row)[None, :]
    dproducts = products_grad(head, products, weights, dweights, row_delta, queries, keys, score, dropout)
    dk_acc = parts.accumulate(dproducts.to(dtype), q_tile, dk_acc)
    return dk_acc, dv_acc
