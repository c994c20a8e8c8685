"""FlashAttention-3, the Hopper kernels in flash-attn's ``hopper`` folder. Inputs as they come."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fap_testing.bench.peers.base import Peer
from fap_testing.bench.peers.flash_attn_2 import FlashAttention2

if TYPE_CHECKING:
    from fap_testing.bench.problem import Direction, Problem, Tensors

__all__ = ["FlashAttention3"]


class FlashAttention3(FlashAttention2):
    """flash_attn_interface's public functions, which are called as flash-attn 2's are but for pages."""

    name = "flash-attn-3"
    distribution = "flash-attn-3"
    module = "flash_attn_interface"
    install = "build it from the hopper folder of the flash-attention repository"

    def unsupported_reasons(self, problem: Problem, direction: Direction) -> list[str]:
        """Return what it lacks; it takes pages of any size."""
        return Peer.unsupported_reasons(self, problem, direction)

    def _cache(self, tensors: Tensors) -> dict[str, Any]:
        return {"cache_seqlens": tensors.cache_seqlens, "page_table": tensors.block_table}
