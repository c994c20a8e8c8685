"""Turns: one warpgroup multiplies while another weighs.

Left alone, warpgroups drift into the same phase: all want the tensor cores, then none does. Named barriers of
the hardware, which Gluon does not offer, hand a turn from one warpgroup to the next. A barrier is met by 256
threads: the warpgroup that waits for its turn and the one that passes it on.
"""

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin

FIRST_BARRIER = gl.constexpr(12)
"""Number of the first of as many barriers as there are warpgroups. Triton itself counts up from 0."""


@builtin
def _named_barrier(kind: Any, number: Any, _semantic: Any = None) -> None:
    kind, number = (getattr(x, "value", x) for x in (kind, number))
    builder = _semantic.builder
    assembly = f"bar.{kind} {number}, 256; mov.u32 $0, 0;"
    builder.create_inline_asm(assembly, "=r", [], [gl.int32.to_ir(builder)], False, 1)


@gluon.jit
def first_turn(WARPGROUP: gl.constexpr, WARPGROUPS: gl.constexpr):
    """Give the first turn to warpgroup 0; called once by every warpgroup."""
    if WARPGROUP == WARPGROUPS - 1:
        _named_barrier("arrive", FIRST_BARRIER)


@gluon.jit
def take_turn(WARPGROUP: gl.constexpr):
    """Wait until it is this warpgroup's turn."""
    _named_barrier("sync", FIRST_BARRIER + WARPGROUP)


@gluon.jit
def pass_turn(WARPGROUP: gl.constexpr, WARPGROUPS: gl.constexpr):
    """Let the next warpgroup have its turn. All of them must take and pass equally often."""
    _named_barrier("arrive", FIRST_BARRIER + (WARPGROUP + 1) % WARPGROUPS)
