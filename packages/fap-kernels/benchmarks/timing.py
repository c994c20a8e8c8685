"""What the sweeps share: seeded inputs, FlashAttention-2, medians."""

from __future__ import annotations

import math
import random
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from triton.testing import do_bench, do_bench_cudagraph

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

TOKENS = 16384
WIDTH = 2048  # nheads * head_dim
WARM_MS = 200.0
"""Until an H200 at its power limit has set its clock by what runs now."""


class Shape(NamedTuple):
    """One point: TOKENS tokens in sequences of ``seqlen``, as many heads as fit WIDTH."""

    head_dim: int
    seqlen: int
    causal: bool

    @property
    def batch(self) -> int:
        return TOKENS // self.seqlen

    @property
    def nheads(self) -> int:
        return WIDTH // self.head_dim

    @property
    def flops(self) -> float:
        """Of the forward pass; the backward has 2.5 times as many."""
        return 4 * self.batch * self.nheads * self.seqlen**2 * self.head_dim * (0.5 if self.causal else 1.0)


def make_inputs(shape: Shape, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, ...]:
    """q, k, v and dout, ``(batch, seqlen, nheads, head_dim)``; random, since zeros run faster."""
    generator = torch.Generator("cuda").manual_seed(0)
    size = (shape.batch, shape.seqlen, shape.nheads, shape.head_dim)
    return tuple(torch.randn(size, device="cuda", dtype=dtype, generator=generator) for _ in range(4))


def median(run: Callable[[], Any], milliseconds: int = 60) -> float:
    """Median milliseconds of a call, the L2 cache flushed between calls."""
    return float(do_bench(run, warmup=15, rep=milliseconds, return_mode="median"))


def take_turns(
    runs: Mapping[str, Callable[[], Any]], rounds: int = 4, warm_ms: float = WARM_MS
) -> dict[str, float]:
    """Median milliseconds of each run, all of which must be possible in a CUDA graph.

    They take turns. Each turn starts with ``warm_ms`` of the run itself that do not count, and each round has
    another order: at its power limit a GPU sets its clock by what ran before, and what follows a run that
    draws more, or less, than it does by itself would read up to 10% wrong. Tensors should not fit the L2
    cache, which is not flushed.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    rng = random.Random(0)
    for _ in range(rounds):
        for name in rng.sample(list(runs), len(runs)):
            # Ten replays of one graph, of which the first four warm up.
            length = math.ceil(warm_ms / 4)
            samples[name] += do_bench_cudagraph(runs[name], rep=length, return_mode="all")[4:]
    return {name: statistics.median(times) for name, times in samples.items()}


def heat(seconds: float = 1.0) -> None:
    """Bring clocks and temperature to where they stay: a GPU right after idling reads up to 10% high."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(int(seconds * 600)):
        torch.mm(a, a)
    torch.cuda.synchronize()


class FlashAttention2:
    """PyTorch's FlashAttention-2 back end on the same tensors, without autograd around it."""

    def __init__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, causal: bool
    ) -> None:
        self.q, self.k, self.v, self.dout = (x.transpose(1, 2) for x in (q, k, v, dout))
        self.causal = causal
        self.saved = self._forward()
        self.out = self.saved[0].transpose(1, 2)

    def _forward(self) -> Any:
        return torch.ops.aten._scaled_dot_product_flash_attention(self.q, self.k, self.v, 0.0, self.causal)

    def forward(self) -> torch.Tensor:
        return self._forward()[0]

    def backward(self) -> tuple[torch.Tensor, ...]:
        out, lse, cu_q, cu_k, max_q, max_k, seed, offset, _ = self.saved
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            self.dout,
            self.q,
            self.k,
            self.v,
            out,
            lse,
            cu_q,
            cu_k,
            max_q,
            max_k,
            0.0,
            self.causal,
            seed,
            offset,
        )
        return tuple(x.transpose(1, 2) for x in gradients)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm; NaN stays NaN."""
    return float((actual.float() - expected.float()).norm() / expected.float().norm())
