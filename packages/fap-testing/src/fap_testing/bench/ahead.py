"""Compile in several processes what a run will need: they leave it in their compilers' caches on disk.

A dozen shapes of FlexAttention or of kernels in Triton take minutes to compile one after the other, while the
GPU waits.
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from fap_testing.bench.peers.base import Peer
    from fap_testing.bench.problem import Direction, Problem

__all__ = ["compile_ahead", "tasks"]


def tasks(points: Sequence[Problem], peers: Sequence[Peer]) -> list[tuple[Peer, Problem]]:
    """Return what there is to compile: every point of every peer that compiles."""
    return [(peer, point) for peer in peers if peer.compiles for point in points]


def compile_ahead(
    work: Sequence[tuple[Peer, Problem]], directions: Sequence[Direction], jobs: int
) -> Iterator[None]:
    """Run each piece of work once in one of ``jobs`` new processes, and yield as they end.

    What fails here fails again where it is measured, and is reported there.

    Raises:
        concurrent.futures.process.BrokenProcessPool: a process died.
    """
    # A fork of a process that has talked to the GPU cannot.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_alone) as pool:
        for _ in as_completed([pool.submit(_run_once, peer, point, directions) for peer, point in work]):
            yield


def _alone() -> None:
    """Keep TorchInductor from starting a process for every core in each of these."""
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def _run_once(peer: Peer, problem: Problem, directions: Sequence[Direction]) -> None:
    supported = [d for d in directions if not peer.unsupported_reasons(problem, d)]
    if not supported:
        return
    with peer.scope():
        calls = peer.prepare(problem, problem.draw())
        if any(direction in ("bwd", "both") for direction in supported):
            calls.both()
        else:
            calls.forward()
