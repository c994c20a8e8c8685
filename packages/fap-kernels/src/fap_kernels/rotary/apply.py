"""Rotary position embeddings as a function: tensors in, a tensor out, no autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import WrongType
from ..execute import unit_last_stride
from ..packing import check_index
from ..replay import Replays
from ..support import require_supported_tensor

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["apply_rotary", "check_angles"]

_replays = Replays()


def apply_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool = False,
    seqlen_offsets: int | torch.Tensor = 0,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    conjugate: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Rotate pairs of columns by angles that grow with the position (Su et al., arXiv:2104.09864).

    Args:
        x: ``(batch, seqlen, nheads, head_dim)``, or packed ``(total, nheads, head_dim)`` with ``cu_seqlens``;
            float16, bfloat16 or float32, any strides.
        cos, sin: ``(positions, rotary_dim / 2)`` on x's device, with ``rotary_dim <= head_dim``; the columns
            from rotary_dim on are left as they are, and so are rows at positions beyond the tables.
        interleaved: turn columns 2 c and 2 c + 1 together, else c and ``rotary_dim / 2 + c``.
        seqlen_offsets: the position of each sequence's first row: one for all, or int32 ``(batch,)``.
        cu_seqlens: int32 ``(batch + 1,)``; sequence b has the rows ``cu_seqlens[b]`` up to ``cu_seqlens[b +
            1]``. Rows of no sequence are left as they are.
        max_seqlen: no packed sequence is longer; needed iff ``cu_seqlens`` is given.
        conjugate: turn backwards: the gradient, and the inverse, of turning.
        out: where the result goes, of x's shape and dtype; it may be x. None for a new tensor.

    Returns:
        ``out``, computed in float32 and rounded once.

    Raises:
        RuntimeError: tensors that do not fit together, or that this kernel does not support.
        TypeError: an argument of the wrong type.
    """
    offsets = seqlen_offsets if isinstance(seqlen_offsets, torch.Tensor) else None
    given = {"x": x, "out": out, "cos": cos, "sin": sin, "offsets": offsets, "cu_seqlens": cu_seqlens}
    key = replay = None
    # A number that grows from call to call would be another key each time.
    if offsets is not None or seqlen_offsets == 0:
        # Turned in place, x keeps the columns that are not turned; they are copied elsewhere.
        key, replay = _replays.find(tuple(given.values()), (interleaved, max_seqlen, conjugate, out is x))
    if replay is not None:
        made = replay.run(*given.values())
        return made[0] if out is None else out
    if not isinstance(x, torch.Tensor):
        raise WrongType(f"x must be a torch.Tensor, got {type(x).__name__}")
    rank, layout = (
        (4, "(batch, seqlen, nheads, headdim)") if cu_seqlens is None else (3, "(total, nheads, headdim)")
    )
    if x.dim() != rank:
        raise RuntimeError(f"x must have {rank} dimensions {layout}, got shape {tuple(x.shape)}")
    check_angles(x, cos, sin)
    if (cu_seqlens is None) != (max_seqlen is None):
        raise RuntimeError("cu_seqlens and max_seqlen must be given together: packed rows need both")
    batch = x.shape[0]
    if cu_seqlens is not None:
        check_index("cu_seqlens", cu_seqlens, x.device)
        batch = cu_seqlens.shape[0] - 1
        cu_seqlens = cu_seqlens.contiguous()
    if isinstance(seqlen_offsets, torch.Tensor):
        check_index("seqlen_offsets", seqlen_offsets, x.device, batch, "(batch,)")
        seqlen_offsets = seqlen_offsets.contiguous()
    if out is not None and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
        raise RuntimeError(
            f"out must have x's shape {tuple(x.shape)}, dtype {x.dtype} and device {x.device}, "
            f"got {tuple(out.shape)}, {out.dtype} and {out.device}"
        )
    require_supported_tensor(x)
    from .launch import plan_rotary

    if out is None and cu_seqlens is not None:
        # Rows of no sequence, which no program writes, are as they were.
        out = x = x.clone(memory_format=torch.contiguous_format)
    result = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    # A last stride other than 1 is copied, on the way in and on the way out.
    (source,) = unit_last_stride(x)
    target = source if out is x else unit_last_stride(result)[0]
    seqlen = x.shape[1] if max_seqlen is None else int(max_seqlen)
    as_batch = [t if cu_seqlens is None else t[None] for t in _each_once(source, target)]
    launch = plan_rotary(
        as_batch[0], as_batch[-1], cos, sin, seqlen_offsets, cu_seqlens, seqlen,
        interleaved=interleaved, conjugate=conjugate,
    )  # fmt: skip
    compiled = launch.run(x.device)
    keep = _replays.keeper(key, given)
    if keep is not None:
        keep([(launch, compiled)], {"out": result} if out is None else {})
    if target.data_ptr() != result.data_ptr():
        result.copy_(target)
    return result


def _each_once(source: torch.Tensor, target: torch.Tensor) -> Iterator[torch.Tensor]:
    yield source
    if target is not source:
        yield target


def check_angles(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, names: tuple[str, str] = ("cos", "sin")
) -> None:
    """Raise unless ``cos`` and ``sin`` are tables of angles that fit x's last dimension."""
    for name, table in zip(names, (cos, sin), strict=True):
        if not isinstance(table, torch.Tensor):
            raise WrongType(f"{name} must be a torch.Tensor, got {type(table).__name__}")
        if table.device != x.device:
            raise RuntimeError(
                f"{name} must be on the device of what it turns, {x.device}, got {table.device}"
            )
        if table.dim() != 2 or not 1 <= table.shape[1] <= x.shape[-1] // 2:
            raise RuntimeError(
                f"{name} must have shape (positions, rotary_dim / 2) with rotary_dim at most the head "
                f"dimension {x.shape[-1]}, got {tuple(table.shape)}"
            )
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise RuntimeError(
            f"{names[0]} and {names[1]} must have one shape and dtype, got {tuple(cos.shape)} of "
            f"{cos.dtype} and {tuple(sin.shape)} of {sin.dtype}"
        )
