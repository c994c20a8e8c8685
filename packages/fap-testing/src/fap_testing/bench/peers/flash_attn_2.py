"""The flash-attn package, version 2. Inputs as they come: the layout is its own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fap_testing.bench.peers.base import AutogradCalls, KernelCalls, Peer, first_of

if TYPE_CHECKING:
    from fap_testing.bench.decode import Decode
    from fap_testing.bench.peers.base import Calls
    from fap_testing.bench.prefill import Prefill
    from fap_testing.bench.problem import Direction, Problem, Tensors
    from fap_testing.bench.varlen import Varlen

__all__ = ["FlashAttention2"]

_PAGE_MULTIPLE = 256


class FlashAttention2(Peer):
    """flash_attn's public functions, as of 2.8."""

    name = "flash-attn-2"
    kinds = ("prefill", "varlen", "decode")
    distribution = "flash-attn"
    module = "flash_attn.flash_attn_interface"
    install = "pip install flash-attn --no-build-isolation"

    def absent(self, device: str, kind: str) -> str | None:
        """Return why the original cannot run here: fap_api can put itself under its name."""
        reason = super().absent(device, kind)
        if reason is None and hasattr(importlib.import_module(self.module), "__fap_shim__"):
            return "flash_attn is fap_api's stand-in here: fap_api.integrations.flash_attn_shim is installed"
        return reason

    def unsupported_reasons(self, problem: Problem, direction: Direction) -> list[str]:
        """Return what it lacks."""
        reasons = super().unsupported_reasons(problem, direction)
        page_size = getattr(problem, "page_size", 0)
        if page_size % _PAGE_MULTIPLE:
            reasons.append(f"its pages hold a multiple of {_PAGE_MULTIPLE} keys, got {page_size}")
        return reasons

    def prefill(self, problem: Prefill, tensors: Tensors) -> Calls:
        """Return calls of flash_attn_func."""
        attention = importlib.import_module(self.module).flash_attn_func
        options = self._mask(problem)
        return AutogradCalls(lambda q, k, v: first_of(attention(q, k, v, **options)), tensors)

    def varlen(self, problem: Varlen, tensors: Tensors) -> Calls:
        """Return calls of flash_attn_varlen_func."""
        attention = importlib.import_module(self.module).flash_attn_varlen_func
        longest, starts, options = max(problem.lengths), tensors.cu_seqlens, self._mask(problem)
        lengths = (starts, starts, longest, longest)
        return AutogradCalls(lambda q, k, v: first_of(attention(q, k, v, *lengths, **options)), tensors)

    def decode(self, problem: Decode, tensors: Tensors) -> Calls:
        """Return calls of flash_attn_with_kvcache."""
        attention = importlib.import_module(self.module).flash_attn_with_kvcache
        options = {**self._mask(problem), **self._cache(tensors)}
        return KernelCalls(lambda: (first_of(attention(*tensors[:3], **options)),))

    def _mask(self, problem: Problem) -> dict[str, Any]:
        return {"causal": problem.causal, "window_size": problem.window_size}

    def _cache(self, tensors: Tensors) -> dict[str, Any]:
        return {"cache_seqlens": tensors.cache_seqlens, "block_table": tensors.block_table}
