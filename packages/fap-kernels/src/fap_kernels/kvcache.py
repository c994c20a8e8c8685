"""Exact attention to a cache of keys and values, and appending to it: tensors in, tensors out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import execute
from .cache import Cache, check_last_strides, check_num_splits
from .packing import check_index
from .problem import AttentionProblem
from .replay import Replays

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["attention_kvcache_forward", "kvcache_append"]

_replays = Replays()
_append_replays = Replays()


def attention_kvcache_forward(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor | None = None,
    *,
    seqlen_new: int = 0,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to a cache in which each sequence has a length of its own.

    Nothing waits for the device and no launch depends on a length, so a CUDA graph of this call is right for
    whatever ``cache_seqlens`` holds when it is replayed. With a fixed ``num_splits`` a sequence's result is
    bitwise the same whatever else is in the batch.

    Args:
        q: ``(batch, seqlen_q, nheads, head_dim)``, float16, bfloat16 or float32; head_dim 1 to 256.
        k_cache, v_cache: ``(batch_cache, capacity, nheads_k, head_dim)``, in q's dtype, with a last stride of
            1, where ``nheads_k`` divides ``nheads``; with ``block_table`` ``(num_pages, page_size, nheads_k,
            head_dim)``, the page size a power of two and at least 16.
        cache_seqlens: int32 ``(batch,)`` on q's device, the keys of each sequence; None for the whole
            capacity. A length beyond the capacity counts as the capacity.
        seqlen_new: keys that :func:`kvcache_append` has added to each sequence beyond ``cache_seqlens``.
        cache_batch_idx: int32 ``(batch,)``, each sequence's index along the cache's first dimension; None for
            its number.
        cache_leftpad: int32 ``(batch,)``, how many keys at each sequence's start do not count; None for 0.
        block_table: int32 ``(batch, max_pages)``; key p of sequence b is row ``p % page_size`` of page
            ``block_table[b, p // page_size]``.
        softmax_scale, causal, window_size, softcap: as for :func:`fap_kernels.attention_forward`; the last
            query is aligned with the last key.
        alibi_slopes: float32 ``(nheads,)`` or ``(batch, nheads)``.
        num_splits: into how many shares the keys of few queries are split, at most 128; 0 chooses by the
            sizes.

    Returns:
        ``out`` like q, contiguous, and ``softmax_lse`` float32 ``(batch, nheads, seqlen_q)``, natural log. A
        row that sees no key has out 0 and softmax_lse +inf.

    Raises:
        RuntimeError: tensors that do not fit together, or that these kernels do not support.
        ValueError, TypeError: an option out of range or of the wrong type.
    """
    options = (seqlen_new, softmax_scale, causal, window_size, softcap, num_splits)
    given = {
        "q": q, "k": k_cache, "v": v_cache, "seqused_k": cache_seqlens, "cache_batch_idx": cache_batch_idx,
        "cache_leftpad": cache_leftpad, "block_table": block_table, "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    key, replay = _replays.find(tuple(given.values()), options)
    if replay is not None:
        out, softmax_lse, *_ = replay.run(*given.values())
        return out, softmax_lse
    num_splits = check_num_splits(num_splits)
    cache = Cache.describe(
        q, k_cache, cache_seqlens, seqlen_new=seqlen_new, cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad, block_table=block_table,
    )  # fmt: skip
    problem = AttentionProblem.describe(
        q, k_cache, v_cache, softmax_scale=softmax_scale, causal=causal, window_size=window_size,
        softcap=softcap, alibi_slopes=alibi_slopes, cache=cache,
    )  # fmt: skip
    check_last_strides(k_cache, v_cache)
    return execute.cached_forward(
        problem, q, k_cache, v_cache, alibi_slopes, cache, num_splits, _replays.keeper(key, given)
    )


def kvcache_append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache_seqlens: torch.Tensor,
    *,
    cache_batch_idx: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    rotary_interleaved: bool = True,
) -> None:
    """Write new keys and values behind each sequence's last ones, in place.

    A sequence that they do not all fit is left as it was: its length is on the device, and to report it would
    make every call wait for it.

    Args:
        k_cache, v_cache, cache_batch_idx, block_table: as for :func:`attention_kvcache_forward`.
        k, v: ``(batch, seqlen_new, nheads_k, head_dim)``, any strides with a last one of 1.
        cache_seqlens: int32 ``(batch,)``, the keys of each sequence before. It is left as it is.
        rotary_cos, rotary_sin: ``(positions, rotary_dim / 2)`` in k's dtype; the new keys are rotated by the
            angles of their absolute positions, ``cache_seqlens[b]`` and on, before they are written. There
            must be as many positions as the longest sequence then has. None for no rotation.
        rotary_interleaved: turn columns 2 c and 2 c + 1 together, else c and ``rotary_dim / 2 + c``.

    Raises:
        RuntimeError: tensors that do not fit together, or that these kernels do not support.
        TypeError: an argument of the wrong type.
    """
    given = {
        "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v, "cache_seqlens": cache_seqlens,
        "cache_batch_idx": cache_batch_idx, "block_table": block_table, "cos": rotary_cos, "sin": rotary_sin,
    }  # fmt: skip
    key, replay = _append_replays.find(tuple(given.values()), (rotary_interleaved,))
    if replay is not None:
        replay.run(*given.values())
        return
    cache = Cache.describe(
        k, k_cache, cache_seqlens, cache_batch_idx=cache_batch_idx, block_table=block_table, name="k"
    )
    problem = AttentionProblem.describe(k, k_cache, v_cache, cache=cache)
    check_index("cache_seqlens", cache_seqlens, k.device, cache.batch, "(batch,)")
    check_last_strides(k_cache, v_cache)
    if k.shape[2] != k_cache.shape[2] or k.shape != v.shape or v.dtype != k.dtype or v.device != k.device:
        raise RuntimeError(
            "k and v must have one shape (batch, seqlen_new, nheads_k, head_dim), k_cache's nheads_k "
            f"{k_cache.shape[2]}, one dtype and one device; got k {tuple(k.shape)} and v {tuple(v.shape)}, "
            f"{k.dtype} and {v.dtype}, on {k.device} and {v.device}"
        )
    if (rotary_cos is None) != (rotary_sin is None):
        lone, missing = ("rotary_cos", "rotary_sin")[:: 1 if rotary_sin is None else -1]
        raise RuntimeError(f"{lone} needs {missing}")
    angles = None
    if rotary_cos is not None and rotary_sin is not None:
        from .rotary.apply import check_angles

        check_angles(k, rotary_cos, rotary_sin, names=("rotary_cos", "rotary_sin"))
        angles = (rotary_cos, rotary_sin)
    keep = _append_replays.keeper(key, given)
    execute.append(problem, k_cache, v_cache, k, v, cache, angles, rotary_interleaved, keep)
