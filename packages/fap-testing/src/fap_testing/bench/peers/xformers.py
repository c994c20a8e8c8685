"""xFormers's memory-efficient attention. Inputs as they come: the layout is its own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fap_testing.bench.peers.base import EVERY_DTYPE, AutogradCalls, Peer

if TYPE_CHECKING:
    import torch

    from fap_testing.bench.peers.base import Calls
    from fap_testing.bench.prefill import Prefill
    from fap_testing.bench.problem import Direction, Problem, Tensors
    from fap_testing.bench.varlen import Varlen

__all__ = ["Xformers"]


class Xformers(Peer):
    """xformers.ops.memory_efficient_attention, on whichever of its operators it chooses."""

    name = "xformers"
    kinds = ("prefill", "varlen")
    distribution = "xformers"
    module = "xformers.ops"
    install = "pip install xformers"
    dtypes = EVERY_DTYPE

    def unsupported_reasons(self, problem: Problem, direction: Direction) -> list[str]:
        """Return what its masks and layout lack."""
        reasons = super().unsupported_reasons(problem, direction)
        if problem.windowed:
            reasons.append(f"its windows are not measured, got window_size {problem.window_size}")
        if problem.group > 1:
            reasons.append("it takes grouped heads in another layout")
        return reasons

    def prefill(self, problem: Prefill, tensors: Tensors) -> Calls:
        """Return calls of the function."""
        masks = importlib.import_module("xformers.ops.fmha.attn_bias")
        return self._calls(masks.LowerTriangularFromBottomRightMask() if problem.causal else None, tensors)

    def varlen(self, problem: Varlen, tensors: Tensors) -> Calls:
        """Return calls with a block-diagonal mask."""
        masks = importlib.import_module("xformers.ops.fmha.attn_bias")
        bias = masks.BlockDiagonalMask.from_seqlens(list(problem.lengths), device=problem.device)
        return self._calls(bias.make_causal() if problem.causal else bias, tensors)

    def _calls(self, bias: Any, tensors: Tensors) -> Calls:
        attention = importlib.import_module(self.module).memory_efficient_attention
        packed = tensors.q.dim() == 3

        def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            if packed:
                q, k, v = q[None], k[None], v[None]
            out: torch.Tensor = attention(q, k, v, attn_bias=bias)
            return out[0] if packed else out

        return AutogradCalls(function, tensors)
