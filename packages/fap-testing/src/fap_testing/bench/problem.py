"""One attention call to be measured: what every kind of call has in common."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from fap_testing.cases import Case

__all__ = ["DIRECTIONS", "DTYPES", "Direction", "Part", "Problem", "Tensors", "spread_out", "visible_pairs"]

Direction = Literal["fwd", "bwd", "both", "fwd+grad"]
"""A forward pass without a graph, a backward pass, both in turn, a forward pass that records a graph."""
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# The backward pass has five matrix products, the forward pass two.
FLOPS_FACTOR: dict[Direction, float] = {"fwd": 1.0, "bwd": 2.5, "both": 3.5, "fwd+grad": 1.0}


class Tensors(NamedTuple):
    """The data of one call, contiguous and standard normal.

    Attributes:
        q, k, v, dout: ``(batch, seqlen, nheads, head_dim)``; packed ``(total, nheads, head_dim)``; in pages,
            k and v are ``(num_pages, page_size, nheads_k, head_dim)``.
        cu_seqlens: int32 ``(batch + 1,)`` where sequences are packed, of queries and keys alike.
        cache_seqlens: int32 ``(batch,)`` where k and v are a cache.
        block_table: int32 ``(batch, pages)`` where that cache is paged.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    cu_seqlens: torch.Tensor | None = None
    cache_seqlens: torch.Tensor | None = None
    block_table: torch.Tensor | None = None


class Part(NamedTuple):
    """A dense attention call inside a measured one, small enough for the oracle to judge.

    Attributes:
        case: the dense call.
        rows: picks the part ``(batch, seqlen_q, nheads, head_dim)`` out of q, dout, out and dq.
        keys: picks the part ``(batch, seqlen_k, nheads_k, head_dim)`` out of k, v, dk and dv.
    """

    case: Case
    rows: Callable[[torch.Tensor], torch.Tensor]
    keys: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """The sizes and options of one call.

    Attributes:
        kind: what sort of call it is; a peer says which it can run.
        nheads, nheads_k, head_dim: heads of q, heads of k and v, and their size.
        causal, window_size: as in ``flash_attn_func``, aligned bottom-right; -1 is no bound.
        dtype: one of :data:`DTYPES`.
        device: a type of device, "cuda" or "cpu".
    """

    kind: ClassVar[str] = ""
    nheads: int
    nheads_k: int
    head_dim: int
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    dtype: str = "bf16"
    device: str = "cpu"

    def __str__(self) -> str:
        return f"d{self.head_dim} {self.mask} {self.size}"

    @property
    def equal(self) -> bool:
        """Whether all sequences are of one length."""
        return True

    @property
    def size(self) -> str:
        """The sequences, in a word."""
        raise NotImplementedError(f"{type(self).__name__} must define size")

    @property
    def seqlen(self) -> int:
        """The length that a plot has on its horizontal axis."""
        raise NotImplementedError(f"{type(self).__name__} must define seqlen")

    def flops(self, direction: Direction) -> float:
        """Count the matrix products' floating-point operations, as the field does.

        ``4 * nheads * head_dim`` forward for each (query, key) pair: all pairs without a mask, half of them
        for causal, those inside for a window; 2.5 times as many backward (Dao, "FlashAttention-2", 2023,
        section 4.1).
        """
        raise NotImplementedError(f"{type(self).__name__} must define flops(direction)")

    def draw(self, seed: int = 0) -> Tensors:
        """Draw the call's data. It is random because zeros draw less power, and run faster on a GPU."""
        raise NotImplementedError(f"{type(self).__name__} must define draw(seed)")

    def parts(self, tensors: Tensors, scores: int) -> list[Part]:
        """Return parts of this call that together have about ``scores`` scores; none if none is so small."""
        raise NotImplementedError(f"{type(self).__name__} must define parts(tensors, scores)")

    def shrunk(self, scores: int) -> Problem:
        """Return a call with the same options whose parts have at most ``scores`` scores."""
        raise NotImplementedError(f"{type(self).__name__} must define shrunk(scores)")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of q, k, v and dout."""
        return DTYPES[self.dtype]

    @property
    def group(self) -> int:
        """How many heads of q share one of k and v."""
        return self.nheads // self.nheads_k

    @property
    def grouping(self) -> str:
        """The heads in words, where they are not as many of k as of q."""
        return f" h{self.nheads}/{self.nheads_k}" if self.group > 1 else ""

    @property
    def windowed(self) -> bool:
        """Whether there is a window besides what causal says."""
        return self.window_size != (-1, -1)

    @property
    def bounds(self) -> tuple[int, int]:
        """``window_size`` with causal folded in."""
        left, right = self.window_size
        return left, 0 if self.causal else right

    @property
    def mask(self) -> str:
        """What is masked, in a word or two."""
        if self.windowed:
            left, right = self.bounds
            return f"window {left},{right}"
        return "causal" if self.causal else "full"

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold, with what a reader of the file wants to sort by."""
        fields = {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(self).items()}
        if "lengths" in fields:
            fields["batch"] = len(fields["lengths"])
        derived = {"kind": self.kind, "mask": self.mask, "seqlen": self.seqlen, "equal": self.equal}
        return {**derived, **fields}

    def heads_of(self, kv_heads: list[int]) -> list[int]:
        """Return the heads of q that read these heads of k and v."""
        return [head * self.group + i for head in kv_heads for i in range(self.group)]

    def pairs(self, seqlen_q: int, seqlen_k: int) -> float:
        """Count the (query, key) pairs of one sequence and head, as :meth:`flops` wants them."""
        if self.windowed:
            return visible_pairs(seqlen_q, seqlen_k, *self.bounds)
        return seqlen_q * seqlen_k * (0.5 if self.causal else 1.0)


def visible_pairs(seqlen_q: int, seqlen_k: int, left: int, right: int) -> int:
    """Count the (query, key) pairs inside a window aligned bottom-right; -1 is no bound."""
    diagonal = torch.arange(seqlen_q, dtype=torch.int64) + (seqlen_k - seqlen_q)
    first = (diagonal - left).clamp(0) if left >= 0 else torch.zeros_like(diagonal)
    last = (
        (diagonal + right).clamp(max=seqlen_k - 1) if right >= 0 else torch.full_like(diagonal, seqlen_k - 1)
    )
    return int((last - first + 1).clamp(0).sum())


def spread_out(total: int, count: int) -> list[int]:
    """Return ``count`` of the numbers below ``total``, far apart, the last one among them."""
    count = max(1, min(total, count))
    return sorted({total - 1 - i * total // count for i in range(count)})


def longest_square(scores: int) -> int:
    """Return the largest power of two whose square is at most ``scores``."""
    return 1 << (max(1, math.isqrt(scores)).bit_length() - 1)
