"""Packed sequences cut out one by one, so that the dense code attends to each."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from fap_kernels.packing import Packing

__all__ = ["Sequence", "packed_sequences"]


class Sequence(NamedTuple):
    """One sequence of a packed batch: which rows of the packed tensors are its own and in use.

    Attributes:
        number: its number in the batch.
        queries: rows of q, out and softmax_lse.
        keys: rows of k and v; of the pages, one behind the other, where there are some.
        pages: the numbers of its pages, int32; None where k and v are packed.
    """

    number: int
    queries: slice
    keys: slice
    pages: torch.Tensor | None

    def own_keys(self, x: torch.Tensor) -> torch.Tensor:
        """Return its rows of k or v as a batch of one, ``(1, seqlen_k, nheads_k, headdim)``."""
        rows = x if self.pages is None else x[self.pages].flatten(0, 1)
        return rows[None, self.keys]

    def own_slopes(self, slopes: torch.Tensor | None) -> torch.Tensor | None:
        """Return its ALiBi slopes ``(nheads,)``, or None."""
        return slopes[self.number] if slopes is not None and slopes.dim() == 2 else slopes


def packed_sequences(q: torch.Tensor, k: torch.Tensor, packing: Packing) -> Iterator[Sequence]:
    """Yield every sequence. The lengths are read: on a device that waits for it.

    Raises:
        RuntimeError: lengths that contradict each other or the tensors.
    """
    queries = _spans("q", packing.cu_seqlens_q, packing.seqused_q, packing.max_seqlen_q)
    keys = _spans("k", packing.cu_seqlens_k, packing.seqused_k, packing.max_seqlen_k)
    _check_end("q", packing.cu_seqlens_q, len(q))
    if packing.block_table is None:
        _check_end("k", packing.cu_seqlens_k, len(k))
        yield from (Sequence(b, *spans, None) for b, spans in enumerate(zip(queries, keys, strict=True)))
        return
    for b, (rows, own) in enumerate(zip(queries, keys, strict=True)):
        length = own.stop - own.start
        yield Sequence(b, rows, slice(0, length), _pages(packing, b, length, len(k)))


def _spans(side: str, cu_seqlens: torch.Tensor, seqused: torch.Tensor | None, longest: int) -> list[slice]:
    bounds = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(bounds)]
    if bounds[0] < 0 or any(length < 0 for length in lengths):
        raise RuntimeError(f"cu_seqlens_{side} must start at 0 or later and never decrease, got {bounds}")
    if any(length > longest for length in lengths):
        raise RuntimeError(
            f"max_seqlen_{side} must be at least the longest sequence's length {max(lengths)}, got {longest}"
        )
    used = lengths if seqused is None else seqused.tolist()
    if any(not 0 <= n <= length for n, length in zip(used, lengths, strict=True)):
        raise RuntimeError(f"seqused_{side} must be 0 to each sequence's length {lengths}, got {used}")
    return [slice(start, start + n) for start, n in zip(bounds, used, strict=False)]


def _check_end(side: str, cu_seqlens: torch.Tensor, rows: int) -> None:
    end = int(cu_seqlens[-1])
    if end > rows:
        raise RuntimeError(f"cu_seqlens_{side} must end at {side}'s number of rows {rows} at most, got {end}")


def _pages(packing: Packing, b: int, length: int, num_pages: int) -> torch.Tensor:
    assert packing.block_table is not None
    most = packing.block_table.shape[1] * packing.page_size
    if length > most:
        raise RuntimeError(
            f"block_table has {packing.block_table.shape[1]} pages of {packing.page_size} keys for each "
            f"sequence, got one of {length} keys"
        )
    pages = packing.block_table[b, : -(-length // packing.page_size)]
    if len(pages) and not 0 <= int(pages.min()) <= int(pages.max()) < num_pages:
        raise RuntimeError(
            f"block_table must name some of the {num_pages} pages for each sequence, got {pages.tolist()}"
        )
    return pages
