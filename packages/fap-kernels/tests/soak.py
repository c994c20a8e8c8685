"""Random problems by the thousand on a Hopper GPU: none may hang, fail, or differ from PyTorch.

    python packages/fap-kernels/tests/soak.py --problems 10000 --jobs 16 --seed 0

First a pool of processes compiles, a pass of one kind of problem at a time, the longest first. Then the
problems run in batches, which find Triton's cache filled, each in a process of its own under a timeout,
several at a time on one GPU. What fails is named with the command that runs it alone:

    python packages/fap-kernels/tests/soak.py --seed 0 --only 4711

It lies beside the tests, since it judges, and is none, since it takes four minutes of an H200 and 16 cores.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

MOST_HANDED_BACK = 0.1
"""Of all passes; more, and the soak is not of what it says."""
FEW_PROCESSORS = 5
"""So many does the GPU seem to have for every second problem of a kind: programs then have several tiles."""
STUCK = 30.0
"""Seconds at one problem after which a batch that is stopped for want of time is taken to hang."""


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


def run_batch(numbers: range, seed: int, device: str) -> Iterator[Result]:
    """Run problems one after the other; say before each which it is, so that a hang has a name."""
    from soak_problems import check, draw, processors_seen, variants

    kinds = variants(seed)
    for number in numbers:
        print(number, flush=True)
        problem = draw(kinds[number % len(kinds)], number, seed)
        try:
            with processors_seen(FEW_PROCESSORS if number // len(kinds) % 2 else None):
                verdict = check(problem, device)
        except Exception:  # noqa: BLE001 - whatever it is, it goes with the problem's number
            yield Result(1, wrong=[(number, f"{problem}\n{traceback.format_exc()}")])
            return  # an error of the GPU fails every later call too
        passes = Counter(f"{name} on Hopper" for name in verdict.on_hopper)
        passes.update(f"{name} handed back" for name in verdict.handed_back)
        yield Result(1, passes, verdict.errors, [(number, f"{problem}: {text}") for text in verdict.wrong])


@dataclass
class Batch:
    """A process with its problems, and what it has said."""

    numbers: range
    process: subprocess.Popen[bytes]
    output: Path
    found: Path
    deadline: float

    @classmethod
    def start(cls, command: list[str], numbers: range, folder: Path, timeout: float) -> Batch:
        name = f"{numbers[0]}-{numbers.step}"
        output, found = folder / f"{name}.txt", folder / f"{name}.jsonl"
        found.touch()
        steps = f"{numbers.start}:{numbers.stop}:{numbers.step}"
        with output.open("wb") as file:
            process = subprocess.Popen(
                [*command, "--batch", steps, "--found", str(found)], stdout=file, stderr=subprocess.STDOUT
            )
        return cls(numbers, process, output, found, time.monotonic() + timeout)

    def ended(self) -> bool:
        if self.process.poll() is None and time.monotonic() < self.deadline:
            return False
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        return True

    def collect(self, result: Result, stopped: bool = False) -> None:
        """Add what it found; that it did not come to its end is the fault of the problem that it was at.

        Args:
            stopped: that was for want of time, and is nobody's fault, if it was not at one problem for long.
        """
        # A line that was being written when the process was killed has no end.
        text, _, _ = self.found.read_text().rpartition("\n")
        told = [json.loads(line) for line in text.splitlines()]
        for entry in told:
            result.add(**entry)
        code = self.process.poll()
        complete = len(told) == len(self.numbers) or any(entry["wrong"] for entry in told)
        latest = max(path.stat().st_mtime for path in (self.output, self.found))
        if (code == 0 and complete) or (stopped and time.time() - latest < STUCK):
            return
        lines = self.output.read_text(errors="replace").splitlines()
        number = next((int(line) for line in reversed(lines) if line.isdigit()), self.numbers[0])
        why = "did not end in time" if code in (None, -9) else f"ended with code {code}"
        if code == 0:
            why = f"told of {len(told)} of {len(self.numbers)} problems"
        result.wrong.append((number, "\n".join((f"its process {why}", *lines[-20:]))))


def run_batches(
    command: list[str],
    batches: list[range],
    jobs: int,
    timeout: float,
    result: Result,
    seconds: float = math.inf,
) -> None:
    """Run ``command --batch ...`` for each, ``jobs`` at a time.

    After ``seconds`` none is started, and those that run are stopped; what they have done by then counts.
    """
    waiting, running = batches[::-1], []
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:
        try:
            while (waiting or running) and time.monotonic() < end:
                while waiting and len(running) < jobs:
                    running.append(Batch.start(command, waiting.pop(), Path(folder), timeout))
                for batch in [batch for batch in running if batch.ended()]:
                    running.remove(batch)
                    batch.collect(result)
                time.sleep(0.05)
        finally:
            stopped = [batch for batch in running if batch.process.poll() is None]
            for batch in stopped:
                batch.process.kill()
            for batch in running:
                batch.process.wait()
        for batch in running:
            batch.collect(result, batch in stopped)


def split(problems: int, size: int) -> list[range]:
    """The batches."""
    return [range(low, min(low + size, problems)) for low in range(0, problems, size)]


def compilations(seed: int) -> list[tuple[int, str]]:
    """Of each kind of problem its number and a pass, those that take longest to compile first."""
    from soak_problems import variants

    jobs = [
        (number, name, variant.head_dim)
        for number, variant in enumerate(variants(seed))
        for name in ("forward", "backward")
        if getattr(variant, name)
    ]
    jobs.sort(key=lambda job: (job[1] == "backward", job[2]), reverse=True)
    return [(number, name) for number, name, _ in jobs]


def compile_one(number: int, name: str, seed: int, device: str) -> str | None:
    """Run one problem's pass, for what that compiles; what goes wrong is for the batches to judge."""
    from soak_problems import check, draw, processors_seen, variants

    variant = variants(seed)[number]
    problem = draw(variant, number, seed)
    alone = replace(variant, forward=name == "forward", backward=name == "backward")
    try:
        for processors in (None, FEW_PROCESSORS):
            with processors_seen(processors):
                check(replace(problem, variant=alone), device)
    except Exception:  # noqa: BLE001 - it goes with the problem's number
        return f"{name} of {problem}\n{traceback.format_exc()}"
    return None


def compile_all(jobs: int, seed: int, device: str, timeout: float) -> list[tuple[int, str]]:
    """Fill Triton's cache; what went wrong, by the number of a problem."""
    wrong = []
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"))
    tasks = {
        pool.submit(compile_one, number, name, seed, device): (number, name)
        for number, name in compilations(seed)
    }
    try:
        for task in as_completed(tasks, timeout):
            try:
                text = task.result()
            except Exception as error:  # noqa: BLE001 - a process of the pool has died
                text = f"{tasks[task][1]}: {error!r}"
            if text is not None:
                wrong.append((tasks[task][0], text))
    except TimeoutError:
        late = [job for task, job in tasks.items() if not task.done()]
        wrong += [(number, f"{name} is not compiled after {timeout:.0f} s") for number, name in late]
        for process in multiprocessing.active_children():
            process.kill()
    pool.shutdown(cancel_futures=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=10_000)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--size", type=int, default=625, help="problems of a batch")
    # With 16 at a time on an H200 one takes up to 190.
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds for a batch")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop after so many, whatever is left"
    )
    parser.add_argument("--compile-timeout", type=float, default=600.0, help="seconds for compiling all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", type=int, help="run this one problem here")
    parser.add_argument("--batch", help=argparse.SUPPRESS)
    parser.add_argument("--found", default=os.devnull, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.batch is not None:
        for found in run_batch(range(*map(int, options.batch.split(":"))), options.seed, options.device):
            with Path(options.found).open("a") as file:
                file.write(json.dumps(found.__dict__) + "\n")
        return 0
    if options.only is not None:
        (found,) = run_batch(range(options.only, options.only + 1), options.seed, options.device)
        return report(found, options.seed)
    begin = time.monotonic()
    wrong = compile_all(options.jobs, options.seed, options.device, options.compile_timeout)
    passes = len(compilations(options.seed))
    print(f"{passes} passes compiled, {len(wrong)} failed: {time.monotonic() - begin:.0f} s", flush=True)
    result = Result(wrong=wrong)
    if not wrong:
        command = [sys.executable, __file__, "--seed", str(options.seed), "--device", options.device]
        begin, batches = time.monotonic(), split(options.problems, options.size)
        run_batches(command, batches, options.jobs, options.timeout, result, options.seconds)
        seconds = time.monotonic() - begin
        print(f"{result.problems} of {options.problems} problems ran: {seconds:.0f} s", flush=True)
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
