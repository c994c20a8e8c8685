"""Run the launches of a call; compile those that are new side by side.

Most of what Triton does for a kernel that it has not met happens in LLVM and in the assembler, which other
threads need not wait for. So a first call takes as long as its slowest kernel, not as all of them together.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch

from .direct import is_descriptor
from .target import interpreting

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from .launch import Launch

__all__ = ["run_all"]

_met: set[Hashable] = set()


def run_all(launches: Sequence[Launch], device: torch.device) -> list[Any]:
    """Launch them in order on the current stream of ``device``.

    Returns:
        For each what Triton compiled, None if nothing ran.
    """
    # The interpreter compiles nothing, not even for tensors of a GPU, which it copies.
    if device.type == "cuda" and not interpreting():
        _compile_new(launches, device)
    return [launch.run(device) for launch in launches]


def _compile_new(launches: Sequence[Launch], device: torch.device) -> None:
    new = {}
    for launch in launches:
        code = device.index, _code(launch)
        if launch.programs and code not in _met:
            new[code] = launch
    # One alone is compiled as it is launched.
    if len(new) > 1:
        for launch in new.values():
            # Triton 3.4 computes it without a lock, and those of all functions that the kernel calls.
            launch.kernel.cache_key  # noqa: B018
        with ThreadPoolExecutor(len(new)) as pool:
            list(pool.map(lambda launch: launch.compile(device), new.values()))
    _met.update(new)


def _code(launch: Launch) -> Hashable:
    """What mostly tells one compiled kernel from another.

    Triton also looks at whether numbers and addresses are multiples of 16. Where that alone is new, kernels
    are compiled one after the other.
    """
    kinds = [value if name.isupper() else _kind(value) for name, value in launch.arguments.items()]
    return launch.kernel, launch.num_warps, launch.maxnreg, *kinds


def _kind(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.dtype
    if is_descriptor(value):
        return value.base.dtype, tuple(value.block_shape)
    return type(value)
