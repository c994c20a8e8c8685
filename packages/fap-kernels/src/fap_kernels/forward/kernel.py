"""The forward pass: one query tile sweeps the keys it sees.

    tile of queries ──> for each tile of keys it sees:   S = Q K^T
                                                         logits, mask
                                                         online softmax step: P, rescale
                                                         O = rescale * O + P V
                    ──> O / sum,  LSE = max + log(sum)

FlashAttention-2's schedule (Dao, arXiv:2307.08691): parallel over query tiles, heads and batch,
sequential over keys, nothing of size seqlen_q x seqlen_k in memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..language import dropout as drop
from ..language import masks, parts, rows, scores, softmax, spans, tiles
from ..launch import UNSPECIALIZED


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_forward_kernel(
    q, q_strides, q_part0, q_part1, k, k_strides, k_part0, k_part1, v, v_strides, v_part0, v_part1,
    out, out_strides, lse, lse_rows, alibi_slopes, alibi_stride, rng_state,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, entries, slots,
    cache_batch_idx, cache_leftpad, cache_rows, rows_added, block_table, table_stride, page_bits,
    nheads, group, seqlen_q, seqlen_k, window_left, window_right,
    softmax_scale, softcap, keep_threshold, keep_scale,
    HEAD_DIM: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    FOLD_SCALE: tl.constexpr,
):  # fmt: skip
    """Write ``out`` and ``lse`` of one query tile; see the module's docstring.

    Grid: one program for each (batch, query head, query tile), the tile fastest, so that programs
    that run together share their keys in L2.
    """
    packed = spans.Slots(cu_seqlens_q, entries, slots) if cu_seqlens_q is not None else None
    batch, head, first_query = tiles.place(nheads, seqlen_q, packed, BLOCK_M, window_right is not None)
    q_batch, q_start, seqlen_q = spans.span_of(cu_seqlens_q, seqused_q, seqlen_q, batch)
    capacity = seqlen_k
    k_batch, k_start, seqlen_k = spans.span_of(cu_seqlens_k, seqused_k, seqlen_k, batch)
    if rows_added is not None:
        k_batch, k_start, seqlen_k = spans.in_cache(
            k_batch, k_start, seqlen_k, batch, cache_batch_idx, cache_leftpad, cache_rows, rows_added,
            capacity,
        )  # fmt: skip
    q_packed = q_start if cu_seqlens_q is not None else None
    k_packed = k_start if cu_seqlens_k is not None or rows_added is not None else None
    pages = rows.Pages(block_table + batch * table_stride, page_bits) if block_table is not None else None
    if cu_seqlens_q is not None and first_query >= seqlen_q:
        return
    window = masks.Window(window_left, window_right, seqlen_k - seqlen_q, seqlen_q, seqlen_k)
    slopes = alibi_slopes + batch * alibi_stride if alibi_slopes is not None else None
    score = scores.Scores(softmax_scale, softmax_scale if FOLD_SCALE else None, softcap, slopes)
    dropout = None
    if rng_state is not None:
        dropout = drop.Dropout(rng_state, batch * nheads, keep_threshold, keep_scale)

    q_rows = rows.Rows(q, q_strides, q_part0, q_part1, q_batch, q_packed, seqlen_q, None)
    k_rows = rows.Rows(k, k_strides, k_part0, k_part1, k_batch, k_packed, seqlen_k, pages)
    v_rows = rows.Rows(v, v_strides, v_part0, v_part1, k_batch, k_packed, seqlen_k, pages)
    out_rows = rows.Rows(out, out_strides, None, None, q_batch, q_packed, seqlen_q, None)
    entry_lse = rows.vector_of(lse, (nheads * lse_rows, lse_rows), q_batch, head, q_start)
    compute_tile(
        head, head // group, first_query, q_rows, k_rows, v_rows, out_rows, entry_lse, window, score, dropout,
        HEAD_DIM, PART0, PART1, BLOCK_M, BLOCK_N, STAGES,
    )  # fmt: skip


@triton.jit
def compute_tile(
    head, head_k, first_query, q_rows, k_rows, v_rows, out_rows, entry_lse, window, score, dropout,
    HEAD_DIM: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the queries of a head from ``first_query`` on, and store their output and LSE."""
    queries = first_query + tl.arange(0, BLOCK_M)
    q_tile = rows.load(q_rows, head, first_query, BLOCK_M, HEAD_DIM, PART0, PART1, True)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = parts.zeros(BLOCK_M, PART0, PART1)
    visit = tiles.keys_to_visit(window, first_query, BLOCK_M, BLOCK_N)
    if window.left is not None:
        for first_key in tl.range(
            visit.start, tl.minimum(visit.inner, visit.end), BLOCK_N, num_stages=STAGES
        ):
            acc, row_max, row_sum = attend(
                head, head_k, q_tile, k_rows, v_rows, queries, first_key, window, score, dropout,
                acc, row_max, row_sum, HEAD_DIM, PART0, PART1, BLOCK_N, True,
            )  # fmt: skip
    for first_key in tl.range(visit.inner, visit.outer, BLOCK_N, num_stages=STAGES):
        acc, row_max, row_sum = attend(
            head, head_k, q_tile, k_rows, v_rows, queries, first_key, window, score, dropout,
            acc, row_max, row_sum, HEAD_DIM, PART0, PART1, BLOCK_N, False,
        )  # fmt: skip
    for first_key in tl.range(visit.outer, visit.end, BLOCK_N, num_stages=STAGES):
        acc, row_max, row_sum = attend(
            head, head_k, q_tile, k_rows, v_rows, queries, first_key, window, score, dropout,
            acc, row_max, row_sum, HEAD_DIM, PART0, PART1, BLOCK_N, True,
        )  # fmt: skip

    factor, row_lse = softmax.finish(row_max, row_sum)
    if dropout is not None:
        factor *= dropout.scale
    rows.store(out_rows, head, first_query, parts.scale_rows(acc, factor), BLOCK_M, HEAD_DIM, PART0, PART1)
    rows.store_vector(entry_lse, first_query, row_lse, window.seqlen_q, BLOCK_M)


@triton.jit
def attend(
    head, head_k, q_tile, k_rows, v_rows, queries, first_key, window, score, dropout,
    acc, row_max, row_sum, HEAD_DIM: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Let the query tile take in the key tile at ``first_key``.

    ``head`` is a number, or one for each query as a column, where queries of several heads form one tile.
    """
    keys = first_key + tl.arange(0, BLOCK_N)
    distances = masks.distance(window, queries[:, None], keys[None, :])
    k_tile = rows.load(k_rows, head_k, first_key, BLOCK_N, HEAD_DIM, PART0, PART1, MASKED)
    x = scores.logits(score, head, parts.contract(q_tile, k_tile), distances)
    if MASKED:
        x = tl.where(masks.visible(window, queries[:, None], keys[None, :]), x, float("-inf"))
    weights, rescale, row_max, row_sum = softmax.step(x, scores.unit(score), row_max, row_sum, MASKED)
    weights = drop.apply(dropout, head, weights, queries[:, None], keys[None, :])
    v_tile = rows.load(v_rows, head_k, first_key, BLOCK_N, HEAD_DIM, PART0, PART1, MASKED)
    acc = parts.accumulate(weights.to(v_tile[0].dtype), v_tile, parts.scale_rows(acc, rescale))
    return acc, row_max, row_sum
