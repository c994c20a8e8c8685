"""Self-attention over packed sequences of different lengths: ``flash_attn_varlen_func``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fap_testing.bench.problem import FLOPS_FACTOR, Part, Problem, Tensors, longest_square, spread_out
from fap_testing.cases import Case

if TYPE_CHECKING:
    from fap_testing.bench.problem import Direction

__all__ = ["Varlen", "lognormal_lengths"]

# As documents have: about 1,000 tokens in the median where there is room for that, and a long tail.
_MEDIAN, _LOG_SIGMA = 1000, 1.0
_JUDGED_SEQUENCES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Varlen(Problem):
    """A call over packed sequences.

    Attributes:
        lengths: of each sequence, of its queries and its keys alike.
    """

    kind: ClassVar[str] = "varlen"
    lengths: tuple[int, ...]

    @classmethod
    def of_lengths(
        cls, lengths: tuple[int, ...], head_dim: int, *, width: int, group: int = 1, **options: Any
    ) -> Varlen:
        """Return attention over sequences of these lengths, with nheads * head_dim close to ``width``."""
        nheads_k = max(1, width // head_dim // group)
        return cls(lengths=lengths, nheads=nheads_k * group, nheads_k=nheads_k, head_dim=head_dim, **options)

    @property
    def batch(self) -> int:
        """How many sequences."""
        return len(self.lengths)

    @property
    def equal(self) -> bool:
        """Whether all sequences are of one length, so that a dense call could do the same."""
        return len(set(self.lengths)) == 1

    @property
    def size(self) -> str:
        """How many sequences, and how long."""
        if self.equal:
            return f"{self.batch}x{self.lengths[0]}{self.grouping}"
        return f"{self.batch} of {min(self.lengths)}-{max(self.lengths)}{self.grouping}"

    @property
    def seqlen(self) -> int:
        """The mean length."""
        return round(sum(self.lengths) / self.batch)

    def flops(self, direction: Direction) -> float:
        """Count floating-point operations; see the base class."""
        pairs = sum(self.pairs(length, length) for length in self.lengths)
        return FLOPS_FACTOR[direction] * 4.0 * self.nheads * pairs * self.head_dim

    def draw(self, seed: int = 0) -> Tensors:
        """Draw q, k, v and dout, and write the lengths down."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def draw(nheads: int) -> torch.Tensor:
            shape = (sum(self.lengths), nheads, self.head_dim)
            return torch.randn(shape, generator=generator, device=self.device, dtype=self.torch_dtype)

        starts = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.device)
        q, k, v, dout = (draw(n) for n in (self.nheads, self.nheads_k, self.nheads_k, self.nheads))
        return Tensors(q, k, v, dout, cu_seqlens=starts)

    def parts(self, tensors: Tensors, scores: int) -> list[Part]:  # noqa: ARG002 - the lengths are here
        """Return the longest sequence that fits, the shortest, the first and the last, some heads of each."""
        fitting = [i for i, n in enumerate(self.lengths) if 0 < n * n * self.group <= scores]
        if 2 * len(fitting) < len(self.lengths):
            return []  # the few short ones would say little
        by_length = sorted(fitting, key=self.lengths.__getitem__)
        chosen = dict.fromkeys((by_length[-1], by_length[0], fitting[0], fitting[-1]))
        return [self._part(index, scores // _JUDGED_SEQUENCES) for index in chosen]

    def _part(self, index: int, scores: int) -> Part:
        length, start = self.lengths[index], sum(self.lengths[:index])
        kv_heads = spread_out(self.nheads_k, scores // (length * length * self.group))
        heads = self.heads_of(kv_heads)
        case = Case(
            name=f"{self}, sequence {index}",
            seqlen_q=length,
            seqlen_k=length,
            nheads=len(heads),
            nheads_k=len(kv_heads),
            head_dim=self.head_dim,
            causal=self.causal,
            window_size=self.window_size,
        )
        rows = slice(start, start + length)
        return Part(case, lambda x: x[rows][None, :, heads], lambda x: x[rows][None, :, kv_heads])

    def shrunk(self, scores: int) -> Varlen:
        """Return the call with sequences no longer than fit."""
        longest = longest_square(scores // self.group)
        return replace(self, lengths=tuple(min(length, longest) for length in self.lengths))


def lognormal_lengths(total: int, longest: int, seed: int = 0) -> tuple[int, ...]:
    """Draw lengths from a log-normal distribution, none above ``longest``, that add up to ``total``."""
    generator = torch.Generator().manual_seed(seed)
    middle = math.log(max(1, min(_MEDIAN, longest // 4)))
    lengths: list[int] = []
    left = total
    while left:
        drawn = torch.empty(()).log_normal_(middle, _LOG_SIGMA, generator=generator)
        lengths.append(min(int(drawn.clamp(1, longest)), left))
        left -= lengths[-1]
    return tuple(lengths)
