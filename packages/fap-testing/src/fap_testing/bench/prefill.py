"""Self-attention over a batch of sequences of one length: ``flash_attn_func``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fap_testing.bench.problem import FLOPS_FACTOR, Part, Problem, Tensors, longest_square, spread_out
from fap_testing.cases import Case

if TYPE_CHECKING:
    from fap_testing.bench.problem import Direction

__all__ = ["Prefill"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Prefill(Problem):
    """A dense call.

    Attributes:
        batch, seqlen_q, seqlen_k: sizes of q ``(batch, seqlen_q, nheads, head_dim)`` and of k and v ``(batch,
            seqlen_k, nheads_k, head_dim)``.
    """

    kind: ClassVar[str] = "prefill"
    batch: int
    seqlen_q: int
    seqlen_k: int

    @classmethod
    def of_tokens(
        cls, head_dim: int, seqlen: int, *, tokens: int, width: int, group: int = 1, **options: Any
    ) -> Prefill:
        """Return self-attention over ``tokens`` tokens in all, with nheads * head_dim close to ``width``."""
        nheads_k = max(1, width // head_dim // group)
        return cls(
            batch=max(1, tokens // seqlen),
            seqlen_q=seqlen,
            seqlen_k=seqlen,
            nheads=nheads_k * group,
            nheads_k=nheads_k,
            head_dim=head_dim,
            **options,
        )

    @property
    def size(self) -> str:
        """Batch and length."""
        length = f"{self.seqlen_q}" if self.seqlen_q == self.seqlen_k else f"{self.seqlen_q}:{self.seqlen_k}"
        return f"{self.batch}x{length}{self.grouping}"

    @property
    def seqlen(self) -> int:
        """The keys' length."""
        return self.seqlen_k

    def flops(self, direction: Direction) -> float:
        """Count floating-point operations; see the base class."""
        pairs = self.pairs(self.seqlen_q, self.seqlen_k)
        return FLOPS_FACTOR[direction] * 4.0 * self.batch * self.nheads * pairs * self.head_dim

    def draw(self, seed: int = 0) -> Tensors:
        """Draw q, k, v and dout."""
        generator = torch.Generator(self.device).manual_seed(seed)

        def draw(seqlen: int, nheads: int) -> torch.Tensor:
            shape = (self.batch, seqlen, nheads, self.head_dim)
            return torch.randn(shape, generator=generator, device=self.device, dtype=self.torch_dtype)

        return Tensors(
            q=draw(self.seqlen_q, self.nheads),
            k=draw(self.seqlen_k, self.nheads_k),
            v=draw(self.seqlen_k, self.nheads_k),
            dout=draw(self.seqlen_q, self.nheads),
        )

    def parts(self, tensors: Tensors, scores: int) -> list[Part]:  # noqa: ARG002 - lengths are sizes here
        """Return one part: as many batch entries and heads as fit, the last ones among them."""
        fitting = scores // (self.seqlen_q * self.seqlen_k * self.group)
        if not fitting:
            return []
        kv_heads = spread_out(self.nheads_k, fitting)
        entries = spread_out(self.batch, fitting // len(kv_heads))
        heads = self.heads_of(kv_heads)
        case = Case(
            name=str(self),
            batch=len(entries),
            seqlen_q=self.seqlen_q,
            seqlen_k=self.seqlen_k,
            nheads=len(heads),
            nheads_k=len(kv_heads),
            head_dim=self.head_dim,
            causal=self.causal,
            window_size=self.window_size,
        )
        return [Part(case, lambda x: x[entries][:, :, heads], lambda x: x[entries][:, :, kv_heads])]

    def shrunk(self, scores: int) -> Prefill:
        """Return the call with fewer heads and shorter sequences."""
        nheads_k, longest = min(2, self.nheads_k), longest_square(scores // self.group)
        return replace(
            self,
            batch=1,
            nheads=nheads_k * self.group,
            nheads_k=nheads_k,
            seqlen_q=min(self.seqlen_q, longest),
            seqlen_k=min(self.seqlen_k, longest),
        )
