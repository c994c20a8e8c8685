"""Attention over a cache of keys and values: appending, rotary embeddings and pages in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fap_api._kvcache_call import KVCacheOptions, KVCacheTensors, attention_with_kvcache

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["flash_attn_with_kvcache"]


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Append new keys and values to a cache, in place, and attend to all that it holds.

    A drop-in for flash-attn 2's function of this name; any page size that is a power of two from 16 on works.
    There is no backward. Nothing waits for the device, so the call can stand in a CUDA graph, which is right
    for whatever ``cache_seqlens`` holds when it is replayed.

    Args:
        q: ``(batch, seqlen_q, nheads, headdim)``, any strides.
        k_cache, v_cache: ``(batch_cache, capacity, nheads_k, headdim)`` in q's dtype, with a last stride of
            1, where nheads_k divides nheads. With ``block_table`` they are ``(num_pages, page_size, nheads_k,
            headdim)``, and the capacity is ``max_pages * page_size``. What no sequence uses is not read.
        k, v: ``(batch, seqlen_new, nheads_k, headdim)``, written behind each sequence's ``cache_seqlens``
            keys before attention. ``cache_seqlens`` itself is left as it is.
        rotary_cos, rotary_sin: ``(positions, rotary_dim / 2)`` in q's dtype, with at least as many positions
            as the capacity, and rotary_dim a multiple of 16 up to headdim; they need ``k``. New key t is
            rotated to position ``cache_seqlens + t`` before it is written. So is query i to
            ``cache_seqlens + i`` with causal masking or a window, and every query to ``cache_seqlens``
            without either. Positions count left padding.
        cache_seqlens: int32 ``(batch,)``, how many keys each sequence has before the new ones; one integer
            for all; None for the whole capacity.
        cache_batch_idx: int32 ``(batch,)``, each sequence's index along the caches' first dimension. Where
            keys are appended, the indices must differ.
        cache_leftpad: int32 ``(batch,)``, how many keys at each sequence's start do not count.
        block_table: int32 ``(batch, max_pages)``: key p of sequence b is row ``p % page_size`` of page
            ``block_table[b, p // page_size]``. It excludes cache_batch_idx and cache_leftpad.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as for :func:`fap_api.flash_attn_func`;
            a sequence's last query is aligned with its last key.
        rotary_interleaved: rotate features 2 i and 2 i + 1 together (GPT-J), else i and
            ``rotary_dim / 2 + i`` (GPT-NeoX, LLaMA).
        num_splits: into how many shares the keys are split where queries are few, at most 128; 0 chooses by
            the sizes. With another number, a sequence's result is bitwise the same in any batch.
        return_softmax_lse: return ``(out, softmax_lse)``.

    Returns:
        out: ``(batch, seqlen_q, nheads, headdim)`` in q's dtype. A query without any visible key gets 0.
        softmax_lse: only with ``return_softmax_lse``; float32 (float64 for float64 inputs)
            ``(batch, nheads, seqlen_q)``, natural logarithm; +inf for a query without keys.

    Under autocast, q, k, v and the tables of angles are cast to the caches' dtype.

    A sequence that new keys do not fit is an error, and nothing is written, where the host knows the lengths:
    an integer, or tensors on a CPU. On a device it keeps what it has (with the back ends ``triton`` and
    ``torch``), and its result is not to be used: to report it would make every call wait for the device.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit or are not supported; arguments that exclude
            or need each other; a full cache; a tensor that requires a gradient, unless gradients are off; an
            explicitly chosen back end that cannot run the call, with every reason.
        ValueError: an option outside its range.
        TypeError: an argument of the wrong type.
        ImportError: an explicitly chosen back end whose package is not installed.
    """
    tensors = KVCacheTensors(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
        block_table, alibi_slopes,
    )  # fmt: skip
    options = KVCacheOptions(
        softmax_scale, causal, window_size, softcap, rotary_interleaved, num_splits, return_softmax_lse
    )
    return attention_with_kvcache(tensors, options)
