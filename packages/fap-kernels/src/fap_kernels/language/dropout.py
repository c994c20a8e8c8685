"""Which weights survive dropout: Philox keyed on absolute (batch, head, query, key).

The mask does not depend on tile sizes, on the direction of the sweep or on the kernel that asks, so
the backward pass and other back ends draw it again from the two numbers of ``rng_state``. Generator:
Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with 7 rounds, the
fewest that pass BigCrush.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Dropout(NamedTuple):
    """The random numbers of one batch entry.

    Fields:
        rng_state: address of seed and offset.
        first_stream: ``batch * nheads``; head h draws from stream ``first_stream + h``.
        threshold: a weight survives iff its random byte is at most this: ``floor(255 * (1 - p))``.
        scale: ``1 / (1 - p)``.
    """

    rng_state: Any
    first_stream: Any
    threshold: Any
    scale: Any


@triton.jit
def apply(dropout, head, weights, queries, keys):
    """The weights that survive, without their scale, which is applied once to the finished sum."""
    if dropout is None:
        return weights
    else:
        return tl.where(survives(dropout, head, queries, keys), weights, 0.0)


@triton.jit
def apply_grad(dropout, head, dweights, queries, keys):
    """Gradient of the weights before dropout, given that of the surviving and scaled ones."""
    if dropout is None:
        return dweights
    else:
        return tl.where(survives(dropout, head, queries, keys), dweights * dropout.scale, 0.0)


@triton.jit
def survives(dropout, head, queries, keys):
    """True where the head's weight of (query, key) is kept; the positions broadcast to the tile.

    One Philox call gives 16 bytes. They serve the 16 keys of a 64-key stretch that one thread holds
    in the tensor cores' accumulator layouts (two neighbours in each group of eight), so the compiler
    finds one call where it would otherwise make 16.
    """
    seed = tl.load(dropout.rng_state)
    offset = tl.load(dropout.rng_state + 1).to(tl.int32)
    group = keys // 64 * 4 + keys % 8 // 2
    byte = keys % 64 // 8 * 2 + keys % 2
    zero = group * 0 + queries * 0
    w0, w1, w2, w3 = tl.philox(
        seed, zero + group, zero + queries, zero + (dropout.first_stream + head), zero + offset, 7
    )
    low = tl.where(byte < 4, w0, w1)
    high = tl.where(byte < 12, w2, w3)
    word = tl.where(byte < 8, low, high)
    return ((word >> (byte % 4 * 8).to(tl.uint32)) & 0xFF) <= dropout.threshold.to(tl.uint32)
