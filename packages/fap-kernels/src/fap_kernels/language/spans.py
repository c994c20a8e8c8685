"""Where a batch entry's rows lie: in a place of its own, or packed behind the entries before it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def span_of(cu_seqlens, seqused, seqlen, batch):
    """Batch index, first row and length of batch entry ``batch``.

    ``cu_seqlens`` None means that every entry has ``seqlen`` rows of its own. Else all entries share batch
    index 0 and this one starts at row ``cu_seqlens[batch]``. ``seqused`` shortens an entry.
    """
    row_batch = batch
    start = 0
    length = seqlen
    if cu_seqlens is not None:
        row_batch = 0
        start = tl.load(cu_seqlens + batch)
        length = tl.load(cu_seqlens + batch + 1) - start
    if seqused is not None:
        length = tl.load(seqused + batch)
    return row_batch, start, length


@triton.jit
def padded_start(cu_seqlens, start, batch, PADDING: tl.constexpr):
    """Where the entry's numbers start in a vector that pads each entry to a multiple of ``PADDING``.

    Packed entries are moved apart by one ``PADDING`` each, and down to a multiple of it: so they are
    disjoint and aligned, and no entry needs to know the lengths of those before it.
    """
    if cu_seqlens is None:
        return start
    else:
        return (start + batch * PADDING) // PADDING * PADDING
