"""Time candidate tile sizes and split counts of attention to a KV cache.

    python packages/fap-kernels/benchmarks/sweep_decode.py --configs 64,4,3 128,4,2 --splits 0 8

One query a sequence, 32 query and 8 key heads, bf16, head dimension 128. GB/s are of keys and values read,
which are several times what the L2 cache holds; calls are replayed from CUDA graphs, as in serving. A
configuration is BLOCK_N,warps,stages; 0 splits is the number that the sizes choose. What the shipped
configurations reach, beside other implementations, is measured by ``fap-bench decode --graph``.
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any, NamedTuple

import torch
from timing import heat, relative_error
from triton.testing import do_bench_cudagraph

from fap_kernels.cache import Cache
from fap_kernels.config import TileConfig
from fap_kernels.decode.launch import plan_decode
from fap_kernels.problem import AttentionProblem
from fap_kernels.target import processors_of, target_of

NHEADS, NHEADS_K, HEAD_DIM = 32, 8, 128
TOLERANCE = 1e-2


class Shape(NamedTuple):
    batch: int
    seqlen: int

    @property
    def gigabytes(self) -> float:
        return 2 * self.batch * self.seqlen * NHEADS_K * HEAD_DIM * 2 / 1e9

    @classmethod
    def parse(cls, text: str) -> Shape:
        """A shape written as batch x seqlen, as in ``16x8192``."""
        batch, _, seqlen = text.partition("x")
        return cls(int(batch), int(seqlen))


SHAPES = ("16x8192", "64x4096", "128x1024", "1x65536")


def make_inputs(shape: Shape, page_size: int) -> tuple[torch.Tensor, ...]:
    """q, k_cache, v_cache, lengths and, with pages, their table in random order."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator)

    q = draw(shape.batch, 1, NHEADS, HEAD_DIM)
    k, v = (draw(shape.batch, shape.seqlen, NHEADS_K, HEAD_DIM) for _ in range(2))
    lengths = torch.full((shape.batch,), shape.seqlen, dtype=torch.int32, device="cuda")
    if not page_size:
        return q, k, v, lengths
    pages = shape.batch * shape.seqlen // page_size
    order = torch.randperm(pages, device="cuda", generator=generator)
    table = torch.empty_like(order)
    table[order] = torch.arange(pages, device="cuda")
    k, v = (x.view(pages, page_size, NHEADS_K, HEAD_DIM)[order].contiguous() for x in (k, v))
    return q, k, v, lengths, table.view(shape.batch, -1).to(torch.int32)


def peer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(*heads, enable_gqa=True)
    return out.transpose(1, 2)


def planned(tensors: tuple[torch.Tensor, ...], config: TileConfig, splits: int) -> Any:
    """A call that launches one configuration, and the tensor that it fills."""
    q, k, v, lengths, *table = tensors
    cache = Cache.describe(q, k, lengths, block_table=table[0] if table else None)
    problem = AttentionProblem.describe(q, k, v, cache=cache)
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[0], NHEADS, 1, device="cuda")
    launches = plan_decode(
        problem, target_of(q.device), processors_of(q.device), q, k, v, out, lse, None, cache, splits, config
    )

    def run() -> torch.Tensor:
        for launch in launches:
            launch.run(q.device)
        return out

    return run


def median(run: Any) -> float:
    """Median milliseconds of a call."""
    with torch.cuda.stream(torch.cuda.Stream()):
        return float(do_bench_cudagraph(run, rep=60, return_mode="median"))


def measure(shape: Shape, run: Any, expected: torch.Tensor) -> tuple[float, float]:
    error = relative_error(run(), expected)
    return shape.gigabytes / median(run) * 1e3, error


def sweep(options: argparse.Namespace) -> None:
    configs = [TileConfig(16, *map(int, text.split(","))) for text in options.configs]
    for shape in map(Shape.parse, options.batches):
        expected = peer(*make_inputs(shape, 0)[:3])
        for page_size in options.page_sizes:
            tensors = make_inputs(shape, page_size)
            print(f"{shape.batch} x {shape.seqlen}, page size {page_size}")
            for config, splits in itertools.product(configs, options.splits):
                try:
                    speed, error = measure(shape, planned(tensors, config, splits), expected)
                except Exception as failure:  # noqa: BLE001 - the other configurations still count
                    print(f"  {config} {type(failure).__name__}: {str(failure)[:80]}")
                    continue
                wrong = "" if error < TOLERANCE else "  WRONG"
                numbers = f"{config.block_n},{config.num_warps},{config.num_stages} splits {splits}"
                print(f"  {numbers}  {speed:.0f} GB/s  error {error:.1e}{wrong}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", required=True)
    parser.add_argument("--splits", type=int, nargs="+", default=[0])
    parser.add_argument("--batches", nargs="+", default=SHAPES, help="batch x seqlen, as in 16x8192")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[0, 16])
    options = parser.parse_args()
    heat()
    sweep(options)


if __name__ == "__main__":
    main()
