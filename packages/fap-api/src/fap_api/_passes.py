"""Attention one pass at a time, for callers that bring an autograd of their own.

PyTorch's scaled_dot_product_attention is one, code that calls flash-attn's private functions another. Nothing
is recorded here, and autocast changes nothing: such callers have cast before.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fap_api import _dispatch, _ops, _varlen_ops
from fap_api.backends import select
from fap_kernels.packing import Packing
from fap_kernels.problem import AttentionProblem

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fap_api._call import Sequences

__all__ = ["backward_pass", "forward_pass", "probabilities_pass"]


def forward_pass(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sequences: Sequences | None = None,
    *,
    needs_grad: bool,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run one forward pass; tensors and options as for :func:`fap_api.flash_attn_func`.

    Args:
        sequences: where packed sequences lie, with tensors and results as for
            :func:`fap_api.flash_attn_varlen_func`.
        needs_grad: :func:`backward_pass` may follow, so the back end must have one.

    Returns:
        ``out`` like q, ``softmax_lse`` float32 (b, h, sq) or (h, total_q), and ``rng_state``, int64[2] with
        dropout and empty without.
    """
    problem, sequences = _describe(
        (q, k, v),
        sequences,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        needs_grad=needs_grad,
    )
    if problem.paged and needs_grad:
        raise RuntimeError(_varlen_ops.PAGES_HAVE_NO_GRADIENT)
    operator: Any = _ops.attention_forward
    function: Any = _ops.forward_with_state
    if sequences is not None:
        operator, function = _varlen_ops.attention_varlen_forward, _varlen_ops.forward_with_state
    score, backend = (alibi_slopes, *_score(problem)), select.choose(problem)
    arguments = (q, k, v, *(sequences or ()), *score, False, backend)
    out, softmax_lse, rng_state = _dispatch.call(operator, function, _tensors(arguments), arguments)
    return out, softmax_lse, rng_state


def backward_pass(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    rng_state: torch.Tensor,
    sequences: Sequences | None = None,
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
    problem, sequences = _describe(
        (q, k, v),
        sequences,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        deterministic=deterministic,
        needs_grad=True,
    )
    if problem.paged:
        raise RuntimeError(_varlen_ops.PAGES_HAVE_NO_GRADIENT)
    operator: Any = _ops.attention_backward
    function: Any = _ops.backward
    if sequences is not None:
        operator, function = _varlen_ops.attention_varlen_backward, _varlen_ops.backward
    saved = q, k, v, out, softmax_lse, None, rng_state
    # All but the table of pages, which have no gradient.
    places = () if sequences is None else sequences[:-1]
    score, backend = (alibi_slopes, *_score(problem)), select.choose(problem)
    arguments = (dout, *saved, *places, *score, problem.deterministic, backend)
    dq, dk, dv = _dispatch.call(operator, function, _tensors(arguments), arguments)
    return dq, dk, dv


def probabilities_pass(
    q: torch.Tensor,
    k: torch.Tensor,
    softmax_lse: torch.Tensor,
    rng_state: torch.Tensor,
    sequences: Sequences | None = None,
    *,
    dropout_p: float,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the ``S_dmask`` of :func:`forward_pass`, whose inputs, results and options it takes."""
    problem, sequences = _describe(
        (q, k, k),
        sequences,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        return_attn_probs=True,
    )
    operator: Any = (
        _ops.attention_probabilities if sequences is None else _varlen_ops.attention_varlen_probabilities
    )
    score, backend = (alibi_slopes, *_score(problem)), select.choose(problem)
    with torch._C._AutoDispatchBelowAutograd():
        s_dmask: torch.Tensor = operator(q, k, softmax_lse, rng_state, *(sequences or ()), *score, backend)
    return s_dmask


def _tensors(arguments: Sequence[Any]) -> list[torch.Tensor]:
    return [x for x in arguments if isinstance(x, torch.Tensor)]


def _describe(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor], sequences: Sequences | None, **options: Any
) -> tuple[AttentionProblem, Sequences | None]:
    """Check one call, and return ``sequences`` with integers for ``max_seqlen_*``."""
    if sequences is None:
        return AttentionProblem.describe(*qkv, **options), None
    sequences = sequences.with_integers()
    q, k, v = qkv
    packing = Packing.describe(q, k, *sequences)
    return AttentionProblem.describe(q, k, v, packing=packing, **options), sequences


def _score(problem: AttentionProblem) -> tuple[float, int, int, float, float]:
    """Return the operators' options between ``alibi_slopes`` and ``deterministic``."""
    return (
        problem.softmax_scale,
        problem.window_left,
        problem.window_right,
        problem.softcap,
        problem.dropout_p,
    )
