"""How the bench times: medians, turns, and one call's failure that is nobody else's."""

from __future__ import annotations

import itertools
import time
from contextlib import contextmanager

import pytest
import torch

from fap_testing.bench.timing import CpuTimer, Effort, HostTimer, Run, Spread, preheat, race, spread

SHORT = Effort(rounds=3, milliseconds=3, warmup_ms=0.1)


class TellingTimer:
    """Returns as measurements what the calls return."""

    unit = "ms"

    def sample(self, call, count):
        return [call() for _ in range(count)]

    def synchronize(self):
        pass


def test_spread_is_the_median_and_the_quartiles():
    assert spread([5.0, 1.0, 3.0, 2.0, 4.0]) == Spread(3.0, 2.0, 4.0, 5)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0, 1)
    with pytest.raises(ValueError, match="at least one"):
        spread([])


def test_a_failing_call_ends_no_other():
    def fail():
        raise RuntimeError("no")

    results = race({"bad": Run(fail), "good": Run(lambda: 2.0)}, TellingTimer(), SHORT)
    assert isinstance(results["bad"], RuntimeError)
    assert results["good"].median == 2.0


def test_a_call_that_fails_late_ends_no_other():
    calls = iter(range(10))

    def fail():
        return 1.0 / (9 - next(calls))

    results = race({"late": Run(fail), "good": Run(lambda: 2.0)}, TellingTimer(), SHORT)
    assert isinstance(results["late"], (ZeroDivisionError, StopIteration))
    assert results["good"].median == 2.0


def test_calls_take_turns_in_another_order_each_round():
    order = []
    runs = {name: Run(lambda name=name: order.append(name) or 1.0) for name in ("a", "b", "c")}
    race(runs, TellingTimer(), Effort(rounds=4, milliseconds=1e-9, warmup_ms=0))
    turns = [name for index in range(4) for name in order[-24 + 6 * index : -18 + 6 * index or None : 2]]
    assert "".join(turns) == "abc" + "bac" + "cab" + "acb"
    assert turns[::3] == ["a", "b", "c", "a"], "each round must begin with another call"
    after = {(before, name) for before, name in itertools.pairwise(turns) if before != name}
    assert len(after) == 6, "none always follows the same other one"


def test_what_ran_before_is_forgotten_when_a_turn_is_measured():
    latest, since = "", 0

    def call(name):
        nonlocal latest, since
        since = since + 1 if name == latest else 0
        latest = name
        return 9.0 if since < 5 else 1.0

    runs = {name: Run(lambda name=name: call(name)) for name in ("a", "b")}
    results = race(runs, TellingTimer(), Effort(rounds=3, milliseconds=0.1, warmup_ms=5.0))
    assert [(result.median, result.upper) for result in results.values()] == [(1.0, 1.0)] * 2


def test_every_turn_is_inside_the_scope_and_entering_it_is_not_timed():
    inside = []

    @contextmanager
    def scope():
        time.sleep(0.02)
        inside.append(True)
        yield
        inside.pop()

    def call():
        assert inside
        return 0.0

    result = race({"one": Run(call, scope)}, CpuTimer(), SHORT)["one"]
    assert result.median < 10


def test_the_clock_measures_what_a_call_takes():
    assert min(CpuTimer().sample(lambda: time.sleep(0.01), 3)) >= 9.9


def test_the_host_timer_divides_by_the_calls_in_a_row():
    calls = []
    (per_call,) = HostTimer("cpu", calls=20).sample(lambda: (calls.append(1), time.sleep(0.001)), 1)
    assert len(calls) == 20
    assert 1000 <= per_call < 20000


def test_preheating_lasts_as_long_as_it_says():
    begin = time.perf_counter()
    preheat("cpu", 0.05)
    assert time.perf_counter() - begin >= 0.05


@pytest.mark.gpu
def test_events_measure_the_gpu_alone():
    from fap_testing.bench.timing import CudaTimer

    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    timer = CudaTimer()
    timer.sample(lambda: a @ a, 10)
    times = timer.sample(lambda: a @ a, 20)
    host = HostTimer("cuda").sample(lambda: a @ a, 5)
    assert 0.02 < spread(times).median < 50
    assert spread(host).median < 1000 * spread(times).median


@pytest.mark.gpu
def test_a_graph_measures_what_events_do():
    from fap_testing.bench.timing import CudaTimer, GraphTimer

    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    run = {"matmul": Run(lambda: a @ a)}
    alone, replayed = (race(run, timer, Effort())["matmul"] for timer in (CudaTimer(), GraphTimer()))
    assert 0.5 < replayed.median / alone.median < 1.5
