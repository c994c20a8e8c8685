"""Random problems by the thousand on a Hopper GPU: none may hang, fail, or differ from the portable kernels.

    python packages/fap-kernels/tests/soak.py --problems 10000 --jobs 16 --seed 0

The problems run in batches, each in a process of its own under a timeout, several at a time on one GPU. The
first batches take one problem for each kernel that is to be compiled, so that the others find Triton's cache
filled. What fails is named with the command that runs it alone:

    python packages/fap-kernels/tests/soak.py --seed 0 --only 4711

It lies beside the tests, since it judges, and is none, since it takes a minute of a GPU and of many cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

MOST_HANDED_BACK = 0.1
"""Of all passes; more, and the soak is not of what it says."""


@dataclass
class Result:
    """What came of batches: how many problems and passes ran where, and what went wrong."""

    problems: int = 0
    passes: Counter[str] = field(default_factory=Counter)
    errors: dict[str, float] = field(default_factory=dict)
    wrong: list[tuple[int, str]] = field(default_factory=list)

    def add(self, problems: int, passes: dict[str, int], errors: dict[str, float], wrong: list[Any]) -> None:
        self.problems += problems
        self.passes.update(passes)
        for name, error in errors.items():
            self.errors[name] = max(error, self.errors.get(name, 0.0))
        self.wrong += [(number, text) for number, text in wrong]


def run_batch(numbers: range, seed: int, device: str) -> Result:
    """Run problems one after the other; say before each which it is, so that a hang has a name."""
    from soak_problems import check, draw, variants

    # Memory is filled with NaN when it is allocated: what no kernel writes is seen.
    torch.use_deterministic_algorithms(True)
    kinds = variants(seed)
    result = Result()
    for number in numbers:
        print(number, flush=True)
        problem = draw(kinds[number % len(kinds)], number, seed)
        try:
            verdict = check(problem, device)
        except Exception:  # noqa: BLE001 - whatever it is, it goes with the problem's number
            result.add(1, {}, {}, [(number, f"{problem}\n{traceback.format_exc()}")])
            break  # an error of the GPU fails every later call too
        passes = Counter(f"{name} on Hopper" for name in verdict.on_hopper)
        passes.update(f"{name} handed back" for name in verdict.handed_back)
        result.add(1, passes, verdict.errors, [(number, f"{problem}: {text}") for text in verdict.wrong])
    return result


@dataclass
class Batch:
    """A process with its problems, and what it has said."""

    numbers: range
    process: subprocess.Popen[bytes]
    output: Path
    deadline: float

    @classmethod
    def start(cls, command: list[str], numbers: range, folder: Path, timeout: float) -> Batch:
        output = folder / f"{numbers[0]}-{numbers.step}.txt"
        steps = f"{numbers.start}:{numbers.stop}:{numbers.step}"
        with output.open("wb") as file:
            process = subprocess.Popen([*command, "--batch", steps], stdout=file, stderr=subprocess.STDOUT)
        return cls(numbers, process, output, time.monotonic() + timeout)

    def ended(self) -> bool:
        if self.process.poll() is None and time.monotonic() < self.deadline:
            return False
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        return True

    def collect(self, result: Result) -> None:
        """Add what it found; that it did not come to its end is the fault of the problem that it was at."""
        lines = self.output.read_text(errors="replace").splitlines()
        if self.process.poll() == 0:
            result.add(**json.loads(lines[-1]))
            return
        number = next((int(line) for line in reversed(lines) if line.isdigit()), self.numbers[0])
        code = self.process.poll()
        why = "did not end in time" if code in (None, -9) else f"ended with code {code}"
        result.wrong.append((number, "\n".join((f"its process {why}", *lines[-20:]))))


def run_batches(command: list[str], batches: list[range], jobs: int, timeout: float, result: Result) -> None:
    """Run ``command --batch ...`` for each, ``jobs`` at a time."""
    waiting, running = batches[::-1], []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(Batch.start(command, waiting.pop(), Path(folder), timeout))
            for batch in [batch for batch in running if batch.ended()]:
                running.remove(batch)
                batch.collect(result)
            time.sleep(0.05)


def split(problems: int, kinds: int, jobs: int, size: int) -> tuple[list[range], list[range]]:
    """The batches that compile, one problem of each kind in all, and then the rest of the problems."""
    first = min(kinds, problems)
    compiling = [range(start, first, jobs) for start in range(min(jobs, first))]
    return compiling, [range(low, min(low + size, problems)) for low in range(first, problems, size)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--size", type=int, default=500, help="problems of a batch")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", type=int, help="run this one problem here")
    parser.add_argument("--batch", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.batch is not None:
        result = run_batch(range(*map(int, options.batch.split(":"))), options.seed, options.device)
        print(json.dumps(result.__dict__))
        return 0
    if options.only is not None:
        return report(
            run_batch(range(options.only, options.only + 1), options.seed, options.device), options.seed
        )
    from soak_problems import variants

    command = [sys.executable, __file__, "--seed", str(options.seed), "--device", options.device]
    compiling, rest = split(options.problems, len(variants(options.seed)), options.jobs, options.size)
    result = Result()
    for batches in (compiling, rest):
        begin, before = time.monotonic(), result.problems
        run_batches(command, batches, options.jobs, options.timeout, result)
        count = result.problems - before
        print(f"{count} problems in {len(batches)} processes: {time.monotonic() - begin:.0f} s", flush=True)
    return report(result, options.seed)


def report(result: Result, seed: int) -> int:
    """Print what came of it; the exit code."""
    handed_back = sum(count for name, count in result.passes.items() if "handed back" in name)
    print(f"{result.problems} problems, seed {seed}: {dict(result.passes)}")
    print("worst, of what is allowed:", {name: round(error, 3) for name, error in result.errors.items()})
    for number, text in result.wrong[:20]:
        print(f"WRONG {number} (run it alone: --seed {seed} --only {number}): {text}")
    if len(result.wrong) > 20:
        print(f"and {len(result.wrong) - 20} more")
    passes = sum(result.passes.values())
    if handed_back > MOST_HANDED_BACK * passes or not passes:
        print("too little ran on the Hopper schedules for this to say anything of them")
        return 1
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
