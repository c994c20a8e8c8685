"""Rotary position embeddings: kernel and launch."""
