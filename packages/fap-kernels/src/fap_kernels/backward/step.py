"""The middle of the backward pass: from two products of a tile to what the gradients are made of."""

from __future__ import annotations

import triton
import triton.language as tl

from ..language import dropout as drop
from ..language import masks, scores, softmax


@triton.jit
def weights_and_dscores(
    head, products, dweights, lse, delta, queries, keys, window, score, dropout, keep_scale,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Recompute the weights P of a tile and return (P after dropout, dS without softmax_scale).

    ``products`` is ``q @ k^T`` and ``dweights`` is ``dO @ v^T``, both of the tile or both of its
    transpose; all else broadcasts to them. With Z the dropout mask over ``1 - p``:

        P = exp(logits - LSE),   dP = Z * dweights,   dlogits = P * (dP - delta)

    The weights returned lack Z's factor ``keep_scale``, which is applied once to the finished dV.
    """
    distances = masks.distance(window, queries, keys)
    x = scores.logits(score, head, products, distances)
    if MASKED:
        x = tl.where(masks.visible(window, distances, keys), x, float("-inf"))
    weights = softmax.weights_of(x, scores.unit(score), lse)
    kept = weights
    if dropout is not None:
        survives = drop.survives(dropout, head, queries, keys)
        kept = tl.where(survives, weights, 0.0)
        dweights = tl.where(survives, dweights * keep_scale, 0.0)
    return kept, scores.logits_grad(score, products, weights * (dweights - delta))
