"""What the backward pass needs to know of each row: its LSE, and what its softmax gradient subtracts."""

from __future__ import annotations

import triton
import triton.language as tl

from ..language import parts, rows, tiles
from ..language.scores import LOG2E
from ..launch import UNSPECIALIZED


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_delta_kernel(
    out, dout, softmax_lse, dlse, lse, delta,
    out_strides, dout_strides, dlse_strides,
    nheads, seqlen_q, rows_padded,
    HEAD_DIM: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write ``lse`` and ``delta``, float32 ``(batch, nheads, rows_padded)``.

    ``lse`` is the LSE in base 2 and ``delta = sum(out * dout) - dlse``. The sum is FlashAttention's D (Dao
    et al., arXiv:2205.14135, section B.4). The LSE's gradient enters here because d LSE / d logits is
    the softmax itself: ``dlogits = P * (dP - D + dlse)``.

    Rows are padded to a multiple of every tile, with an LSE of +inf that makes their weights 0: the
    kernels that sweep queries then load these vectors without a mask, and with aligned addresses.
    """
    batch, head, first = tiles.place(nheads, rows_padded, BLOCK_M, False)
    out_tile = rows.load(
        rows.Rows(out, None, out_strides, batch, seqlen_q), head, first, BLOCK_M, HEAD_DIM, PART0, PART1, True
    )
    dout_tile = rows.load(
        rows.Rows(dout, None, dout_strides, batch, seqlen_q),
        head,
        first,
        BLOCK_M,
        HEAD_DIM,
        PART0,
        PART1,
        True,
    )
    row_delta = parts.row_dot(out_tile, dout_tile)
    row = first + tl.arange(0, BLOCK_M)
    exists = row < seqlen_q
    if dlse is not None:
        corner = dlse + batch * tl.cast(dlse_strides[0], tl.int64) + head * tl.cast(dlse_strides[1], tl.int64)
        row_delta -= tl.load(corner + row * tl.cast(dlse_strides[2], tl.int64), mask=exists, other=0.0)
    vector = (batch * nheads + head).to(tl.int64)
    row_lse = tl.load(softmax_lse + vector * seqlen_q + row, mask=exists, other=float("inf"))
    tl.store(lse + vector * rows_padded + row, row_lse * LOG2E)
    tl.store(delta + vector * rows_padded + row, row_delta)
