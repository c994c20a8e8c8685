"""Seeded inputs for a varlen case: packed or paged, with NaN around them and in every row not in use."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fap_testing.layouts import Buffer, Placement, place_qkv

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fap_testing.cases_varlen import VarlenCase

__all__ = [
    "VarlenInputs",
    "contiguous_placement",
    "make_varlen_inputs",
    "make_varlen_keep_mask",
    "shuffle_pages",
]

_FREE_PAGES = 3


@dataclass(frozen=True, slots=True, eq=False)
class VarlenInputs:
    """The tensors of one varlen call.

    Attributes:
        case: what they were made for.
        q, k, v, dout: packed, in the inputs' dtype; k and v of a paged case are ``(num_blocks, page_size,
            nheads_k, head_dim)``. ``dout`` is a gradient for out.
        dlse: a gradient for the LSE, float32 (float64 for float64 inputs) ``(nheads, total_q)``.
        cu_seqlens_q, cu_seqlens_k: int32 ``(batch + 1,)``.
        alibi_slopes: float32 ``(nheads,)`` or ``(batch, nheads)``, or None.
        seqused_q, seqused_k: int32 ``(batch,)``, or None.
        block_table: int32 ``(batch, max_blocks)``, or None. Entries beyond a sequence's pages name a page
            that is full of NaN.
    """

    case: VarlenCase
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor
    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    alibi_slopes: torch.Tensor | None
    seqused_q: torch.Tensor | None
    seqused_k: torch.Tensor | None
    block_table: torch.Tensor | None
    buffers: tuple[Buffer, ...]

    @property
    def lengths(self) -> dict[str, Any]:
        """flash_attn_varlen_func's arguments after q, k and v: cu_seqlens_* and max_seqlen_*."""
        return {
            "cu_seqlens_q": self.cu_seqlens_q,
            "cu_seqlens_k": self.cu_seqlens_k,
            "max_seqlen_q": max(self.case.seqlens_q, default=0),
            "max_seqlen_k": max(self.case.seqlens_k, default=0),
        }

    @property
    def options(self) -> dict[str, Any]:
        """The rest of its keyword arguments, less those at their default."""
        names = ("alibi_slopes", "seqused_q", "seqused_k", "block_table")
        tensors = {name: x for name in names if (x := getattr(self, name)) is not None}
        return {**self.case.options, **tensors}

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q, k and v as fresh leaves that want gradients and share the inputs' memory and strides."""
        q, k, v = (x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        return q, k, v

    def assert_untouched(self) -> None:
        """Raise AssertionError if a call wrote to its floating inputs or to the memory around them."""
        for buffer in self.buffers:
            buffer.assert_untouched()


def make_varlen_inputs(
    case: VarlenCase,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    poison: bool = True,
) -> VarlenInputs:
    """Make the tensors of a varlen call, standard normal and reproducible.

    The values in use depend on the case's name, its sizes and the seed; not on dtype (but for rounding),
    device, layout or page size.

    Args:
        case: lengths, options and memory layout.
        dtype: of q, k, v and dout.
        device: of all tensors.
        seed: another seed gives other values.
        poison: put NaN before, between and after the tensors, into rows that are allocated but not in use,
            and into pages that are free. Without, zeros.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) ^ seed)
    empty = math.nan if poison else 0.0
    total_q, total_k = sum(case.seqlens_q), sum(case.seqlens_k)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    unused_q = ~_rows_in_use(case.seqlens_q, case.used_q)
    unused_k = ~_rows_in_use(case.seqlens_k, case.used_k)
    values = {
        "q": draw(total_q, case.nheads, case.head_dim),
        "k": draw(total_k, case.nheads_k, case.head_dim),
        "v": draw(total_k, case.nheads_k, case.head_dim),
        "dout": draw(total_q, case.nheads, case.head_dim),
    }
    dlse = draw(case.nheads, total_q)
    dlse[:, unused_q] = empty
    for name, x in values.items():
        x[unused_k if name in ("k", "v") else unused_q] = empty
    slopes = _draw_slopes(case, generator)

    block_table = None
    places = place_qkv(case.packed)
    stored = {name: x[None] for name, x in values.items()}
    if case.page_size is not None:
        block_table, num_blocks = shuffle_pages(case.used_k, case.page_size, generator)
        for name in ("k", "v"):
            pages = torch.full((num_blocks, case.page_size, case.nheads_k, case.head_dim), empty)
            _scatter(pages, values[name], block_table, case)
            stored[name] = pages
        places = [{name: contiguous_placement(x)} for name, x in stored.items()]
    stored = {name: x.to(device=device, dtype=dtype) for name, x in stored.items()}
    buffers = [
        Buffer({n: (stored[n], place) for n, place in group.items()}, poison=poison) for group in places
    ]
    if slopes is not None:
        slopes = slopes.to(device)
        buffers.append(Buffer({"alibi_slopes": (slopes, contiguous_placement(slopes))}, poison=poison))
    views = {name: view for buffer in buffers for name, view in buffer.views.items()}

    def integers(values: Sequence[int] | None) -> torch.Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.int32, device=device)

    return VarlenInputs(
        case=case,
        q=views["q"][0],
        k=views["k"] if case.page_size is not None else views["k"][0],
        v=views["v"] if case.page_size is not None else views["v"][0],
        dout=views["dout"][0],
        dlse=dlse.to(device=device, dtype=torch.promote_types(dtype, torch.float32)),
        cu_seqlens_q=_cumulated(case.seqlens_q).to(device),
        cu_seqlens_k=_cumulated(case.seqlens_k).to(device),
        alibi_slopes=views.get("alibi_slopes"),
        seqused_q=integers(case.seqused_q),
        seqused_k=integers(case.seqused_k),
        block_table=None if block_table is None else block_table.to(device),
        buffers=tuple(buffers),
    )


def make_varlen_keep_mask(
    case: VarlenCase, *, device: torch.device | str = "cpu", seed: int = 0
) -> torch.Tensor | None:
    """Draw a dropout mask ``(batch, nheads, max_seqlen_q, max_seqlen_k)``; None without dropout."""
    if case.dropout_p == 0.0:
        return None
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) ^ seed ^ 1)
    longest = (max(case.seqlens_q, default=0), max(case.seqlens_k, default=0))
    shape = (case.batch, case.nheads, *longest)
    return (torch.rand(shape, generator=generator) >= case.dropout_p).to(device)


def shuffle_pages(
    seqlens: Sequence[int], page_size: int, generator: torch.Generator, max_blocks: int | None = None
) -> tuple[torch.Tensor, int]:
    """Deal pages out in random order, with a few left free.

    Args:
        seqlens: how many keys each sequence needs room for.
        page_size: how many keys a page holds.
        generator: shuffles the pages.
        max_blocks: columns of the block_table; default is one more than the longest sequence needs.

    Returns:
        The block_table, int32 ``(batch, max_blocks)``, and the number of pages. Entries past a sequence's
        last page name a free one.
    """
    needed = [math.ceil(seqlen / page_size) for seqlen in seqlens]
    num_blocks = sum(needed) + _FREE_PAGES
    order = torch.randperm(num_blocks, generator=generator).to(torch.int32)
    columns = max(needed, default=0) + 1 if max_blocks is None else max_blocks
    table = order[-1].repeat(len(needed), columns)
    taken = 0
    for row, pages in zip(table, needed, strict=True):
        row[:pages] = order[taken : taken + pages]
        taken += pages
    return table, num_blocks


def contiguous_placement(x: torch.Tensor) -> Placement:
    """Return the placement of a contiguous tensor of x's shape at the start of a buffer."""
    return Placement(tuple(x.shape), torch.empty(x.shape, device="meta").stride(), 0)


def _scatter(pages: torch.Tensor, packed: torch.Tensor, block_table: torch.Tensor, case: VarlenCase) -> None:
    """Copy the rows in use from packed sequences into their pages."""
    start = 0
    for table, seqlen, used in zip(block_table.tolist(), case.seqlens_k, case.used_k, strict=True):
        for position in range(used):
            page, row = divmod(position, pages.shape[1])
            pages[table[page], row] = packed[start + position]
        start += seqlen


def _rows_in_use(seqlens: Sequence[int], used: Sequence[int]) -> torch.Tensor:
    return torch.tensor(
        [row < n for seqlen, n in zip(seqlens, used, strict=True) for row in range(seqlen)], dtype=torch.bool
    )


def _cumulated(seqlens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([sum(seqlens[:index]) for index in range(len(seqlens) + 1)], dtype=torch.int32)


def _draw_slopes(case: VarlenCase, generator: torch.Generator) -> torch.Tensor | None:
    if case.alibi is None:
        return None
    shape = (case.nheads,) if case.alibi == "head" else (case.batch, case.nheads)
    return torch.rand(shape, generator=generator) * 0.9 + 0.05
