"""Tiles whose head dimension is held as one or two power-of-two parts.

Triton's tensors have power-of-two sides. A head dimension such as 96 would pay for 128; held as
64 + 32 it pays for 96. A tile is a tuple of one or two tensors, and these functions are all that
knows it.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def zeros(ROWS: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr):
    """A float32 accumulator of ``ROWS`` rows."""
    if PART1 == 0:
        return (tl.zeros([ROWS, PART0], tl.float32),)
    else:
        return (tl.zeros([ROWS, PART0], tl.float32), tl.zeros([ROWS, PART1], tl.float32))


@triton.jit
def contract(a, b):
    """``a @ b^T``, summed over the head dimension, in float32."""
    product = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
    if len(a) == 2:
        product = tl.dot(a[1], tl.trans(b[1]), product, input_precision="ieee")
    return product


@triton.jit
def accumulate(weights, rows, acc):
    """``acc + weights @ rows``, part by part."""
    if len(acc) == 1:
        return (tl.dot(weights, rows[0], acc[0], input_precision="ieee"),)
    else:
        return (
            tl.dot(weights, rows[0], acc[0], input_precision="ieee"),
            tl.dot(weights, rows[1], acc[1], input_precision="ieee"),
        )


@triton.jit
def scale_rows(acc, factor):
    """Multiply row i of every part by ``factor[i]``."""
    if len(acc) == 1:
        return (acc[0] * factor[:, None],)
    else:
        return (acc[0] * factor[:, None], acc[1] * factor[:, None])


@triton.jit
def scale(acc, factor):
    """Multiply every element by one number."""
    if len(acc) == 1:
        return (acc[0] * factor,)
    else:
        return (acc[0] * factor, acc[1] * factor)


@triton.jit
def row_dot(a, b):
    """``sum(a * b)`` over the head dimension in float32, one number a row."""
    total = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    if len(a) == 2:
        total += tl.sum(a[1].to(tl.float32) * b[1].to(tl.float32), 1)
    return total
