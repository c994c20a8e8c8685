"""How attention over a sequence in parts scales: tokens a second of all devices against one of them.

    torchrun --nproc-per-node 2 packages/fap-api/benchmarks/context_parallel.py --output scaling.json

Forward and backward, causal. Results are checked before anything is timed; the exit status is 1 where one is
wrong, or where less than ``--promise`` times one device's speed is reached. On a CPU it runs over gloo, which
shows no more than that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import fap_api
from fap_api.integrations.context_parallel import context_parallel_attention, shard_sequence, unshard_sequence

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.device_mesh import DeviceMesh


class Row(NamedTuple):
    """One measurement of one sequence, in seconds."""

    method: str
    seqlen: int
    devices: int
    all_seconds: float
    one_seconds: float

    @property
    def ratio(self) -> float:
        return self.one_seconds / self.all_seconds


def main() -> int:
    options = parse()
    device = (
        torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    rows = []
    for method in options.methods:
        check(method, mesh, device, options)
        rows += [measure(method, seqlen, mesh, device, options) for seqlen in options.seqlens]
    held = all(row.ratio >= options.promise for row in rows)
    if dist.get_rank() == 0:
        report(rows, device, options)
    dist.destroy_process_group()
    return 0 if held else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", default=["ring", "ulysses"], choices=["ring", "ulysses"])
    parser.add_argument("--seqlens", nargs="+", type=int, default=[65536, 262144])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--heads-k", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--promise", type=float, default=0.0, help="least ratio to one device (default: none)"
    )
    parser.add_argument("--output", type=Path, help="where to write the record, as JSON")
    return parser.parse_args()


def draw(seqlen: int, device: torch.device, options: argparse.Namespace) -> list[torch.Tensor]:
    """Return q, k, v and dout of one sequence, the same on every device."""
    generator = torch.Generator(device).manual_seed(0)
    counts = options.heads, options.heads_k, options.heads_k, options.heads
    return [
        torch.randn(
            1, seqlen, heads, options.head_dim, dtype=torch.bfloat16, device=device, generator=generator
        )
        for heads in counts
    ]


def attend(*inputs: torch.Tensor, run: Callable[..., torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Run forward and backward; return the output and the gradients."""
    *qkv, dout = inputs
    tensors = [x.detach().requires_grad_() for x in qkv]
    out = run(*tensors)
    return out.detach(), *torch.autograd.grad(out, tensors, dout)


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = fap_api.flash_attn_func(q, k, v, causal=True)
    assert isinstance(out, torch.Tensor)
    return out


def together(method: str, mesh: DeviceMesh) -> Callable[..., torch.Tensor]:
    return lambda *qkv: context_parallel_attention(*qkv, mesh=mesh, method=method, causal=True)


def check(method: str, mesh: DeviceMesh, device: torch.device, options: argparse.Namespace) -> None:
    """Refuse to go on where parts do not give what the whole gives, in bfloat16's accuracy."""
    whole = draw(256 * mesh.size(), device, options)
    right = attend(*whole, run=alone)
    got = attend(*(shard_sequence(x, mesh) for x in whole), run=together(method, mesh))
    for name, x, expected in zip(("out", "dq", "dk", "dv"), got, right, strict=True):
        error = (unshard_sequence(x, mesh).float() - expected.float()).abs().max().item()
        allowed = 2e-2 * expected.abs().max().item()
        if error > allowed:
            raise SystemExit(f"{method}: {name} is wrong by {error:.1e}, allowed {allowed:.1e}: not timed")


def measure(
    method: str, seqlen: int, mesh: DeviceMesh, device: torch.device, options: argparse.Namespace
) -> Row:
    """Time all devices together and one alone."""
    whole = draw(seqlen, device, options)
    parts = [shard_sequence(x, mesh) for x in whole]
    all_seconds = median(lambda: attend(*parts, run=together(method, mesh)), device, options.repeats)
    # Every device computes the whole at the same time, so that none is cooler than it was.
    one_seconds = median(lambda: attend(*whole, run=alone), device, options.repeats)
    return Row(method, seqlen, mesh.size(), all_seconds, one_seconds)


def median(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median seconds of a call that all devices begin together, the slowest device counting."""
    seconds = []
    for _ in range(repeats + 1):
        dist.barrier()
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        slowest = torch.tensor(time.perf_counter() - start, device=device)
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        seconds.append(slowest.item())
    return statistics.median(seconds[1:])  # the first one compiles


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def report(rows: list[Row], device: torch.device, options: argparse.Namespace) -> None:
    """Print a table, and write the record."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    record = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": name,
        "torch": torch.__version__,
        "fap_api": fap_api.__version__,
        "heads": options.heads,
        "heads_k": options.heads_k,
        "head_dim": options.head_dim,
        "dtype": "bfloat16",
        "rows": [row._asdict() | {"ratio": row.ratio} for row in rows],
    }
    print(f"{name}, torch {torch.__version__}, {rows[0].devices} devices, causal, forward and backward")
    print(f"{'method':>8} {'seqlen':>8} {'one: tokens/s':>14} {'all: tokens/s':>14} {'ratio':>6}")
    for row in rows:
        one, every = row.seqlen / row.one_seconds, row.seqlen / row.all_seconds
        print(f"{row.method:>8} {row.seqlen:>8} {one:>14,.0f} {every:>14,.0f} {row.ratio:>6.2f}")
    if options.output is not None:
        options.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
