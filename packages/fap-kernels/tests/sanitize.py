"""Every shipped configuration under NVIDIA's compute-sanitizer, on a tiny problem, on a GPU.

    python packages/fap-kernels/tests/sanitize.py memcheck racecheck --jobs 16

Processes share the calls, each under compute-sanitizer and a timeout: one for each row and kind of mask of
the Hopper tables, one for each row of the portable ones, and attention to a cache, with rotation and an
append before it. All run once without it, so that Triton's cache is filled. Results are checked too. What a
process that is not clean says is printed, and the exit code tells whether all were clean.

To run some of them by hand, by a word in their names:
``compute-sanitizer --tool racecheck python .../sanitize.py --share 0/1 --only d64-causal``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

SEEN = 87
"""What compute-sanitizer exits with where it has found something."""
# Ours, by their names: PyTorch's own cost time.
KERNELS = ("hopper_", "attention_", "kvcache_append", "rotary_kernel")
COMMON = (
    "--error-exitcode", str(SEEN), "--report-api-errors", "no", "--print-limit", "20",
    *(word for name in KERNELS for word in ("--kernel-name", f"kns={name}")),
)  # fmt: skip
# Memory that is not cached, so that each tensor has an end.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
GROUPS = ("hopper", "portable", "cache")
FEW_PROCESSORS = 4
"""So many does the GPU seem to have: persistent programs then take several tiles of a tiny problem."""


def calls(device: str, groups: Iterable[str] = GROUPS) -> dict[str, Callable[[], None]]:
    """What is to be run, by name; each raises where its result is wrong."""
    makers = {"hopper": hopper_calls, "portable": portable_calls, "cache": cache_calls}
    return {name: call for group in groups for name, call in makers[group](device).items()}


def hopper_calls(device: str) -> dict[str, Callable[[], None]]:
    from soak_problems import check, draw, variants

    def run(number: int, variant: Any) -> None:
        problem = draw(variant, number, 0)
        seqlen_k = variant.seqlens_k[0] + 290
        lengths = ((130, 0, 70), (seqlen_k, 33, 0)) if variant.packed else ((200,), (seqlen_k,))
        verdict = check(
            replace(
                problem, nheads_k=2, group=2, lengths_q=lengths[0], lengths_k=lengths[1],
                max_seqlen_q=max(lengths[0]), max_seqlen_k=seqlen_k,
                window=(150, -1 if variant.mask == "left" else 40),
                # Where rows start over, a kernel of its own computes them again.
                steep=variant.mask == "full" and not variant.backward,
            ),
            device,
        )  # fmt: skip
        if verdict.handed_back or verdict.wrong:
            raise AssertionError(f"{variant}: handed back {verdict.handed_back}, wrong {verdict.wrong}")

    return {
        str(variant): lambda number=number, variant=variant: run(number, variant)
        for number, variant in enumerate(variants())
    }


def portable_calls(device: str) -> dict[str, Callable[[], None]]:
    from fap_kernels import attention_backward, attention_forward, attention_probabilities, use_schedule
    from fap_kernels.backward.config import DKDV, DQ
    from fap_kernels.forward.config import FORWARD

    def run(row: Any) -> None:
        dtype = torch.float32 if row.float32 else torch.float16
        seqlen_k = max(row.seqlen_from, 150)
        q, k, v, dout = (
            torch.randn(1, n, h, row.head_dim, device=device, dtype=dtype)
            for n, h in ((140, 4), (seqlen_k, 2), (seqlen_k, 2), (140, 4))
        )
        options: dict[str, Any] = {"causal": row.bounded is not False}
        if not row.plain:
            options |= {"softcap": 20.0, "alibi_slopes": torch.rand(4, device=device), "dropout_p": 0.2}
        with use_schedule("portable"):
            out, lse, rng_state = attention_forward(q, k, v, **options)
            options["rng_state"] = rng_state
            gradients = attention_backward(dout, q, k, v, out, lse, **options)
            weights = attention_probabilities(q, k, lse, **options)
        for x in (out, lse, weights, *gradients):
            if not x.isfinite().all():
                raise AssertionError(f"{row} gives what is not finite")

    return {
        f"portable {name} {number} d{row.head_dim}": lambda row=row: run(row)
        for name, table in (("forward", FORWARD), ("dkdv", DKDV), ("dq", DQ))
        for number, row in enumerate(table)
        if row.family == "sm_90"
    }


def cache_calls(device: str) -> dict[str, Callable[[], None]]:
    """Few queries and many, split and not, contiguous and by page; rotation and appending before."""
    from fap_kernels import apply_rotary, attention_kvcache_forward, kvcache_append

    def run(head_dim: int, seqlen_q: int, page_size: int, num_splits: int) -> None:
        batch, capacity, heads = 3, 256, 2
        draw = lambda *shape: torch.randn(*shape, device=device, dtype=torch.float16)  # noqa: E731
        q, new = draw(batch, seqlen_q, 4 * heads, head_dim), draw(batch, seqlen_q, heads, head_dim)
        lengths = torch.tensor([0, 100, capacity - seqlen_q], device=device, dtype=torch.int32)
        table, shape = None, (batch, capacity)
        if page_size:
            pages = batch * capacity // page_size
            table = torch.randperm(pages, device=device).to(torch.int32).view(batch, -1)
            shape = (pages, page_size)
        k, v = (draw(*shape, heads, head_dim) for _ in "kv")
        cos, sin = (draw(capacity, head_dim // 4) for _ in "cs")
        rotated = apply_rotary(q, cos, sin, seqlen_offsets=lengths)
        kvcache_append(
            k, v, new, new, lengths, block_table=table, rotary_cos=cos, rotary_sin=sin,
            rotary_interleaved=bool(page_size),
        )  # fmt: skip
        out, lse = attention_kvcache_forward(
            rotated, k, v, lengths, seqlen_new=seqlen_q, block_table=table, causal=True, num_splits=num_splits
        )
        if not out.isfinite().all() or not lse.isfinite().all():
            raise AssertionError("attention to a cache gives what is not finite")

    return {
        f"cache d{head_dim} {seqlen_q} queries, pages of {page_size}, {num_splits} splits": (
            lambda arguments=(head_dim, seqlen_q, page_size, num_splits): run(*arguments)
        )
        for head_dim in (64, 128, 256)
        for seqlen_q in (1, 20, 100)
        for page_size, num_splits in ((0, 3), (32, 1))
    }


def run_share(share: str, groups: Iterable[str], device: str, only: str = "") -> int:
    """Run every n-th call from number i on, for a share of "i/n" of those with ``only`` in their names.

    Returns how many failed.
    """
    from fap_kernels import target

    target._processors_of_index = lambda index: FEW_PROCESSORS
    first, step = map(int, share.split("/"))
    failed = 0
    chosen = [(name, call) for name, call in calls(device, groups).items() if only in name]
    for name, call in chosen[first::step]:
        try:
            call()
            torch.cuda.synchronize()
            print(f"ran {name}", flush=True)
        except Exception as error:  # noqa: BLE001 - the others still count
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
    return failed


def run_all(command: list[str], jobs: int, timeout: float) -> list[tuple[int | None, str]]:
    """Exit code, None for what was killed, and output of each share."""
    shares = []
    for number in range(jobs):
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with its share
        process = subprocess.Popen(
            [*command, "--share", f"{number}/{jobs}"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
        shares.append((process, output))
    deadline = time.monotonic() + timeout
    results = []
    for process, output in shares:
        code = None
        try:
            code = process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the sanitizer, and what it has started
            process.wait()
        with output:
            output.seek(0)
            results.append((code, output.read()))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tools", nargs="*", default=["memcheck", "racecheck"], help="compute-sanitizer's")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="of calls")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each tool")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="the command")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="a word in the names of the calls to run")
    parser.add_argument("--share", help="run this share of the calls here: number/count")
    options = parser.parse_args()
    if options.share is not None:
        return 1 if run_share(options.share, options.groups, options.device, options.only) else 0
    python = [sys.executable, __file__, "--device", options.device, "--groups", *options.groups]
    python += ["--only", options.only]
    bad = 0
    for tool in ("none", *options.tools):
        sanitizer = [] if tool == "none" else [options.sanitizer, "--tool", tool, *COMMON]
        begin = time.monotonic()
        results = run_all([*sanitizer, *python], options.jobs, options.timeout)
        ran = sum(text.count("\nran ") + text.startswith("ran ") for _, text in results)
        dirty = [(code, text) for code, text in results if code != 0]
        bad += len(dirty)
        print(f"{tool}: {ran} calls, {len(dirty)} shares not clean, {time.monotonic() - begin:.0f} s")
        for code, text in dirty:
            print(f"exit code {code}\n{text[-6000:]}", flush=True)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
