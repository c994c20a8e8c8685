"""Rotate the rows of a tensor by their positions."""

from __future__ import annotations

import triton
import triton.language as tl

from ..language import rotary, rows, spans
from ..launch import UNSPECIALIZED


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rotary_kernel(
    x, x_strides, out, out_strides, cos, sin, table_rows, offsets, offset, cu_seqlens, nheads, seqlen,
    HEAD_DIM: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr,
    ROWS: tl.constexpr, INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr,
):  # fmt: skip
    """Write ``out``, which may be ``x``.

    A row is one head at one position; heads are the faster index. Grid: (batch, ROWS rows), rows fastest.
    """
    pid = tl.program_id(0)
    blocks = tl.cdiv(seqlen * nheads, ROWS)
    batch = pid // blocks
    row = pid % blocks * ROWS + tl.arange(0, ROWS)
    row_batch, start, length = spans.span_of(cu_seqlens, None, seqlen, batch)
    position = row // nheads
    place = start + position
    head = row % nheads
    source = x + rows.element_of(x_strides, row_batch, place, head)
    target = out + rows.element_of(out_strides, row_batch, place, head)
    position += offset
    if offsets is not None:
        position += tl.load(offsets + batch)
    rotary.turn_rows(
        rotary.Rotation(cos, sin, table_rows), source, target, row // nheads < length, position,
        HEAD_DIM, HALF, WIDTH, REST, INTERLEAVED, CONJUGATE,
    )  # fmt: skip
