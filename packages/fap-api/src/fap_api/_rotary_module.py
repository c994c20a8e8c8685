"""RotaryEmbedding: the angles of rotary embeddings and of xPos, applied to packed q, k and v."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import nn

from fap_api._rotary_call import check_offset, keys_of, rotary_in_place
from fap_api._validate import check_tensor
from fap_kernels.errors import WrongType, WrongValue
from fap_kernels.packing import check_length

__all__ = ["RotaryEmbedding", "RotaryTables"]


class RotaryTables(NamedTuple):
    """Cosines and sines ``(seqlen, dim / 2)`` of queries and of keys, which differ under xPos alone."""

    cos: torch.Tensor
    sin: torch.Tensor
    cos_k: torch.Tensor
    sin_k: torch.Tensor


class RotaryEmbedding(nn.Module):
    """Rotate q and k by their positions, so that scores depend on distance (RoPE), and fall with it (xPos).

    Pair i of position p turns by ``p * base ** (-2 i / dim)`` (Su et al., arXiv:2104.09864). With
    ``scale_base``, queries are scaled by ``s_i ** ((p - c) / scale_base)`` and keys by its inverse, where
    ``s_i = (2 i / dim + 0.4) / 1.4`` (Sun et al., arXiv:2212.10554). c is half the length of the tables. It
    cancels out in a score if q and k come from tables of one length, so give ``max_seqlen`` when generating.

    Angles are computed in float32 whatever the module's dtype. The last tables are kept, out of the state
    dict, and serve every call that they are long enough for.

    Args:
        dim: how many leading features of a head are rotated; even, at least 2. The others pass unchanged.
        base: wavelengths run from 2*pi to 2*pi*base.
        interleaved: pair neighbours (0, 1), (2, 3), ... as GPT-J does; else the first half of ``dim`` with
            the second, as GPT-NeoX and LLaMA do.
        scale_base: None for none, else in how many positions the scale of xPos changes by its factor.
        device: where :meth:`tables` are made unless it is told otherwise; None stands for PyTorch's default.

    Raises:
        ValueError: dim that is odd or below 2, or a base that is not positive and finite.
        TypeError: an argument of the wrong type.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if check_length("rotary dim", dim) < 2 or dim % 2:
            raise WrongValue(f"rotary dim must be even and at least 2, got {dim}")
        _check_positive("base", base, "positive")
        if scale_base is not None:
            _check_positive("scale_base", scale_base, "positive or None")
        if not isinstance(interleaved, bool):
            raise WrongType(
                f"rotary interleaved must be True or False, got {type(interleaved).__name__}: {interleaved!r}"
            )
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.device = device
        self._kept: RotaryTables | None = None

    def forward(
        self,
        qkv: torch.Tensor,
        kv: torch.Tensor | None = None,
        seqlen_offset: int | torch.Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Rotate queries and keys in place.

        Args:
            qkv: ``(batch, seqlen, 3, nheads, headdim)``, or with ``num_heads_q`` ``(batch, seqlen,
                num_heads_q + 2 * nheads_k, headdim)``; beside ``kv`` the queries alone, ``(batch, seqlen,
                nheads, headdim)``.
            kv: ``(batch, seqlen, 2, nheads_k, headdim)``.
            seqlen_offset: the position of the first row: a number, or int32 ``(batch,)``.
            max_seqlen: the positions that there are; needed with a tensor of offsets, whose values are not
                looked at. None stands for those of this call.
            num_heads_q: as for :func:`fap_api.rotary.apply_rotary_emb_qkv_`.

        Returns:
            ``qkv``; with ``kv`` both.

        Raises:
            RuntimeError: as for :func:`fap_api.rotary.apply_rotary_emb_qkv_`; max_seqlen missing.
            ValueError, TypeError: as for :func:`fap_api.rotary.apply_rotary_emb_qkv_`.
        """
        from fap_api.rotary import apply_rotary_emb_qkv_

        check_tensor("qkv", qkv)
        keys = None if kv is None else keys_of(kv)
        if not isinstance(seqlen_offset, torch.Tensor):
            check_offset("seqlen_offset", seqlen_offset)
        if max_seqlen is not None:
            max_seqlen = check_length("max_seqlen", max_seqlen)
        else:
            if isinstance(seqlen_offset, torch.Tensor):
                raise RuntimeError("max_seqlen must be given where seqlen_offset is a tensor, got None")
            max_seqlen = max(qkv.shape[1], 0 if kv is None else kv.shape[1]) + seqlen_offset
        cos, sin, cos_k, sin_k = self.tables(max_seqlen, qkv.device)
        if kv is None or keys is None:
            of_keys = {} if self.scale_base is None else {"cos_k": cos_k, "sin_k": sin_k}
            return apply_rotary_emb_qkv_(
                qkv,
                cos,
                sin,
                **of_keys,
                interleaved=self.interleaved,
                seqlen_offsets=seqlen_offset,
                num_heads_q=num_heads_q,
            )
        tables = ("cos", "sin")
        parts = [(qkv, cos, sin, ("qkv", *tables)), (keys, cos_k, sin_k, ("kv", *tables))]
        rotary_in_place(parts, self.interleaved, seqlen_offset)
        return qkv, kv

    def tables(self, seqlen: int, device: torch.device | str | None = None) -> RotaryTables:
        """Return float32 tables for at least the positions 0 to ``seqlen - 1``; under xPos for just these."""
        if torch.compiler.is_compiling():
            return self._make_tables(seqlen, device or self.device)
        kept, wanted = self._kept, torch.get_default_device() if self.device is None else self.device
        wanted = torch.device(wanted if device is None else device)
        if kept is not None and _same_device(kept.cos.device, wanted):
            rows = kept.cos.shape[0]
            if rows == seqlen or (rows > seqlen and self.scale_base is None):
                return kept
        # No inference tensors: the same tables may be saved for a backward later.
        with torch.inference_mode(False), torch.no_grad():
            tables = self._make_tables(seqlen, wanted)
        if _have_values(tables.cos):
            self._kept = tables
        return tables

    def extra_repr(self) -> str:
        """Name the settings."""
        scaled = "" if self.scale_base is None else f", scale_base={self.scale_base}"
        return f"dim={self.dim}, base={self.base}, interleaved={self.interleaved}{scaled}"

    def _make_tables(self, seqlen: int, device: torch.device | str | None) -> RotaryTables:
        position = torch.arange(seqlen, dtype=torch.float32, device=device)
        fraction = torch.arange(0, self.dim, 2, dtype=torch.float32, device=device) / self.dim
        # A product, not a matrix product: autocast would run the latter in bfloat16.
        angle = position[:, None] * self.base**-fraction
        cos, sin = angle.cos(), angle.sin()
        if self.scale_base is None:
            return RotaryTables(cos, sin, cos, sin)
        scale = ((fraction + 0.4) / 1.4) ** ((position - seqlen // 2) / self.scale_base)[:, None]
        return RotaryTables(cos * scale, sin * scale, cos / scale, sin / scale)


def _check_positive(name: str, value: Any, accepted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise WrongType(f"rotary {name} must be a {accepted} number, got {type(value).__name__}: {value!r}")
    if not 0 < value < math.inf:
        raise WrongValue(f"rotary {name} must be {accepted}, and finite, got {value}")


def _have_values(table: torch.Tensor) -> bool:
    """Whether a table is no fake tensor, and none that only the replay of a CUDA graph would fill."""
    if type(table) is not torch.Tensor:
        return False
    return table.device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


def _same_device(a: torch.device, b: torch.device) -> bool:
    return a == b or (a.type == b.type and b.index is None)
