"""Which key a query may see."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl  # noqa: F401 - the interpreter asks every kernel module for it


class Window(NamedTuple):
    """Query i sees key j iff ``-right <= i + diagonal - j <= left``, and j is a key at all.

    Fields:
        left, right: how many keys before and after its own position a query sees; None is no bound.
            Causal attention is ``right = 0``.
        diagonal: ``seqlen_k - seqlen_q``: sequences of unequal length are aligned at their ends.
        seqlen_q, seqlen_k: the lengths.
    """

    left: Any
    right: Any
    diagonal: Any
    seqlen_q: Any
    seqlen_k: Any


@triton.jit
def distance(window, queries, keys):
    """How far key j lies before query i's own position; negative if after. Arguments broadcast."""
    return queries + window.diagonal - keys


@triton.jit
def visible(window, distances, keys):
    """True where the query may see the key; all arguments broadcast."""
    seen = keys < window.seqlen_k
    if window.left is not None:
        seen = seen & (distances <= window.left)
    if window.right is not None:
        seen = seen & (distances >= -window.right)
    return seen
