"""Packed sequences beside dense ones and beside FlashAttention-2, in one run.

    python packages/fap-kernels/benchmarks/varlen.py

First 32 sequences of equal length, packed and dense: packing should cost less than 5%. Then lengths drawn
from a log-normal distribution, 65,536 tokens in all, beside FlashAttention-2's own packed kernel. Exits
with 1 if a result is wrong or a promise is missed.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from timing import WIDTH, heat, median, relative_error

from fap_kernels import (
    attention_backward,
    attention_forward,
    attention_varlen_backward,
    attention_varlen_forward,
)

TOLERANCE = 1e-2
PACKING_PROMISE = 0.95
FA2_PROMISE = 1.3


def lognormal_lengths(total: int, seed: int = 0) -> list[int]:
    """Lengths from a log-normal distribution (median 1,000 tokens, sigma 1) that add up to ``total``."""
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while sum(lengths) < total:
        length = int(torch.empty(()).log_normal_(6.9, 1.0, generator=generator).clamp(1, 16384))
        lengths.append(min(length, total - sum(lengths)))
    return lengths


def packed_inputs(lengths: list[int], head_dim: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator("cuda").manual_seed(0)
    size = (sum(lengths), WIDTH // head_dim, head_dim)
    tensors = (torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=generator) for _ in range(4))
    starts = torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)
    return (*tensors, starts)


class Packed:
    """Ours on packed tensors."""

    def __init__(self, q: Any, k: Any, v: Any, dout: Any, starts: Any, longest: int, causal: bool) -> None:
        self.arguments = (q, k, v)
        self.lengths = (starts, starts, longest, longest)
        self.dout, self.causal = dout, causal
        self.out, self.lse = self.forward()

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return attention_varlen_forward(*self.arguments, *self.lengths, causal=self.causal)[:2]

    def backward(self) -> tuple[torch.Tensor, ...]:
        return attention_varlen_backward(
            self.dout, *self.arguments, self.out, self.lse, *self.lengths, causal=self.causal
        )


class Dense:
    """Ours on the same rows as a dense batch."""

    def __init__(self, q: Any, k: Any, v: Any, dout: Any, batch: int, causal: bool) -> None:
        self.q, self.k, self.v, self.dout = (x.unflatten(0, (batch, -1)) for x in (q, k, v, dout))
        self.causal = causal
        self.out, self.lse, _ = self.forward()

    def forward(self) -> Any:
        return attention_forward(self.q, self.k, self.v, causal=self.causal)

    def backward(self) -> tuple[torch.Tensor, ...]:
        gradients = attention_backward(
            self.dout, self.q, self.k, self.v, self.out, self.lse, causal=self.causal
        )
        return tuple(x.flatten(0, 1) for x in gradients)


class FlashAttention2:
    """PyTorch's FlashAttention-2 on packed tensors, without autograd around it."""

    def __init__(self, q: Any, k: Any, v: Any, dout: Any, starts: Any, longest: int, causal: bool) -> None:
        self.arguments = (q, k, v)
        self.lengths = (starts, starts, longest, longest)
        self.dout, self.causal = dout, causal
        self.saved = self.forward()
        self.out = self.saved[0]

    def forward(self) -> Any:
        return torch.ops.aten._flash_attention_forward(
            *self.arguments, *self.lengths, 0.0, self.causal, False
        )

    def backward(self) -> tuple[torch.Tensor, ...]:
        out, lse, state, unused, _ = self.saved
        gradients: tuple[torch.Tensor, ...] = torch.ops.aten._flash_attention_backward(
            self.dout, *self.arguments, out, lse, *self.lengths, 0.0, self.causal, state, unused
        )
        return gradients


def compare(title: str, ours: Any, theirs: Any, promise: float) -> bool:
    """Print both directions' times; True if they are right and as promised."""
    errors = {
        "forward": relative_error(ours.out, theirs.out.flatten(0, -3)),
        "backward": max(map(relative_error, ours.backward(), theirs.backward())),
    }
    good = True
    for direction, error in errors.items():
        times = [(median(getattr(ours, direction)), median(getattr(theirs, direction))) for _ in range(2)]
        mine, other = (sum(column) / 2 for column in zip(*times, strict=True))
        wrong = not error < TOLERANCE
        missed = other / mine < promise
        good &= not wrong and not missed
        verdict = "WRONG" if wrong else f"below {promise}" if missed else ""
        print(
            f"| {title} | {direction} | {mine:.3f} | {other:.3f} | {other / mine:.2f} | {error:.1e} "
            f"| {verdict} |",
            flush=True,
        )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    options = parser.parse_args()
    heat()
    good = True
    print("| point | direction | packed, ms | peer, ms | ratio | error | |\n" + "|---" * 7 + "|")
    for head_dim in options.head_dims:
        for causal in (False, True):
            mask = "causal" if causal else "full"
            for length in (512, 2048):
                tensors = packed_inputs([length] * 32, head_dim)
                ours = Packed(*tensors, length, causal)
                dense = Dense(*tensors[:4], 32, causal)
                good &= compare(f"d{head_dim} {mask} 32 x {length}, dense", ours, dense, PACKING_PROMISE)
    for head_dim in options.head_dims:
        lengths = lognormal_lengths(65536)
        tensors = packed_inputs(lengths, head_dim)
        for causal in (False, True):
            mask = "causal" if causal else "full"
            ours = Packed(*tensors, max(lengths), causal)
            peer = FlashAttention2(*tensors, max(lengths), causal)
            title = f"d{head_dim} {mask} {len(lengths)} log-normal, FA2"
            good &= compare(title, ours, peer, FA2_PROMISE if (head_dim, causal) == (128, True) else 0.0)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
