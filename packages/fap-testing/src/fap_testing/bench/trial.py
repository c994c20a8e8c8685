"""One peer at one point: prepared, run once and judged, before anything is timed."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from fap_testing.bench.record import Row

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fap_testing.bench.judge import Judge
    from fap_testing.bench.peers.base import Calls, Peer
    from fap_testing.bench.problem import Direction, Problem, Tensors
    from fap_testing.bench.record import Status

__all__ = ["DeviceLostError", "Outcome", "Trial", "free_memory", "require_device", "try_peer"]


class DeviceLostError(RuntimeError):
    """The device answers no more, so nothing that is measured after this in the same process means anything.

    Args:
        message: what happened.
        rows: the figures of the point at which it happened.
    """

    def __init__(self, message: str, rows: Sequence[Row] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)


class Outcome(NamedTuple):
    """What became of one direction. Only what is "ok" is measured."""

    status: Status
    note: str = ""
    error: float | None = None
    configuration: str | None = None


@dataclass(eq=False, slots=True)
class Trial:
    """One peer at one point.

    Attributes:
        peer: who.
        problem: what is to be measured.
        checked: which call was judged, in words.
        outcomes: by direction.
        calls: to be timed, if any direction is "ok".
    """

    peer: Peer
    problem: Problem
    checked: str
    outcomes: dict[Direction, Outcome] = field(default_factory=dict)
    calls: Calls | None = None

    def ready(self) -> list[Direction]:
        """Return the directions that may be measured."""
        return [direction for direction, outcome in self.outcomes.items() if outcome.status == "ok"]

    def call(self, direction: Direction) -> Callable[[], Any]:
        """Return the call to be measured."""
        if self.calls is None:
            raise ValueError(f"{self.peer.name} was not prepared for {self.problem}")
        return _call(self.calls, direction)

    def fail(self, direction: Direction, error: Exception) -> None:
        """Record that a direction ended in an exception."""
        self.outcomes[direction] = self.outcomes[direction]._replace(status="failed", note=first_line(error))

    def row(self, direction: Direction, measures: dict[str, float]) -> Row:
        """Return a direction's figure."""
        outcome = self.outcomes[direction]
        return Row(
            point=str(self.problem),
            problem=self.problem.to_dict(),
            direction=direction,
            peer=self.peer.name,
            ours=self.peer.ours,
            status=outcome.status,
            note=outcome.note,
            measures=measures,
            checked=self.checked,
            error=outcome.error,
            configuration=outcome.configuration,
        )


def try_peer(
    peer: Peer, problem: Problem, tensors: Tensors, judge: Judge, directions: Sequence[Direction]
) -> Trial:
    """Prepare a peer, run each direction once, and judge what comes out.

    Args:
        peer: who.
        problem, tensors: what is to be measured.
        judge: of this very call, or of a smaller one like it, which is then run instead.
        directions: that are to be measured.
    """
    trial = Trial(peer, problem, str(judge.problem))
    for direction in directions:
        reasons = peer.unsupported_reasons(problem, direction)
        trial.outcomes[direction] = Outcome("unsupported", "; ".join(reasons)) if reasons else Outcome("ok")
    if not trial.ready():
        return trial
    try:
        with peer.scope():
            judged = peer.prepare(judge.problem, judge.tensors)
            for direction in trial.ready():
                trial.outcomes[direction] = _judge(judged, direction, judge)
            same = judge.problem is problem
            trial.calls = judged if same else peer.prepare(problem, tensors)
            for direction in trial.ready():
                configuration = _configuration(peer, problem, tensors, direction)
                trial.outcomes[direction] = trial.outcomes[direction]._replace(configuration=configuration)
    except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
        for direction in trial.ready():
            trial.fail(direction, error)
    return trial


def first_line(error: BaseException) -> str:
    """Return an exception's type and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def require_device(device: str, message: str, rows: Sequence[Row] = ()) -> None:
    """Make sure, after a peer has failed, that the device still works.

    Raises:
        DeviceLostError: it does not, for instance after an illegal memory access.
    """
    if device != "cuda":
        return
    try:
        torch.cuda.synchronize()
    except Exception as error:
        raise DeviceLostError(f"{message}: {first_line(error)}", rows) from error


def free_memory(device: str) -> None:
    """Give back what earlier points held."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _call(calls: Calls, direction: Direction) -> Callable[[], Any]:
    by_direction: dict[Direction, Callable[[], Any]] = {
        "fwd": calls.forward,
        "fwd+grad": calls.recorded,
        "bwd": calls.backward,
        "both": calls.both,
    }
    return by_direction[direction]


def _judge(calls: Calls, direction: Direction, judge: Judge) -> Outcome:
    try:
        result = _call(calls, direction)()
        named = _named(direction, result)
        verdict = judge.verdict(named)
    except Exception as error:  # noqa: BLE001 - as above
        return Outcome("failed", first_line(error))
    if verdict.message:
        return Outcome("wrong", verdict.message, verdict.error)
    return Outcome("ok", error=verdict.error)


def _named(direction: Direction, result: Any) -> dict[str, torch.Tensor]:
    """Name what a call returned."""
    if direction in ("fwd", "fwd+grad"):
        return {"out": result.detach()}
    out, gradients = (None, result) if direction == "bwd" else result
    named = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    return named if out is None else {"out": out, **named}


def _configuration(peer: Peer, problem: Problem, tensors: Tensors, direction: Direction) -> str | None:
    try:
        return peer.configuration(problem, tensors, direction)
    except Exception as error:  # noqa: BLE001 - a description that fails must not cost the measurement
        return f"unknown ({first_line(error)})"
