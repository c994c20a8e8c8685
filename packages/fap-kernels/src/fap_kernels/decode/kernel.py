"""Few queries, many keys: the keys are split among programs, and a key head's query heads form one tile.

    tile of (query, head of the group) rows,
    share of the keys ──> for each tile of keys in the share:   as the forward pass
                      ──> O and LSE of the share, which the combine kernel joins

Reading K and V is all the work there is when a sequence has few queries. So each key is read once for all
query heads that share it, and by as many programs as it takes to keep the whole chip reading (flash-decoding:
Dao, Haziza, Massa, Sizov, 2023).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..forward.kernel import attend
from ..language import grid, masks, parts, rows, scores, softmax, spans, tiles
from ..launch import UNSPECIALIZED


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_decode_kernel(
    q, q_strides, k, k_strides, k_part0, k_part1, v, v_strides, v_part0, v_part1,
    share_out, out_strides, share_lse, lse_strides, alibi_slopes, alibi_stride,
    cu_seqlens_k, seqused_k,
    cache_batch_idx, cache_leftpad, cache_rows, rows_added, block_table, table_stride, page_bits,
    nheads_k, group, seqlen_q, seqlen_k, splits, window_left, window_right, softmax_scale, softcap,
    HEAD_DIM: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    FOLD_SCALE: tl.constexpr, PARTIAL: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write ``share_out`` and ``share_lse`` of one tile of rows and one share of its keys.

    Row r of a key head is query ``r // group`` of the group's head ``r % group``. With ``PARTIAL`` the first
    dimension of both is the share, before that of the batch.

    Grid: one program for each (batch, key head, share, tile of rows), the tile fastest.
    """
    batch, head_k, split, first_row = tiles.place_share(nheads_k, splits, seqlen_q * group, BLOCK_M)
    k_batch, k_start, keys = spans.span_of(cu_seqlens_k, seqused_k, seqlen_k, batch)
    k_batch, k_start, keys = spans.in_cache(
        k_batch, k_start, keys, batch, cache_batch_idx, cache_leftpad, cache_rows, rows_added, seqlen_k
    )
    pages = rows.Pages(block_table + batch * table_stride, page_bits) if block_table is not None else None
    row = first_row + tl.arange(0, BLOCK_M)
    queries = row // group
    heads = head_k * group + row % group
    window = masks.Window(window_left, window_right, keys - seqlen_q, seqlen_q, keys)
    slopes = alibi_slopes + batch * alibi_stride if alibi_slopes is not None else None
    score = scores.Scores(softmax_scale, softmax_scale if FOLD_SCALE else None, softcap, slopes)

    q_rows = rows.Rows(q, q_strides, None, None, batch, None, seqlen_q, None)
    k_rows = rows.Rows(k, k_strides, k_part0, k_part1, k_batch, k_start, keys, pages)
    v_rows = rows.Rows(v, v_strides, v_part0, v_part1, k_batch, k_start, keys, pages)
    q_tile = rows.load_grouped(q_rows, heads, queries, HEAD_DIM, PART0, PART1)

    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = parts.zeros(BLOCK_M, PART0, PART1)
    first_query = first_row // group
    count = (first_row + BLOCK_M - 1) // group - first_query + 1
    visit = tiles.share_of(tiles.keys_to_visit(window, first_query, count, BLOCK_N), split, splits, BLOCK_N)
    if window_left is not None:
        for first_key in tl.range(visit.start, visit.inner, BLOCK_N, num_stages=STAGES):
            acc, row_max, row_sum = attend(
                heads[:, None], head_k, q_tile, k_rows, v_rows, queries, first_key, window, score, None,
                acc, row_max, row_sum, HEAD_DIM, PART0, PART1, BLOCK_N, True,
            )  # fmt: skip
    for first_key in tl.range(visit.inner, visit.outer, BLOCK_N, num_stages=STAGES):
        acc, row_max, row_sum = attend(
            heads[:, None], head_k, q_tile, k_rows, v_rows, queries, first_key, window, score, None,
            acc, row_max, row_sum, HEAD_DIM, PART0, PART1, BLOCK_N, False,
        )  # fmt: skip
    for first_key in tl.range(visit.outer, visit.end, BLOCK_N, num_stages=STAGES):
        acc, row_max, row_sum = attend(
            heads[:, None], head_k, q_tile, k_rows, v_rows, queries, first_key, window, score, None,
            acc, row_max, row_sum, HEAD_DIM, PART0, PART1, BLOCK_N, True,
        )  # fmt: skip

    if OVERLAP:
        # The combine kernel may take its place on the chip now; it waits there for what is stored below.
        grid.release_next()
    factor, row_lse = softmax.finish(row_max, row_sum)
    entry = batch
    if PARTIAL:
        # A share without keys must weigh nothing against the others; a row without any gets +inf at last.
        row_lse = tl.where(row_sum == 0.0, float("-inf"), row_lse)
        entry += split * (tl.num_programs(0) // (splits * nheads_k * tl.cdiv(seqlen_q * group, BLOCK_M)))
    out_rows = rows.Rows(share_out, out_strides, None, None, entry, None, seqlen_q, None)
    rows.store_grouped(out_rows, heads, queries, parts.scale_rows(acc, factor), HEAD_DIM, PART0, PART1)
    vectors = entry.to(tl.int64) * lse_strides[0] + heads.to(tl.int64) * lse_strides[1]
    tl.store(share_lse + vectors + queries, row_lse, mask=queries < seqlen_q)
