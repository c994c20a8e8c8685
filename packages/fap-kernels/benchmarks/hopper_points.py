"""The points that ``sweep_hopper.py`` times, and what runs on them."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from builds import HERE, Build
from timing import WIDTH, Shape, make_inputs
from torch.nn.attention import SDPBackend, sdpa_kernel

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TOKENS_PACKED = 65536
TABLE = "table"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PASSES = {"fwd": "forward", "bwd": "backward"}


class Candidate(NamedTuple):
    """A configuration of a build: as it was written, and the build's name."""

    text: str
    build: str
    config: str

    @classmethod
    def parse(cls, text: str, builds: Mapping[str, Build]) -> Candidate:
        """Read ``[BUILD:]CONFIG``, or a build alone, which stands for what its table says."""
        build, colon, config = text.partition(":")
        if colon and build not in builds:
            raise ValueError(f"{text!r} must begin with a build, any of {', '.join(builds)}")
        if colon:
            return cls(text, build, config)
        return cls(text, text, TABLE) if text in builds else cls(text, HERE, text)


class Task(NamedTuple):
    """A point, as it was written, and the candidates to time there."""

    head_dim: int
    mask: str
    length: str
    direction: str
    dtype: str
    group: int
    candidates: tuple[Candidate, ...]

    @classmethod
    def parse(cls, text: str, builds: Mapping[str, Build]) -> Task:
        """Read ``HEAD_DIM MASK LENGTH [fwd|bwd] [bf16|fp16] [groupN]: CANDIDATE ...``.

        Raises:
            ValueError: it is written differently, or the group does not divide the heads.
        """
        point, _, candidates = text.partition(":")
        try:
            head_dim, mask, length, *rest = point.split()
            number = int(head_dim)
        except ValueError:
            raise ValueError(
                f"a point is HEAD_DIM MASK LENGTH, as in '128 causal 2048', got {point!r}"
            ) from None
        direction, dtype, group = "fwd", "bf16", 1
        for word in rest:
            if word in PASSES:
                direction = word
            elif word in DTYPES:
                dtype = word
            elif word.startswith("group") and word.removeprefix("group").isdigit():
                group = int(word.removeprefix("group"))
            else:
                raise ValueError(f"{word!r} in {point!r} is no direction, dtype or group")
        parsed = tuple(Candidate.parse(candidate, builds) for candidate in candidates.split())
        task = cls(number, mask, length, direction, dtype, group, parsed)
        if group < 1 or task.nheads % group:
            raise ValueError(f"{point!r} has {task.nheads} heads, which are no groups of {group}")
        return task

    @property
    def name(self) -> str:
        """The point, in words."""
        group = f" group{self.group}" if self.group > 1 else ""
        return f"d{self.head_dim} {self.mask} {self.length} {self.direction} {self.dtype}{group}"

    @property
    def causal(self) -> bool:
        """Whether the mask is causal and nothing else."""
        return self.mask.partition("+")[0] == "causal"

    @property
    def plain(self) -> bool:
        """Whether other implementations have such calls."""
        return self.mask in ("full", "causal") and self.lengths is None and self.group == 1

    @property
    def nheads(self) -> int:
        """Query heads, of which ``group`` share a key head."""
        return WIDTH // self.head_dim

    @property
    def lengths(self) -> list[int] | None:
        """Of packed sequences, or None."""
        if self.length == "mixed":
            return draw_lengths(TOKENS_PACKED)
        if self.length.startswith("packed"):
            length = int(self.length.removeprefix("packed"))
            return [length] * (TOKENS_PACKED // length)
        return None

    def options(self, device: str) -> dict[str, Any]:
        """Of the problem."""
        mask, *features = self.mask.split("+")
        options: dict[str, Any] = {"causal": mask == "causal"}
        if mask.startswith("window"):
            options["window_size"] = (int(mask.removeprefix("window")) - 1, 0)
        if "softcap" in features:
            options["softcap"] = 30.0
        if "alibi" in features:
            slopes = [2.0 ** (-8 * (head + 1) / self.nheads) for head in range(self.nheads)]
            options["alibi_slopes"] = torch.tensor(slopes, device=device)
        return options


def draw_lengths(tokens: int) -> list[int]:
    """Lengths from a log-normal whose median is 1000, the last cut to fit; the same each time."""
    rng, lengths = random.Random(0), []
    while sum(lengths) < tokens:
        lengths.append(min(max(int(rng.lognormvariate(math.log(1000.0), 1.0)), 1), tokens - sum(lengths)))
    return lengths


def configure(text: str, config_type: type[Any], row: Any) -> Any:
    """Return a configuration as it was written.

    Args:
        text: "table" for ``row``; fields by name, as in ``turns,no_paired,stages=3``, to replace in it; or
            numbers and fields of a configuration of its own, as in ``128,2,64,4,persistent``.
        config_type: the class of configurations.
        row: what the table says, None where that is the portable kernel.

    Raises:
        ValueError: a word is neither a number nor a field, or there is nothing to replace it in.
    """
    if text == TABLE:
        return row
    numbers: list[int] = []
    options: dict[str, Any] = {}
    names = {field.name for field in fields(config_type)}
    for word in text.split(","):
        name, _, value = word.partition("=")
        if word.isdigit():
            numbers.append(int(word))
        elif name.removeprefix("no_") in names:
            options[name.removeprefix("no_")] = int(value) if value else not name.startswith("no_")
        else:
            raise ValueError(
                f"{word!r} in {text!r} is neither a number nor a field of {config_type.__name__}"
            )
    if numbers:
        return config_type(*numbers, **options)
    if row is None:
        raise ValueError(f"the table has no configuration here in which {text!r} could replace anything")
    return replace(row, **options)


class Point:
    """The tensors of a task, and what runs on them. Results are the same tensors each time."""

    def __init__(self, task: Task, builds: Mapping[str, Build]) -> None:
        self.task, self.builds = task, builds
        self.options = task.options("cuda")
        lengths, self.bounds = task.lengths, None
        dtype, nheads_k = DTYPES[task.dtype], task.nheads // task.group
        if lengths is None:
            shape = Shape(task.head_dim, int(task.length), task.causal)
            self.q, self.k, self.v, self.dout = make_inputs(shape, dtype)
            self.flops = shape.flops
        else:
            generator = torch.Generator("cuda").manual_seed(0)
            size = (1, sum(lengths), task.nheads, task.head_dim)
            self.q, self.k, self.v, self.dout = (
                torch.randn(size, device="cuda", dtype=dtype, generator=generator) for _ in range(4)
            )
            ends = [0, *itertools.accumulate(lengths)]
            self.bounds = torch.tensor(ends, dtype=torch.int32, device="cuda")
            share = 0.5 if task.causal else 1.0
            self.flops = sum(4 * task.nheads * n * n * task.head_dim * share for n in lengths)
        if task.direction == "bwd":
            self.flops *= 2.5
        self.k, self.v = (x[:, :, :nheads_k].contiguous() for x in (self.k, self.v))
        self.lengths = lengths
        self.out, self.dq = torch.empty_like(self.q), torch.empty_like(self.q)
        self.dk, self.dv = torch.empty_like(self.k), torch.empty_like(self.v)
        vector = (self.q.shape[0], self.q.shape[2], self.q.shape[1])
        self.lse = torch.empty(vector, device="cuda", dtype=torch.float32)
        if task.direction == "bwd":
            out, lse, _ = self.portable("fwd")
            self.out, self.lse = out.view_as(self.out), lse.view_as(self.lse)

    @property
    def results(self) -> list[torch.Tensor]:
        """What a run fills."""
        return [self.out] if self.task.direction == "fwd" else [self.dq, self.dk, self.dv]

    def portable(self, direction: str) -> tuple[torch.Tensor, ...]:
        """Return what the portable kernels return for a pass, "fwd" or "bwd"."""
        kernels = Build().module()
        given = {"q": self.q, "k": self.k, "v": self.v}
        if direction == "bwd":
            given |= {"dout": self.dout, "out": self.out, "softmax_lse": self.lse}
        with kernels.use_schedule("portable"):
            if self.lengths is None:
                attention = getattr(kernels, f"attention_{PASSES[direction]}")
                return tuple(attention(**given, **self.options))
            attention = getattr(kernels, f"attention_varlen_{PASSES[direction]}")
            longest = max(self.lengths)
            return tuple(
                attention(
                    **{name: x[0] for name, x in given.items()},
                    cu_seqlens_q=self.bounds,
                    cu_seqlens_k=self.bounds,
                    max_seqlen_q=longest,
                    max_seqlen_k=longest,
                    **self.options,
                )
            )

    def hopper(self, candidate: Candidate) -> Callable[[], Any]:
        """Return a run of a build's Hopper kernels.

        Raises:
            LookupError: the build's table has the portable kernels here.
        """
        build = self.builds[candidate.build]
        packing = None
        q, k, v = (x if self.lengths is None else x[0] for x in (self.q, self.k, self.v))
        if self.lengths is not None:
            describe = build.module("packing").Packing.describe
            packing = describe(q, k, self.bounds, self.bounds, max(self.lengths), max(self.lengths))
        problem = build.module().AttentionProblem.describe(
            q, k, v, packing=packing, needs_grad=self.task.direction == "bwd", **self.options
        )
        table = build.module("hopper.config")
        forward = self.task.direction == "fwd"
        row = table.choose(table.FORWARD if forward else table.BACKWARD, problem).config
        config = configure(candidate.config, table.HopperConfig if forward else table.BackwardConfig, row)
        if config is None:
            raise LookupError("the table says the portable kernels")
        plan = self._plan_forward if forward else self._plan_backward
        launches = plan(build, problem, packing, config)

        def run() -> None:
            for launch in launches:
                launch.run(self.q.device)

        return run

    def _plan_forward(self, build: Build, problem: Any, packing: Any, config: Any) -> list[Any]:
        processors = build.module("target").processors_of(self.q.device)
        tensors = (self.q, self.k, self.v, self.out, self.lse, self.options.get("alibi_slopes"))
        plan = build.module("hopper.launch").plan_hopper_forward
        launches, _ = plan(problem, processors, *tensors, packing, config)
        return list(launches)

    def _plan_backward(self, build: Build, problem: Any, packing: Any, config: Any) -> list[Any]:
        processors = build.module("target").processors_of(self.q.device)
        padded_rows = build.module("backward.config").padded_rows
        rows = padded_rows(self.q.shape[1], problem.batch if problem.packed else 0)
        shape = (self.q.shape[0], problem.nheads, rows)
        lse, delta = (torch.empty(shape, dtype=torch.float32, device=self.q.device) for _ in range(2))
        slopes = self.options.get("alibi_slopes")
        inputs = build.module("backward.launch").BackwardInputs(
            self.q, self.k, self.v, self.dout, lse, delta, slopes, None, packing
        )
        outputs = (self.out, self.lse, None, self.dq, self.dk, self.dv)
        plan = build.module("hopper.backward_launch").plan_hopper_backward
        launches, _ = plan(problem, processors, inputs, *outputs, config)
        return list(launches)

    def cudnn(self) -> Callable[[], Any]:
        """Return a run of cuDNN's forward."""
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))

        def run() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.task.causal)

        return run

    def runs(self, alone: bool) -> dict[str, Callable[[], Any] | str]:
        """What is to be timed, by name, or why it cannot be.

        Args:
            alone: leave out the portable kernel and cuDNN.
        """
        makers: dict[str, Callable[[], Callable[[], Any]]] = {}
        if not alone:
            makers["portable"] = lambda: lambda: self.portable(self.task.direction)
            if self.task.plain and self.task.direction == "fwd":
                makers["cudnn"] = self.cudnn
        for candidate in dict.fromkeys((Candidate(TABLE, HERE, TABLE), *self.task.candidates)):
            makers[candidate.text] = lambda candidate=candidate: self.hopper(candidate)
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
