"""Time candidate configurations of the Hopper kernels, and other builds of them, side by side.

    python packages/fap-kernels/benchmarks/sweep_hopper.py "128 causal 512: 128,2,64,4 128,2,128,2" ...
    git worktree add /tmp/before COMMIT
    python packages/fap-kernels/benchmarks/sweep_hopper.py --build before=/tmp/before \
        "128 causal 2048 bwd: before no_founded,ordered before:ordered"

That is what the tables were chosen from, and where "old and new in one run" comes from.

A point is a head dimension, a mask with options, and a length; then, if they are to differ, a direction
(``fwd`` or ``bwd``), a dtype (``bf16`` or ``fp16``) and query heads for each key head (``group4``). The mask
is ``full``, ``causal`` or ``window256``, causal with that many keys; ``+softcap`` and ``+alibi`` may follow.
As a length, a number is that of each of the sequences, which then are batch entries; ``packed2048`` packs 32
of 2048 one behind the other, ``mixed`` 65,536 tokens in lengths drawn from a log-normal.

A candidate is fields of HopperConfig or BackwardConfig by name, as in ``no_turns`` or ``stages=3``, that
replace those of the table's row; or begins with numbers, and is a configuration of its own:
width,warpgroups,block_n,stages of the forward, width,block_m,stages of the backward. A build and a colon may
stand before it; a build alone is what its table says.

All are compiled first, in as many processes as there are cores, then take turns, each warmed up by itself,
beside what the table says, the portable kernel, and cuDNN's forward where it has the call; ``--alone`` leaves
these two out of the turns. A candidate is right if it agrees with the portable kernel.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
from typing import TYPE_CHECKING

import torch
from builds import Build
from hopper_points import Point, Task
from timing import WARM_MS, heat, relative_error, take_turns

if TYPE_CHECKING:
    from collections.abc import Mapping

CLOSE = 1e-2
"""Relative error against the portable kernels, which round elsewhere."""


def compile_all(tasks: list[Task], builds: Mapping[str, Build]) -> None:
    """Fill Triton's cache; what does not compile is reported when it is timed."""
    jobs = [
        task._replace(candidates=chosen)
        for task in tasks
        for chosen in ((), *((candidate,) for candidate in task.candidates))
    ]
    processes = []
    context = multiprocessing.get_context("spawn")
    share = math.ceil(len(jobs) / (os.cpu_count() or 1))
    for first in range(0, len(jobs), share):
        processes.append(context.Process(target=_compile, args=(jobs[first : first + share], builds)))
        processes[-1].start()
    for process in processes:
        process.join(120)
        process.kill()


def _compile(jobs: list[Task], builds: Mapping[str, Build]) -> None:
    for job in jobs:
        point = Point(job, builds)
        for candidate in job.candidates:
            try:
                point.hopper(candidate)()
            except Exception as error:  # noqa: BLE001, PERF203
                print(f"{job.name} {candidate.text}: {error}"[:200], flush=True)
        if not job.candidates:
            point.runs(alone=False)
    torch.cuda.synchronize()


def measure(task: Task, builds: Mapping[str, Build], alone: bool, rounds: int, warm_ms: float) -> bool:
    """Print a point's figures; return whether all that ran was right."""
    point = Point(task, builds)
    expected = point.portable(task.direction)[: len(point.results)]  # the forward returns its LSE as well
    runs = point.runs(alone)
    possible = {name: run for name, run in runs.items() if not isinstance(run, str)}
    times = take_turns(possible, rounds, warm_ms)
    print(task.name)
    right = True
    for name, run in runs.items():
        if isinstance(run, str):
            print(f"    {name:60} {run}", flush=True)
            continue
        wrong = ""
        if name not in ("cudnn", "portable"):
            for x in point.results:
                x.fill_(torch.nan)
            run()
            error = max(relative_error(x, y) for x, y in zip(point.results, expected, strict=True))
            wrong = "" if error < CLOSE else f"  WRONG {error:.1e}"
            right = right and not wrong
        speed = point.flops / times[name] * 1e-9
        ratio = times["table"] / times[name] if "table" in times else math.nan
        print(f"    {name:60} {times[name]:8.4f} ms {speed:6.0f} TFLOP/s {ratio:6.3f}{wrong}", flush=True)
    return right


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="+", metavar="POINT: CANDIDATE ...")
    parser.add_argument(
        "--build",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="another build, or a checkout of it",
    )
    parser.add_argument("--alone", action="store_true", help="time no other kernels beside them")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each")
    parser.add_argument("--warm-ms", type=float, default=WARM_MS, help="of a turn that do not count")
    options = parser.parse_args()
    try:
        builds = {build.name: build for build in (Build(), *map(Build.parse, options.build))}
        tasks = [Task.parse(text, builds) for text in options.tasks]
    except ValueError as error:
        parser.error(str(error))
    compile_all(tasks, builds)
    heat()
    results = [measure(task, builds, options.alone, options.rounds, options.warm_ms) for task in tasks]
    return 0 if all(results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
