"""Launch a compiled kernel by the C function at the bottom of Triton's launcher.

Around that function there is Python that runs on every launch: it makes the tensor maps by which the TMA unit
fetches tiles, and hands all arguments on through several functions. That takes 8 of the 9 us of a launch with
four descriptors. All of it but the maps is the same for every launch of a compiled kernel, and a map is the
same for every launch that reads one address. So a launch is recorded here: what the Python hands to the C
function is kept, and a later launch puts in its own stream, addresses and maps.

Nothing is assumed about the order of those arguments, which changes between versions of Triton. Every one is
recognised as what was passed in, and where one is not, there is no direct launch.
"""

from __future__ import annotations

import copy
import logging
from functools import cache
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["DirectLaunch", "is_descriptor"]

_logger = logging.getLogger("fap_kernels")
_STREAM = object()
_MAP = object()


class DirectLaunch:
    """One compiled kernel and grid, and what Triton's launcher hands to its C function for them.

    Attributes:
        places: where each of the kernel's arguments lies among :meth:`expand`'s, a descriptor's map for it.
    """

    __slots__ = ("_head", "_launch", "_launcher", "_nested", "_stream", "places")

    def __init__(
        self,
        launch: Callable[..., None],
        launcher: Callable[..., tuple[Any, ...]],
        head: Sequence[Any],
        nested: bool,
        places: list[int],
    ) -> None:
        self._launch = launch
        self._launcher = launcher
        self._head = list(head)
        self._stream = self._head.index(_STREAM)
        self._nested = nested
        self.places = places

    @classmethod
    def of(cls, compiled: Any, grid: tuple[int, int, int], values: Sequence[Any]) -> DirectLaunch | None:
        """Record a launch; None, and a log line, where Triton's launcher is not made as described above.

        Args:
            compiled: what Triton's JIT returns, which has been launched before.
            values: the kernel's arguments in order, descriptors on the tensors of some call.
        """
        direct = cls._recorded(compiled, grid, values)
        if direct is None:
            _tell(type(compiled.run).__qualname__)
        return direct

    @classmethod
    def _recorded(
        cls, compiled: Any, grid: tuple[int, int, int], values: Sequence[Any]
    ) -> DirectLaunch | None:
        split = _split(getattr(compiled.run, "launch", None))
        if split is None or any(_scratch(compiled.run, kind) for kind in ("global", "profile")):
            return None
        launch, around = split
        recorder = copy.copy(compiled.run)

        def launcher(values: Sequence[Any]) -> tuple[Any, ...]:
            taken: list[tuple[Any, ...]] = []
            recorder.launch = around(lambda *arguments: taken.append(arguments))
            no_hooks = (None, None, None)
            recorder(*grid, _STREAM, compiled.function, compiled.packed_metadata, *no_hooks, *values)
            return taken.pop()  # since the recorder would keep its tensors alive

        expected, places = _expand(values)
        recorded = launcher(values)
        last = recorded[-1]
        if isinstance(last, (list, tuple)) and _match(last, expected):
            return cls(launch, launcher, recorded[:-1], True, places)
        count = len(expected)
        if _match(recorded[-count:], expected):
            return cls(launch, launcher, recorded[:-count], False, places)
        return None

    def expand(self, values: Sequence[Any]) -> list[Any]:
        """The kernel's arguments as the C function takes them, tensor maps made."""
        recorded = self._launcher(values)
        return list(recorded[-1] if self._nested else recorded[len(self._head) :])

    def run(self, stream: int, arguments: list[Any]) -> None:
        """Launch with arguments as :meth:`expand` returns them, where addresses may stand for tensors."""
        head = self._head.copy()
        head[self._stream] = stream
        if self._nested:
            self._launch(*head, arguments)
        else:
            self._launch(*head, *arguments)


def is_descriptor(value: Any) -> bool:
    """Whether an argument is a tensor descriptor, of which Triton and Gluon have a class each."""
    return hasattr(value, "block_shape")


@cache
def _tell(launcher: str) -> None:
    """Say once that calls are slower on the host than they could be."""
    _logger.info("launches take longer on the host: Triton's launcher is a %s of unknown make", launcher)


def _split(launch: Any) -> tuple[Any, Callable[[Any], Any]] | None:
    """The C function in Triton's ``launch``, and what puts another one in its place.

    Without descriptors ``launch`` is that function; else it is one in Python that calls it as ``launcher``.
    """
    if not isinstance(launch, FunctionType):
        return None if launch is None else (launch, lambda other: other)
    cells = dict(zip(launch.__code__.co_freevars, launch.__closure__ or (), strict=True))
    if "launcher" not in cells:
        return None

    def around(other: Any) -> Any:
        closure = tuple(CellType(other) if name == "launcher" else cell for name, cell in cells.items())
        return FunctionType(launch.__code__, launch.__globals__, closure=closure)

    return cells["launcher"].cell_contents, around


def _scratch(launcher: Any, kind: str) -> bool:
    """Whether every launch allocates memory of this kind."""
    return bool(getattr(launcher, f"{kind}_scratch_size", 0))


def _expand(values: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """What the C function should be given for ``values``, and where each of them should be."""
    expected: list[Any] = []
    places: list[int] = []
    for value in values:
        places.append(len(expected))
        expected.extend((_MAP, *value.shape, *value.strides) if is_descriptor(value) else (value,))
    return expected, places


def _match(given: Sequence[Any], expected: Sequence[Any]) -> bool:
    return len(given) == len(expected) and all(
        one is other or other is _MAP for one, other in zip(given, expected, strict=True)
    )
