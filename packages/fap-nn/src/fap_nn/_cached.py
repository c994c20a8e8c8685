"""FlashMHA's pass over a KV cache: tokens are appended to it and attend to all that it holds."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from fap_api import flash_attn_with_kvcache
from fap_nn.kv_cache import KVCache
from fap_nn.rotary import rotate

if TYPE_CHECKING:
    from fap_nn.attention import FlashAttention
    from fap_nn.rotary import RotaryEmbedding

__all__ = ["attend_cached", "check_cache", "real_tokens_first"]


def attend_cached(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attention: FlashAttention,
    rotary: RotaryEmbedding | None,
    cache: KVCache,
    lengths: torch.Tensor | None,
) -> torch.Tensor:
    """Append k and v and return what q attends to, ``(batch, seqlen, num_heads, head_dim)``.

    Args:
        q, k, v: ``(batch, seqlen, heads, head_dim)`` of new tokens, padding behind the real ones.
        attention: whose settings count.
        rotary: turns q and k by their positions in the whole sequences.
        lengths: ``(batch,)``, how many of the tokens are real; None for all. What is appended beyond them is
            not counted, so the next tokens overwrite it.
    """
    tokens = q.shape[1]
    cache.require_room(tokens)
    if rotary is not None:
        q, k = rotate(rotary, q, k, cache.seqlens, cache.max_seqlen)
    out = flash_attn_with_kvcache(
        q,
        cache.k,
        cache.v,
        k,
        v,
        cache_seqlens=cache.seqlens,
        block_table=cache.block_table,
        softmax_scale=attention.softmax_scale,
        causal=True,
        window_size=attention.window_size,
        softcap=attention.softcap,
        alibi_slopes=attention.alibi_slopes,
    )
    cache.advance(tokens, lengths)
    return cast("torch.Tensor", out).to(q.dtype)  # a tuple only with return_softmax_lse


def check_cache(cache: KVCache, attention: FlashAttention, heads: tuple[int, int], batch: int) -> None:
    """Raise unless a module with these settings can generate with this cache.

    Args:
        heads: the module's num_heads_kv and head_dim.
        batch: sequences in the input.

    Raises:
        RuntimeError: it is not causal, would drop weights, or has other sizes than the cache.
        TypeError: cache is no KVCache.
    """
    if not isinstance(cache, KVCache):
        raise TypeError(f"cache must be a KVCache or None, got {type(cache).__name__}")
    if not attention.causal:
        raise RuntimeError("cache needs a module with causal=True: later tokens change earlier ones without")
    if attention.training and attention.dropout > 0.0:
        raise RuntimeError(
            f"cache and dropout exclude each other, got dropout {attention.dropout} in training; "
            "accepted: eval() first"
        )
    if tuple(cache.k.shape[2:]) != heads or cache.batch != batch:
        raise RuntimeError(
            f"cache must be for batch {batch}, num_heads_kv {heads[0]} and head_dim {heads[1]}, got one for "
            f"batch {cache.batch}, num_heads_kv {cache.k.shape[2]} and head_dim {cache.k.shape[3]}"
        )


def real_tokens_first(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Move each sequence's padding behind its tokens, whose order stays.

    Args:
        x: ``(batch, seqlen, width)``.
        mask: bool ``(batch, seqlen)``, True for real tokens.

    Returns:
        x in that order, int64 ``(batch, seqlen)`` that restores the old order by ``gather``, and int32
        ``(batch,)``, how many tokens are real.
    """
    order = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
    moved = x.gather(1, order[:, :, None].expand_as(x))
    return moved, order.argsort(dim=1), mask.sum(1, dtype=torch.int32)
