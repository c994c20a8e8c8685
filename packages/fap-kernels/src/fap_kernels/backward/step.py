"""The middle of the backward pass: from the products of a tile to what the gradients are made of.

    P = exp(logits - LSE),   dP = Z * (dO V^T),   dlogits = P * (dP - delta)

with Z the dropout mask over ``1 - p``. Each function takes a tile or its transpose: all else broadcasts.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..language import dropout as drop
from ..language import masks, scores, softmax


@triton.jit
def recompute_weights(head, products, lse, queries, keys, window, score, MASKED: tl.constexpr):
    """The normalised weights P, before dropout, from ``q @ k^T`` and the rows' LSE in base 2."""
    distances = masks.distance(window, queries, keys)
    x = scores.logits(score, head, products, distances)
    if MASKED:
        x = tl.where(masks.visible(window, queries, keys), x, float("-inf"))
    return softmax.weights_of(x, scores.unit(score), lse)


@triton.jit
def products_grad(head, products, weights, dweights, delta, queries, keys, score, dropout):
    """Gradient of ``q @ k^T`` over softmax_scale, given ``dweights = dO @ v^T``."""
    dweights = drop.apply_grad(dropout, head, dweights, queries, keys)
    return scores.logits_grad(score, products, weights * (dweights - delta))
