"""Attention one pass at a time, for callers that bring an autograd of their own.

PyTorch's scaled_dot_product_attention is one, code that calls flash-attn's private functions another. Nothing
is recorded here, and autocast changes nothing: such callers have cast before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fap_api import _ops
from fap_api.backends import select
from fap_kernels.problem import AttentionProblem

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["backward_pass", "forward_pass"]


def forward_pass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    needs_grad: bool,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run one dense forward pass; tensors and options as for :func:`fap_api.flash_attn_func`.

    Args:
        needs_grad: :func:`backward_pass` may follow, so the back end must have one.

    Returns:
        ``out`` (b, sq, h, d), ``softmax_lse`` float32 (b, h, sq), and ``rng_state``, int64[2] with dropout
        and empty without.
    """
    problem = AttentionProblem.describe(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        needs_grad=needs_grad,
    )
    with torch._C._AutoDispatchBelowAutograd():
        out, softmax_lse, rng_state = _ops.attention_forward(
            q, k, v, alibi_slopes, *_score(problem), False, select.choose(problem)
        )
    return out, softmax_lse, rng_state


def backward_pass(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    rng_state: torch.Tensor,
    *,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run the backward pass of :func:`forward_pass`, whose inputs, results and options it takes.

    The back end is chosen anew: keep the setting that the forward pass ran under.

    Returns:
        ``dq``, ``dk`` and ``dv``, contiguous, like q, k and v.
    """
    problem = AttentionProblem.describe(
        q,
        k,
        v,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        deterministic=deterministic,
        needs_grad=True,
    )
    backend = select.choose(problem)
    saved = q, k, v, out, softmax_lse, None, rng_state, alibi_slopes
    with torch._C._AutoDispatchBelowAutograd():
        dq, dk, dv = _ops.attention_backward(dout, *saved, *_score(problem), problem.deterministic, backend)
    return dq, dk, dv


def _score(problem: AttentionProblem) -> tuple[float, int, int, float, float]:
    """Return the operators' options between ``alibi_slopes`` and ``deterministic``."""
    return (
        problem.softmax_scale,
        problem.window_left,
        problem.window_right,
        problem.softcap,
        problem.dropout_p,
    )
