"""Exact attention over a key/value cache: the float64 oracle for flash_attn_with_kvcache.

Each sequence is rotated, appended and attended to by itself: slow, and plainly what the function promises.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch

from fap_testing.reference import AttentionOptions, attention_baseline, attention_reference
from fap_testing.reference_rotary import rotary_baseline, rotary_reference
from fap_testing.reference_varlen import page_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Unpack

    from fap_testing.reference import AttentionResult

__all__ = [
    "KVCacheOptions",
    "KVCacheResult",
    "kvcache_baseline",
    "kvcache_reference",
    "rotary_baseline",
    "rotary_reference",
]


class KVCacheResult(NamedTuple):
    """What attention over a cache computes.

    Attributes:
        out: ``(batch, seqlen_q, nheads, head_dim)``.
        softmax_lse: ``(batch, nheads, seqlen_q)``, natural logarithm.
        k_cache, v_cache: the caches after the call, new tensors in the shape of those given.
    """

    out: torch.Tensor
    softmax_lse: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor


class KVCacheOptions(TypedDict, total=False):
    """The keyword arguments of :func:`kvcache_reference`."""

    rotary_cos: torch.Tensor | None
    rotary_sin: torch.Tensor | None
    cache_seqlens: torch.Tensor | int | None
    cache_batch_idx: torch.Tensor | None
    cache_leftpad: torch.Tensor | None
    block_table: torch.Tensor | None
    softmax_scale: float | None
    causal: bool
    window_size: Sequence[int]
    softcap: float
    rotary_interleaved: bool
    alibi_slopes: torch.Tensor | None


def kvcache_reference(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    *,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | int | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
) -> KVCacheResult:
    """Append to a cache and attend to it in float64: the oracle for flash_attn_with_kvcache.

    Sequence b has ``cache_seqlens[b]`` keys in the cache and appends the new ones behind them. Its queries
    then attend to all of them but the first ``cache_leftpad[b]``, as in the dense oracle
    :func:`fap_testing.reference.attention_reference`: aligned bottom-right, to the last key.
    Formulas: flash-attn's documentation (Dao, 2023).

    Args:
        q: ``(batch, seqlen_q, nheads, head_dim)``.
        k_cache, v_cache: ``(batch_cache, capacity, nheads_k, head_dim)``; with a block_table ``(num_blocks,
            page_size, nheads_k, head_dim)``. What no sequence uses is not read: it may hold NaN.
        k, v: ``(batch, seqlen_new, nheads_k, head_dim)``, to append; both or neither.
        rotary_cos, rotary_sin: ``(seqlen_rotary, rotary_dim / 2)``, both or neither, only beside k. New key t
            is rotated to position ``cache_seqlens[b] + t``; so is query i to ``cache_seqlens[b] + i`` if
            causal or a window is set, and every query to ``cache_seqlens[b]`` otherwise. Left padding counts.
        cache_seqlens: ``(batch,)``, one number for all, or None for the whole capacity.
        cache_batch_idx: ``(batch,)``: which row of the cache belongs to sequence b. Rows may be shared where
            nothing is appended.
        cache_leftpad: ``(batch,)``: how many leading keys are padding.
        block_table: ``(batch, max_blocks)``: key j of sequence b lies in page ``block_table[b, j //
            page_size]``, row ``j % page_size``; the capacity is ``max_blocks * page_size``.
        softmax_scale, causal, window_size, softcap: as for the dense oracle.
        rotary_interleaved: as for :func:`rotary_reference`.
        alibi_slopes: ``(nheads,)`` or ``(batch, nheads)``.

    Returns:
        float64 ``out``, ``softmax_lse``, and the caches as they must be afterwards. Rows without keys have
        out 0 and LSE +inf.

    Raises:
        ValueError: arguments that exclude each other or do not fit together, or a full cache.
    """
    options: KVCacheOptions = {
        "rotary_cos": rotary_cos,
        "rotary_sin": rotary_sin,
        "cache_seqlens": cache_seqlens,
        "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad,
        "block_table": block_table,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "rotary_interleaved": rotary_interleaved,
        "alibi_slopes": alibi_slopes,
    }
    tensors = [None if x is None else x.to(torch.float64) for x in (k, v)]
    wide = (x.to(torch.float64) for x in (q, k_cache, v_cache))
    return _decode(attention_reference, rotary_reference, *wide, *tensors, **options)


def kvcache_baseline(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    **options: Unpack[KVCacheOptions],
) -> KVCacheResult:
    """Append and attend in the inputs' own dtype: the error of this is the yardstick.

    Rotated queries and keys are rounded to that dtype, as a cache does. Arguments as for
    :func:`kvcache_reference`; see :func:`fap_testing.reference.attention_baseline`.
    """
    return _decode(attention_baseline, rotary_baseline, q, k_cache, v_cache, k, v, **options)


def _decode(
    attention: Callable[..., AttentionResult],
    rotate: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    *,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: torch.Tensor | int | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
) -> KVCacheResult:
    _check_combination(
        k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table
    )
    _check_shapes(q, k_cache, v_cache, k, v, alibi_slopes)
    batch, seqlen_new = q.shape[0], 0 if k is None else k.shape[1]
    places = _places(batch, k_cache, cache_batch_idx, block_table)
    capacity = places[0].numel() if places else 0
    lengths = _integers("cache_seqlens", capacity if cache_seqlens is None else cache_seqlens, batch)
    leftpads = _integers("cache_leftpad", 0 if cache_leftpad is None else cache_leftpad, batch)
    _check_room(lengths, seqlen_new, capacity)

    if k is not None and rotary_cos is not None and rotary_sin is not None:
        starts = torch.tensor(lengths, dtype=torch.int64)
        turn = partial(rotate, cos=rotary_cos, sin=rotary_sin, interleaved=rotary_interleaved)
        k = turn(k, seqlen_offsets=starts)
        if causal or any(int(bound) >= 0 for bound in window_size):
            q = turn(q, seqlen_offsets=starts)
        else:
            q = _turn_to_one_position(turn, q, starts)
    # clone(): flatten() alone may return a view of the caller's cache.
    rows_k, rows_v = (x.flatten(0, 1).clone() for x in (k_cache, v_cache))
    if k is not None and v is not None:
        written = [rows[n : n + seqlen_new] for rows, n in zip(places, lengths, strict=True)]
        _check_distinct(written)
        for b, rows in enumerate(written):
            rows_k[rows], rows_v[rows] = k[b], v[b]
    keys = [rows[leftpads[b] : lengths[b] + seqlen_new] for b, rows in enumerate(places)]
    own: AttentionOptions = {"softmax_scale": softmax_scale, "causal": causal}
    own |= {"window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes}
    out, lse = _attend(attention, q, rows_k, rows_v, keys, own)
    return KVCacheResult(out, lse, rows_k.reshape(k_cache.shape), rows_v.reshape(v_cache.shape))


def _attend(
    attention: Callable[..., AttentionResult],
    q: torch.Tensor,
    rows_k: torch.Tensor,
    rows_v: torch.Tensor,
    keys: Sequence[torch.Tensor],
    options: AttentionOptions,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and LSE of each sequence's queries and of the rows that hold its keys."""
    batch, seqlen_q, nheads, _ = q.shape
    out = torch.zeros_like(q)
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    lse = torch.full((batch, nheads, seqlen_q), torch.inf, dtype=lse_dtype, device=q.device)
    slopes = options.get("alibi_slopes")
    for b, rows in enumerate(keys):
        own = options.copy()
        own["alibi_slopes"] = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
        result = attention(q[b : b + 1], rows_k[rows][None], rows_v[rows][None], **own)
        out[b], lse[b] = result.out[0], result.softmax_lse[0]
    return out, lse


def _turn_to_one_position(
    turn: Callable[..., torch.Tensor], q: torch.Tensor, positions: torch.Tensor
) -> torch.Tensor:
    """Rotate all queries of a sequence to its one position, as if each were a sequence by itself."""
    batch, seqlen_q = q.shape[:2]
    single = q.reshape(batch * seqlen_q, 1, *q.shape[2:])
    return turn(single, seqlen_offsets=positions.repeat_interleave(seqlen_q)).reshape(q.shape)


def _places(
    batch: int,
    cache: torch.Tensor,
    cache_batch_idx: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> list[torch.Tensor]:
    """Return, for each sequence, where its rows lie when the cache's first two dimensions are flattened."""
    capacity = cache.shape[1]
    if block_table is not None:
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            raise ValueError(
                f"block_table must be (batch, max_blocks) with batch {batch}, got {tuple(block_table.shape)}"
            )
        pages = block_table.to(cache.device)
        return [page_rows(row, capacity, row.numel() * capacity) for row in pages]
    if cache_batch_idx is None and cache.shape[0] != batch:
        raise ValueError(f"k_cache must have q's batch {batch} without cache_batch_idx, got {cache.shape[0]}")
    index = _integers(
        "cache_batch_idx", torch.arange(batch) if cache_batch_idx is None else cache_batch_idx, batch
    )
    if any(not 0 <= row < cache.shape[0] for row in index):
        raise ValueError(f"cache_batch_idx must name rows of k_cache's {cache.shape[0]}, got {index}")
    return [row * capacity + torch.arange(capacity, device=cache.device) for row in index]


def _integers(name: str, value: torch.Tensor | int, batch: int) -> list[int]:
    values = [int(n) for n in value] if isinstance(value, torch.Tensor) else [int(value)] * batch
    if len(values) != batch or any(n < 0 for n in values):
        raise ValueError(f"{name} must be (batch,) = ({batch},) and not negative, got {values}")
    return values


def _check_combination(
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    cache_seqlens: torch.Tensor | int | None,
    cache_batch_idx: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
) -> None:
    wrong = {
        "k and v go together": (k is None) != (v is None),
        "k needs cache_seqlens": k is not None and cache_seqlens is None,
        "rotary_cos and rotary_sin go together": (rotary_cos is None) != (rotary_sin is None),
        "rotary_cos needs k": rotary_cos is not None and k is None,
        "block_table excludes cache_batch_idx": block_table is not None and cache_batch_idx is not None,
        "block_table excludes cache_leftpad": block_table is not None and cache_leftpad is not None,
    }
    broken = [rule for rule, is_broken in wrong.items() if is_broken]
    if broken:
        raise ValueError(f"arguments contradict each other: {'; '.join(broken)}")


def _check_shapes(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
) -> None:
    for name, x in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if x.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions, got shape {tuple(x.shape)}")
    if k_cache.shape != v_cache.shape:
        raise ValueError(
            f"k_cache and v_cache must have one shape, got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    for name, new in (("k", k), ("v", v)):
        expected = (q.shape[0], k.shape[1] if k is not None and k.dim() == 4 else 0, *k_cache.shape[2:])
        if new is not None and tuple(new.shape) != expected:
            raise ValueError(
                f"{name} must be (batch, seqlen_new, nheads_k, head_dim) as q and k_cache have them, "
                f"{expected}, got {tuple(new.shape)}"
            )
    shapes = ((q.shape[2],), (q.shape[0], q.shape[2]))
    if alibi_slopes is not None and tuple(alibi_slopes.shape) not in shapes:
        raise ValueError(
            f"alibi_slopes must have one of the shapes {shapes}, got {tuple(alibi_slopes.shape)}"
        )


def _check_room(lengths: Sequence[int], seqlen_new: int, capacity: int) -> None:
    if any(n + seqlen_new > capacity for n in lengths):
        raise ValueError(
            f"cache_seqlens {[*lengths]} and {seqlen_new} new keys must fit the cache's capacity {capacity}"
        )


def _check_distinct(written: Sequence[torch.Tensor]) -> None:
    rows = torch.cat([*written]).tolist() if written else []
    if len(set(rows)) != len(rows):
        raise ValueError("sequences must not append to the same rows of the cache, got some that share them")
