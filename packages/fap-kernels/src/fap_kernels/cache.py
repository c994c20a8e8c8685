"""Where the keys and values of a batch lie in a cache: entry by entry, or in pages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .errors import WrongType, WrongValue
from .packing import check_block_table, check_index

__all__ = ["MOST_SPLITS", "Cache", "check_last_strides", "check_num_splits"]

MOST_SPLITS = 128


@dataclass(frozen=True, slots=True, eq=False)
class Cache:
    """Which rows of a cache are a batch entry's keys and values.

    Attributes:
        batch: how many sequences are attended to.
        capacity: the most rows that a sequence can have.
        seqlens: int32 ``(batch,)``, rows of each sequence before the new ones; None for the whole capacity.
        seqlen_new: how many rows were appended to each sequence since.
        batch_idx: int32 ``(batch,)``, a sequence's index along the cache's first dimension; None for its own
            number.
        leftpad: int32 ``(batch,)``, the rows at the start that do not count; None for 0.
        block_table: int32 ``(batch, max_pages)``: row p of a sequence lies in page
            ``block_table[b, p // page_size]``; None where the cache is not paged.
        page_size: rows of a page, a power of two; 0 where the cache is not paged.
    """

    batch: int
    capacity: int
    seqlens: torch.Tensor | None = None
    seqlen_new: int = 0
    batch_idx: torch.Tensor | None = None
    leftpad: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    page_size: int = 0

    @classmethod
    def describe(
        cls,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        cache_seqlens: torch.Tensor | None = None,
        *,
        seqlen_new: int = 0,
        cache_batch_idx: torch.Tensor | None = None,
        cache_leftpad: torch.Tensor | None = None,
        block_table: torch.Tensor | None = None,
        name: str = "q",
    ) -> Cache:
        """Check where a cache's rows lie and return the description.

        Args:
            q: what comes to the cache, ``(batch, seqlen, heads, head_dim)``; ``name`` is what errors call it.
            k_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table: as given to
                :func:`fap_kernels.attention_kvcache_forward`.
            seqlen_new: how many rows were appended behind ``cache_seqlens``.

        Raises:
            RuntimeError: a tensor of the wrong shape, dtype or device, or two arguments that exclude each
                other.
            TypeError: an argument of the wrong type.
        """
        keys = "batch_cache, seqlen_cache" if block_table is None else "num_pages, page_size"
        for tensor_name, x, rows in ((name, q, "batch, seqlen"), ("k_cache", k_cache, keys)):
            if not isinstance(x, torch.Tensor):
                raise WrongType(f"{tensor_name} must be a torch.Tensor, got {type(x).__name__}")
            if x.dim() != 4:
                raise RuntimeError(
                    f"{tensor_name} must have 4 dimensions ({rows}, nheads, headdim), "
                    f"got shape {tuple(x.shape)}"
                )
        batch = q.shape[0]
        vectors = (
            ("cache_seqlens", cache_seqlens),
            ("cache_batch_idx", cache_batch_idx),
            ("cache_leftpad", cache_leftpad),
        )
        for vector_name, vector in vectors:
            if vector is not None:
                check_index(vector_name, vector, q.device, batch, "(batch,)")
        page_size = 0
        capacity = k_cache.shape[1]
        if block_table is not None:
            for vector_name, vector in vectors[1:]:
                if vector is not None:
                    raise RuntimeError(
                        f"block_table and {vector_name} exclude each other: a page table already says "
                        "where each sequence's rows lie"
                    )
            page_size = k_cache.shape[1]
            check_block_table(block_table, page_size, batch, q.device)
            capacity = page_size * block_table.shape[1]
        elif cache_batch_idx is None and k_cache.shape[0] != batch:
            raise RuntimeError(
                f"k_cache must have {name}'s batch size {batch} unless cache_batch_idx is given, "
                f"got {k_cache.shape[0]}"
            )
        seqlens, batch_idx, leftpad = (None if x is None else x.contiguous() for _, x in vectors)
        return cls(batch, capacity, seqlens, seqlen_new, batch_idx, leftpad, block_table, page_size)


def check_last_strides(k_cache: torch.Tensor, v_cache: torch.Tensor) -> None:
    """Raise a RuntimeError unless the caches have a last stride of 1.

    A copy, as of k and v elsewhere, would cost as much as the attention, and an append to it would be lost.
    """
    for name, x in (("k_cache", k_cache), ("v_cache", v_cache)):
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise RuntimeError(f"{name} must have a last stride of 1, got strides {tuple(x.stride())}")


def check_num_splits(num_splits: Any) -> int:
    """Return into how many shares the keys are split; 0 leaves it to the sizes.

    Raises:
        ValueError: below 0 or above :data:`MOST_SPLITS`.
        TypeError: no integer.
    """
    if isinstance(num_splits, bool) or not isinstance(num_splits, int):
        raise WrongType(f"num_splits must be an integer, got {type(num_splits).__name__}: {num_splits!r}")
    if not 0 <= num_splits <= MOST_SPLITS:
        raise WrongValue(f"num_splits must be 0 (chosen by the sizes) to {MOST_SPLITS}, got {num_splits}")
    return num_splits
