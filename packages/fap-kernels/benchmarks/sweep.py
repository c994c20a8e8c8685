"""Time candidate tile sizes of one kernel: what the configuration tables were chosen from.

    python packages/fap-kernels/benchmarks/sweep.py dkdv --head-dim 128 --configs 64,64,4,2 64,128,8,2

A configuration is BLOCK_M,BLOCK_N,warps,stages. All are compiled first, in as many processes as there are
cores, then timed in turn beside FlashAttention-2 (for dkdv and dq, beside its whole backward).
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
from typing import TYPE_CHECKING

import torch
from timing import FlashAttention2, Shape, heat, make_inputs, median, relative_error

from fap_kernels.backward.launch import ROW_PADDING, BackwardInputs, plan_delta, plan_dkdv, plan_dq
from fap_kernels.config import TileConfig
from fap_kernels.forward.launch import plan_forward
from fap_kernels.problem import AttentionProblem
from fap_kernels.target import target_of

if TYPE_CHECKING:
    from fap_kernels.launch import Launch

KERNELS = ("forward", "dkdv", "dq")


class Point:
    """The tensors of one shape, FlashAttention-2's results on them, and our launches."""

    def __init__(self, shape: Shape) -> None:
        self.tensors = make_inputs(shape)
        self.peer = FlashAttention2(*self.tensors, shape.causal)
        q, k, v, dout = self.tensors
        self.problem = AttentionProblem.describe(q, k, v, causal=shape.causal)
        self.target = target_of(q.device)
        self.outputs = {name: torch.empty_like(q) for name in ("out", "dq", "dk", "dv")}
        self.softmax_lse = self.peer.saved[1]
        rows = -(-shape.seqlen // ROW_PADDING) * ROW_PADDING
        vectors = (torch.empty(shape.batch, shape.nheads, rows, device=q.device) for _ in range(2))
        self.inputs = BackwardInputs(q, k, v, dout, *vectors, None, None)
        plan_delta(self.problem, self.peer.out, self.softmax_lse, None, self.inputs).run(q.device)

    def launch(self, kernel: str, config: TileConfig) -> Launch:
        q, k, v, _ = self.tensors
        out = self.outputs
        if kernel == "forward":
            lse = torch.empty_like(self.softmax_lse)
            return plan_forward(
                self.problem, self.target, q, k, v, out["out"], lse, None, None, config=config
            )
        if kernel == "dkdv":
            return plan_dkdv(self.problem, self.target, self.inputs, out["dk"], out["dv"], config)
        return plan_dq(self.problem, self.target, self.inputs, out["dq"], config)

    def error(self, kernel: str) -> float:
        dq, dk, dv = self.peer.backward()
        expected = {"forward": {"out": self.peer.out}, "dkdv": {"dk": dk, "dv": dv}, "dq": {"dq": dq}}[kernel]
        return max(relative_error(self.outputs[name], tensor) for name, tensor in expected.items())


def compile_all(kernel: str, shapes: list[Shape], configs: list[TileConfig]) -> None:
    """Fill Triton's cache; what does not compile is reported when it is timed."""
    jobs = list(itertools.product(shapes, configs))
    share = math.ceil(len(jobs) / (os.cpu_count() or 1))
    context = multiprocessing.get_context("spawn")
    chunks = (jobs[i : i + share] for i in range(0, len(jobs), share))
    processes = [context.Process(target=_compile, args=(kernel, chunk)) for chunk in chunks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()


def _compile(kernel: str, jobs: list[tuple[Shape, TileConfig]]) -> None:
    for shape, config in jobs:
        launch = Point(shape).launch(kernel, config)
        try:
            launch.kernel.warmup(**launch.arguments, num_warps=launch.num_warps, grid=(launch.programs,))
        except Exception as error:  # noqa: BLE001 - a configuration that fails must not stop the others
            print(f"{config}: {error}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernel", choices=KERNELS)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128])
    parser.add_argument("--seqlens", type=int, nargs="+", default=[2048, 16384])
    parser.add_argument("--masks", choices=("full", "causal"), nargs="+", default=["full", "causal"])
    parser.add_argument("--configs", nargs="+", required=True)
    options = parser.parse_args()
    configs = [TileConfig(*map(int, text.split(","))) for text in options.configs]
    shapes = [
        Shape(head_dim, seqlen, mask == "causal")
        for head_dim, mask, seqlen in itertools.product(options.head_dim, options.masks, options.seqlens)
    ]
    # Kernels depend on the mask and the head dimension, not on the length.
    compile_all(options.kernel, [shape for shape in shapes if shape.seqlen == options.seqlens[0]], configs)
    heat()
    for shape in shapes:
        point = Point(shape)
        theirs = median(point.peer.forward if options.kernel == "forward" else point.peer.backward)
        mask = "causal" if shape.causal else "full"
        print(f"{options.kernel} d{shape.head_dim} {mask} {shape.seqlen}: FA2 {theirs:.3f} ms")
        for config in configs:
            print(f"  {_describe(config)}  {_time(point, options.kernel, config, theirs)}", flush=True)


def _describe(config: TileConfig) -> str:
    return f"{config.block_m},{config.block_n},{config.num_warps},{config.num_stages}"


def _time(point: Point, kernel: str, config: TileConfig, theirs: float) -> str:
    try:
        launch = point.launch(kernel, config)
        launch.run(point.problem.device)
        ours = median(lambda: launch.run(point.problem.device))
    except Exception as error:  # noqa: BLE001 - e.g. too much shared memory: the others still count
        return f"{type(error).__name__}: {str(error)[:80]}"
    error = point.error(kernel)
    return f"{ours:.3f} ms  {theirs / ours:.2f}x  error {error:.1e}" + ("" if error < 1e-2 else "  WRONG")


if __name__ == "__main__":
    main()
