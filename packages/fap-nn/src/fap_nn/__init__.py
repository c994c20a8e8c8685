"""Exact attention modules for PyTorch, on top of fap_api: FlashAttention, FlashMHA, rotary embeddings."""

from __future__ import annotations

from fap_nn.attention import FlashAttention
from fap_nn.mha import FlashMHA
from fap_nn.rotary import RotaryEmbedding, apply_rotary_emb

__all__ = ["FlashAttention", "FlashMHA", "RotaryEmbedding", "apply_rotary_emb"]
