"""Time candidate configurations of the Hopper forward: what its table was chosen from.

    python packages/fap-kernels/benchmarks/sweep_hopper.py "128 causal 512: 128,2,64,4 128,2,128,2" ...

A point is a head dimension, a mask with options, and a length. The mask is ``full``, ``causal`` or
``window256``, causal with that many keys; ``+softcap`` and ``+alibi`` may follow. As a length, a number is
that of each of the sequences, which then are batch entries; ``packed2048`` packs 32 of 2048 one behind the
other, ``mixed`` 65,536 tokens in lengths drawn from a log-normal. A configuration is
width,warpgroups,block_n,stages and fields of HopperConfig by name, as in ``persistent`` or ``beside=2``. All
are compiled first, in as many processes as there are cores, then take turns, each warmed up by itself, beside
what the table says, the portable kernel, and cuDNN where it has the call; ``--alone`` leaves these two out of
the turns, which take half as long then. A configuration is right if it agrees with the portable kernel.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import random
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from timing import WIDTH, Shape, heat, make_inputs, relative_error, take_turns
from torch.nn.attention import SDPBackend, sdpa_kernel

from fap_kernels import use_schedule
from fap_kernels.forward.launch import plan_forward
from fap_kernels.hopper.config import FORWARD, HopperConfig, choose
from fap_kernels.hopper.launch import plan_hopper_forward
from fap_kernels.packing import Packing
from fap_kernels.problem import AttentionProblem
from fap_kernels.target import processors_of, target_of

if TYPE_CHECKING:
    from collections.abc import Callable

TOKENS_PACKED = 65536


class Task(NamedTuple):
    """A point, as it was written, and the configurations to time there."""

    head_dim: int
    mask: str
    length: str
    configs: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Task:
        point, _, configs = text.partition(":")
        head_dim, mask, length = point.split()
        return cls(int(head_dim), mask, length, tuple(configs.split()))

    @property
    def name(self) -> str:
        return f"d{self.head_dim} {self.mask} {self.length}"

    @property
    def causal(self) -> bool:
        return self.mask.partition("+")[0] == "causal"

    def options(self, nheads: int) -> dict[str, Any]:
        """Of the problem."""
        mask, *features = self.mask.split("+")
        options: dict[str, Any] = {"causal": mask == "causal"}
        if mask.startswith("window"):
            options["window_size"] = (int(mask.removeprefix("window")) - 1, 0)
        if "softcap" in features:
            options["softcap"] = 30.0
        if "alibi" in features:
            options["alibi_slopes"] = torch.tensor(
                [2.0 ** (-8 * (head + 1) / nheads) for head in range(nheads)], device="cuda"
            )
        return options

    @property
    def lengths(self) -> list[int] | None:
        """Of packed sequences, or None."""
        if self.length == "mixed":
            return draw_lengths(TOKENS_PACKED)
        if self.length.startswith("packed"):
            length = int(self.length.removeprefix("packed"))
            return [length] * (TOKENS_PACKED // length)
        return None


def draw_lengths(tokens: int) -> list[int]:
    """Lengths from a log-normal whose median is 1000, the last cut to fit; the same each time."""
    rng, lengths = random.Random(0), []
    while sum(lengths) < tokens:
        lengths.append(min(max(int(rng.lognormvariate(math.log(1000.0), 1.0)), 1), tokens - sum(lengths)))
    return lengths


def parse_config(text: str) -> HopperConfig:
    numbers, options = [], {}
    names = {field.name for field in fields(HopperConfig)}
    for word in text.split(","):
        name, _, value = word.partition("=")
        if word.isdigit():
            numbers.append(int(word))
        elif name.removeprefix("no_") in names:
            options[name.removeprefix("no_")] = int(value) if value else not name.startswith("no_")
        else:
            raise ValueError(f"{word!r} in {text!r} is neither a number nor a field of HopperConfig")
    return HopperConfig(*numbers, **options)


class Point:
    """The tensors of a task, and what runs on them."""

    def __init__(self, task: Task) -> None:
        self.task = task
        lengths, packing = task.lengths, None
        nheads = max(WIDTH // task.head_dim, 1)
        options = task.options(nheads)
        self.slopes = options.get("alibi_slopes")
        if lengths is None:
            shape = Shape(task.head_dim, int(task.length), task.causal)
            self.q, self.k, self.v, _ = make_inputs(shape)
            self.flops = shape.flops
            self.problem = AttentionProblem.describe(self.q, self.k, self.v, **options)
        else:
            generator = torch.Generator("cuda").manual_seed(0)
            size = (sum(lengths), nheads, task.head_dim)
            q, k, v = (
                torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(3)
            )
            bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device="cuda")
            packing = Packing.describe(q, k, bounds, bounds, max(lengths), max(lengths))
            self.problem = AttentionProblem.describe(q, k, v, packing=packing, **options)
            self.q, self.k, self.v = q[None], k[None], v[None]
            share = 0.5 if task.causal else 1.0
            self.flops = sum(4 * nheads * n * n * task.head_dim * share for n in lengths)
        self.packing = packing
        self.out = torch.empty_like(self.q)
        self.lse = torch.empty(
            self.q.shape[0], self.q.shape[2], self.q.shape[1], device="cuda", dtype=torch.float32
        )

    def portable(self) -> Callable[[], Any]:
        target = target_of(self.q.device)
        launch = plan_forward(
            self.problem, target, self.q, self.k, self.v, self.out, self.lse, self.slopes, None, self.packing
        )
        return lambda: launch.run(self.q.device)

    def hopper(self, config: HopperConfig | None) -> Callable[[], Any]:
        processors = processors_of(self.q.device)
        launches, _ = plan_hopper_forward(
            self.problem,
            processors,
            self.q,
            self.k,
            self.v,
            self.out,
            self.lse,
            self.slopes,
            self.packing,
            config,
        )
        return lambda: [launch.run(self.q.device) for launch in launches]

    def cudnn(self) -> Callable[[], Any]:
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))

        def run() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.task.causal)

        return run

    def candidates(self, alone: bool) -> dict[str, Callable[[], Any] | str]:
        """What is to be timed, by name, or why it cannot be."""
        makers: dict[str, Callable[[], Any]] = {}
        if not alone:
            makers["portable"] = self.portable
            if self.packing is None and self.task.mask in ("full", "causal"):
                makers["cudnn"] = self.cudnn
        with use_schedule("hopper"):
            if choose(FORWARD, self.problem).config is not None:
                makers["table"] = lambda: self.hopper(None)
        for text in self.task.configs:
            makers[text] = lambda text=text: self.hopper(parse_config(text))
        made: dict[str, Callable[[], Any] | str] = {}
        for name, make in makers.items():
            try:
                run = make()
                run()
                torch.cuda.synchronize()
                made[name] = run
            except Exception as error:  # noqa: BLE001, PERF203 - too much shared memory: the others still count
                made[name] = f"{type(error).__name__}: {str(error)[:90]}"
        return made


def compile_all(tasks: list[Task]) -> None:
    """Fill Triton's cache; what does not compile is reported when it is timed."""
    jobs = [task._replace(configs=(config,)) for task in tasks for config in (*task.configs, "")]
    processes = []
    context = multiprocessing.get_context("spawn")
    share = math.ceil(len(jobs) / (os.cpu_count() or 1))
    for first in range(0, len(jobs), share):
        processes.append(context.Process(target=_compile, args=(jobs[first : first + share],)))
        processes[-1].start()
    for process in processes:
        process.join(120)
        process.kill()


def _compile(jobs: list[Task]) -> None:
    for job in jobs:
        point = Point(job._replace(configs=()))
        (config,) = job.configs
        try:
            if config:
                point.hopper(parse_config(config))()
            else:
                point.candidates(alone=False)
        except Exception as error:  # noqa: BLE001
            print(f"{job.name} {config}: {error}"[:200], flush=True)
    torch.cuda.synchronize()


def measure(task: Task, alone: bool) -> None:
    point = Point(task)
    point.portable()()
    expected = point.out.clone()
    candidates = point.candidates(alone)
    times = take_turns({name: run for name, run in candidates.items() if not isinstance(run, str)})
    print(task.name)
    for name, run in candidates.items():
        if isinstance(run, str):
            print(f"    {name:60} {run}", flush=True)
            continue
        milliseconds = times[name]
        wrong = ""
        if name != "cudnn":
            point.out.fill_(torch.nan)
            run()
            error = relative_error(point.out, expected)
            wrong = "" if error < 1e-2 else f"  WRONG {error:.1e}"
        speed = point.flops / milliseconds * 1e-9
        print(f"    {name:60} {milliseconds:8.4f} ms {speed:6.0f} TFLOP/s{wrong}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tasks", nargs="+", type=Task.parse, metavar="POINT: CONFIG ...")
    parser.add_argument("--alone", action="store_true", help="time no other kernels beside them")
    options = parser.parse_args()
    compile_all(options.tasks)
    heat()
    for task in options.tasks:
        measure(task, options.alone)


if __name__ == "__main__":
    main()
