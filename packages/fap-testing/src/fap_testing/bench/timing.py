"""Time calls on a GPU by events, on a CPU by the clock: warm, with a cold cache, in turn, as medians."""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "CpuTimer",
    "CudaTimer",
    "Effort",
    "GraphTimer",
    "HostTimer",
    "Run",
    "Spread",
    "Timer",
    "preheat",
    "race",
    "spread",
]

_MIB = 1 << 20
_MOST_SAMPLES_A_TURN = 200
_MOST_WARMUP_CALLS = 2000
_LEAST_SAMPLES_A_TURN = 2


@dataclass(frozen=True, slots=True)
class Spread:
    """The middle of a set of measurements and how far they scatter.

    Attributes:
        median, lower, upper: the median and the quartiles.
        samples: how many measurements.
    """

    median: float
    lower: float
    upper: float
    samples: int


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure one call.

    Attributes:
        rounds: how many turns each of the compared calls gets.
        milliseconds: of measuring, over all turns together.
        warmup_ms: of calls at the start of each turn that do not count. At its power limit a GPU sets its
            clock by what ran before, and another call may draw more power, or less: an H200 needs 0.1 to 0.25
            seconds until a call's speed is its own.
        preheat_s: seconds of matrix products before the first measurement of a process.
    """

    rounds: int = 5
    milliseconds: float = 100.0
    warmup_ms: float = 250.0
    preheat_s: float = 3.0


@dataclass(frozen=True, slots=True)
class Run:
    """A call to be timed, and what must surround it, which is entered once a turn and not timed."""

    call: Callable[[], Any]
    scope: Callable[[], AbstractContextManager[Any]] = nullcontext


class Timer(Protocol):
    """Something that times single calls on one kind of device.

    Attributes:
        unit: what it measures in, "ms" or "us".
    """

    unit: ClassVar[str]

    def sample(self, call: Callable[[], Any], count: int) -> list[float]:
        """Return ``count`` measurements of a call."""
        ...

    def synchronize(self) -> None:
        """Wait until everything asked of the device is done."""
        ...


class CudaTimer:
    """Times by CUDA events around each call, the L2 cache overwritten in between, as Triton's do_bench does.

    Calls are queued without waiting, so the host's share is hidden where the GPU is the slower of the two.
    """

    unit: ClassVar[str] = "ms"

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(max(256 * _MIB, 2 * cache), dtype=torch.int8, device="cuda")

    def sample(self, call: Callable[[], Any], count: int) -> list[float]:
        """Return the milliseconds of each of ``count`` calls, with a cold cache before each."""
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)
        ]
        for start, end in pairs:
            self._flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [float(start.elapsed_time(end)) for start, end in pairs]

    def synchronize(self) -> None:
        """Wait until everything asked of the device is done."""
        torch.cuda.synchronize()


class GraphTimer:
    """Times calls replayed from a CUDA graph, as servers run a decoding step: the host is not in the way.

    Several calls follow each other in one graph, so that starting it hardly counts. Nothing empties the L2
    cache between them: a call must read several times what it holds to be measured as if it were empty.

    Args:
        calls: how many in one graph.
    """

    unit: ClassVar[str] = "ms"

    def __init__(self, calls: int = 10) -> None:
        self._calls = calls

    def sample(self, call: Callable[[], Any], count: int) -> list[float]:
        """Return the milliseconds per call of each of ``count`` replays."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(self._calls):
                call()
        graph.replay()
        pairs = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)
        ]
        for start, end in pairs:
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [float(start.elapsed_time(end)) / self._calls for start, end in pairs]

    def synchronize(self) -> None:
        """Wait until everything asked of the device is done."""
        torch.cuda.synchronize()


class CpuTimer:
    """Times by the clock, the caches overwritten in between."""

    unit: ClassVar[str] = "ms"

    def __init__(self) -> None:
        self._flush = torch.empty(32 * _MIB, dtype=torch.int8)

    def sample(self, call: Callable[[], Any], count: int) -> list[float]:
        """Return the milliseconds of each of ``count`` calls, with a cold cache before each."""
        times = []
        for _ in range(count):
            self._flush.zero_()
            start = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - start))
        return times

    def synchronize(self) -> None:
        """Return at once: a CPU's calls are done when they return."""


class HostTimer:
    """Times what the host does for a call: many calls in a row without waiting for the device between them.

    On a CPU, where a call is done when it returns, this is all of the call.

    Args:
        device: a type of device.
        calls: how many calls in a row; few enough for the device's queue to hold their launches.
    """

    unit: ClassVar[str] = "us"

    def __init__(self, device: str, calls: int = 50) -> None:
        self._on_gpu = device == "cuda"
        self._calls = calls

    def sample(self, call: Callable[[], Any], count: int) -> list[float]:
        """Return the microseconds per call of each of ``count`` rows of calls."""
        times = []
        for _ in range(count):
            self.synchronize()
            start = time.perf_counter()
            for _ in range(self._calls):
                call()
            times.append(1e6 * (time.perf_counter() - start) / self._calls)
        self.synchronize()
        return times

    def synchronize(self) -> None:
        """Wait until everything asked of the device is done."""
        if self._on_gpu:
            torch.cuda.synchronize()


def spread(samples: Sequence[float]) -> Spread:
    """Return median and quartiles (by linear interpolation) of one or more measurements.

    Raises:
        ValueError: there is no measurement.
    """
    if not samples:
        raise ValueError("samples must hold at least one measurement, got none")
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0], 1)
    lower, median, upper = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, lower, upper, len(samples))


def preheat(device: str, seconds: float) -> None:
    """Bring clocks and temperature to where they stay: right after idling, a GPU reads up to 10% high."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (512, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(10):
            torch.mm(a, a)
        if device == "cuda":
            torch.cuda.synchronize()


def race(runs: Mapping[str, Run], timer: Timer, effort: Effort) -> dict[str, Spread | Exception]:
    """Time several calls in turn, so that a drift of clocks and heat hits all alike.

    Each round begins with another call, and every second one goes backwards, so that none always follows the
    same other one.

    Args:
        runs: the calls by name.
        timer: for the device they run on.
        effort: how long to measure.

    Returns:
        For each name the measurements, or the exception that ended them. It ends no other.
    """
    finished: dict[str, Exception] = {}
    counts: dict[str, tuple[int, int]] = {}
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        try:
            counts[name] = _samples_a_turn(run, timer, effort)
        except Exception as error:  # noqa: BLE001, PERF203 - whatever a peer raises is its result
            finished[name] = error
    for turn in range(effort.rounds):
        names = [name for name in runs if name not in finished]
        shift = turn % max(1, len(names))
        names = names[shift:] + names[:shift]
        for name in names[:1] + names[:0:-1] if turn % 2 else names:
            try:
                warm, counted = counts[name]
                with runs[name].scope():
                    samples[name] += timer.sample(runs[name].call, warm + counted)[warm:]
            except Exception as error:  # noqa: BLE001, PERF203 - as above
                finished[name] = error
    return {name: finished[name] if name in finished else spread(samples[name]) for name in runs}


def _samples_a_turn(run: Run, timer: Timer, effort: Effort) -> tuple[int, int]:
    """Warm a call up, and tell from its pace how many calls warm up a turn, and how many fit it then."""
    with run.scope():
        run.call()
        timer.synchronize()
        paces: list[float] = []
        while sum(paces) < effort.warmup_ms or not paces:
            begin = time.perf_counter()
            timer.sample(run.call, 1)
            paces.append(1e3 * (time.perf_counter() - begin))
    pace = max(statistics.median(paces), 1e-3)
    fitting = effort.milliseconds / effort.rounds / pace
    warm = min(effort.warmup_ms / pace, _MOST_WARMUP_CALLS)
    return int(warm), int(min(max(fitting, _LEAST_SAMPLES_A_TURN), _MOST_SAMPLES_A_TURN))
