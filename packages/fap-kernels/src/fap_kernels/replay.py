"""Repeat a call without checking and planning it again.

All that a call's launches depend on but the addresses of its tensors is its key: shapes, strides, dtypes,
devices, alignments and options. The first call of a key is checked, planned and compiled; its launches are
kept with the tensors taken out. A later one puts its own tensors in and goes straight to Triton's launcher,
which saves most of the host time of a call. Nothing here holds memory of the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from .launch import Launch

    Keep = Callable[[Sequence[tuple[Launch, Any]], Mapping[str, torch.Tensor]], None]

__all__ = ["Replay", "Replays"]

MOST_REPLAYS = 4096
_PLAIN = frozenset((bool, int, float, str, type(None)))
_BOUNDS = frozenset((int,))


class Replays:
    """The launches of one function's earlier calls, by key."""

    __slots__ = ("_kept",)

    def __init__(self) -> None:
        self._kept: dict[Hashable, Replay] = {}

    def key(self, tensors: Sequence[torch.Tensor | None], options: Sequence[Any]) -> Hashable:
        """The key of a call, or None if it holds something unusual and must be checked each time."""
        if not isinstance(tensors[0], torch.Tensor) or not tensors[0].is_cuda:
            return None
        parts: list[Hashable] = []
        for x in tensors:
            if x is None:
                parts.append(None)
            elif type(x) is torch.Tensor or type(x) is torch.nn.Parameter:
                # Sparse tensors have no strides, and fake ones no address.
                try:
                    parts.append((x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16))
                except RuntimeError:
                    return None
            else:
                return None
        for option in options:
            kind = type(option)
            if kind is tuple:
                if not _BOUNDS.issuperset(map(type, option)):
                    return None
            elif kind not in _PLAIN:
                return None
            # Equal values of two types may be right and wrong: True, 1 and 1.0.
            parts.append((kind, option))
        return tuple(parts)

    def find(self, key: Hashable) -> Replay | None:
        """The launches of an earlier call with this key, where they can run now."""
        replay = self._kept.get(key) if key is not None else None
        if replay is None or replay.device != torch.cuda.current_device():
            return None
        return replay

    def keeper(self, key: Hashable, given: Mapping[str, torch.Tensor | None]) -> Keep | None:
        """What keeps the launches that a call has run, with the tensors that it has made; None without a key.

        Args:
            key: from :meth:`key`.
            given: the call's tensors by the name that kernels take them by, in the order in which
                :meth:`Replay.run` will get them. A call that launches a copy of one of them is not kept.
        """
        if key is None:
            return None

        def keep(launches: Sequence[tuple[Launch, Any]], made: Mapping[str, torch.Tensor]) -> None:
            replay = Replay.of(launches, given, made)
            if replay is None:
                return
            if len(self._kept) >= MOST_REPLAYS:
                self._kept.clear()
            self._kept[key] = replay

        return keep


class Replay:
    """Launches that wait for their tensors.

    Attributes:
        device: index of the CUDA device that they were compiled on.
    """

    __slots__ = ("_made", "_steps", "device")

    def __init__(
        self, steps: list[_Step], made: list[tuple[torch.Size, torch.dtype, torch.device]], device: int
    ) -> None:
        self._steps = steps
        self._made = made
        self.device = device

    @classmethod
    def of(
        cls,
        launches: Sequence[tuple[Launch, Any]],
        given: Mapping[str, torch.Tensor | None],
        made: Mapping[str, torch.Tensor],
    ) -> Replay | None:
        """Take the tensors out of launches; None if one of their tensors is none of those named.

        Args:
            made: the contiguous tensors that the call allocated, results first, by name as well.
        """
        steps = []
        named = {**given, **made}
        # Where a result was not given, its name stands for None among those given: what was made counts.
        places = {name: place for place, name in enumerate((*given, *made))}
        for launch, compiled in launches:
            if launch.programs == 0:
                continue
            step = _Step.of(launch, compiled, named, places)
            if step is None:
                return None
            steps.append(step)
        return cls(steps, [(x.shape, x.dtype, x.device) for x in made.values()], torch.cuda.current_device())

    def run(self, *given: torch.Tensor | None) -> list[torch.Tensor]:
        """Launch on the current stream, with tensors in the order in which they were given.

        Returns:
            New tensors in place of those that the first call made, in their order.
        """
        made = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in self._made]
        tensors = (*given, *made)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        for step in self._steps:
            step.run(stream, tensors)
        return made


@dataclass(slots=True)
class _Step:
    """One launch: a compiled kernel, the arguments that stay, and where the tensors and descriptors go."""

    compiled: Any
    hooks: Any
    grid: tuple[int, int, int]
    values: list[Any]
    tensors: list[tuple[int, int]]
    descriptors: list[tuple[int, int, Any]]

    @classmethod
    def of(
        cls,
        launch: Launch,
        compiled: Any,
        named: Mapping[str, torch.Tensor | None],
        places: Mapping[str, int],
    ) -> _Step | None:
        if not hasattr(compiled, "packed_metadata"):
            return None  # Triton's interpreter compiles nothing.
        from triton import knobs

        step = cls(compiled, knobs.runtime, (launch.programs, 1, 1), [], [], [])
        for position, parameter in enumerate(launch.kernel.params):
            value = launch.arguments[parameter.name]
            step.values.append(value)
            name = parameter.name.removesuffix("_part0").removesuffix("_part1")
            # Triton's descriptors and Gluon's are two classes with the same fields.
            tensor = value.base if hasattr(value, "block_shape") else value
            if not isinstance(tensor, torch.Tensor):
                continue
            original = named.get(name)
            if original is None or original.data_ptr() != tensor.data_ptr():
                return None
            step.values[-1] = None
            if tensor is value:
                step.tensors.append((position, places[name]))
            else:
                step.descriptors.append((position, places[name], _Descriptor(value)))
        return step

    def run(self, stream: int, tensors: Sequence[torch.Tensor | None]) -> None:
        values = self.values.copy()
        for position, index in self.tensors:
            values[position] = tensors[index]
        for position, index, descriptor in self.descriptors:
            values[position] = descriptor.of(tensors[index])
        compiled, hooks = self.compiled, self.hooks
        metadata = compiled.launch_metadata(self.grid, stream, *values)
        compiled.run(
            *self.grid, stream, compiled.function, compiled.packed_metadata, metadata,
            hooks.launch_enter_hook, hooks.launch_exit_hook, *values,
        )  # fmt: skip


class _Descriptor:
    """All of a TensorDescriptor but its tensor; its fields were checked when it was made."""

    __slots__ = ("_fields", "_kind")

    def __init__(self, made: Any) -> None:
        self._kind = type(made)
        self._fields = {name: value for name, value in vars(made).items() if name != "base"}

    def of(self, base: Any) -> Any:
        """Return it for another tensor of the same shape and strides."""
        # An import here, and the checks of its constructor, would take as long as all else of a launch.
        descriptor = object.__new__(self._kind)
        descriptor.__dict__.update(self._fields)
        descriptor.base = base
        return descriptor
