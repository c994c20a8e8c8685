"""Where the sequences of a packed batch lie."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .errors import WrongType, WrongValue

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LEAST_PAGE_SIZE", "Packing", "check_block_table", "check_index", "check_length", "slot_count"]

LEAST_PAGE_SIZE = 16
# The bounds of sequences are int32. A length beyond that would ask for more programs than a device has.
LONGEST = 2**31 - 1


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """The sequences of a batch, packed one behind the other without padding.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: int32 ``(batch + 1,)``; sequence b has the rows from ``cu_seqlens[b]``
            up to ``cu_seqlens[b + 1]`` of q, and of k and v. Their values are not looked at: that would
            make every call wait for the device.
        max_seqlen_q, max_seqlen_k: no sequence is longer.
        seqused_q, seqused_k: int32 ``(batch,)``, how many of a sequence's rows count, from its first on; None
            for all.
        block_table: int32 ``(batch, max_pages)``: row p of a sequence's keys lies in page
            ``block_table[b, p // page_size]``, and ``cu_seqlens_k`` tells the lengths alone; None where k and
            v are packed as well.
        page_size: rows of a page, a power of two; 0 without pages.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_q: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    page_size: int = 0

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return self.cu_seqlens_q.shape[0] - 1

    @classmethod
    def describe(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int | torch.Tensor,
        max_seqlen_k: int | torch.Tensor,
        seqused_q: torch.Tensor | None = None,
        seqused_k: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
    ) -> Packing:
        """Check a packed batch's bounds and return its description.

        q and k tell the device and the page size; ``AttentionProblem.describe`` checks the rest of them.

        Raises:
            RuntimeError: a tensor of the wrong shape, dtype or device.
            ValueError: a length below 0, or beyond what int32 holds.
            TypeError: an argument of the wrong type.
        """
        if not isinstance(q, torch.Tensor):
            raise WrongType(f"q must be a torch.Tensor, got {type(q).__name__}")
        device = q.device
        check_index("cu_seqlens_q", cu_seqlens_q, device)
        if cu_seqlens_q.shape[0] < 1:
            raise RuntimeError("cu_seqlens_q must have shape (batch + 1,), got shape (0,)")
        batch = cu_seqlens_q.shape[0] - 1
        check_index("cu_seqlens_k", cu_seqlens_k, device, batch + 1, "cu_seqlens_q's (batch + 1,)")
        for name, seqused in (("seqused_q", seqused_q), ("seqused_k", seqused_k)):
            if seqused is not None:
                check_index(name, seqused, device, batch, "(batch,)")
        page_size = 0
        if block_table is not None:
            page_size = _page_size_of(k)
            check_block_table(block_table, page_size, batch, device)
        return cls(
            cu_seqlens_q=cu_seqlens_q.contiguous(),
            cu_seqlens_k=cu_seqlens_k.contiguous(),
            max_seqlen_q=_check_longest("max_seqlen_q", max_seqlen_q),
            max_seqlen_k=_check_longest("max_seqlen_k", max_seqlen_k),
            seqused_q=None if seqused_q is None else seqused_q.contiguous(),
            seqused_k=None if seqused_k is None else seqused_k.contiguous(),
            block_table=block_table,
            page_size=page_size,
        )

    def arguments(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """The tensors by name, as kernels take them."""
        for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
            yield name, getattr(self, name)


def slot_count(rows: int, entries: int, block: int) -> int:
    """How many slots for tiles of ``block`` rows there are in a packed batch of ``rows`` rows.

    :class:`fap_kernels.language.spans.Slots` says which entry has which.
    """
    return (rows + entries * (block - 1)) // block if entries else 0


def _page_size_of(k: Any) -> int:
    if not isinstance(k, torch.Tensor):
        raise WrongType(f"k must be a torch.Tensor, got {type(k).__name__}")
    if k.dim() != 4:
        raise RuntimeError(
            "k must have 4 dimensions (num_pages, page_size, nheads, headdim) where block_table is given, "
            f"got shape {tuple(k.shape)}"
        )
    return k.shape[1]


def check_index(
    name: str, x: Any, device: torch.device, length: int | None = None, shape: str = "(batch + 1,)"
) -> None:
    """Raise unless ``x`` is an int32 vector on ``device``, of ``length`` if that is given."""
    if not isinstance(x, torch.Tensor):
        raise WrongType(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype != torch.int32:
        raise RuntimeError(f"{name} must have dtype int32, got {x.dtype}")
    if x.device != device:
        raise RuntimeError(f"{name} must be on q's device {device}, got {x.device}")
    if x.dim() != 1 or length not in (None, x.shape[0]):
        expected = shape if length is None else f"{shape} = ({length},)"
        raise RuntimeError(f"{name} must have shape {expected}, got {tuple(x.shape)}")


def check_block_table(block_table: Any, page_size: int, batch: int, device: torch.device) -> None:
    """Raise unless ``block_table`` is int32 ``(batch, max_pages)`` and the page size a power of two."""
    if not isinstance(block_table, torch.Tensor):
        raise WrongType(f"block_table must be a torch.Tensor, got {type(block_table).__name__}")
    if block_table.dtype != torch.int32:
        raise RuntimeError(f"block_table must have dtype int32, got {block_table.dtype}")
    if block_table.device != device:
        raise RuntimeError(f"block_table must be on q's device {device}, got {block_table.device}")
    if block_table.dim() != 2 or block_table.shape[0] != batch:
        raise RuntimeError(
            f"block_table must have shape (batch, max_pages) = ({batch}, ...), got {tuple(block_table.shape)}"
        )
    if page_size < LEAST_PAGE_SIZE or page_size & (page_size - 1):
        raise RuntimeError(
            f"the page size (the second dimension of keys in pages) must be a power of two and at "
            f"least {LEAST_PAGE_SIZE}, got {page_size}"
        )
    if block_table.shape[1] > 1 and block_table.stride(1) != 1:
        raise RuntimeError(
            f"block_table must have a last stride of 1, got strides {tuple(block_table.stride())}"
        )


def check_length(name: str, value: Any) -> int:
    """Return an integer that is at least 0: an int, or a tensor of one, which is read.

    Raises:
        ValueError: below 0.
        TypeError: no integer.
    """
    # torch.compile follows isinstance on symbolic numbers, but not operator.index; torch.export takes what
    # operator.index returns for a constant.
    is_number = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    length = value if is_number else _as_index(name, value)
    if torch.compiler.is_compiling():
        # Of a number that the graph itself reads from a tensor nothing is known while it is traced.
        torch._check(length >= 0)
        return length
    if length < 0:
        raise WrongValue(f"{name} must be at least 0, got {length}")
    return length


def _check_longest(name: str, value: Any) -> int:
    length = check_length(name, value)
    if not torch.compiler.is_compiling() and length > LONGEST:
        raise WrongValue(f"{name} must be at most {LONGEST}, the largest int32, got {length}")
    return length


def _as_index(name: str, value: Any) -> int:
    if isinstance(value, torch.Tensor):
        whole = not (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool)
        if value.numel() != 1 or not whole or value.is_meta:
            raise WrongType(
                f"{name} must be an integer, "
                f"got a tensor of shape {tuple(value.shape)} and {value.dtype} on {value.device}"
            )
        return int(value.item())
    try:
        if isinstance(value, bool):
            raise WrongType("a bool is no number of rows")
        return operator.index(value)
    except TypeError as error:
        raise WrongType(f"{name} must be an integer, got {type(value).__name__}: {value!r}") from error
