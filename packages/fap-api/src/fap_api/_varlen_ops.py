"""The operators of packed sequences: ``fap::attention_varlen_forward``, ``_backward`` and ``_probabilities``.

As those of dense attention in ``_ops``, with the places of the sequences between the tensors and the options.
The functions below take the arguments of their schema by position. ``rest`` begins with the places: six of
``_SEQUENCES``, and with ``block_table``, which the backward pass lacks, seven. The options are behind them.
"""

from __future__ import annotations

from typing import Any

import torch

from fap_api import _dispatch, _flops
from fap_api._autograd import register_autograd
from fap_api._ops import SCORE, no_state, refuse_second_derivative
from fap_api.backends.base import Score
from fap_api.backends.registry import get_backend
from fap_kernels.packing import Packing

__all__ = [
    "attention_varlen_backward",
    "attention_varlen_forward",
    "attention_varlen_probabilities",
    "backward",
    "forward",
    "forward_with_state",
    "record_forward",
]

# In the order of flash_attn_varlen_func. A graph takes every max_seqlen, as it takes every total.
_SEQUENCES = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k,"
    " Tensor? seqused_q, Tensor? seqused_k"
)
_LIBRARY = torch.library.Library("fap", "FRAGMENT")
_LIBRARY.define(
    f"attention_varlen_forward(Tensor q, Tensor k, Tensor v, {_SEQUENCES}, Tensor? block_table, {SCORE},"
    " bool deterministic, str backend) -> (Tensor out, Tensor softmax_lse, Tensor rng_state)",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
_LIBRARY.define(
    "attention_varlen_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,"
    f" Tensor? dlse, Tensor rng_state, {_SEQUENCES}, {SCORE}, bool deterministic, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "attention_varlen_probabilities(Tensor q, Tensor k, Tensor softmax_lse, Tensor rng_state,"
    f" {_SEQUENCES}, Tensor? block_table, {SCORE}, str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _packing(
    k: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    seqused_q: torch.Tensor | None,
    seqused_k: torch.Tensor | None,
    block_table: torch.Tensor | None = None,
) -> Packing:
    page_size = 0 if block_table is None else k.shape[1]
    return Packing(
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q,
        seqused_k,
        block_table,
        page_size,
    )


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Do what ``fap::attention_varlen_forward`` does, but that rng_state is None without dropout."""
    packing, (slopes, *options, _, backend) = _packing(k, *rest[:7]), rest[7:]
    score = _score(slopes, *options)
    return get_backend(backend).varlen_forward(q, k, v, packing, score)


def forward_with_state(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what ``fap::attention_varlen_forward`` does."""
    out, lse, rng_state = forward(q, *rest)
    return out, lse, no_state(q) if rng_state is None else rng_state


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dlse: torch.Tensor | None,
    rng_state: torch.Tensor,
    *rest: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what ``fap::attention_varlen_backward`` does."""
    packing, (slopes, *options, deterministic, backend) = _packing(k, *rest[:6]), rest[6:]
    score = _score(slopes, *options)
    state = rng_state if score.dropout_p else None
    return get_backend(backend).varlen_backward(
        dout, q, k, v, out, softmax_lse, dlse, state, packing, score, deterministic
    )


def _probabilities(
    q: torch.Tensor, k: torch.Tensor, softmax_lse: torch.Tensor, rng_state: torch.Tensor, *rest: Any
) -> torch.Tensor:
    packing, (slopes, *options, backend) = _packing(k, *rest[:7]), rest[7:]
    score = _score(slopes, *options)
    return get_backend(backend).varlen_probabilities(q, k, softmax_lse, rng_state, packing, score)


def _score(
    slopes: torch.Tensor | None, scale: float, left: int, right: int, softcap: float, dropout_p: float
) -> Score:
    return Score(scale, left, right, softcap, slopes, dropout_p)


for _name, _implementation in (
    ("attention_varlen_forward", forward_with_state),
    ("attention_varlen_backward", backward),
    ("attention_varlen_probabilities", _probabilities),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")

attention_varlen_forward = torch.ops.fap.attention_varlen_forward.default
attention_varlen_backward = torch.ops.fap.attention_varlen_backward.default
attention_varlen_probabilities = torch.ops.fap.attention_varlen_probabilities.default


@torch.library.register_fake("fap::attention_varlen_forward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _forward_fake(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _flops.register()
    *_, dropout_p, _deterministic, _backend = rest
    total_q, nheads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((nheads, total_q), dtype=lse_dtype)
    return q.new_empty(q.shape), lse, q.new_empty((2 if dropout_p else 0,), dtype=torch.int64)


@torch.library.register_fake("fap::attention_varlen_backward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _backward_fake(
    dout: torch.Tensor,  # noqa: ARG001
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: Any,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake(  # type: ignore[untyped-decorator]
    "fap::attention_varlen_probabilities", lib=_LIBRARY
)
def _probabilities_fake(
    q: torch.Tensor,
    k: torch.Tensor,  # noqa: ARG001
    softmax_lse: torch.Tensor,  # noqa: ARG001
    rng_state: torch.Tensor,  # noqa: ARG001
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,  # noqa: ARG001
    max_seqlen_q: int,
    max_seqlen_k: int,
    *rest: Any,  # noqa: ARG001
) -> torch.Tensor:
    padded = ((seqlen + 127) // 128 * 128 for seqlen in (max_seqlen_q, max_seqlen_k))
    return q.new_empty((cu_seqlens_q.shape[0] - 1, q.shape[1], *padded))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    q, k, v, bounds_q, bounds_k, *ctx.longest, used_q, used_k, block_table, slopes = inputs[:11]
    ctx.options, ctx.paged = inputs[11:], block_table is not None
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, bounds_q, bounds_k, used_q, used_k, slopes, *output)


def _differentiate(
    ctx: Any,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    drng_state: None,  # noqa: ARG001
) -> tuple[torch.Tensor | None, ...]:
    if ctx.paged:
        raise RuntimeError(PAGES_HAVE_NO_GRADIENT)
    q, k, v, bounds_q, bounds_k, used_q, used_k, slopes, out, softmax_lse, rng_state = ctx.saved_tensors
    if torch._C._len_torch_dispatch_stack():
        _flops.teach_active_counters()
    if dout is None and dlse is None:
        return (None,) * 18  # one for each argument of the forward operator
    if dout is None:
        dout = torch.zeros_like(out)
    tensors = dout, q, k, v, out, softmax_lse, dlse, rng_state
    places = bounds_q, bounds_k, *ctx.longest, used_q, used_k
    gradients = _dispatch.call_backward(
        attention_varlen_backward,
        backward,
        (*tensors, bounds_q, bounds_k, used_q, used_k, slopes),
        (*tensors, *places, slopes, *ctx.options),
    )
    return (*gradients, *(None,) * 15)


PAGES_HAVE_NO_GRADIENT = (
    "block_table was given and q, k or v requires a gradient, but keys and values in pages have none; "
    "accepted: calls under torch.no_grad(), or k and v packed without a block_table"
)

record_forward = register_autograd(attention_varlen_forward, _differentiate, _save, _LIBRARY)
torch.library.register_autograd("fap::attention_varlen_backward", refuse_second_derivative, lib=_LIBRARY)

# For those who counted before this module, the last one with operators that count, was imported; everybody
# else is met in the calls.
_flops.register()
