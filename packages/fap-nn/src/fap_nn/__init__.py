"""Exact attention modules for PyTorch, on top of fap_api: attention, generation, rotary embeddings."""

from __future__ import annotations

from fap_nn.attention import FlashAttention
from fap_nn.kv_cache import KVCache
from fap_nn.mha import FlashMHA
from fap_nn.rotary import RotaryEmbedding, apply_rotary_emb

__all__ = ["FlashAttention", "FlashMHA", "KVCache", "RotaryEmbedding", "apply_rotary_emb"]
