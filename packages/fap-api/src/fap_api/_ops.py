"""The operators that PyTorch sees: ``fap::attention_forward``, ``_backward`` and ``_probabilities``.

Each takes the canonical options of a checked call and the name of the back end that was chosen for it, so a
compiled graph, a profile or a selective checkpoint shows what runs. Outputs are always fresh tensors.
"""

from __future__ import annotations

from typing import Any

import torch

from fap_api import _dispatch, _flops
from fap_api._autograd import register_autograd
from fap_api.backends.base import Score
from fap_api.backends.registry import get_backend

__all__ = [
    "SCORE",
    "attention_backward",
    "attention_forward",
    "attention_probabilities",
    "backward",
    "forward",
    "forward_with_state",
    "no_state",
    "record_forward",
    "refuse_second_derivative",
]

SCORE = (
    "Tensor? alibi_slopes, float softmax_scale, int window_left, int window_right, float softcap,"
    " float dropout_p"
)
# A Library rather than torch.library.custom_op, for the lower host cost of a call.
_LIBRARY = torch.library.Library("fap", "FRAGMENT")
_LIBRARY.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, {SCORE}, bool deterministic, str backend)"
    " -> (Tensor out, Tensor softmax_lse, Tensor rng_state)",
    # Dropout draws from PyTorch's generator: the tag keeps compilers from merging or repeating calls.
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)
_LIBRARY.define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,"
    f" Tensor? dlse, Tensor rng_state, {SCORE}, bool deterministic, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    f"attention_probabilities(Tensor q, Tensor k, Tensor softmax_lse, Tensor rng_state, {SCORE},"
    " str backend) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    deterministic: bool,  # noqa: ARG001 - carried for the backward
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Do what ``fap::attention_forward`` does, but that rng_state is None without dropout."""
    score = Score(softmax_scale, window_left, window_right, softcap, alibi_slopes, dropout_p)
    return get_backend(backend).forward(q, k, v, score)


def forward_with_state(q: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what ``fap::attention_forward`` does."""
    out, lse, rng_state = forward(q, *rest)
    return out, lse, no_state(q) if rng_state is None else rng_state


def no_state(q: torch.Tensor) -> torch.Tensor:
    """Return the rng_state of an operator's call without dropout, since an output cannot be None."""
    return torch.empty(0, dtype=torch.int64, device=q.device)


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dlse: torch.Tensor | None,
    rng_state: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    deterministic: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Do what ``fap::attention_backward`` does."""
    score = Score(softmax_scale, window_left, window_right, softcap, alibi_slopes, dropout_p)
    state = rng_state if dropout_p else None
    return get_backend(backend).backward(dout, q, k, v, out, softmax_lse, dlse, state, score, deterministic)


def _probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    softmax_lse: torch.Tensor,
    rng_state: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    softcap: float,
    dropout_p: float,
    backend: str,
) -> torch.Tensor:
    score = Score(softmax_scale, window_left, window_right, softcap, alibi_slopes, dropout_p)
    return get_backend(backend).probabilities(q, k, softmax_lse, rng_state, score)


for _name, _implementation in (
    ("attention_forward", forward_with_state),
    ("attention_backward", backward),
    ("attention_probabilities", _probabilities),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")

attention_forward = torch.ops.fap.attention_forward.default
attention_backward = torch.ops.fap.attention_backward.default
attention_probabilities = torch.ops.fap.attention_probabilities.default


@torch.library.register_fake("fap::attention_forward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _forward_fake(
    q: torch.Tensor,
    k: torch.Tensor,  # noqa: ARG001
    v: torch.Tensor,  # noqa: ARG001
    alibi_slopes: torch.Tensor | None,  # noqa: ARG001
    softmax_scale: float,  # noqa: ARG001
    window_left: int,  # noqa: ARG001
    window_right: int,  # noqa: ARG001
    softcap: float,  # noqa: ARG001
    dropout_p: float,
    deterministic: bool,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _flops.register()
    batch, seqlen_q, nheads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((batch, nheads, seqlen_q), dtype=lse_dtype)
    return q.new_empty(q.shape), lse, q.new_empty((2 if dropout_p else 0,), dtype=torch.int64)


@torch.library.register_fake("fap::attention_backward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _backward_fake(
    dout: torch.Tensor,  # noqa: ARG001
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *rest: Any,  # noqa: ARG001
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.register_fake("fap::attention_probabilities", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _probabilities_fake(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> torch.Tensor:  # noqa: ARG001
    batch, seqlen_q, nheads, _ = q.shape
    padded = ((seqlen + 127) // 128 * 128 for seqlen in (seqlen_q, k.shape[1]))
    return q.new_empty((batch, nheads, *padded))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    q, k, v, alibi_slopes, *ctx.options = inputs
    # Without this an LSE that nobody uses would cost a tensor of zeros and its reading in every backward.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, alibi_slopes, *output)


def _differentiate(
    ctx: Any,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    drng_state: None,  # noqa: ARG001
) -> tuple[torch.Tensor | None, ...]:
    q, k, v, alibi_slopes, out, softmax_lse, rng_state = ctx.saved_tensors
    if torch._C._len_torch_dispatch_stack():
        _flops.teach_active_counters()
    if dout is None and dlse is None:
        return (None,) * 11  # one for each argument of the forward operator
    if dout is None:
        dout = torch.zeros_like(out)
    tensors = dout, q, k, v, out, softmax_lse, dlse, rng_state, alibi_slopes
    gradients = _dispatch.call_backward(attention_backward, backward, tensors, (*tensors, *ctx.options))
    return (*gradients, *(None,) * 8)


def refuse_second_derivative(*_: Any) -> None:
    """Raise where a backward operator is differentiated."""
    raise RuntimeError(
        "attention was differentiated twice, accepted: first derivatives only "
        "(call backward or torch.autograd.grad without create_graph=True)"
    )


record_forward = register_autograd(attention_forward, _differentiate, _save, _LIBRARY)
torch.library.register_autograd("fap::attention_backward", refuse_second_derivative, lib=_LIBRARY)
