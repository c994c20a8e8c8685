"""From ``q @ k^T`` to logits in base 2, and back: each function beside its derivative.

``logits(...)`` returns x such that the base-2 logits are ``x * unit(...)``. Without softcap and ALiBi
x is the raw product, so that scaling costs nothing: it becomes the multiplier of the one fused
multiply-add in ``exp2(x * unit - max)``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


class Scores(NamedTuple):
    """How a product becomes a logit.

    Fields:
        scale: softmax_scale.
        folded_scale: softmax_scale again if it may be left to :func:`unit`, else None. It must be positive
            for that, since the largest product has to be the largest logit.
        softcap: c in ``c * tanh(scale * qk / c)``, or None.
        slopes: address of this batch entry's ALiBi slopes m in ``- m * |i + diagonal - j|``, one a head,
            or None.
    """

    scale: Any
    folded_scale: Any
    softcap: Any
    slopes: Any


@triton.jit
def unit(scores):
    """The factor that turns what :func:`logits` returns into base-2 logits."""
    if scores.folded_scale is not None:
        return scores.folded_scale * LOG2E
    else:
        return 1.0


@triton.jit
def logits(scores, head, products, distances):
    """Logits of a tile of a head's products, up to the factor :func:`unit`."""
    if scores.folded_scale is not None:
        return products
    else:
        if scores.softcap is not None:
            x = _tanh(products * (scores.scale / scores.softcap)) * (scores.softcap * LOG2E)
        else:
            x = products * (scores.scale * LOG2E)
        if scores.slopes is not None:
            x -= tl.abs(distances).to(tl.float32) * (tl.load(scores.slopes + head) * LOG2E)
        return x


@triton.jit
def logits_grad(scores, products, dlogits):
    """Gradient of the products over softmax_scale, given that of the (natural) logits.

    The scale itself is left out: it is applied once to the finished dQ and dK.
    """
    if scores.softcap is not None:
        t = _tanh(products * (scores.scale / scores.softcap))
        return dlogits * (1.0 - t * t)
    else:
        return dlogits


@triton.jit
def _tanh(x):
    # exp2 overflows to inf for large x and the quotient is then 0, so no inf / inf can arise.
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
