"""What ``flash_attn.flash_attn_interface`` holds while the shim is installed: functions public and private.

Libraries that split attention themselves (ring-flash-attention, yunchang, diffusers) call the private ones
and read their defaults; names, order and defaults of the arguments are flash-attn 2.8's.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

import torch

import fap_api
from fap_api._call import Sequences
from fap_api._kvcache_checks import as_length
from fap_api._passes import backward_pass, forward_pass, probabilities_pass
from fap_api._varlen_ops import PAGES_HAVE_NO_GRADIENT

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "USE_TRITON_ROCM",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_get_block_size_n",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

USE_TRITON_ROCM = False


def _with_unnormalised_weights(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have a function return S_dmask as flash-attn does, in units of each row's largest weight."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if not isinstance(result, tuple):
            return result
        out, softmax_lse, s_dmask = result
        return out, softmax_lse, _unnormalised(s_dmask)

    return wrapper


def _unnormalised(s_dmask: torch.Tensor) -> torch.Tensor:
    """Return ``exp(score - largest score of the row)`` with the signs of ``s_dmask``: negative if dropped."""
    if not s_dmask.numel():
        return s_dmask
    largest = s_dmask.abs().amax(-1, keepdim=True)
    return s_dmask / largest.masked_fill(largest == 0.0, 1.0)


class _PagesWithoutGradient(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, function: Callable[..., Any], kwargs: dict[str, Any], *args: Any) -> Any:
        return function(*args, **kwargs)

    @staticmethod
    def backward(_ctx: Any, *_: Any) -> Any:
        raise RuntimeError(PAGES_HAVE_NO_GRADIENT)


def _with_pages_under_autograd(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have keys in pages raise in the backward pass, not in the forward pass where a gradient is needed.

    As in flash-attn, whose callers run the forward pass alone without saying so.
    """
    place = list(inspect.signature(function).parameters).index("block_table")

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        block_table = args[place] if len(args) > place else kwargs.get("block_table")
        if block_table is None:
            return function(*args, **kwargs)
        # Autograd sees tensors among the positional arguments alone.
        args = (*args, *(kwargs.pop(name) for name in ("q", "k", "v")[len(args) :]))
        return _PagesWithoutGradient.apply(function, kwargs, *args)  # type: ignore[no-untyped-call]

    return wrapper


def _with_pages_that_suffice(function: Callable[..., Any]) -> Callable[..., Any]:
    """Have a sequence that is longer than its pages raise wherever its length is.

    As in flash-attn, which waits for the device to tell the lengths of a cache in pages. While a CUDA graph
    is recorded, nothing can be read.
    """
    places = {name: place for place, name in enumerate(inspect.signature(function).parameters)}

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        names = ("k_cache", "k", "cache_seqlens", "block_table")
        given: list[Any] = [
            args[places[name]] if len(args) > places[name] else kwargs.get(name) for name in names
        ]
        k_cache, k, lengths, block_table = given
        tensors = (k_cache, lengths, block_table)
        if all(isinstance(x, torch.Tensor) and x.numel() for x in tensors) and _readable(lengths):
            capacity = block_table.shape[-1] * k_cache.shape[1]
            seqlen_new = k.shape[1] if isinstance(k, torch.Tensor) and k.dim() == 4 else 0
            as_length(int(lengths.max()), seqlen_new, capacity, paged=True)
        return function(*args, **kwargs)

    return wrapper


def _readable(x: torch.Tensor) -> bool:
    if torch.compiler.is_compiling() or x.is_meta:
        return False
    return not (x.is_cuda and torch.cuda.is_current_stream_capturing())


flash_attn_func = _with_unnormalised_weights(fap_api.flash_attn_func)
flash_attn_kvpacked_func = _with_unnormalised_weights(fap_api.flash_attn_kvpacked_func)
flash_attn_qkvpacked_func = _with_unnormalised_weights(fap_api.flash_attn_qkvpacked_func)
flash_attn_varlen_func = _with_unnormalised_weights(
    _with_pages_under_autograd(fap_api.flash_attn_varlen_func)
)
flash_attn_varlen_kvpacked_func = _with_unnormalised_weights(fap_api.flash_attn_varlen_kvpacked_func)
flash_attn_varlen_qkvpacked_func = _with_unnormalised_weights(fap_api.flash_attn_varlen_qkvpacked_func)
flash_attn_with_kvcache = _with_pages_that_suffice(fap_api.flash_attn_with_kvcache)


def _get_block_size_n(
    device: torch.device,  # noqa: ARG001
    head_dim: int,  # noqa: ARG001
    is_dropout: bool,  # noqa: ARG001
    is_causal: bool,  # noqa: ARG001
) -> int:
    """Return how many keys share the scale of their S_dmask: all, since it is scaled row by row."""
    return 2**30


def _flash_attn_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    return_softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the forward pass alone, without recording a gradient.

    Arguments as for :func:`fap_api.flash_attn_func`, but for ``window_size`` in two parts, and
    ``return_softmax``, which needs dropout.

    Returns:
        ``out``, ``softmax_lse`` (b, h, sq), ``S_dmask`` (empty without ``return_softmax``) and ``rng_state``
        int64[2].
    """
    score = _score(
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
    )
    return _forward(q, k, v, None, score, return_softmax)


def _flash_attn_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    block_table: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    zero_tensors: bool = False,  # noqa: ARG001 - every row is written
    num_splits: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the forward pass over packed sequences alone, without recording a gradient.

    Arguments as for :func:`fap_api.flash_attn_varlen_func` and :func:`_flash_attn_forward`; ``leftpad_k`` is
    refused.

    Returns:
        ``out``, ``softmax_lse`` (h, total_q), ``S_dmask`` and ``rng_state``, as :func:`_flash_attn_forward`.
    """
    if num_splits > 1:
        raise RuntimeError(
            f"num_splits > 1 is not supported for packed sequences, got {num_splits}; accepted: 0 and 1"
        )
    if leftpad_k is not None:
        raise RuntimeError(
            "leftpad_k must be None for packed sequences, got a tensor; accepted: k and v packed without "
            "padding"
        )
    sequences = Sequences(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, seqused_k, block_table
    )
    score = _score(
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
    )
    return _forward(q, k, v, sequences, score, return_softmax)


def _flash_attn_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """Run the backward pass alone, writing the gradients into dq, dk and dv where these are given.

    Returns:
        ``softmax_d`` float32 (b, h, sq rounded up to 128): the sums over ``dout * out``, 0 beyond sq.
    """
    score = _score(
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
    )
    saved = dout, q, k, v, out, softmax_lse
    _backward(saved, (dq, dk, dv), None, score, deterministic, rng_state)
    return _row_sums(dout, out, -(-q.shape[1] // 128) * 128)


def _flash_attn_varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
    zero_tensors: bool = False,  # noqa: ARG001 - every row is written
) -> torch.Tensor:
    """Run the backward pass over packed sequences alone, as :func:`_flash_attn_backward`.

    Returns:
        ``softmax_d`` float32 (h, total_q + 128 * batch): the sums over ``dout * out``, row by row of q, and 0
        beyond them. flash-attn has gaps between the sequences there.
    """
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, None, None)
    score = _score(
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
    )
    saved = dout, q, k, v, out, softmax_lse
    _backward(saved, (dq, dk, dv), sequences, score, deterministic, rng_state)
    return _row_sums(dout, out, q.shape[0] + 128 * (cu_seqlens_q.shape[0] - 1))


_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


def _score(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
) -> dict[str, Any]:
    return {
        "dropout_p": dropout_p,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": (window_size_left, window_size_right),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
    }


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences | None,
    score: dict[str, Any],
    return_softmax: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    dropout = score["dropout_p"] > 0.0
    if return_softmax and not dropout:
        raise RuntimeError("return_softmax must be False without dropout, got True with dropout_p 0.0")
    # Keys in pages have no gradient; after any other call a backward may follow.
    paged = sequences is not None and sequences.block_table is not None
    out, softmax_lse, rng_state = forward_pass(q, k, v, sequences, needs_grad=not paged, **score)
    s_dmask = q.new_empty(0)
    if return_softmax:
        s_dmask = _unnormalised(probabilities_pass(q, k, softmax_lse, rng_state, sequences, **score))
    return out, softmax_lse, s_dmask, rng_state if dropout else rng_state.new_zeros(2)


def _backward(
    saved: tuple[torch.Tensor, ...],
    gradients: tuple[torch.Tensor | None, ...],
    sequences: Sequences | None,
    score: dict[str, Any],
    deterministic: bool,
    rng_state: torch.Tensor | None,
) -> None:
    dout, q, k, v, out, softmax_lse = saved
    if rng_state is None:
        if score["dropout_p"] > 0.0:
            raise RuntimeError(
                "rng_state must be what the forward pass returned, where dropout_p is above 0, got None"
            )
        rng_state = torch.empty(0, dtype=torch.int64, device=q.device)
    computed = backward_pass(
        dout, q, k, v, out, softmax_lse, rng_state, sequences, deterministic=deterministic, **score
    )
    for given, dx in zip(gradients, computed, strict=True):
        if given is not None:
            given.copy_(dx)


def _row_sums(dout: torch.Tensor, out: torch.Tensor, width: int) -> torch.Tensor:
    """Return the sums over ``dout * out``, heads before rows, filled up with zeros to ``width`` rows."""
    sums = (dout.float() * out.float()).sum(-1).transpose(-1, -2)
    return torch.nn.functional.pad(sums, (0, width - sums.shape[-1]))
