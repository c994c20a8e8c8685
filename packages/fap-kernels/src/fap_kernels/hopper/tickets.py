"""Tickets: programs draw the numbers of their query tiles, so that all are busy until none is left."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def hopper_tickets_kernel(tickets):
    """Set the counter from which they are drawn to 0. Grid: one program."""
    tl.store(tickets, 0)
