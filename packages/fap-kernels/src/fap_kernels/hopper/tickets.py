"""Tickets: programs draw the numbers of their query tiles, so that all are busy until none is left."""

from __future__ import annotations

import triton
import triton.language as tl

from ..language import grid


@triton.jit
def hopper_tickets_kernel(tickets):
    """Set the counter from which they are drawn to 0. Grid: one program.

    The kernel that follows may start at once, and waits by itself before it draws.
    """
    grid.release_next()
    tl.store(tickets, 0)
