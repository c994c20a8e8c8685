"""Append new keys and values to a cache, in place, the keys rotated by their positions if asked for."""

from __future__ import annotations

import triton
import triton.language as tl

from ..language import rotary, rows
from ..launch import UNSPECIALIZED


@triton.jit(do_not_specialize=UNSPECIALIZED)
def kvcache_append_kernel(
    k, k_strides, v, v_strides, k_cache, k_cache_strides, v_cache, v_cache_strides,
    cache_seqlens, cache_batch_idx, block_table, table_stride, page_bits, capacity,
    cos, sin, table_rows, nheads_k, seqlen_new,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Write the new rows of ``k_cache`` and ``v_cache``.

    A sequence whose new rows do not all fit is left as it was. A row is one head of one new key; heads are
    the faster index. Grid: (batch, ROWS rows), rows fastest.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(seqlen_new * nheads_k, ROWS)
    batch = pid // blocks
    row = pid % blocks * ROWS + tl.arange(0, ROWS)
    new = row // nheads_k
    head = row % nheads_k
    length = tl.load(cache_seqlens + batch)
    fits = (length >= 0) & (length + seqlen_new <= capacity)
    exists = new < tl.where(fits, seqlen_new, 0)
    position = length + new
    if block_table is not None:
        index = position >> page_bits
        entry = tl.load(block_table + batch * table_stride + index, mask=exists, other=0)
        place = position - (index << page_bits)
    else:
        entry = batch + row * 0
        if cache_batch_idx is not None:
            entry = tl.load(cache_batch_idx + batch) + row * 0
        place = position
    from_k = k + rows.element_of(k_strides, batch, new, head)
    from_v = v + rows.element_of(v_strides, batch, new, head)
    to_k = k_cache + rows.element_of(k_cache_strides, entry, place, head)
    to_v = v_cache + rows.element_of(v_cache_strides, entry, place, head)
    if cos is not None:
        rotary.turn_rows(
            rotary.Rotation(cos, sin, table_rows), from_k, to_k, exists, position,
            HEAD_DIM, HALF, WIDTH, REST, INTERLEAVED, False,
        )  # fmt: skip
    else:
        rotary.copy_rows(from_k, to_k, exists[:, None], 0, HEAD_DIM, COLUMNS)
    rotary.copy_rows(from_v, to_v, exists[:, None], 0, HEAD_DIM, COLUMNS)
