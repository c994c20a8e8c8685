"""Measure a list of points: draw, judge, then time the peers that are right in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fap_testing.bench.decode import Decode
from fap_testing.bench.judge import judge_of, oracle_scores
from fap_testing.bench.timing import Run, Spread, race
from fap_testing.bench.trial import free_memory, require_device, try_peer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fap_testing.bench.peers.base import Peer
    from fap_testing.bench.problem import Direction, Problem, Tensors
    from fap_testing.bench.record import Row
    from fap_testing.bench.timing import Effort, Timer
    from fap_testing.bench.trial import Trial

__all__ = ["measure_point", "present_peers", "trials_at"]


def present_peers(peers: Sequence[Peer], device: str, kind: str) -> tuple[list[Peer], dict[str, str]]:
    """Return the peers that can run such calls here, and for each other one why it cannot."""
    absent = {peer.name: reason for peer in peers if (reason := peer.absent(device, kind)) is not None}
    return [peer for peer in peers if peer.name not in absent], absent


def trials_at(
    problem: Problem, tensors: Tensors, peers: Sequence[Peer], directions: Sequence[Direction]
) -> list[Trial]:
    """Prepare and judge every peer at one point.

    Raises:
        DeviceLostError: a peer took the device down.
    """
    judge = judge_of(problem, tensors, oracle_scores(problem.device))
    trials: list[Trial] = []
    for peer in peers:
        trial = try_peer(peer, problem, tensors, judge, directions)
        trials.append(trial)
        if any(outcome.status == "failed" for outcome in trial.outcomes.values()):
            rows = [earlier.row(d, {}) for earlier in trials for d in directions if d not in earlier.ready()]
            require_device(problem.device, f"{peer.name} at {problem} took the device down", rows)
    return trials


def measure_point(
    problem: Problem, peers: Sequence[Peer], directions: Sequence[Direction], timer: Timer, effort: Effort
) -> list[Row]:
    """Return one row for each peer and direction, timed if it is right.

    Raises:
        DeviceLostError: a peer took the device down; what is known of this point comes with it.
    """
    free_memory(problem.device)
    tensors = problem.draw()
    trials = trials_at(problem, tensors, peers, directions)
    free_memory(problem.device)
    rows: list[Row] = []
    for direction in directions:
        runs = {
            trial.peer.name: Run(trial.call(direction), trial.peer.scope)
            for trial in trials
            if direction in trial.ready()
        }
        results = race(runs, timer, effort)
        for trial in trials:
            result = results.get(trial.peer.name)
            if isinstance(result, Exception):
                trial.fail(direction, result)
            measures = _measures(problem, direction, result, timer) if isinstance(result, Spread) else {}
            rows.append(trial.row(direction, measures))
        if any(isinstance(result, Exception) for result in results.values()):
            require_device(problem.device, f"a peer took the device down at {problem} {direction}", rows)
    return rows


def _measures(problem: Problem, direction: Direction, times: Spread, timer: Timer) -> dict[str, float]:
    unit = timer.unit
    measures = {
        unit: times.median,
        f"{unit}_lower": times.lower,
        f"{unit}_upper": times.upper,
        "samples": times.samples,
    }
    if unit == "ms" and times.median > 0:
        measures["tflops"] = problem.flops(direction) / times.median / 1e9
        if isinstance(problem, Decode):
            measures["gbps"] = problem.moved_bytes() / times.median / 1e6
    return measures
