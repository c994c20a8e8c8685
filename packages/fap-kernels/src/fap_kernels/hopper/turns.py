"""Turns: one warpgroup multiplies while another weighs.

Left alone, warpgroups drift into the same phase: all want the tensor cores, then none does. Named barriers of
the hardware hand a turn from one warpgroup to the next.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from . import barriers

THREADS = gl.constexpr(256)
"""The warpgroup that waits for its turn and the one that passes it on."""


@gluon.jit
def first_turn(WARPGROUP: gl.constexpr, WARPGROUPS: gl.constexpr):
    """Give the first turn to warpgroup 0; called once by every warpgroup."""
    if WARPGROUP == WARPGROUPS - 1:
        barriers.arrive(barriers.FIRST_TURN, THREADS)


@gluon.jit
def take_turn(WARPGROUP: gl.constexpr):
    """Wait until it is this warpgroup's turn."""
    barriers.meet(barriers.FIRST_TURN + WARPGROUP, THREADS)


@gluon.jit
def pass_turn(WARPGROUP: gl.constexpr, WARPGROUPS: gl.constexpr):
    """Let the next warpgroup have its turn. All of them must take and pass equally often."""
    barriers.arrive(barriers.FIRST_TURN + (WARPGROUP + 1) % WARPGROUPS, THREADS)
