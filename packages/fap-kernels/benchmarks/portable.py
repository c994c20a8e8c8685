"""The portable kernels beside FlashAttention-2, in one run.

    python packages/fap-kernels/benchmarks/portable.py

Prints a table of TFLOP/s and ratios, each point checked against FlashAttention-2's own results, and exits
with 1 if one is wrong or misses what the project promises of it.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from timing import FlashAttention2, Shape, heat, machine, make_inputs, median, relative_error

from fap_kernels import attention_backward, attention_forward

# The least ratio to FlashAttention-2 that is promised, by head dimension.
FORWARD_PROMISE = {64: 1.35, 128: 1.35, 256: 1.2} | dict.fromkeys((40, 80, 96, 160, 192, 224), 1.1)
BACKWARD_PROMISE = {64: 1.05, 128: 1.2}
# Both round P and dS to bf16, each in its own order.
TOLERANCE = 1e-2


def points(quick: bool) -> list[Shape]:
    seqlens = (2048, 16384) if quick else (2048, 4096, 8192, 16384)
    main = [Shape(d, s, causal) for d in (64, 128, 256) for causal in (False, True) for s in seqlens]
    others = [Shape(d, 4096, causal) for d in (40, 80, 96, 112, 160, 192, 224) for causal in (False, True)]
    return main + others


def measure(shape: Shape) -> list[dict[str, Any]]:
    """Forward and backward of one point, ours and FlashAttention-2's in turn."""
    q, k, v, dout = make_inputs(shape)
    peer = FlashAttention2(q, k, v, dout, shape.causal)
    out, lse, _ = attention_forward(q, k, v, causal=shape.causal)

    def ours_forward() -> Any:
        return attention_forward(q, k, v, causal=shape.causal)

    def ours_backward() -> Any:
        return attention_backward(dout, q, k, v, out, lse, causal=shape.causal)

    errors = {
        "forward": relative_error(out, peer.out),
        "backward": max(relative_error(a, b) for a, b in zip(ours_backward(), peer.backward(), strict=True)),
    }
    promises = {"forward": FORWARD_PROMISE, "backward": BACKWARD_PROMISE}
    runs = {"forward": (ours_forward, peer.forward, 1.0), "backward": (ours_backward, peer.backward, 2.5)}
    rows = []
    for direction, (ours, theirs, factor) in runs.items():
        # In turn and twice, so that a drift of the clocks hits both alike.
        times = [(median(ours), median(theirs)) for _ in range(2)]
        mine, fa2 = (sum(column) / 2 for column in zip(*times, strict=True))
        rows.append(
            shape._asdict()
            | {
                "direction": direction,
                "tflops": factor * shape.flops / mine / 1e9,
                "fa2_tflops": factor * shape.flops / fa2 / 1e9,
                "ratio": fa2 / mine,
                "promise": promises[direction].get(shape.head_dim),
                "error": errors[direction],
            }
        )
    return rows


def verdict(row: dict[str, Any]) -> str:
    if not row["error"] < TOLERANCE:
        return "WRONG"
    if row["promise"] and row["ratio"] < row["promise"]:
        return f"below {row['promise']}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the shortest and the longest sequences only")
    parser.add_argument("--json", type=Path, help="write all figures and the machine's description here")
    options = parser.parse_args()
    heat()
    rows = []
    print("| head_dim | seqlen | mask | direction | TFLOP/s | FA2 | ratio | error | |\n" + "|---" * 9 + "|")
    for shape in points(options.quick):
        for row in measure(shape):
            rows.append(row)
            mask = "causal" if shape.causal else "full"
            print(
                f"| {shape.head_dim} | {shape.seqlen} | {mask} | {row['direction']} | {row['tflops']:.0f} "
                f"| {row['fa2_tflops']:.0f} | {row['ratio']:.2f} | {row['error']:.1e} | {verdict(row)} |",
                flush=True,
            )
    for direction in ("forward", "backward"):
        ratios = [row["ratio"] for row in rows if row["direction"] == direction]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        print(f"{direction}: geometric mean {mean:.2f}x FA2, worst {min(ratios):.2f}x")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1))
    failures = [row for row in rows if verdict(row)]
    print(f"{len(rows) - len(failures)} of {len(rows)} points as promised")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
