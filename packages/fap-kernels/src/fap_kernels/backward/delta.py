"""What the backward pass needs to know of each row: its LSE, and what its softmax gradient subtracts."""

from __future__ import annotations

import triton
import triton.language as tl

from ..language import grid, parts, rows, spans, tiles
from ..language.scores import LOG2E
from ..launch import UNSPECIALIZED


@triton.jit(do_not_specialize=UNSPECIALIZED)
def attention_delta_kernel(
    out, out_strides, dout, dout_strides,
    softmax_lse, lse_rows, dlse, lse, delta, dq_acc, additions, tickets, progress, progress_count, lift,
    cu_seqlens_q, seqused_q, entries, slots,
    nheads, seqlen_q, rows_swept, rows_padded,
    HEAD_DIM: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr,
    BLOCK_M: tl.constexpr, PADDING: tl.constexpr, WIDTH: tl.constexpr, NEGATIVE: tl.constexpr,
    RELEASE: tl.constexpr,
):  # fmt: skip
    """Write ``lse`` and ``delta``, float32 ``(batch, nheads, rows_padded)``; batch is 1 where packed.

    ``lse`` is the LSE in base 2, less ``lift``, and ``delta = sum(out * dout) - dlse``. The sum is
    FlashAttention's D (Dao et al., arXiv:2205.14135, section B.4). The LSE's gradient enters here because
    d LSE / d logits is the softmax itself: ``dlogits = P * (dP - D + dlse)``. With ``NEGATIVE`` it is
    ``-delta`` that is written, at which products can start.

    Each entry's rows are padded to a multiple of ``PADDING``, and so of every tile, with an LSE of +inf
    that makes their weights 0: the kernels that sweep queries then load these vectors without a mask,
    and with aligned addresses.

    ``dq_acc`` is None or float32 ``(batch, nheads, rows_padded, WIDTH)``, and is set to zero: where a kernel
    that follows adds dQ up, that costs no pass of its own here. So is ``additions``, one number for each
    ``BLOCK_M`` rows, or None: what that kernel counts in. ``tickets`` is None or one number, from which its
    programs draw what they work on, and is set to zero too; so are the ``progress_count`` numbers of
    ``progress``, or None, by which they tell each other how far they are.

    With ``RELEASE`` the kernel that follows may start at once, and waits by itself for what is stored here.
    """
    if RELEASE:
        grid.release_next()
    packed = spans.Slots(cu_seqlens_q, entries, slots) if cu_seqlens_q is not None else None
    # The padding has tiles of its own.
    SHARE: tl.constexpr = PADDING // BLOCK_M
    pid = tl.program_id(0)
    if tickets is not None and pid == 0:
        tl.store(tickets, 0)
    if progress is not None and pid == 0:
        for start in range(0, progress_count, 1024):
            number = start + tl.arange(0, 1024)
            tl.store(progress + number, 0, mask=number < progress_count)
    batch, head, first = tiles.place_of(pid // SHARE, nheads, rows_swept, packed, PADDING, False)
    first += pid % SHARE * BLOCK_M
    q_batch, q_start, seqlen_q = spans.span_of(cu_seqlens_q, seqused_q, seqlen_q, batch)
    q_packed = q_start if cu_seqlens_q is not None else None
    if cu_seqlens_q is not None and first >= tl.cdiv(seqlen_q, PADDING) * PADDING:
        return
    out_rows = rows.Rows(out, out_strides, None, None, q_batch, q_packed, seqlen_q, None)
    dout_rows = rows.Rows(dout, dout_strides, None, None, q_batch, q_packed, seqlen_q, None)
    out_tile = rows.load(out_rows, head, first, BLOCK_M, HEAD_DIM, PART0, PART1, True)
    dout_tile = rows.load(dout_rows, head, first, BLOCK_M, HEAD_DIM, PART0, PART1, True)
    row_delta = parts.row_dot(out_tile, dout_tile)
    row = first + tl.arange(0, BLOCK_M)
    exists = row < seqlen_q
    strides = (nheads * lse_rows, lse_rows)
    if dlse is not None:
        entry_dlse = rows.vector_of(dlse, strides, q_batch, head, q_start)
        row_delta -= tl.load(entry_dlse + row, mask=exists, other=0.0)
    entry_lse = rows.vector_of(softmax_lse, strides, q_batch, head, q_start)
    row_lse = tl.load(entry_lse + row, mask=exists, other=float("inf"))
    start = spans.padded_start(cu_seqlens_q, q_start, batch, PADDING)
    padded_first = (q_batch * nheads + head).to(tl.int64) * rows_padded + start + first
    padded_row = padded_first + tl.arange(0, BLOCK_M)
    tl.store(lse + padded_row, row_lse * LOG2E - lift)
    tl.store(delta + padded_row, -row_delta if NEGATIVE else row_delta)
    if dq_acc is not None:
        column = tl.arange(0, WIDTH)
        tl.store(
            dq_acc + padded_row[:, None] * WIDTH + column[None, :], tl.zeros([BLOCK_M, WIDTH], tl.float32)
        )
    if additions is not None:
        tl.store(additions + padded_first // BLOCK_M, 0)
