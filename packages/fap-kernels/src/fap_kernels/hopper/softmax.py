"""The online softmax of one warpgroup, as :mod:`fap_kernels.language.softmax` says it, without shuffles.

A row of scores is spread over the four lanes of a quad. Only the row's maximum has to be known to all of
them at each step; the sums are kept apart, one a lane, and meet once at the end.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..language import softmax
from .config import WARPGROUP_ROWS

ROWS = gl.constexpr(WARPGROUP_ROWS)
"""Rows of a warpgroup: what one wgmma instruction covers."""

QUAD = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[8, 0]],
        lane_bases=[[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 4],
    )
)
"""One number for each row and lane of its quad, where the accumulators of wgmma have that row."""


@gluon.jit
def no_sums():
    """The sums before the first key."""
    return gl.zeros([ROWS, 4], gl.float32, QUAD)


@gluon.jit
def online_step(x, unit, row_max, sums):
    """Take in a tile of logits ``x * unit`` of which some may be -inf.

    Returns the weights, the factor that brings earlier accumulators to the new maximum, that maximum and the
    new sums.
    """
    weights, rescale, row_max = softmax.rebase(x, unit, row_max, True)
    column = gl.convert_layout(rescale[:, None], QUAD, assert_trivial=True)
    return weights, rescale, row_max, sums * column + _sums_of(weights)


@gluon.jit
def optimistic_step(x, unit, reference, sums):
    """Take in a tile of logits relative to a reference that is no longer raised.

    Exact as long as nothing overflows, which happens where a logit exceeds the reference by 128 in base 2 (16
    where weights are rounded to float16); :func:`mark_overflow` tells.
    """
    weights = gl.exp2(x * unit - reference[:, None])
    return weights, sums + _sums_of(weights)


@gluon.jit
def finish(row_max, sums):
    """Return the factor that normalises each row, the natural-log LSE and the row's sum."""
    row_sum = gl.convert_layout(gl.sum(sums, 1), row_max.type.layout, assert_trivial=True)
    factor, lse = softmax.finish(row_max, row_sum)
    return factor, lse, row_sum


@gluon.jit
def mark_overflow(lse, row_sum, acc):
    """Make the LSE of each row NaN of which the sum or any accumulator is not finite."""
    # inf * 0 is NaN, and so is every sum with it.
    doubt = gl.convert_layout(gl.sum(acc * 0.0, 1), lse.type.layout)
    return lse + doubt + row_sum * 0.0


@gluon.jit
def _sums_of(weights):
    WIDTH: gl.constexpr = weights.shape[1]
    # Each lane holds pairs of neighbours, eight columns apart.
    sums = gl.sum(gl.sum(weights.reshape([ROWS, WIDTH // 8, 4, 2]), 3), 1)
    return gl.convert_layout(sums, QUAD, assert_trivial=True)
