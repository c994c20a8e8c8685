"""Where a batch entry's rows lie: in a place of its own, or packed behind the entries before it."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Slots(NamedTuple):
    """How tiles are numbered where entries of different lengths lie packed.

    Entry b has the slots from ``(cu_seqlens[b] + b * (BLOCK - 1)) // BLOCK`` up to that of entry b + 1. These
    are as many as it has tiles, or one more: so the host knows how many there are in all from the number of
    rows and entries alone, and a program finds its entry without adding up the lengths of those before it.

    Fields:
        cu_seqlens: where entries start.
        entries: how many there are.
        count: slots in all, ``fap_kernels.packing.slot_count``.
    """

    cu_seqlens: Any
    entries: Any
    count: Any


@triton.jit
def entry_of(slots, slot, BLOCK: tl.constexpr):
    """Which entry has a slot, or each of several; which of its slots that is; and how many it has.

    A slot that no entry has is said to be the first one behind an entry's last.
    """
    batch = slot * 0
    width = slots.entries
    while width > 1:
        half = width // 2
        batch = tl.where(_first_slot(slots, batch + half, BLOCK) <= slot, batch + half, batch)
        width -= half
    first = _first_slot(slots, batch, BLOCK)
    count = _first_slot(slots, batch + 1, BLOCK) - first
    tile = slot - first
    return batch, tl.where((tile >= 0) & (tile < count), tile, count), count


@triton.jit
def _first_slot(slots, batch, BLOCK: tl.constexpr):
    return (tl.load(slots.cu_seqlens + batch) + batch * (BLOCK - 1)) // BLOCK


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
def in_cache(row_batch, start, length, batch, batch_idx, leftpad, entry_rows, rows_added, capacity):
    """The span of batch entry ``batch`` in a cache, given what :func:`span_of` says of it.

    Args:
        batch_idx: address of each entry's index along the cache's first dimension, or None.
        leftpad: address of how many rows at each entry's start do not count, or None. The entry starts behind
            them, which leaves all that counts from its end as it was.
        entry_rows: rows from one entry to the next where the cache is one long entry, as descriptors want it.
        rows_added: how many rows were appended behind the length that is known.
        capacity: no entry is longer, whatever its length says.
    """
    length = tl.minimum(length + rows_added, capacity)
    if batch_idx is not None:
        row_batch = tl.load(batch_idx + batch)
    if leftpad is not None:
        padding = tl.load(leftpad + batch)
        start += padding
        length = tl.maximum(length - padding, 0)
    if entry_rows is not None:
        start += row_batch * entry_rows
        row_batch = 0
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
