"""Attention to a KV cache: how fast the cache is read, beside PyTorch's FlashAttention-2.

    python packages/fap-kernels/benchmarks/decode.py
    python packages/fap-kernels/benchmarks/decode.py --configs 64,4,3 128,4,2 --splits 0 8

One query a sequence, 32 query and 8 key heads, bf16, head dimension 128. GB/s are of keys and values read,
which are several times what the L2 cache holds; calls are replayed from CUDA graphs, as in serving. A
configuration is BLOCK_N,warps,stages. Exits with 1 if a result is wrong or, without --configs, if a promise
is missed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from typing import Any, NamedTuple

import torch
from timing import heat, relative_error
from triton.testing import do_bench_cudagraph

from fap_kernels import attention_kvcache_forward
from fap_kernels.cache import Cache
from fap_kernels.config import TileConfig
from fap_kernels.decode.launch import plan_decode
from fap_kernels.problem import AttentionProblem
from fap_kernels.target import processors_of, target_of

NHEADS, NHEADS_K, HEAD_DIM = 32, 8, 128
TOLERANCE = 1e-2
PAGED_PROMISE = 0.9


class Shape(NamedTuple):
    batch: int
    seqlen: int
    promise: float  # GB/s

    @property
    def gigabytes(self) -> float:
        return 2 * self.batch * self.seqlen * NHEADS_K * HEAD_DIM * 2 / 1e9


SHAPES = (Shape(16, 8192, 4000), Shape(64, 4096, 4200), Shape(128, 1024, 3750), Shape(1, 65536, 3500))


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
    for shape in SHAPES:
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


def table() -> int:
    good = True
    print("| batch x keys | cache | GB/s | FA2 | error | |\n" + "|---" * 6 + "|")
    for shape in SHAPES:
        tensors = make_inputs(shape, 0)
        expected = peer(*tensors[:3])
        theirs = shape.gigabytes / median(lambda tensors=tensors: peer(*tensors[:3])) * 1e3
        contiguous = 0.0
        for page_size in (0, 16, 256):
            q, k, v, lengths, *pages = make_inputs(shape, page_size) if page_size else tensors
            block_table = pages[0] if pages else None

            def run(
                q: Any = q, k: Any = k, v: Any = v, lengths: Any = lengths, block_table: Any = block_table
            ) -> torch.Tensor:
                return attention_kvcache_forward(q, k, v, lengths, block_table=block_table)[0]

            speed, error = measure(shape, run, expected)
            contiguous = contiguous or speed
            promise = PAGED_PROMISE * contiguous if page_size else shape.promise
            verdict = "WRONG" if not error < TOLERANCE else f"below {promise:.0f}" if speed < promise else ""
            good &= not verdict
            layout = f"pages of {page_size}" if page_size else "contiguous"
            print(
                f"| {shape.batch} x {shape.seqlen} | {layout} | {speed:.0f} | {theirs:.0f} | {error:.1e} "
                f"| {verdict} |",
                flush=True,
            )
    return 0 if good else 1


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", help="time these instead of making the table")
    parser.add_argument("--splits", type=int, nargs="+", default=[0])
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[0, 16])
    options = parser.parse_args()
    heat()
    if options.configs:
        sweep(options)
        return 0
    return table()


if __name__ == "__main__":
    sys.exit(main())
