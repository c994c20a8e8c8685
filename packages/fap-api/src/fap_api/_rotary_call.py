"""From the arguments of the rotary functions to their operators: checks, and the choice of a back end."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad

from fap_api import _rotary_ops
from fap_api._validate import check_tensor
from fap_api.backends import select
from fap_api.backends._support import constant_in_graphs
from fap_kernels.errors import WrongType, WrongValue
from fap_kernels.packing import check_index, check_length
from fap_kernels.rotary.apply import check_angles

__all__ = ["Names", "check_offset", "keys_of", "rotary", "rotary_in_place"]

# What the caller knows what is turned, and its tables, by.
Names = tuple[str, str, str]
_OWN_NAMES = ("x", "cos", "sin")


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
    _check_flag("inplace", inplace)
    rest = _check(x, cos, sin, interleaved, seqlen_offsets, cu_seqlens, max_seqlen)
    return _turn(x, inplace, rest)


def rotary_in_place(
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, Names]],
    interleaved: bool,
    seqlen_offsets: int | torch.Tensor,
) -> None:
    """Check several rotations, and then write them.

    Args:
        parts: x, cos, sin and their names in errors, for each.
        interleaved, seqlen_offsets: as for :func:`fap_api.apply_rotary_emb`.

    Raises:
        RuntimeError, ValueError, TypeError: as there; nothing has been written.
    """
    checked = []
    for x, cos, sin, names in parts:
        rest = _check(x, cos, sin, interleaved, seqlen_offsets, names=names)
        checked.append((x, rest))
        # One alone is looked at by the operator, before it writes.
        if len(parts) > 1 and x.device.type == "cpu" and not torch.compiler.is_compiling():
            *_, offset, offsets, _, _, _, _ = rest
            _rotary_ops.check_on_host(x, cos, offset if offsets is None else offsets)
    for x, rest in checked:
        _turn(x, True, rest)


def keys_of(kv: Any) -> torch.Tensor:
    """Return the keys of a packed ``(batch, seqlen, 2, nheads_k, headdim)`` as a view.

    Raises:
        RuntimeError: another shape.
        TypeError: no tensor.
    """
    check_tensor("kv", kv)
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise RuntimeError(f"kv must have shape (batch, seqlen, 2, nheads_k, headdim), got {tuple(kv.shape)}")
    return kv[:, :, 0]  # type: ignore[no-any-return]


def check_offset(name: str, offset: Any) -> None:
    """Raise unless ``offset``, which is no tensor, is an integer of at least 0.

    Raises:
        TypeError: no integer.
        ValueError: below 0.
    """
    if isinstance(offset, bool) or not isinstance(offset, int):
        raise WrongType(
            f"{name} must be an integer or an int32 tensor (batch,), got {type(offset).__name__}: {offset!r}"
        )
    if offset < 0:
        raise WrongValue(f"{name} must be at least 0, got {offset}")


def _check(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    seqlen_offsets: int | torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    names: Names = _OWN_NAMES,
) -> tuple[Any, ...]:
    """Check one rotation and return the operators' arguments behind ``x``."""
    name, *table_names = names
    _check_rows(name, x, cu_seqlens, max_seqlen)
    check_angles(x, cos, sin, (table_names[0], table_names[1]))
    for table_name, table in zip(table_names, (cos, sin), strict=True):
        if torch.is_grad_enabled() and table.requires_grad:
            raise RuntimeError(
                f"{table_name} must not require a gradient, since rotation computes none for it, "
                f"got requires_grad=True; accepted: {table_name}.detach()"
            )
    compiling = torch.compiler.is_compiling()
    if not compiling and forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        raise RuntimeError(
            f"{name} must not carry a forward-mode tangent, got one; accepted: reverse-mode only"
        )
    batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    offset, offsets = _offsets(x, seqlen_offsets, batch)
    if cu_seqlens is None and offsets is None and x.shape[1] > 0 and x.shape[1] + offset > cos.shape[0]:
        raise RuntimeError(
            f"{table_names[0]} and {table_names[1]} must have an angle for every position, "
            f"got {cos.shape[0]} rows for seqlen {x.shape[1]} and seqlen_offsets {offset}"
        )
    # Callers hand down 0-d tensors as well as ints.
    longest = None if max_seqlen is None else check_length("max_seqlen", max_seqlen)
    _check_flag("interleaved", interleaved)
    return cos, sin, interleaved, offset, offsets, cu_seqlens, longest, False, _backend(x)


def _turn(x: torch.Tensor, inplace: bool, rest: tuple[Any, ...]) -> torch.Tensor:
    """Run one checked rotation."""
    compiling = torch.compiler.is_compiling()
    needs_grad = torch.is_grad_enabled() and x.requires_grad
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


def _check_rows(name: str, x: Any, cu_seqlens: Any, max_seqlen: Any) -> None:
    check_tensor(name, x)
    if x.layout != torch.strided:
        raise RuntimeError(f"{name} must be a dense tensor (layout torch.strided), got {x.layout}")
    if not x.is_floating_point():
        raise RuntimeError(f"{name} must have a floating-point dtype, got {x.dtype}")
    layout = "(batch, seqlen, nheads, headdim)" if cu_seqlens is None else "(total, nheads, headdim)"
    if x.dim() != layout.count(",") + 1:
        raise RuntimeError(
            f"{name} must have {layout.count(',') + 1} dimensions {layout}, got {tuple(x.shape)}"
        )
    if (cu_seqlens is None) != (max_seqlen is None):
        raise RuntimeError("cu_seqlens and max_seqlen need each other, got one without the other")
    if cu_seqlens is not None:
        check_index("cu_seqlens", cu_seqlens, x.device)
        if cu_seqlens.shape[0] < 1:
            raise RuntimeError("cu_seqlens must have shape (batch + 1,), got shape (0,)")


def _check_flag(name: str, flag: Any) -> None:
    if not isinstance(flag, bool):
        raise WrongType(f"{name} must be True or False, got {type(flag).__name__}: {flag!r}")


def _offsets(x: torch.Tensor, seqlen_offsets: Any, batch: int) -> tuple[int, torch.Tensor | None]:
    """Return the positions of the first rows: one number, or an int32 tensor beside 0."""
    if isinstance(seqlen_offsets, torch.Tensor):
        offsets = seqlen_offsets
        if offsets.dtype == torch.int64:
            # No table is that long. Without the bounds a conversion would wrap far positions around to near.
            offsets = offsets.clamp(-(2**30), 2**30).to(torch.int32)
        check_index("seqlen_offsets", offsets, x.device, batch, "(batch,)")
        return 0, offsets
    check_offset("seqlen_offsets", seqlen_offsets)
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
