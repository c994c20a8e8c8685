"""Rotary position embeddings in plain PyTorch, with angles in float32 whatever the model's dtype."""

from __future__ import annotations

import torch
from torch import nn


class RotaryEmbedding(nn.Module):
    """Rotate q and k by their positions, so that scores depend on distance (RoPE).

    Pair i of position p turns by ``p * base ** (-2 * i / dim)`` (Su et al. 2021, arXiv:2104.09864). The
    angles are computed in float32 on every call: they are few beside q and k, and nothing is held that
    could be cast to bfloat16, lost on the meta device, or be too short for the next sequence.

    Args:
        dim: how many leading features of a head are rotated; even, at least 2. The others pass unchanged.
        base: wavelengths run from 2*pi to 2*pi*base.
        interleaved: pair neighbours (0, 1), (2, 3), ... as GPT-J does; else the first half of ``dim`` with
            the second, as GPT-NeoX and LLaMA do.

    Raises:
        ValueError: dim that is odd or below 2, or base that is not positive.
    """

    def __init__(self, dim: int, base: float = 10000.0, interleaved: bool = False) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"rotary dim must be even and at least 2, got {dim}")
        if not base > 0:
            raise ValueError(f"rotary base must be positive, got {base}")
        self.dim = dim
        self.base = base
        self.interleaved = interleaved

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, seqlen_offset: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rotate q ``(batch, seqlen_q, heads, head_dim)`` and k ``(batch, seqlen_k, heads_k, head_dim)``.

        Both start at position ``seqlen_offset``. Returns both, in their own dtypes.
        """
        cos, sin = self.cos_sin(max(q.shape[1], k.shape[1]), seqlen_offset, device=q.device)
        rotated_q, rotated_k = (
            apply_rotary_emb(x, cos[: x.shape[1]], sin[: x.shape[1]], self.interleaved) for x in (q, k)
        )
        return rotated_q, rotated_k

    def cos_sin(
        self, seqlen: int, seqlen_offset: int = 0, device: torch.device | str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return float32 cosines and sines, each ``(seqlen, dim / 2)``, from position ``seqlen_offset``."""
        position = torch.arange(seqlen_offset, seqlen_offset + seqlen, dtype=torch.float32, device=device)
        exponent = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim
        # A product, not a matrix product: autocast would run the latter in bfloat16.
        angle = position[:, None] * self.base**-exponent
        return angle.cos(), angle.sin()

    def extra_repr(self) -> str:
        """Name the settings."""
        return f"dim={self.dim}, base={self.base}, interleaved={self.interleaved}"


def apply_rotary_emb(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """Rotate the leading features of every head of x by the angles whose cosines and sines are given.

    Args:
        x: ``(batch, seqlen, heads, head_dim)``.
        cos, sin: ``(seqlen, dim / 2)`` with ``dim <= head_dim``; features from ``dim`` on pass unchanged.
        interleaved: pair neighbours (0, 1), (2, 3), ...; else feature i with feature i + dim / 2.

    Returns:
        A new tensor of x's shape and dtype; the arithmetic runs in float32, or x's dtype if that is wider.

    Raises:
        RuntimeError: shapes that do not fit together.
    """
    if x.dim() != 4:
        raise RuntimeError(f"x must have shape (batch, seqlen, heads, head_dim), got {tuple(x.shape)}")
    half = cos.shape[-1]
    if cos.shape != sin.shape or cos.shape != (x.shape[1], half) or 2 * half > x.shape[3]:
        raise RuntimeError(
            f"cos and sin must have shape (seqlen, dim / 2) with seqlen {x.shape[1]} and dim at most "
            f"{x.shape[3]}, got cos {tuple(cos.shape)} and sin {tuple(sin.shape)}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(wide)[:, None, :] for t in (cos, sin))
    pairs = x[..., : 2 * half].to(wide)
    # (..., half, 2) holds neighbours as pairs, (..., 2, half) holds the two halves as pairs.
    shape, pair_dim = ((half, 2), -1) if interleaved else ((2, half), -2)
    real, imaginary = pairs.unflatten(-1, shape).unbind(pair_dim)
    turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), pair_dim)
    return torch.cat((turned.flatten(-2).to(x.dtype), x[..., 2 * half :]), dim=-1)
