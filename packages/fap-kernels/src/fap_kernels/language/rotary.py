"""Rotary position embeddings (Su et al., "RoFormer", arXiv:2104.09864)."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rotation(NamedTuple):
    """The angles, one row a position.

    Fields:
        cos, sin: addresses of contiguous ``(length, rotary_dim / 2)`` tables.
        length: their rows. A position outside them is not rotated.
    """

    cos: Any
    sin: Any
    length: Any


@triton.jit
def turn_rows(rotation, source, target, exists, positions, HEAD_DIM: tl.constexpr, HALF: tl.constexpr,
              WIDTH: tl.constexpr, REST: tl.constexpr, INTERLEAVED: tl.constexpr,
              CONJUGATE: tl.constexpr):  # fmt: skip
    """Write the rows at ``source``, rotated by their positions' angles, to ``target``; both are addresses.

    Args:
        exists: which rows there are.
        HALF: ``rotary_dim / 2``; column c is turned together with ``HALF + c``, or 2 c with 2 c + 1 if
            ``INTERLEAVED``.
        WIDTH: the power of two that holds HALF.
        REST: the power of two that holds the columns that are not turned but copied; 0 for none.
        CONJUGATE: turn backwards, which is the gradient of turning.
    """
    column = tl.arange(0, WIDTH)
    exists = exists[:, None]
    turned = exists & (column < HALF)[None, :]
    known = turned & ((positions >= 0) & (positions < rotation.length))[:, None]
    angle = positions.to(tl.int64)[:, None] * HALF + column[None, :]
    cos = tl.load(rotation.cos + angle, mask=known, other=1.0).to(tl.float32)
    sin = tl.load(rotation.sin + angle, mask=known, other=0.0).to(tl.float32)
    if CONJUGATE:
        sin = -sin
    first = 2 * column if INTERLEAVED else column
    second = first + 1 if INTERLEAVED else first + HALF
    a = tl.load(source[:, None] + first[None, :], mask=turned, other=0.0)
    b = tl.load(source[:, None] + second[None, :], mask=turned, other=0.0)
    dtype = target.dtype.element_ty
    x, y = a.to(tl.float32), b.to(tl.float32)
    tl.store(target[:, None] + first[None, :], (x * cos - y * sin).to(dtype), mask=turned)
    tl.store(target[:, None] + second[None, :], (x * sin + y * cos).to(dtype), mask=turned)
    if REST > 0:
        copy_rows(source, target, exists, 2 * HALF, HEAD_DIM, REST)


@triton.jit
def copy_rows(source, target, exists, START: tl.constexpr, END: tl.constexpr, WIDTH: tl.constexpr):
    """Copy columns ``START .. END``; ``exists`` is a column of which rows there are."""
    column = START + tl.arange(0, WIDTH)
    mask = exists & (column < END)[None, :]
    values = tl.load(source[:, None] + column[None, :], mask=mask, other=0.0)
    tl.store(target[:, None] + column[None, :], values, mask=mask)
