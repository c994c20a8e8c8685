"""The operators of a KV cache: ``fap::kvcache_attention``, and ``fap::kvcache_append_attention``.

The second one writes to the caches, and says so in its schema, so that compilers keep the order of calls.
Each takes the canonical options of a checked call and the name of the back end; neither has a gradient.
"""

from __future__ import annotations

from typing import Any

import torch

from fap_api._kvcache_checks import check_on_host
from fap_api.backends.base import NewKeys, Places, Score
from fap_api.backends.registry import get_backend

__all__ = ["append_and_attend", "attend", "kvcache_append_attention", "kvcache_attention"]

_REST = (
    "Tensor? cache_seqlens, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table,"
    " Tensor? alibi_slopes, float softmax_scale, int window_left, int window_right, float softcap,"
    " int num_splits, str backend) -> (Tensor out, Tensor softmax_lse)"
)
_LIBRARY = torch.library.Library("fap", "FRAGMENT")
_LIBRARY.define(
    f"kvcache_attention(Tensor q, Tensor k_cache, Tensor v_cache, {_REST}",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "kvcache_append_attention(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor k, Tensor v,"
    f" Tensor? rotary_cos, Tensor? rotary_sin, bool rotary_interleaved, {_REST}",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor | None,
    cache_batch_idx: torch.Tensor | None,
    cache_leftpad: torch.Tensor | None,
    block_table: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    num_splits: int,
    backend: str,
    *,
    new: NewKeys | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the back end: what ``fap::kvcache_attention`` does."""
    places = Places(cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    score = Score(softmax_scale, window_left, window_right, softcap, alibi_slopes, 0.0)
    if q.is_cpu:
        seqlen_new = 0 if new is None else new.k.shape[1]
        rows = None if new is None or new.angles is None else new.angles[0].shape[0]
        seqlen_q = q.shape[1] if score.is_local else min(q.shape[1], 1)
        check_on_host(k_cache, places, seqlen_q, seqlen_new, rows)
    return get_backend(backend).cached_forward(q, k_cache, v_cache, new, places, score, num_splits)


def append_and_attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotary_cos: torch.Tensor | None,
    rotary_sin: torch.Tensor | None,
    rotary_interleaved: bool,
    cache_seqlens: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the back end: what ``fap::kvcache_append_attention`` does."""
    angles = None if rotary_cos is None or rotary_sin is None else (rotary_cos, rotary_sin)
    new = NewKeys(k, v, cache_seqlens, angles, rotary_interleaved)
    result = attend(q, k_cache, v_cache, cache_seqlens, *rest, new=new)
    # Kernels write behind PyTorch's back, and autograd has to find out if it saved a cache. Inference tensors
    # have no version, and autograd does not save them.
    torch.autograd.graph.increment_version([x for x in (k_cache, v_cache) if not x.is_inference()])
    return result


_LIBRARY.impl("kvcache_attention", attend, "CompositeExplicitAutograd")
_LIBRARY.impl("kvcache_append_attention", append_and_attend, "CompositeExplicitAutograd")

kvcache_attention = torch.ops.fap.kvcache_attention.default
kvcache_append_attention = torch.ops.fap.kvcache_append_attention.default


@torch.library.register_fake("fap::kvcache_attention", lib=_LIBRARY)  # type: ignore[untyped-decorator]
@torch.library.register_fake("fap::kvcache_append_attention", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG001
    batch, seqlen_q, nheads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty((batch, nheads, seqlen_q), dtype=lse_dtype)
