"""How much memory a call needs beyond its inputs, beside what its tensors account for."""

from __future__ import annotations

import json
import math
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from fap_testing.bench.measure import trials_at
from fap_testing.bench.trial import free_memory, require_device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fap_testing.bench.peers.base import Peer
    from fap_testing.bench.prefill import Prefill
    from fap_testing.bench.problem import Direction
    from fap_testing.bench.record import Row
    from fap_testing.bench.trial import Trial

__all__ = ["LINEAR", "accounted_bytes", "growth", "measure_memory"]

LINEAR = 1.1
"""The largest :func:`growth` that counts as linear: allocations are rounded up, some are of fixed size."""
_FLOAT32 = 4


def accounted_bytes(problem: Prefill, direction: Direction) -> int:
    """Count the bytes that a call's own results take at its peak.

    Forward: out and the log-sum-exp. Backward, out and the log-sum-exp being there already: dq, dk and dv,
    and one float32 for each row, ``rowsum(dout * out)``.
    """
    rows = problem.batch * problem.seqlen_q * problem.nheads
    queries = rows * problem.head_dim * problem.torch_dtype.itemsize
    keys = (
        problem.batch * problem.seqlen_k * problem.nheads_k * problem.head_dim * problem.torch_dtype.itemsize
    )
    forward, backward = queries + _FLOAT32 * rows, queries + 2 * keys + _FLOAT32 * rows
    return {"fwd": forward, "fwd+grad": forward, "bwd": backward, "both": forward + backward}[direction]


def measure_memory(problem: Prefill, peers: Sequence[Peer], directions: Sequence[Direction]) -> list[Row]:
    """Return one row for each peer and direction, with the peak of its extra bytes if it is right.

    Raises:
        DeviceLostError: a peer took the device down.
    """
    free_memory(problem.device)
    tensors = problem.draw()
    trials = trials_at(problem, tensors, peers, directions)
    rows: list[Row] = []
    for trial in trials:
        for direction in directions:
            measures: dict[str, float] = {}
            if direction in trial.ready():
                try:
                    measures = _peak(trial, problem, direction)
                except Exception as error:  # noqa: BLE001 - whatever a peer raises is its result
                    trial.fail(direction, error)
                    require_device(problem.device, f"{trial.peer.name} took the device down", rows)
            rows.append(trial.row(direction, measures))
        trial.calls = None  # what this peer keeps must not be in the next one's way
        free_memory(problem.device)
    return rows


def growth(rows: Sequence[Row]) -> float:
    """Return the power of the sequence length that the peak grows with, between the outermost points.

    1 is linear, 2 is a score matrix. NaN for fewer than two lengths.
    """
    points = sorted((row.problem["seqlen"], row.measures["bytes"]) for row in rows if row.status == "ok")
    if len({seqlen for seqlen, _ in points}) < 2:
        return math.nan
    (short, least), (long, most) = points[0], points[-1]
    return math.log(most / least) / math.log(long / short) if least > 0 and most > 0 else 0.0


def _peak(trial: Trial, problem: Prefill, direction: Direction) -> dict[str, float]:
    """Run a call once more, its workspaces and compiled code being there, and see how far memory rises."""
    call = trial.call(direction)
    with trial.peer.scope():
        call()
        free_memory(problem.device)
        peak = _peak_on_gpu(call) if problem.device == "cuda" else _peak_on_cpu(call)
    accounted = accounted_bytes(problem, direction)
    return {"bytes": float(peak), "accounted_bytes": float(accounted), "ratio": peak / accounted}


def _peak_on_gpu(call: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_on_cpu(call: Callable[[], Any]) -> int:
    """Add up what PyTorch's profiler sees its CPU allocator give and take back."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profiled.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    steps = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]"
    )
    return max(accumulate(size for _, size in steps), default=0)
