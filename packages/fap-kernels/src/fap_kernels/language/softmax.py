"""The online softmax in base 2 (Milakov and Gimelshein, arXiv:1805.02867)."""

from __future__ import annotations

import triton
import triton.language as tl

from .scores import LN2


@triton.jit
def step(x, unit, row_max, row_sum, MASKED: tl.constexpr):
    """Take in one tile of logits ``x * unit``.

    Returns the tile's weights ``exp2(x * unit - max)``, the factor that brings earlier accumulators
    to the new maximum, the new maximum and the new sum.
    """
    weights, rescale, new_max = rebase(x, unit, row_max, MASKED)
    return weights, rescale, new_max, row_sum * rescale + tl.sum(weights, 1)


@triton.jit
def rebase(x, unit, row_max, MASKED: tl.constexpr):
    """What :func:`step` returns, without the sum.

    Only a masked tile can leave a row without any key so far; its maximum is still -inf, and 0 stands
    in for it so that no inf - inf arises.
    """
    new_max = tl.maximum(row_max, tl.max(x, 1) * unit)
    reference = new_max
    if MASKED:
        reference = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(x * unit - reference[:, None])
    rescale = tl.exp2(row_max - reference)
    return weights, rescale, new_max


@triton.jit
def finish(row_max, row_sum):
    """Return the factor that normalises each row of the output, and the natural-log LSE.

    A row without keys gets 0 and +inf.
    """
    empty = row_sum == 0.0
    total = tl.where(empty, 1.0, row_sum)
    factor = tl.where(empty, 0.0, 1.0 / total)
    lse = tl.where(empty, float("inf"), (row_max + tl.log2(total)) * LN2)
    return factor, lse


@triton.jit
def weights_of(x, unit, lse):
    """The normalised weights of a tile again, from its logits and its rows' LSE in base 2 (broadcast).

    An LSE of +inf, as rows without keys have, gives weights of 0.
    """
    return tl.exp2(x * unit - lse)
