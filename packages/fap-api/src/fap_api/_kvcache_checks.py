"""Checks on what only flash_attn_with_kvcache takes: new keys, angles, and lengths that the host can read."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from fap_kernels.errors import WrongType, WrongValue

if TYPE_CHECKING:
    from fap_api.backends.base import Places

__all__ = ["as_length", "check_combination", "check_new_keys", "check_on_host", "check_rotary"]


def check_combination(given: dict[str, Any]) -> None:
    """Raise unless every argument that another one needs is there.

    Args:
        given: k, v, rotary_cos, rotary_sin and cache_seqlens by name.

    Raises:
        RuntimeError: an argument without the one that it needs.
    """
    needs = (
        ("k", "v", "a key without its value cannot be appended"),
        ("v", "k", "a value without its key cannot be appended"),
        ("k", "cache_seqlens", "it says where k and v are written"),
        ("rotary_cos", "rotary_sin", "an angle has both"),
        ("rotary_sin", "rotary_cos", "an angle has both"),
        ("rotary_cos", "k", "rotary embeddings turn what is appended, with its queries"),
    )
    for name, needed, why in needs:
        if given[name] is not None and given[needed] is None:
            raise RuntimeError(f"{name} needs {needed}, got {name} without it: {why}")


def check_new_keys(q: torch.Tensor, k_cache: torch.Tensor, k: Any, v: Any, capacity: int) -> None:
    """Raise unless ``k`` and ``v`` can be appended: shapes, dtype, device and room for them.

    Raises:
        RuntimeError: one of these does not fit.
        TypeError: no tensor.
    """
    for name, x in (("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise WrongType(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.layout != torch.strided:
            raise RuntimeError(f"{name} must be a dense tensor (layout torch.strided), got {x.layout}")
        if x.dtype != q.dtype:
            raise RuntimeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise RuntimeError(f"{name} must be on q's device {q.device}, got {x.device}")
        fits = x.dim() == 4 and x.shape[0] == q.shape[0] and x.shape[2:] == k_cache.shape[2:]
        if not fits:
            batch, nheads_k, head_dim = q.shape[0], *k_cache.shape[2:]
            raise RuntimeError(
                f"{name} must have shape (batch, seqlen_new, nheads_k, headdim) = ({batch}, ..., {nheads_k}, "
                f"{head_dim}) as q and k_cache have them, got {tuple(x.shape)}"
            )
    if k.shape != v.shape:
        raise RuntimeError(f"k and v must have the same shape, got k {tuple(k.shape)} and v {tuple(v.shape)}")
    if k.shape[1] > capacity:
        raise RuntimeError(f"k has {k.shape[1]} new keys, which the cache's capacity {capacity} cannot hold")


def check_rotary(q: torch.Tensor, cos: Any, sin: Any, capacity: int) -> None:
    """Raise unless ``cos`` and ``sin`` are tables of angles for every position of the cache.

    Raises:
        RuntimeError: a shape, dtype or device that does not fit.
        TypeError: no tensor.
    """
    head_dim = q.shape[-1]
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        if not isinstance(table, torch.Tensor):
            raise WrongType(f"{name} must be a torch.Tensor, got {type(table).__name__}")
        if table.layout != torch.strided:
            raise RuntimeError(f"{name} must be a dense tensor (layout torch.strided), got {table.layout}")
        if table.dtype != q.dtype:
            raise RuntimeError(f"{name} must have q's dtype {q.dtype}, got {table.dtype}")
        if table.device != q.device:
            raise RuntimeError(f"{name} must be on q's device {q.device}, got {table.device}")
        if table.dim() != 2:
            raise RuntimeError(
                f"{name} must have shape (positions, rotary_dim / 2), got {tuple(table.shape)}"
            )
    if cos.shape != sin.shape:
        raise RuntimeError(
            f"rotary_cos and rotary_sin must have the same shape, got rotary_cos {tuple(cos.shape)} and "
            f"rotary_sin {tuple(sin.shape)}"
        )
    positions, rotary_dim = cos.shape[0], 2 * cos.shape[1]
    if rotary_dim % 16 != 0 or not 16 <= rotary_dim <= head_dim:
        raise RuntimeError(
            "rotary_dim (twice the second dimension of rotary_cos) must be a multiple of 16 and at most the "
            f"head dimension {head_dim}, got {rotary_dim}"
        )
    if positions < capacity:
        raise RuntimeError(
            f"rotary_cos and rotary_sin must have a row for every position of the cache, {capacity}, "
            f"got {positions}"
        )


def as_length(cache_seqlens: Any, seqlen_new: int, capacity: int, paged: bool) -> int:
    """Return the one length of all sequences as an int, if it is in the cache and leaves room for new keys.

    Args:
        paged: whether the capacity is that of a block_table's pages.

    Raises:
        TypeError: neither a tensor nor an integer.
        ValueError: a negative length.
        RuntimeError: a length beyond the capacity, new keys included.
    """
    # torch.compile follows isinstance on symbolic numbers, but not operator.index.
    length = cache_seqlens
    if isinstance(length, bool) or not isinstance(length, int):
        try:
            if isinstance(length, bool):
                raise WrongType("a bool is no length")
            length = operator.index(length)
        except TypeError as error:
            raise WrongType(
                "cache_seqlens must be an int32 tensor (batch,) or an integer, "
                f"got {type(cache_seqlens).__name__}: {cache_seqlens!r}"
            ) from error
    if length < 0:
        raise WrongValue(f"cache_seqlens must be at least 0, got {length}")
    if length + seqlen_new > capacity:
        raise RuntimeError(_no_room(length, seqlen_new, capacity, paged))
    return int(length)


def check_on_host(
    k_cache: torch.Tensor, places: Places, seqlen_q: int, seqlen_new: int, rotary_rows: int | None
) -> None:
    """Raise if lengths and indices, which the host can read, lead out of the cache or its tables.

    Args:
        seqlen_q: queries of each sequence that have positions of their own.
        rotary_rows: positions of the tables of angles; None without rotation.

    Raises:
        RuntimeError: new keys that do not fit, or an index of nothing; nothing has been written.
    """
    capacity = places.capacity(k_cache)
    lengths = [] if places.seqlens is None else places.seqlens.tolist()
    for length in lengths:
        if length < 0:
            raise RuntimeError(f"cache_seqlens must be at least 0, got {lengths}")
        if length + seqlen_new > capacity:
            raise RuntimeError(_no_room(length, seqlen_new, capacity, places.block_table is not None))
        if rotary_rows is not None and length + seqlen_q > rotary_rows:
            raise RuntimeError(
                f"rotary_cos and rotary_sin have {rotary_rows} positions, and the last query of a sequence "
                f"with cache_seqlens {length} has position {length + seqlen_q - 1}"
            )
    if places.leftpad is not None and (places.leftpad < 0).any():
        raise RuntimeError(f"cache_leftpad must be at least 0, got {places.leftpad.tolist()}")
    if places.batch_idx is not None:
        _check_indices("cache_batch_idx", places.batch_idx, len(k_cache), "batch entries of k_cache")
        if seqlen_new and len(places.batch_idx.unique()) < len(places.batch_idx):
            raise RuntimeError(
                "cache_batch_idx must be another for each sequence where keys are appended, "
                f"got {places.batch_idx.tolist()}"
            )
    if places.block_table is not None:
        ends = [capacity] * len(places.block_table) if places.seqlens is None else lengths
        for pages, end in zip(places.block_table, ends, strict=True):
            used = pages[: -(-(end + seqlen_new) // k_cache.shape[1])]
            _check_indices("block_table", used, len(k_cache), "pages of k_cache")


def _check_indices(name: str, index: torch.Tensor, length: int, of_what: str) -> None:
    if ((index < 0) | (index >= length)).any():
        raise RuntimeError(f"{name} must name some of the {length} {of_what}, got {index.tolist()}")


def _no_room(length: int, seqlen_new: int, capacity: int, paged: bool) -> str:
    new = f" and {seqlen_new} new ones" if seqlen_new else ""
    holder = "the pages of block_table, which hold" if paged else "the cache's capacity"
    return f"cache_seqlens must leave room: {length} keys{new} do not fit {holder} {capacity}"
