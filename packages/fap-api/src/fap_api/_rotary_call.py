"""From the arguments of the rotary functions to their operators: checks, and the choice of a back end."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad

from fap_api import _rotary_ops
from fap_api.backends import select
from fap_api.backends._support import constant_in_graphs
from fap_kernels.packing import check_index
from fap_kernels.rotary.apply import check_angles

__all__ = ["rotary"]


def rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    inplace: bool,
    seqlen_offsets: int | torch.Tensor,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
) -> torch.Tensor:
    """Check and run one rotation; arguments, result and errors as for :func:`fap_api.apply_rotary_emb`."""
    _check_rows(x, cu_seqlens, max_seqlen)
    check_angles(x, cos, sin)
    needs_grad = torch.is_grad_enabled()
    for name, table in (("cos", cos), ("sin", sin)):
        if needs_grad and table.requires_grad:
            raise RuntimeError(
                f"{name} must not require a gradient, since rotation computes none for it, "
                f"got requires_grad=True; accepted: {name}.detach()"
            )
    compiling = torch.compiler.is_compiling()
    if not compiling and forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError("x must not carry a forward-mode tangent, got one; accepted: reverse-mode only")
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    offset, offsets = _offsets(x, cos, seqlen_offsets, batch, packed=cu_seqlens is not None)
    # Callers hand down 0-d tensors as well as ints, and a symbolic int is to stay one.
    longest = max_seqlen if max_seqlen is None or isinstance(max_seqlen, int) else int(max_seqlen)
    for name, flag in (("interleaved", interleaved), ("inplace", inplace)):
        if not isinstance(flag, bool):
            raise TypeError(f"{name} must be True or False, got {type(flag).__name__}: {flag!r}")
    rest = (cos, sin, interleaved, offset, offsets, cu_seqlens, longest, False, _backend(x))
    needs_grad = needs_grad and x.requires_grad
    if not (needs_grad or compiling):
        # Without a gradient to record, the operators' autograd kernels would cost time and do nothing.
        with torch._C._AutoDispatchBelowAutograd():
            return _run(x, inplace, rest)
    if not (needs_grad and inplace):
        return _run(x, inplace, rest)
    if compiling:
        # Compilers take an in-place custom function apart badly; they make one write of this.
        return x.copy_(_rotary_ops.rotary(x, *rest))
    return _rotary_ops.TurnInPlace.apply(x, *rest)  # type: ignore[no-any-return, no-untyped-call]


def _run(x: torch.Tensor, inplace: bool, rest: tuple[Any, ...]) -> torch.Tensor:
    if not inplace:
        return _rotary_ops.rotary(x, *rest)  # type: ignore[no-any-return]
    _rotary_ops.rotary_(x, *rest)
    return x


def _check_rows(x: Any, cu_seqlens: Any, max_seqlen: Any) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise RuntimeError(f"x must be a dense tensor (layout torch.strided), got {x.layout}")
    if not x.is_floating_point():
        raise RuntimeError(f"x must have a floating-point dtype, got {x.dtype}")
    layout = "(batch, seqlen, nheads, headdim)" if cu_seqlens is None else "(total, nheads, headdim)"
    if x.dim() != layout.count(",") + 1:
        raise RuntimeError(f"x must have {layout.count(',') + 1} dimensions {layout}, got {tuple(x.shape)}")
    if (cu_seqlens is None) != (max_seqlen is None):
        raise RuntimeError("cu_seqlens and max_seqlen need each other, got one without the other")
    if cu_seqlens is not None:
        check_index("cu_seqlens", cu_seqlens, x.device)


def _offsets(
    x: torch.Tensor, cos: torch.Tensor, seqlen_offsets: Any, batch: int, *, packed: bool
) -> tuple[int, torch.Tensor | None]:
    """Return the positions of the first rows: one number, or a tensor beside 0."""
    if isinstance(seqlen_offsets, torch.Tensor):
        offsets = seqlen_offsets.to(torch.int32) if seqlen_offsets.dtype == torch.int64 else seqlen_offsets
        check_index("seqlen_offsets", offsets, x.device, batch, "(batch,)")
        return 0, offsets
    if isinstance(seqlen_offsets, bool) or not isinstance(seqlen_offsets, int):
        raise TypeError(
            "seqlen_offsets must be an integer or an int32 tensor (batch,), "
            f"got {type(seqlen_offsets).__name__}: {seqlen_offsets!r}"
        )
    if seqlen_offsets < 0:
        raise ValueError(f"seqlen_offsets must be at least 0, got {seqlen_offsets}")
    if not packed and x.shape[1] > 0 and x.shape[1] + seqlen_offsets > cos.shape[0]:
        raise RuntimeError(
            f"cos and sin must have an angle for every position, got {cos.shape[0]} rows for seqlen "
            f"{x.shape[1]} and seqlen_offsets {seqlen_offsets}"
        )
    return seqlen_offsets, None


def _backend(x: torch.Tensor) -> str:
    """Return "triton" or "torch"; the choice of a package for attention leaves it open."""
    explicit, chosen_by = select.setting()
    if explicit == "torch":
        return "torch"
    reasons = _known_reasons(x.dtype, x.device)
    if explicit == "triton" and reasons:
        raise RuntimeError(
            f"the back end 'triton' was chosen by {chosen_by} and cannot run this call: {'; '.join(reasons)}"
        )
    return "torch" if reasons else "triton"


# Asking whether Triton is installed takes longer than a rotation. The variable is all that can change.
_reasons: dict[tuple[object, ...], list[str]] = {}


@constant_in_graphs
def _known_reasons(dtype: torch.dtype, device: torch.device) -> list[str]:
    key = (dtype, device, os.environ.get("TRITON_INTERPRET"))
    if key not in _reasons:
        _reasons[key] = _reasons_against_triton(dtype, device)
    return _reasons[key]


def _reasons_against_triton(dtype: torch.dtype, device: torch.device) -> list[str]:
    from fap_kernels.support import tensor_reasons

    return tensor_reasons(dtype, device)
