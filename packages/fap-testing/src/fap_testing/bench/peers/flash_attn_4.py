"""FlashAttention-4, flash-attn's kernels in CuTe DSL. Inputs as they come."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from fap_testing.bench.peers.base import AutogradCalls, Peer, first_of

if TYPE_CHECKING:
    from fap_testing.bench.peers.base import Calls
    from fap_testing.bench.prefill import Prefill
    from fap_testing.bench.problem import Problem, Tensors
    from fap_testing.bench.varlen import Varlen

__all__ = ["FlashAttention4"]


class FlashAttention4(Peer):
    """flash_attn.cute's public functions, as of 4.0.0b36.

    Compiled kernels are kept on disk, unless FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED says otherwise: what
    other processes compile beforehand would be lost.
    """

    name = "flash-attn-4"
    kinds = ("prefill", "varlen")
    distribution = "flash-attn-4"
    module = "flash_attn.cute"
    install = "pip install --pre flash-attn-4"
    compiles = True

    def absent(self, device: str, kind: str) -> str | None:
        """Return why it cannot run, after a look at what is read on its import."""
        os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
        return super().absent(device, kind)

    def prefill(self, problem: Prefill, tensors: Tensors) -> Calls:
        """Return calls of flash_attn_func."""
        attention = importlib.import_module(self.module).flash_attn_func
        options = _mask(problem)
        return AutogradCalls(lambda q, k, v: first_of(attention(q, k, v, **options)), tensors)

    def varlen(self, problem: Varlen, tensors: Tensors) -> Calls:
        """Return calls of flash_attn_varlen_func."""
        attention = importlib.import_module(self.module).flash_attn_varlen_func
        longest, starts = max(problem.lengths), tensors.cu_seqlens
        lengths = {
            "cu_seqlens_q": starts,
            "cu_seqlens_k": starts,
            "max_seqlen_q": longest,
            "max_seqlen_k": longest,
        }
        options = {**lengths, **_mask(problem)}
        return AutogradCalls(lambda q, k, v: first_of(attention(q, k, v, **options)), tensors)


def _mask(problem: Problem) -> dict[str, Any]:
    """Return its options: a bound that is absent is None."""
    left, right = (bound if bound >= 0 else None for bound in problem.window_size)
    return {"causal": problem.causal, "window_size": (left, right)}
