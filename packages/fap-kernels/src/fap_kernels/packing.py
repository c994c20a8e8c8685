"""Where the sequences of a packed batch lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Packing"]


@dataclass(frozen=True, slots=True, eq=False)
class Packing:
    """The sequences of a batch, packed one behind the other without padding.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: int32 ``(batch + 1,)``; sequence b has the rows from ``cu_seqlens[b]``
            up to ``cu_seqlens[b + 1]`` of q, and of k and v. Their values are not looked at: that would
            make every call wait for the device.
        max_seqlen_q, max_seqlen_k: no sequence is longer.
        seqused_q, seqused_k: int32 ``(batch,)``, how many of a sequence's rows count, from its first on; None
            for all.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_q: torch.Tensor | None = None
    seqused_k: torch.Tensor | None = None

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return self.cu_seqlens_q.shape[0] - 1

    @classmethod
    def describe(
        cls,
        q: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        seqused_q: torch.Tensor | None = None,
        seqused_k: torch.Tensor | None = None,
    ) -> Packing:
        """Check a packed batch's bounds and return its description.

        Raises:
            RuntimeError: a tensor of the wrong shape, dtype or device.
            ValueError: a negative length.
            TypeError: an argument of the wrong type.
        """
        if not isinstance(q, torch.Tensor):
            raise TypeError(f"q must be a torch.Tensor, got {type(q).__name__}")
        device = q.device
        _check_index("cu_seqlens_q", cu_seqlens_q, device)
        if cu_seqlens_q.shape[0] < 1:
            raise RuntimeError("cu_seqlens_q must have shape (batch + 1,), got shape (0,)")
        batch = cu_seqlens_q.shape[0] - 1
        _check_index("cu_seqlens_k", cu_seqlens_k, device, batch + 1, "(batch + 1,)")
        for name, seqused in (("seqused_q", seqused_q), ("seqused_k", seqused_k)):
            if seqused is not None:
                _check_index(name, seqused, device, batch, "(batch,)")
        return cls(
            cu_seqlens_q=cu_seqlens_q.contiguous(),
            cu_seqlens_k=cu_seqlens_k.contiguous(),
            max_seqlen_q=_length("max_seqlen_q", max_seqlen_q),
            max_seqlen_k=_length("max_seqlen_k", max_seqlen_k),
            seqused_q=None if seqused_q is None else seqused_q.contiguous(),
            seqused_k=None if seqused_k is None else seqused_k.contiguous(),
        )

    def arguments(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """The tensors by name, as kernels take them."""
        for name in ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"):
            yield name, getattr(self, name)


def _check_index(
    name: str, x: Any, device: torch.device, length: int | None = None, shape: str = "(batch + 1,)"
) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.dtype != torch.int32:
        raise RuntimeError(f"{name} must have dtype int32, got {x.dtype}")
    if x.device != device:
        raise RuntimeError(f"{name} must be on q's device {device}, got {x.device}")
    if x.dim() != 1 or length not in (None, x.shape[0]):
        expected = shape if length is None else f"{shape} = ({length},)"
        raise RuntimeError(f"{name} must have shape {expected}, got {tuple(x.shape)}")


def _length(name: str, value: Any) -> int:
    # Callers hand down 0-d tensors as well as ints.
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}: {value!r}")
    length = int(value)
    if length < 0:
        raise ValueError(f"{name} must be at least 0, got {length}")
    return length
