"""Tensors laid out in memory as a test needs them, inside buffers that notice every stray access."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from fap_testing.cases import HUGE_LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fap_testing.cases import Case

__all__ = ["Buffer", "Placement", "place_qkv"]

_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_GUARD_ROWS = 128
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a tensor lies in its buffer: shape, strides and offset, in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    @property
    def end(self) -> int:
        """One past the last element."""
        if 0 in self.shape:
            return self.offset
        return (
            self.offset
            + 1
            + sum((n - 1) * stride for n, stride in zip(self.shape, self.strides, strict=True))
        )


class Buffer:
    """Memory that holds some tensors of a call, poisoned with NaN wherever no tensor lies.

    A read outside the tensors brings a NaN into the result; a write is found by :meth:`assert_untouched`.

    Args:
        tensors: for each name, the values and where to put them.
        poison: surround and interleave the tensors with NaN; else with zeros, and without a guard.
    """

    def __init__(self, tensors: dict[str, tuple[torch.Tensor, Placement]], *, poison: bool) -> None:
        values = next(iter(tensors.values()))[0]
        guard = self._guard(tensors) if poison else 0
        size = max(placement.end for _, placement in tensors.values()) + 2 * guard
        self._memory = torch.full(
            (size,), math.nan if poison else 0.0, dtype=values.dtype, device=values.device
        )
        self.views: dict[str, torch.Tensor] = {}
        for name, (x, placement) in tensors.items():
            view = self._memory.as_strided(placement.shape, placement.strides, placement.offset + guard)
            self.views[name] = view.copy_(x)
        self._before = self._memory.clone()

    @staticmethod
    def _guard(tensors: dict[str, tuple[torch.Tensor, Placement]]) -> int:
        """Enough for a tile of rows beyond either end, aligned so that no fast path is lost to it."""
        row = max(max((placement.strides[1:2] or (1,))[0], 1) for _, placement in tensors.values())
        return math.ceil(min(_GUARD_ROWS * row, 1 << 20) / _ALIGNMENT) * _ALIGNMENT

    def assert_untouched(self, *, but: Mapping[str, torch.Tensor] | None = None) -> None:
        """Raise AssertionError if a call changed the tensors or the poison between them.

        Args:
            but: for some tensors, bool masks of their shape that are True where a call may write.
        """
        bits = _BITS[self._memory.element_size()]
        changed = self._memory.view(bits) != self._before.view(bits)
        for name, writable in (but or {}).items():
            view = self.views[name]
            changed.as_strided(view.shape, view.stride(), view.storage_offset())[writable] = False
        if not changed.any():
            return
        index = int(changed.nonzero()[0])
        inside = torch.zeros_like(changed)
        for view in self.views.values():
            inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        where = "inside" if inside[index] else "outside"
        raise AssertionError(
            f"the memory of {', '.join(self.views)} was written to: {int(changed.sum())} elements changed, "
            f"the first one {where} the tensors, element {index} of {changed.numel()}: "
            f"{self._before[index].item()} became {self._memory[index].item()}"
        )


def place_qkv(case: Case) -> list[dict[str, Placement]]:
    """Return the buffers of a case's q, k, v and dout: for each buffer, where its tensors lie."""
    q_shape = (case.batch, case.seqlen_q, case.nheads, case.head_dim)
    k_shape = (case.batch, case.seqlen_k, case.nheads_k, case.head_dim)
    shapes = {"q": q_shape, "k": k_shape, "v": k_shape, "dout": q_shape}
    if case.layout == "qkv_packed":
        return [_packed_heads({name: shapes[name] for name in "qkv"}), {"dout": _contiguous(q_shape)}]
    if case.layout == "kv_packed":
        rest = [{name: _contiguous(q_shape)} for name in ("q", "dout")]
        return [_packed_heads({"k": k_shape, "v": k_shape}), *rest]
    places: dict[str, Callable[[tuple[int, ...]], Placement]] = {
        "contiguous": _contiguous,
        "heads_first": lambda shape: _stored(shape, order=(0, 2, 1, 3)),
        "sequence_first": lambda shape: _stored(shape, order=(1, 0, 2, 3)),
        "gapped": lambda shape: _stored(shape, gaps=(0, 2, 1, 8)),
        "unaligned": lambda shape: _stored(shape, gaps=(0, 0, 0, 1), offset=1),
        "last_stride_2": lambda shape: _stored(shape, step=2),
    }
    if case.layout in HUGE_LAYOUTS:
        return [_side_by_side(shapes, far_dim=HUGE_LAYOUTS.index(case.layout))]
    place = places[case.layout]
    return [{name: place(shape)} for name, shape in shapes.items()]


def _contiguous(shape: tuple[int, ...]) -> Placement:
    return _stored(shape)


def _stored(
    shape: tuple[int, ...],
    *,
    order: Sequence[int] = (0, 1, 2, 3),
    gaps: Sequence[int] = (0, 0, 0, 0),
    step: int = 1,
    offset: int = 0,
) -> Placement:
    """Store dimensions in ``order``, outermost first, with a gap after each and ``step`` between elements."""
    strides = [0] * len(shape)
    stride = step
    for dim in reversed(order):
        strides[dim] = stride
        stride *= max(shape[dim] + gaps[dim], 1)
    return Placement(shape, tuple(strides), offset)


def _side_by_side(shapes: Mapping[str, tuple[int, ...]], *, far_dim: int) -> dict[str, Placement]:
    """Put all tensors into one buffer, with the far dimension's last element 2^31 elements past its first."""
    far_stride = math.ceil(((1 << 31) + _ALIGNMENT) / (shapes["q"][far_dim] - 1) / _ALIGNMENT) * _ALIGNMENT
    placements: dict[str, Placement] = {}
    offset = 0
    for name, shape in shapes.items():
        near = _contiguous((*shape[:far_dim], 1, *shape[far_dim + 1 :]))
        strides = [*near.strides]
        strides[far_dim] = far_stride
        placements[name] = Placement(shape, tuple(strides), offset)
        offset += math.ceil(near.end / _ALIGNMENT) * _ALIGNMENT
    return placements


def _packed_heads(shapes: dict[str, tuple[int, ...]]) -> dict[str, Placement]:
    """Put tensors side by side along the heads, as one projection of all of them yields."""
    batch, seqlen, _, head_dim = next(iter(shapes.values()))
    packed = _contiguous((batch, seqlen, sum(shape[2] for shape in shapes.values()), head_dim))
    placements, head = {}, 0
    for name, shape in shapes.items():
        placements[name] = Placement(shape, packed.strides, head * head_dim)
        head += shape[2]
    return placements
