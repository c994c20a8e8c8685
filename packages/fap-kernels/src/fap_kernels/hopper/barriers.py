"""Named barriers of the hardware, which Gluon does not offer, and who uses which.

They are counted in threads and have no phases: a barrier is over once as many threads as are said have come,
whether they wait or only say that they were there. Triton itself counts up from number 0, one for each
warpgroup and one more.
"""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin

from .compat import assemble

__all__ = [
    "ALL_DONE",
    "DOUTS_FREE",
    "DQ_STAGED",
    "EXCHANGE",
    "FIRST_TURN",
    "GRADIENTS_THERE",
    "QUERIES_FREE",
    "SLOT_FREE",
    "SLOT_FREE_TOO",
    "WEIGHTS_THERE",
    "arrive",
    "meet",
]

ALL_DONE = gl.constexpr(10)
"""Forward: all have done what there is to do, and whoever had to mark has marked."""

FIRST_TURN = gl.constexpr(12)
"""Forward: the first of as many barriers as there are warpgroups that take turns."""

EXCHANGE = gl.constexpr(8)
"""Backward: the first of two, for even and odd steps: the two warpgroups have written what each reads of the
other, and there is room for their dQ."""

QUERIES_FREE = gl.constexpr(10)
"""Backward: the first of one for each stage of query tiles, which may be filled again."""

DOUTS_FREE = gl.constexpr(12)
"""Backward: the same for tiles of the output's gradient."""

DQ_STAGED = gl.constexpr(14)
"""Backward: the first of two, for even and odd steps: a tile of dQ may leave."""

SLOT_FREE_TOO = gl.constexpr(6)
"""Backward in three: the same as ``SLOT_FREE``, for the second warpgroup."""

WEIGHTS_THERE = gl.constexpr(6)
"""Backward by relay: the first of one for each of two slots, in which there are weights."""

GRADIENTS_THERE = gl.constexpr(8)
"""Backward by relay, and in three: the same once there are their gradients."""

SLOT_FREE = gl.constexpr(14)
"""Backward by relay, and in three: the same once they are no longer needed."""


@builtin
def meet(number: Any, threads: Any, _semantic: Any = None) -> None:
    """Wait at barrier ``number``, known to the compiler or not, until ``threads`` have come."""
    _named_barrier("sync", number, threads, _semantic)


@builtin
def arrive(number: Any, threads: Any, _semantic: Any = None) -> None:
    """Come to barrier ``number`` as one of ``threads``, and go on.

    Unlike ``mbarrier.arrive`` it brings no barrier among the partition's warps with it.
    """
    _named_barrier("arrive", number, threads, _semantic)


def _named_barrier(kind: str, number: Any, threads: Any, _semantic: Any) -> None:
    threads = getattr(threads, "value", threads)
    assemble(f"bar.{kind} $1, {threads}; mov.u32 $0, 0;", [number], _semantic)
