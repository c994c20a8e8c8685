"""Join the shares of a split sweep: an online softmax over their LSEs, whose values are their outputs."""

from __future__ import annotations

import triton
import triton.language as tl

from ..language import grid, softmax
from ..language.scores import LOG2E
from ..launch import UNSPECIALIZED


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_combine_kernel(
    share_out, share_lse, out, lse, splits, nheads, seqlen_q,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, SHARES: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Write one row of ``out`` and ``lse``.

    ``share_out`` is float32 ``(splits, batch, seqlen_q, nheads, head_dim)`` and ``share_lse`` float32
    ``(splits, batch, nheads, seqlen_q)``, -inf where a share had no keys; all tensors are contiguous. The
    shares are taken in one order, ``SHARES`` at a time, so the result is the same on every run.

    Grid: one program for each (batch, query, head).
    """
    pid = tl.program_id(0)
    rows = tl.num_programs(0).to(tl.int64)
    head = pid % nheads
    query = pid // nheads % seqlen_q
    vector = (pid // (nheads * seqlen_q) * nheads + head) * seqlen_q + query
    column = tl.arange(0, WIDTH)
    if OVERLAP:
        grid.wait_for_previous()
    acc = tl.zeros([1, WIDTH], tl.float32)
    row_max = tl.full([1], float("-inf"), tl.float32)
    row_sum = tl.zeros([1], tl.float32)
    for first in range(0, splits, SHARES):
        share = first + tl.arange(0, SHARES)
        exists = share < splits
        x = tl.load(share_lse + share * rows + vector, mask=exists, other=float("-inf"))
        values = tl.load(
            share_out + (share * rows + pid)[:, None] * HEAD_DIM + column[None, :],
            mask=exists[:, None] & (column < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        weights, rescale, row_max, row_sum = softmax.step(x[None, :], LOG2E, row_max, row_sum, True)
        weighted = tl.sum(tl.trans(weights) * values, 0)
        acc = acc * rescale[:, None] + weighted[None, :]
    factor, row_lse = softmax.finish(row_max, row_sum)
    result = (acc * factor[:, None]).to(out.dtype.element_ty)
    tl.store(out + pid.to(tl.int64) * HEAD_DIM + column[None, :], result, mask=(column < HEAD_DIM)[None, :])
    tl.store(lse + vector + tl.arange(0, 1), row_lse)
