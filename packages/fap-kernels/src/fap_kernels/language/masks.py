"""Which key a query may see."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


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
def visible(window, queries, keys):
    """True where a query may see a key; one of the two is a column, the other one a row.

    The bounds are worked out once for each number of the column, so an element takes one comparison for each.
    """
    if window.left is None and window.right is None:
        return keys < window.seqlen_k
    elif keys.shape[1] > 1:
        seen = keys <= last_key(window, queries)
        if window.left is not None:
            seen = seen & (keys >= first_key(window, queries))
        return seen
    elif window.right is not None:
        seen = queries >= first_query(window, keys)
        if window.left is not None:
            seen = seen & (queries <= last_query(window, keys))
        return seen
    else:
        return queries <= last_query(window, keys)


@triton.jit
def last_key(window, queries):
    """The last key that a query sees, if it sees one from :func:`first_key` on."""
    if window.right is not None:
        return tl.minimum(queries + window.diagonal + window.right, window.seqlen_k - 1)
    else:
        return queries * 0 + window.seqlen_k - 1


@triton.jit
def first_key(window, queries):
    """The first key that a query sees where there is a bound on the left; it may be negative."""
    return queries + window.diagonal - window.left


@triton.jit
def first_query(window, keys):
    """The first query that sees a key where there is a bound on the right; none sees what is no key."""
    return tl.where(keys < window.seqlen_k, keys - window.diagonal - window.right, 2147483647)


@triton.jit
def last_query(window, keys):
    """The last query that sees a key where there is a bound on the left; none sees what is no key."""
    return tl.where(keys < window.seqlen_k, keys - window.diagonal + window.left, -1)
