"""The names of Gluon that differ between Triton 3.6 and 3.9."""

from __future__ import annotations

from triton.experimental.gluon.language.nvidia.hopper import tma

__all__ = ["tma_load", "tma_store"]

# Triton 3.9 renamed both, and keeps the old names only to say so.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
