"""From the arguments of flash_attn_with_kvcache to its operators: checks, back end, and their memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fap_api import _dispatch, _kvcache_ops
from fap_api._kvcache_checks import as_length, check_combination, check_new_keys, check_rotary
from fap_api._plans import Plans
from fap_api.backends import select
from fap_kernels.cache import Cache, check_last_strides, check_num_splits
from fap_kernels.errors import WrongType
from fap_kernels.problem import AttentionProblem

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["KVCacheOptions", "KVCacheTensors", "attention_with_kvcache", "describe_with_kvcache"]


class KVCacheTensors(NamedTuple):
    """The tensors of one call as given to :func:`fap_api.flash_attn_with_kvcache`."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    rotary_cos: torch.Tensor | None
    rotary_sin: torch.Tensor | None
    cache_seqlens: int | torch.Tensor | None
    cache_batch_idx: torch.Tensor | None
    cache_leftpad: torch.Tensor | None
    block_table: torch.Tensor | None
    alibi_slopes: torch.Tensor | None


# The compiler of torch 2.8 does not look fields up.
_NAMES = KVCacheTensors._fields


class KVCacheOptions(NamedTuple):
    """Its options."""

    softmax_scale: float | None
    causal: bool
    window_size: Sequence[int] | torch.Tensor
    softcap: float
    rotary_interleaved: bool
    num_splits: int
    return_softmax_lse: bool


class _Plan(NamedTuple):
    """The operators' options after ``alibi_slopes``, in their order, and the cache's capacity."""

    score: tuple[float, int, int, float]
    num_splits: int
    backend: str
    capacity: int


_plans: Plans[_Plan] = Plans()
_NUMBERS = frozenset((int, float, type(None)))
_FLAGS = frozenset((bool,))


def attention_with_kvcache(
    tensors: KVCacheTensors, options: KVCacheOptions
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Run one call over a cache; results as for :func:`fap_api.flash_attn_with_kvcache`."""
    compiling = torch.compiler.is_compiling()
    if compiling or torch._C._is_any_autocast_enabled():
        tensors = _autocast(tensors)
    plan = _plan(tensors, options)
    q, k_cache, v_cache, k, v, cos, sin, seqlens, *places, slopes = tensors
    if seqlens is not None and not isinstance(seqlens, torch.Tensor):
        seqlen_new = 0 if k is None else k.shape[1]
        length = as_length(seqlens, seqlen_new, plan.capacity, tensors.block_table is not None)
        seqlens = torch.full((q.shape[0],), length, dtype=torch.int32, device=q.device)
    rest = (seqlens, *places, slopes, *plan.score, plan.num_splits, plan.backend)
    operator: Any = _kvcache_ops.kvcache_attention
    function: Any = _kvcache_ops.attend
    arguments: tuple[Any, ...] = (q, k_cache, v_cache, *rest)
    if k is not None:
        operator, function = _kvcache_ops.kvcache_append_attention, _kvcache_ops.append_and_attend
        arguments = (q, k_cache, v_cache, k, v, cos, sin, bool(options.rotary_interleaved), *rest)
    if compiling:
        out, softmax_lse = operator(*arguments)
    else:
        given = (q, k_cache, v_cache, k, v, cos, sin, seqlens, *places, slopes)
        out, softmax_lse = _dispatch.call(operator, function, given, arguments)
    return (out, softmax_lse) if options.return_softmax_lse else out


def describe_with_kvcache(tensors: KVCacheTensors, options: KVCacheOptions) -> AttentionProblem:
    """Check one call as it would run now, autocast and gradient mode included, and describe it."""
    return _describe(_autocast(tensors), options)[0]


def _describe(tensors: KVCacheTensors, options: KVCacheOptions) -> tuple[AttentionProblem, int]:
    """Return the call's description, and its number of splits."""
    q, k_cache, v_cache, k, v, cos, sin, seqlens, batch_idx, leftpad, table, slopes = tensors
    given = {"k": k, "v": v, "rotary_cos": cos, "rotary_sin": sin, "cache_seqlens": seqlens}
    check_combination(given)
    cache = Cache.describe(
        q,
        k_cache,
        seqlens if isinstance(seqlens, torch.Tensor) else None,
        cache_batch_idx=batch_idx,
        cache_leftpad=leftpad,
        block_table=table,
    )
    problem = AttentionProblem.describe(
        q,
        k_cache,
        v_cache,
        softmax_scale=options.softmax_scale,
        causal=options.causal,
        window_size=options.window_size,
        softcap=options.softcap,
        alibi_slopes=slopes,
        return_attn_probs=options.return_softmax_lse,
        cache=cache,
    )
    check_last_strides(k_cache, v_cache)
    if seqlens is not None and not isinstance(seqlens, torch.Tensor):
        as_length(seqlens, 0, cache.capacity, cache.block_table is not None)
    if k is not None:
        check_new_keys(q, k_cache, k, v, cache.capacity)
    if cos is not None:
        check_rotary(q, cos, sin, cache.capacity)
    _check_flag("rotary_interleaved", options.rotary_interleaved)
    _refuse_gradients(tensors)
    return problem, check_num_splits(options.num_splits)


def _check_flag(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise WrongType(f"{name} must be True or False, got {type(value).__name__}: {value!r}")


def _refuse_gradients(tensors: KVCacheTensors) -> None:
    if not torch.is_grad_enabled():
        return
    for name, x in zip(_NAMES, tensors, strict=True):
        if isinstance(x, torch.Tensor) and x.requires_grad:
            raise RuntimeError(
                f"flash_attn_with_kvcache has no backward, since it writes to the caches, got {name} that "
                f"requires a gradient; accepted: calls under torch.no_grad(), or {name}.detach()"
            )


def _plan(tensors: KVCacheTensors, options: KVCacheOptions) -> _Plan:
    if torch.compiler.is_compiling():
        return _new_plan(tensors, options)
    scale, causal, window, softcap, interleaved, num_splits, return_lse = options
    plain = (
        type(window) is tuple
        and all(type(bound) is int for bound in window)
        and type(num_splits) is int
        and _NUMBERS.issuperset((type(scale), type(softcap)))
        and _FLAGS.issuperset((type(causal), type(interleaved), type(return_lse)))
    )
    if not plain:
        return _new_plan(tensors, options)
    given: tuple[Any, ...] = tensors
    one_length = type(tensors.cache_seqlens) is int
    if one_length:  # which is checked on every call
        given = tensors._replace(cache_seqlens=None)
    return _plans.get(given, (options, one_length), _new_plan, (tensors, options))


def _new_plan(tensors: KVCacheTensors, options: KVCacheOptions) -> _Plan:
    problem, num_splits = _describe(tensors, options)
    score = (problem.softmax_scale, problem.window_left, problem.window_right, problem.softcap)
    return _Plan(score, num_splits, select.choose(problem), problem.seqlen_k)


def _autocast(tensors: KVCacheTensors) -> KVCacheTensors:
    """Under autocast, cast all but the caches to the caches' dtype, in which they have to be written."""
    q, cache = tensors.q, tensors.k_cache
    # Meta tensors have no autocast, and asking for it is an error.
    if not isinstance(q, torch.Tensor) or q.is_meta or not torch.is_autocast_enabled(q.device.type):
        return tensors
    if not isinstance(cache, torch.Tensor) or not cache.is_floating_point():
        return tensors
    names = ("q", "k", "v", "rotary_cos", "rotary_sin")
    floats = {
        name: x.to(cache.dtype)
        for name in names
        if isinstance(x := getattr(tensors, name), torch.Tensor) and x.is_floating_point()
    }
    return tensors._replace(**floats)
