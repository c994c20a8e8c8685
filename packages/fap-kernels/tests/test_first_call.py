"""Kernels that a call needs are compiled side by side, once."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fap_kernels import first_call
from fap_kernels.first_call import run_all
from fap_kernels.launch import Launch

GPU = torch.device("cuda", 0)


class Kernel:
    """Stands in for a ``@triton.jit`` function; ``party`` holds its compilations until all have come."""

    cache_key = "a hash"

    def __init__(self, party: threading.Barrier, error: str | None = None) -> None:
        self.party = party
        self.error = error
        self.compiled: list[dict[str, Any]] = []
        self.launched: list[int] = []

    def warmup(self, *, grid: tuple[int], **arguments: Any) -> None:
        self.party.wait(timeout=20)
        if self.error is not None:
            raise RuntimeError(self.error)
        self.compiled.append(arguments)

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(**arguments: Any) -> str:
            self.launched.append(grid[0])
            return "what Triton compiled"

        return launch


@dataclass
class Descriptor:
    """What is seen of Triton's."""

    base: torch.Tensor
    block_shape: list[int]


@pytest.fixture(autouse=True)
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_call, "_met", set())
    monkeypatch.setattr(first_call, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


def launch_of(kernel: Kernel, programs: int = 3, **arguments: Any) -> Launch:
    return Launch(kernel, programs, {"x": torch.zeros(2), "rows": 5, "BLOCK": 64} | arguments, num_warps=4)


def test_new_kernels_are_compiled_at_the_same_time_and_launched_in_order() -> None:
    party = threading.Barrier(2)
    first, second = Kernel(party), Kernel(party)
    launches = [launch_of(first, 3), launch_of(second, 7)]
    assert run_all(launches, GPU) == ["what Triton compiled"] * 2
    assert (first.launched, second.launched) == ([3], [7])
    assert [arguments["num_warps"] for arguments in first.compiled + second.compiled] == [4, 4]
    assert first.compiled[0]["BLOCK"] == 64


def test_a_kernel_is_new_by_what_it_is_compiled_for() -> None:
    alone = threading.Barrier(1)
    one, other = Kernel(alone), Kernel(alone)
    run_all([launch_of(one), launch_of(other)], GPU)
    run_all([launch_of(one, rows=9), launch_of(other, x=torch.ones(2))], GPU)
    assert (len(one.compiled), len(other.compiled)) == (1, 1), "a number, or another tensor, made one new"
    run_all([launch_of(one, BLOCK=128), launch_of(other, x=torch.zeros(2, dtype=torch.float16))], GPU)
    assert (len(one.compiled), len(other.compiled)) == (2, 2)
    run_all([launch_of(one, x=None), launch_of(other, rows=None)], torch.device("cuda", 1))
    assert (len(one.compiled), len(other.compiled)) == (3, 3)


def test_what_a_descriptor_fetches_tells_kernels_apart() -> None:
    alone = threading.Barrier(1)
    one, other = Kernel(alone), Kernel(alone)
    for dtype, rows in ((torch.bfloat16, 64), (torch.float16, 64), (torch.float16, 128), (torch.float16, 64)):
        part = Descriptor(torch.zeros(4, dtype=dtype), [1, rows])
        run_all([launch_of(one, part0=part), launch_of(other, part0=part)], GPU)
    assert (len(one.compiled), len(other.compiled)) == (3, 3)


def test_one_new_kernel_is_left_to_its_launch() -> None:
    kernel, absent = Kernel(threading.Barrier(1)), Kernel(threading.Barrier(1))
    assert run_all([launch_of(kernel), launch_of(absent, programs=0)], GPU) == ["what Triton compiled", None]
    assert kernel.compiled == absent.compiled == []
    assert (kernel.launched, absent.launched) == ([3], [])


def test_an_error_of_the_compiler_reaches_the_caller() -> None:
    party = threading.Barrier(2)
    launches = [launch_of(Kernel(party)), launch_of(Kernel(party, "ptxas failed"))]
    with pytest.raises(RuntimeError, match="ptxas failed"):
        run_all(launches, GPU)


@pytest.mark.parametrize("device", [torch.device("cpu"), GPU], ids=str)
def test_the_interpreter_compiles_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_call, "interpreting", lambda: True)
    kernels = [Kernel(threading.Barrier(1)), Kernel(threading.Barrier(1))]
    run_all([launch_of(kernel) for kernel in kernels], device)
    assert [kernel.compiled for kernel in kernels] == [[], []]
    assert [kernel.launched for kernel in kernels] == [[3], [3]]
