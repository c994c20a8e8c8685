"""delta: what each row's softmax gradient subtracts."""

from __future__ import annotations

import triton
import triton.language as tl

from ..language import parts, rows, tiles
from ..launch import UNSPECIALIZED


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_delta_kernel(
    out, dout, dlse, delta,
    out_strides, dout_strides, dlse_strides,
    nheads, seqlen_q,
    HEAD_DIM: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """``delta = sum(out * dout) - dlse``, float32 ``(batch, nheads, seqlen_q)``.

    The sum is FlashAttention's D (Dao et al., arXiv:2205.14135, section B.4). The LSE's gradient
    enters here because d LSE / d logits is the softmax itself: ``dlogits = P * (dP - D + dlse)``.
    """
    batch, head, first = tiles.place(nheads, seqlen_q, BLOCK_M, False)
    out_rows = rows.Rows(out, None, out_strides, batch, seqlen_q)
    dout_rows = rows.Rows(dout, None, dout_strides, batch, seqlen_q)
    value = parts.row_dot(
        rows.load(out_rows, head, first, BLOCK_M, HEAD_DIM, PART0, PART1, True),
        rows.load(dout_rows, head, first, BLOCK_M, HEAD_DIM, PART0, PART1, True),
    )
    start = (batch * nheads + head).to(tl.int64) * seqlen_q
    if dlse is not None:
        row = first + tl.arange(0, BLOCK_M)
        corner = dlse + batch * tl.cast(dlse_strides[0], tl.int64) + head * tl.cast(dlse_strides[1], tl.int64)
        value -= tl.load(corner + row * tl.cast(dlse_strides[2], tl.int64), mask=row < seqlen_q, other=0.0)
    rows.store_vector(delta + start, first, value, seqlen_q, BLOCK_M)
