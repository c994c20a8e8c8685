"""Which tiles a tile must visit, and which of those need no mask: for forward and backward alike."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from . import spans


class Visit(NamedTuple):
    """Positions to sweep: ``[start, inner)`` masked, ``[inner, outer)`` not, ``[outer, end)`` masked."""

    start: Any
    inner: Any
    outer: Any
    end: Any


@triton.jit
def place(nheads, length, packed, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """This program's batch entry, head and first row; see :func:`place_of`."""
    return place_of(tl.program_id(0), nheads, length, packed, BLOCK, LAST_FIRST)


@triton.jit
def place_of(index, nheads, length, packed, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Batch entry, head and first row of tile number ``index``, the tile of a head being the fastest index.

    ``LAST_FIRST`` starts with the sequence's end: under causal attention those query tiles have the
    most work, and the short ones fill the gaps at the end of the launch.

    Args:
        packed: a :class:`fap_kernels.language.spans.Slots` where entries lie packed, else None. A few slots
            are empty there: their first row lies beyond the entry's end.
    """
    if packed is not None:
        head = index // packed.count
        batch, tile, count = spans.entry_of(packed, index % packed.count, BLOCK)
        if LAST_FIRST:
            tile = tl.where(tile < count, count - 1 - tile, tile)
        return batch, head, tile * BLOCK
    else:
        count = tl.cdiv(length, BLOCK)
        tile = index % count
        if LAST_FIRST:
            tile = count - 1 - tile
        row = index // count
        return row // nheads, row % nheads, tile * BLOCK


@triton.jit
def place_beside(
    index, nheads, heads_beside, items, length, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr,
):  # fmt: skip
    """Batch entry, head and first row of tile number ``index`` of ``items``, where heads are side by side.

    The ``heads_beside`` heads that are worked on side by side are the fastest index, then comes the tile. So
    tiles that are worked on at the same time are equally far in their sequences: with ``LAST_FIRST`` under
    causal attention, what is left to the end of the launch are the short tiles of several heads.
    """
    count = tl.cdiv(length, BLOCK)
    row = index // (heads_beside * count) * heads_beside
    beside = tl.minimum(heads_beside, items // count - row)
    index -= row * count
    row += index % beside
    tile = index // beside
    if LAST_FIRST:
        tile = count - 1 - tile
    return row // nheads, row % nheads, tile * BLOCK


@triton.jit
def place_share(nheads, splits, length, BLOCK: tl.constexpr):
    """This program's batch entry, head, share and first row, on a grid with the tile as fastest index.

    The head comes next: in a sequence-major cache the heads of one key lie side by side, and programs that
    run together then read memory in long stretches.
    """
    pid = tl.program_id(0)
    count = tl.cdiv(length, BLOCK)
    first = pid % count * BLOCK
    pid = pid // count
    head = pid % nheads
    pid = pid // nheads
    return pid // splits, head, pid % splits, first


@triton.jit
def share_of(visit, split, splits, STEP: tl.constexpr):
    """That share of a visit which is the ``split``-th of ``splits``, of whole steps each.

    It depends on the visit and the number of shares alone, so a sequence's result does not depend on what
    else is in its batch.
    """
    share = tl.cdiv(tl.cdiv(tl.maximum(visit.end - visit.start, 0), STEP), splits) * STEP
    start = tl.minimum(visit.start + split * share, tl.maximum(visit.end, visit.start))
    end = tl.minimum(start + share, tl.maximum(visit.end, start))
    inner = tl.minimum(tl.maximum(visit.inner, start), end)
    outer = tl.minimum(tl.maximum(visit.outer, start), end)
    return Visit(start, inner, tl.maximum(outer, inner), end)


@triton.jit
def keys_to_visit(window, first_query, count, BLOCK_N: tl.constexpr):
    """The key positions that ``count`` queries from ``first_query`` on see, in steps of ``BLOCK_N``."""
    last_query = tl.minimum(first_query + count, window.seqlen_q) - 1
    return _visit(
        first_query + window.diagonal, last_query + window.diagonal, window.left, window.right,
        window.seqlen_k, BLOCK_N,
    )  # fmt: skip


@triton.jit
def queries_to_visit(window, first_key, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                     OWN_END: tl.constexpr):  # fmt: skip
    """The query positions that see the key tile at ``first_key``, in steps of ``BLOCK_M``.

    The mirror image of :func:`keys_to_visit`: a key is seen by ``right`` queries before it and
    ``left`` after it.

    With ``OWN_END`` the last step joins the unmasked ones: a query that does not exist has an LSE of +inf,
    which makes its weights 0, and a third loop would cost a causal dK/dV registers. Without any bound it
    stays apart, since ptxas of Triton 3.7 serialises the products of a dK/dV that consists of one loop
    alone (C7515).
    """
    last_key = tl.minimum(first_key + BLOCK_N, window.seqlen_k) - 1
    visit = _visit(
        first_key - window.diagonal, last_key - window.diagonal, window.right, window.left, window.seqlen_q,
        BLOCK_M,
    )  # fmt: skip
    if OWN_END:
        return Visit(visit.start, visit.inner, visit.end, visit.end)
    else:
        return visit


@triton.jit
def _visit(first, last, before, after, length, STEP: tl.constexpr):
    """Steps that meet ``[p - before, p + after]`` for some p in ``first .. last``, inside ``[0, length)``.

    A step is unmasked if it lies inside that span for every p, and wholly below ``length``.
    """
    end = length
    outer = length
    if after is not None:
        end = tl.minimum(length, last + after + 1)
        outer = tl.minimum(length, first + after + 1)
    start = 0
    inner = 0
    if before is not None:
        start = tl.maximum(first - before, 0) // STEP * STEP
        inner = tl.cdiv(tl.maximum(last - before, 0), STEP) * STEP
        inner = tl.minimum(inner, tl.cdiv(tl.maximum(end, 0), STEP) * STEP)
    outer = tl.maximum(tl.maximum(outer, 0) // STEP * STEP, inner)
    return Visit(start, inner, outer, end)
