"""A few new queries against a cache of keys and values: ``flash_attn_with_kvcache``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch

from fap_testing.bench.problem import FLOPS_FACTOR, Part, Problem, Tensors, spread_out, visible_pairs
from fap_testing.cases import Case

if TYPE_CHECKING:
    from collections.abc import Callable

    from fap_testing.bench.problem import Direction

__all__ = ["Decode"]

_JUDGED_SEQUENCES = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Decode(Problem):
    """A call over a cache that holds ``lengths[b]`` keys of sequence b; nothing is appended, no rotation.

    Attributes:
        lengths: how many keys each sequence has. The cache has room for the longest, and no more.
        seqlen_q: new queries of each sequence.
        page_size: 0 for a cache ``(batch, capacity, nheads_k, head_dim)``, else the keys of a page; the pages
            lie in random order.
    """

    kind: ClassVar[str] = "decode"
    lengths: tuple[int, ...]
    seqlen_q: int = 1
    page_size: int = 0

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"lengths must be one or more, each at least 1, got {self.lengths}")

    @property
    def batch(self) -> int:
        """How many sequences."""
        return len(self.lengths)

    @property
    def capacity(self) -> int:
        """How many keys the cache has room for in each sequence."""
        longest = max(self.lengths)
        return -(-longest // self.page_size) * self.page_size if self.page_size else longest

    @property
    def equal(self) -> bool:
        """Whether the cache is full throughout, so that a call without lengths could do the same."""
        return set(self.lengths) == {self.capacity}

    @property
    def size(self) -> str:
        """Batch, queries, keys and the heads that share them."""
        lengths = "-".join(map(str, sorted({min(self.lengths), max(self.lengths)})))
        paged = f" p{self.page_size}" if self.page_size else ""
        return f"{self.batch}x{self.seqlen_q}:{lengths} h{self.nheads}/{self.nheads_k}{paged}"

    @property
    def seqlen(self) -> int:
        """The longest sequence's keys."""
        return max(self.lengths)

    @property
    def mask(self) -> str:
        """What is masked; one query at the end sees all keys before it, so causal hides nothing from it."""
        if self.windowed:
            return f"window {self.window_size[0]},0"
        return "causal" if self.causal and self.seqlen_q > 1 else "full"

    def flops(self, direction: Direction) -> float:
        """Count floating-point operations, of the visible pairs alone: here causal does not halve them."""
        left, right = self.bounds
        pairs = self.seqlen_q * sum(self.lengths)
        if self.windowed or self.causal:
            pairs = sum(visible_pairs(self.seqlen_q, length, left, right) for length in self.lengths)
        return FLOPS_FACTOR[direction] * 4.0 * self.nheads * pairs * self.head_dim

    def moved_bytes(self) -> int:
        """Count the bytes of q, out and of the keys and values in use: the least that must be moved."""
        queries = 2 * self.batch * self.seqlen_q * self.nheads
        keys = 2 * sum(self.lengths) * self.nheads_k
        return (queries + keys) * self.head_dim * self.torch_dtype.itemsize

    def draw(self, seed: int = 0) -> Tensors:
        """Draw q and the cache, and the order of its pages."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=self.device, dtype=self.torch_dtype)

        q, dout = (draw(self.batch, self.seqlen_q, self.nheads, self.head_dim) for _ in range(2))
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=self.device)
        if not self.page_size:
            k, v = (draw(self.batch, self.capacity, self.nheads_k, self.head_dim) for _ in range(2))
            return Tensors(q, k, v, dout, cache_seqlens=lengths)
        pages = self.batch * (self.capacity // self.page_size)
        k, v = (draw(pages, self.page_size, self.nheads_k, self.head_dim) for _ in range(2))
        order = torch.randperm(pages, generator=generator, device=self.device, dtype=torch.int32)
        return Tensors(q, k, v, dout, cache_seqlens=lengths, block_table=order.unflatten(0, (self.batch, -1)))

    def parts(self, tensors: Tensors, scores: int) -> list[Part]:
        """Return the first and the last sequence, some heads of each."""
        share = scores // _JUDGED_SEQUENCES
        if max(self.lengths) * self.seqlen_q * self.group > share:
            return []
        return [self._part(index, tensors, share) for index in dict.fromkeys((0, self.batch - 1))]

    def _part(self, index: int, tensors: Tensors, scores: int) -> Part:
        length = self.lengths[index]
        # The oracle copies the keys for every head of q, which takes more than the scores of a few queries.
        width = max(self.seqlen_q, self.head_dim)
        kv_heads = spread_out(self.nheads_k, scores // (length * width * self.group))
        heads = self.heads_of(kv_heads)
        case = Case(
            name=f"{self}, sequence {index}",
            seqlen_q=self.seqlen_q,
            seqlen_k=length,
            nheads=len(heads),
            nheads_k=len(kv_heads),
            head_dim=self.head_dim,
            causal=self.causal,
            window_size=self.window_size,
        )
        table = tensors.block_table

        def keys(x: torch.Tensor) -> torch.Tensor:
            own = x[index] if table is None else x[table[index].long()].flatten(0, 1)
            return own[None, :length, kv_heads]

        rows: Callable[[torch.Tensor], torch.Tensor] = lambda x: x[index][None, :, heads]  # noqa: E731
        return Part(case, rows, keys)

    def shrunk(self, scores: int) -> Decode:
        """Return the call with shorter sequences."""
        most = max(1, scores // _JUDGED_SEQUENCES // (self.seqlen_q * self.group))
        return replace(self, lengths=tuple(min(length, most) for length in self.lengths))
