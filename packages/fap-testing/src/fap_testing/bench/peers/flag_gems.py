"""FlagGems's own attention, forward only. Inputs as they come."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fap_testing.bench.peers.base import KernelCalls, Peer

if TYPE_CHECKING:
    from fap_testing.bench.peers.base import Calls
    from fap_testing.bench.prefill import Prefill
    from fap_testing.bench.problem import Direction, Problem, Tensors

__all__ = ["FlagGems"]


class FlagGems(Peer):
    """flag_gems.ops.attention.flash_attention_forward, as of FlagGems 5.0.2."""

    name = "flag-gems"
    distribution = "flag_gems"
    module = "flag_gems.ops.attention"
    install = "pip install flag_gems"
    compiles = True
    directions = ("fwd",)

    def unsupported_reasons(self, problem: Problem, direction: Direction) -> list[str]:
        """Return what it lacks."""
        reasons = super().unsupported_reasons(problem, direction)
        if problem.windowed:
            reasons.append(f"its windows are not measured, got window_size {problem.window_size}")
        return reasons

    def prefill(self, problem: Prefill, tensors: Tensors) -> Calls:
        """Return calls of its forward."""
        attention = importlib.import_module(self.module).flash_attention_forward
        q, k, v = tensors[:3]
        lengths = (problem.seqlen_q, problem.seqlen_k)
        options = {"scale": problem.head_dim**-0.5, "window_size_left": -1, "window_size_right": -1}

        def forward() -> tuple[Any, ...]:
            return tuple(attention(q, k, v, None, None, *lengths, 0.0, problem.causal, False, **options))

        return KernelCalls(forward)
