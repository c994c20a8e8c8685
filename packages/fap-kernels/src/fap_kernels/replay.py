"""Repeat a call without checking and planning it again.

All that a call's launches depend on but the addresses of its tensors is its key: shapes, strides, dtypes,
devices, alignments and options. The first call of a key is checked, planned and compiled; its launches are
kept with the tensors taken out. A later one puts its own tensors in and goes straight to Triton's launcher,
which saves most of the host time of a call. Nothing here holds memory of the GPU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .alike import PLAIN, Alike
from .direct import DirectLaunch, is_descriptor
from .schedule import explicit_schedule

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

    from .launch import Launch

    _Key = tuple[Hashable, tuple[Any, ...]]
    Keep = Callable[[Sequence[tuple[Launch, Any]], Mapping[str, torch.Tensor]], None]

__all__ = ["Replay", "Replays"]

MOST_REPLAYS = 4096
MOST_MAPS = 128
# Types whose values never change, a tuple's where its elements' do not.
_PLAIN = frozenset((bool, int, float, str, tuple, type(None)))
_BOUNDS = frozenset((int,))
_ON_CPU = -1  # as in tests without a GPU


class _Kept:
    """One earlier call.

    Attributes:
        key: of :meth:`Replays.key`.
        replay: its launches.
        alike: knows tensors of this key at once.
    """

    __slots__ = ("_kinds", "_options", "_schedule", "_tuples", "alike", "key", "replay")

    def __init__(self, key: _Key, replay: Replay, tensors: Sequence[torch.Tensor | None]) -> None:
        self.key = key
        self.replay = replay
        self.alike = Alike(tensors)
        self._schedule, self._kinds, *options = key[1]
        self._options = tuple(options)
        self._tuples = [place for place, option in enumerate(options) if type(option) is tuple]

    def is_of(self, tensors: Sequence[torch.Tensor | None], options: tuple[Any, ...]) -> bool:
        """Tell whether a call certainly has this key, without making its key."""
        if tuple(map(type, options)) != self._kinds or options != self._options:
            return False
        for place in self._tuples:
            if not _BOUNDS.issuperset(map(type, options[place])):
                return False
        return explicit_schedule() == self._schedule and self.alike.match(tensors)


class Replays:
    """The launches of one function's earlier calls, the last one's at hand."""

    __slots__ = ("_kept", "_last")

    def __init__(self) -> None:
        self._kept: dict[_Key, _Kept] = {}
        self._last: _Kept | None = None

    @staticmethod
    def key(tensors: Sequence[torch.Tensor | None], options: Sequence[Any]) -> _Key | None:
        """The key of a call, or None if it holds something unusual and must be checked each time.

        The schedule that was chosen explicitly is part of it.
        """
        facts, rest = _facts(tensors), _rest(options)
        return None if facts is None or rest is None else (facts, rest)

    def find(
        self, tensors: Sequence[torch.Tensor | None], options: tuple[Any, ...]
    ) -> tuple[_Key | None, Replay | None]:
        """The key of a call, and the launches of an earlier one with this key, where they can run now."""
        last = self._last
        if last is not None and last.is_of(tensors, options):
            kept = last
        else:
            key = self.key(tensors, options)
            found = self._kept.get(key) if key is not None else None
            if found is None:
                return key, None
            if found is last:
                # The dispatcher's state is another one, as under torch.inference_mode().
                found.alike = Alike(tensors)
            self._last = kept = found
        # Not torch.cuda.current_device, which sees to it each time that CUDA is there.
        if kept.replay.device != torch._C._cuda_getDevice():
            return kept.key, None
        return kept.key, kept.replay

    def keeper(self, key: _Key | None, given: Mapping[str, torch.Tensor | None]) -> Keep | None:
        """What keeps the launches that a call has run, with the tensors that it has made; None without a key.

        Args:
            key: from :meth:`find`.
            given: the call's tensors by the name that kernels take them by, in the order in which
                :meth:`find` got them and :meth:`Replay.run` will. A call that launches a copy of one of them
                is not kept.
        """
        if key is None:
            return None

        def keep(launches: Sequence[tuple[Launch, Any]], made: Mapping[str, torch.Tensor]) -> None:
            replay = Replay.of(launches, given, made)
            if replay is None:
                return
            if len(self._kept) >= MOST_REPLAYS:
                self._kept.clear()
            self._kept[key] = self._last = _Kept(key, replay, tuple(given.values()))

        return keep


def _facts(tensors: Sequence[torch.Tensor | None]) -> Hashable | None:
    """What a call's launches depend on of its tensors; None if they are not all plain ones of a GPU."""
    if not PLAIN.issuperset(map(type, tensors)) or tensors[0] is None or not tensors[0].is_cuda:
        return None
    # Sparse tensors have no strides, and fake ones no address.
    try:
        return tuple(
            [
                None if x is None else (x.shape, x.stride(), x.dtype, x.get_device(), x.data_ptr() % 16)
                for x in tensors
            ]
        )
    except RuntimeError:
        return None


def _rest(options: Sequence[Any]) -> tuple[Any, ...] | None:
    """The schedule that was chosen explicitly, the options' types, and the options.

    None if an option is of an unusual type.
    """
    # Equal values of two types may be right and wrong: True, 1 and 1.0.
    kinds = tuple(map(type, options))
    if not _PLAIN.issuperset(kinds):
        return None
    for option in options:
        if type(option) is tuple and not _BOUNDS.issuperset(map(type, option)):
            return None
    return explicit_schedule(), kinds, *options


class Replay:
    """Launches that wait for their tensors.

    Attributes:
        device: index of the CUDA device that they were compiled on.
    """

    __slots__ = ("_made", "_steps", "device")

    def __init__(
        self,
        steps: list[_Step],
        made: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]],
        device: int,
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

        Nor is there one where the tensors are not on the current device, on which :meth:`run` launches.

        Args:
            made: the contiguous tensors that the call allocated, results first, by name as well.
        """
        steps = []
        named = {**given, **made}
        device = torch.cuda.current_device()
        if any(x is not None and x.get_device() not in (device, _ON_CPU) for x in named.values()):
            return None
        # Where a result was not given, its name stands for None among those given: what was made counts.
        places = {name: place for place, name in enumerate((*given, *made))}
        for launch, compiled in launches:
            if launch.programs == 0:
                continue
            step = _Step.of(launch, compiled, named, places)
            if step is None:
                return None
            steps.append(step)
        new = [(tuple(x.shape), x.stride(), x.dtype) for x in made.values()]
        return cls(steps, new, device)

    def run(self, *given: torch.Tensor | None) -> list[torch.Tensor]:
        """Launch on the current stream, with tensors in the order in which they were given.

        Returns:
            New tensors in place of those that the first call made, in their order.
        """
        made = [_empty(shape, strides, dtype) for shape, strides, dtype in self._made]
        tensors = (*given, *made)
        stream = torch._C._cuda_getCurrentRawStream(self.device)
        for step in self._steps:
            step.run(stream, tensors)
        return made


class _Step:
    """One launch: a compiled kernel, the arguments that stay, and where the tensors and descriptors go.

    Attributes:
        compiled: what Triton's JIT returned.
        grid: its grid.
        values: the kernel's arguments in order, None where a tensor or a descriptor goes.
        tensors: for each tensor, its position among the values, and its index among a call's tensors.
        descriptors: the same of each descriptor, and all of it but its tensor.
    """

    __slots__ = ("_direct", "_hooks", "compiled", "descriptors", "grid", "tensors", "values")

    def __init__(self, compiled: Any, grid: tuple[int, int, int], values: list[Any]) -> None:
        from triton import knobs

        self.compiled = compiled
        self.grid = grid
        self.values = values
        self.tensors: list[tuple[int, int]] = []
        self.descriptors: list[tuple[int, int, _Descriptor]] = []
        self._hooks = knobs.runtime
        self._direct: _DirectStep | None = None

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
        values = launch.values
        step = cls(compiled, launch.grid, values.copy())
        for position, (parameter, value) in enumerate(zip(launch.kernel.params, values, strict=True)):
            name = parameter.name.removesuffix("_part0").removesuffix("_part1")
            tensor = value.base if is_descriptor(value) else value
            if not isinstance(tensor, torch.Tensor):
                continue
            original = named.get(name)
            if original is None or original.data_ptr() != tensor.data_ptr():
                return None
            step.values[position] = None
            if tensor is value:
                step.tensors.append((position, places[name]))
            else:
                step.descriptors.append((position, places[name], _Descriptor(value)))
        step._direct = _DirectStep.of(step, values)
        return step

    def run(self, stream: int, tensors: Sequence[torch.Tensor | None]) -> None:
        # A profiler's hooks are told of a launch by Triton's launcher.
        if self._direct is not None and not _hooked(self._hooks):
            self._direct.run(stream, tensors)
            return
        values = self.filled(tensors)
        compiled, hooks = self.compiled, self._hooks
        metadata = compiled.launch_metadata(self.grid, stream, *values)
        compiled.run(
            *self.grid, stream, compiled.function, compiled.packed_metadata, metadata,
            hooks.launch_enter_hook, hooks.launch_exit_hook, *values,
        )  # fmt: skip

    def filled(self, tensors: Sequence[torch.Tensor | None]) -> list[Any]:
        """The kernel's arguments with these tensors."""
        values = self.values.copy()
        for position, index in self.tensors:
            values[position] = tensors[index]
        for position, index, descriptor in self.descriptors:
            values[position] = descriptor.of(tensors[index])
        return values


class _DirectStep:
    """A launch without Triton's Python.

    The map of a descriptor depends on shape and strides, which the key holds, and on the address: maps are
    kept by it. They hold no memory of the GPU.
    """

    __slots__ = ("_arguments", "_direct", "_maps", "_pointers", "_step")

    def __init__(self, step: _Step, direct: DirectLaunch, arguments: list[Any]) -> None:
        self._step = step
        self._direct = direct
        self._arguments = arguments
        self._pointers = [(direct.places[position], index) for position, index in step.tensors]
        self._maps: list[tuple[int, int, dict[int, Any]]] = [
            (direct.places[position], index, {}) for position, index, _ in step.descriptors
        ]
        # What is kept must keep no tensor alive.
        for place in (*(x[0] for x in self._pointers), *(x[0] for x in self._maps)):
            arguments[place] = None

    @classmethod
    def of(cls, step: _Step, values: Sequence[Any]) -> _DirectStep | None:
        direct = DirectLaunch.of(step.compiled, step.grid, values)
        return None if direct is None else cls(step, direct, direct.expand(values))

    def run(self, stream: int, tensors: Sequence[Any]) -> None:
        arguments = self._arguments.copy()
        for place, index in self._pointers:
            arguments[place] = tensors[index].data_ptr()
        for place, index, maps in self._maps:
            tensor_map = maps.get(tensors[index].data_ptr())
            if tensor_map is None:
                self._make_maps(tensors)
                tensor_map = maps[tensors[index].data_ptr()]
            arguments[place] = tensor_map
        self._direct.run(stream, arguments)

    def _make_maps(self, tensors: Sequence[Any]) -> None:
        """Have Triton make the maps of these tensors, and keep them."""
        arguments = self._direct.expand(self._step.filled(tensors))
        for place, index, maps in self._maps:
            if len(maps) >= MOST_MAPS:
                maps.clear()
            maps[tensors[index].data_ptr()] = arguments[place]


def _new(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")


# A new tensor on the current CUDA device. What compiled graphs allocate by takes a third of the host time.
_empty: Callable[..., torch.Tensor] = getattr(torch._C._dynamo.guards, "_empty_strided_cuda", _new)


def _hooked(runtime: Any) -> bool:
    """Whether something is to be called before or after each launch."""
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        # Since Triton 3.6 it is always a chain, which may be empty.
        if hook is not None and getattr(hook, "calls", True):
            return True
    return False


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
