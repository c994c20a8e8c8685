"""Rotary position embeddings behind the names of ``flash_attn.layers.rotary``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fap_api._rotary_call import keys_of, rotary, rotary_in_place
from fap_api._rotary_module import RotaryEmbedding
from fap_api._validate import check_tensor
from fap_api.backends._torch_rotary import turn
from fap_kernels.errors import WrongType
from fap_kernels.packing import check_length

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from fap_api._rotary_call import Names

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
]


def apply_rotary_emb(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> torch.Tensor:
    """Rotate the leading features of every head by angles that grow with the position, with a gradient for x.

    A pair of features ``(a, b)`` becomes ``(a cos - b sin, a sin + b cos)``, in float32 (float64 for float64)
    and rounded once (Su et al., "RoFormer", arXiv:2104.09864). Note that ``interleaved`` is False here, and
    ``rotary_interleaved`` True in :func:`fap_api.flash_attn_with_kvcache`, both as in flash-attn.

    Args:
        x: ``(batch, seqlen, nheads, headdim)``, or with cu_seqlens ``(total, nheads, headdim)``; any strides.
        cos, sin: ``(positions, rotary_dim / 2)`` in any floating-point dtype, with rotary_dim up to headdim;
            features from rotary_dim on pass unchanged. They have no gradient.
        interleaved: pair features 2 i and 2 i + 1 (GPT-J), else i and ``rotary_dim / 2 + i`` (LLaMA).
        inplace: write the result to x and return x, else a new tensor.
        seqlen_offsets: the position of each sequence's first row: one for all, or int32 (int64) ``(batch,)``.
        cu_seqlens: int32 ``(batch + 1,)``: sequence b has the rows ``cu_seqlens[b]`` up to ``cu_seqlens[b +
            1]``. Rows of no sequence pass unchanged.
        max_seqlen: no sequence is longer; needed iff cu_seqlens is given.

    Returns:
        A tensor like x.

    A position without an angle is an error where the host knows the positions: one number as offset, or
    tensors on a CPU. On a device such rows pass unchanged, since asking would make every call wait for it.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together; a position without an angle.
        ValueError: a negative offset.
        TypeError: an argument of the wrong type.
    """
    return rotary(x, cos, sin, interleaved, inplace, seqlen_offsets, cu_seqlens, max_seqlen)


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_torch(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """Rotate in plain PyTorch operations, differentiable in every argument and any number of times.

    Args:
        x: ``(batch, seqlen, nheads, headdim)``.
        cos, sin: ``(seqlen, rotary_dim / 2)`` or ``(batch, seqlen, rotary_dim / 2)``.
        interleaved: as for :func:`apply_rotary_emb`.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit together.
        TypeError: an argument of the wrong type.
    """
    for name, given in (("x", x), ("cos", cos), ("sin", sin)):
        check_tensor(name, given)
        if not given.is_floating_point():
            raise RuntimeError(f"{name} must have a floating-point dtype, got {given.dtype}")
        if given.device != x.device:
            raise RuntimeError(f"{name} must be on x's device {x.device}, got {given.device}")
    if not isinstance(interleaved, bool):
        raise WrongType(
            f"interleaved must be True or False, got {type(interleaved).__name__}: {interleaved!r}"
        )
    rows = x.shape[:2]
    fits = cos.shape == sin.shape and x.dim() == 4 and cos.dim() in (2, 3) and 2 * cos.shape[-1] <= x.shape[3]
    if not fits or cos.shape[:-1] != rows[3 - cos.dim() :]:
        raise RuntimeError(
            "x must have shape (batch, seqlen, nheads, headdim), and cos and sin (seqlen, rotary_dim / 2) or "
            "(batch, seqlen, rotary_dim / 2) with rotary_dim at most headdim, "
            f"got x {tuple(x.shape)}, cos {tuple(cos.shape)} and sin {tuple(sin.shape)}"
        )
    return turn(x, cos, sin, interleaved=interleaved)


def apply_rotary_emb_qkv_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    cos_k: torch.Tensor | None = None,
    sin_k: torch.Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    num_heads_q: int | None = None,
) -> torch.Tensor:
    """Rotate the queries and keys of a packed tensor in place, and return it.

    Args:
        qkv: ``(batch, seqlen, 3, nheads, headdim)``; or ``(batch, seqlen, nheads + 2 * nheads_k, headdim)``,
            heads of q before those of k before those of v, with ``num_heads_q`` saying where k begins.
        cos, sin: as for :func:`apply_rotary_emb`.
        cos_k, sin_k: other tables for the keys, as xPos has them; None for the same.
        interleaved, seqlen_offsets: as for :func:`apply_rotary_emb`.
        num_heads_q: nheads; needed iff qkv has 4 dimensions.

    Raises:
        RuntimeError: a shape other than these; otherwise as for :func:`apply_rotary_emb`. Nothing has been
            written then.
        ValueError, TypeError: as for :func:`apply_rotary_emb`.
    """
    check_tensor("qkv", qkv)
    if (cos_k is None) != (sin_k is None):
        raise RuntimeError("cos_k and sin_k need each other, got one without the other")
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Names]] = []
    for x, is_key in _queries_and_keys(qkv, num_heads_q, together=cos_k is None):
        if is_key and cos_k is not None and sin_k is not None:
            parts.append((x, cos_k, sin_k, ("qkv", "cos_k", "sin_k")))
        else:
            parts.append((x, cos, sin, ("qkv", "cos", "sin")))
    rotary_in_place(parts, interleaved, seqlen_offsets)
    return qkv


def apply_rotary_emb_kv_(
    kv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
) -> torch.Tensor:
    """Rotate the keys of a packed tensor ``(batch, seqlen, 2, nheads_k, headdim)`` in place, and return it.

    Arguments and errors as for :func:`apply_rotary_emb`.

    Raises:
        RuntimeError: kv of another shape.
    """
    rotary_in_place([(keys_of(kv), cos, sin, ("kv", "cos", "sin"))], interleaved, seqlen_offsets)
    return kv


def _queries_and_keys(
    qkv: torch.Tensor, num_heads_q: int | None, *, together: bool
) -> Iterator[tuple[torch.Tensor, bool]]:
    """Yield views of queries and of keys, and whether they are keys; both in one where they may be."""
    if qkv.dim() == 5 and qkv.shape[2] == 3 and num_heads_q is None:
        if together and qkv.stride(2) == qkv.shape[3] * qkv.stride(3):
            yield qkv[:, :, :2].flatten(2, 3), False
            return
        yield qkv[:, :, 0], False
        yield qkv[:, :, 1], True
        return
    if num_heads_q is not None:
        num_heads_q = check_length("num_heads_q", num_heads_q)
    heads_k = (qkv.shape[2] - num_heads_q) // 2 if qkv.dim() == 4 and num_heads_q is not None else 0
    if num_heads_q is None or heads_k < 1 or num_heads_q < 1 or num_heads_q + 2 * heads_k != qkv.shape[2]:
        raise RuntimeError(
            "qkv must have shape (batch, seqlen, 3, nheads, headdim) without num_heads_q, or (batch, seqlen, "
            f"num_heads_q + 2 * nheads_k, headdim) with it, got {tuple(qkv.shape)} and num_heads_q "
            f"{num_heads_q}"
        )
    if together:
        yield qkv[:, :, : num_heads_q + heads_k], False
        return
    yield qkv[:, :, :num_heads_q], False
    yield qkv[:, :, num_heads_q : num_heads_q + heads_k], True
