"""How a launch reaches Triton, with a kernel that is none."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fap_kernels.launch import Launch

CPU = torch.device("cpu")


class Compiled:
    """What Triton's JIT returns, as far as a launch asks."""

    def __init__(self, launched: list[Any]) -> None:
        self.packed_metadata = (4, 1, 1234)
        self._launched = launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *values: self._launched.append((grid, self.packed_metadata, values))


class Kernel:
    """A kernel of which every compilation is another object, as where two threads compile it."""

    def __init__(self, in_background: bool = False) -> None:
        self.params = [SimpleNamespace(name="x"), SimpleNamespace(name="WIDTH")]
        self.launched: list[Any] = []
        self.compiled: list[Compiled] = []
        self._in_background = in_background

    def warmup(self, *, grid: tuple[int, ...], **arguments: Any) -> Any:
        made = Compiled(self.launched)
        self.compiled.append(made)
        return SimpleNamespace(result=lambda: made) if self._in_background else made

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(**arguments: Any) -> Compiled:
            made = Compiled(self.launched)
            made[grid](arguments["x"], arguments["WIDTH"])
            return made

        return run


@pytest.mark.parametrize("in_background", [False, True])
def test_programs_of_a_cluster_are_one_to_tritons_launcher(in_background: bool) -> None:
    kernel = Kernel(in_background)
    launch = Launch(kernel, 6, {"WIDTH": 64, "x": 5}, num_warps=4, cluster=2)
    assert launch.grid == (3, 1, 1)
    compiled = launch.run(CPU)
    assert kernel.launched == [((3, 1, 1), (4, 2, 1234), (5, 64))]
    assert compiled is kernel.compiled[0], "what was launched is what a repeated call launches"


def test_without_clusters_nothing_is_changed() -> None:
    kernel = Kernel()
    Launch(kernel, 6, {"WIDTH": 64, "x": 5}, num_warps=4).run(CPU)
    assert kernel.launched == [((6, 1, 1), (4, 1, 1234), (5, 64))]
    assert Launch(kernel, 0, {}, num_warps=4, cluster=2).run(CPU) is None
