"""KVCache: the keys and values that one attention layer remembers while it generates."""

from __future__ import annotations

import torch

from fap_nn._settings import check_integers

LEAST_PAGE_SIZE = 16


class KVCache:
    """Keys and values of the tokens so far, of one layer and a batch of sequences; state and nothing else.

    ``FlashMHA(...)(x, cache=cache)`` appends the tokens x and attends to all that the cache then holds.

    Args:
        batch: how many sequences there are.
        max_seqlen: how many tokens a sequence can have; more are refused before anything is written.
        num_heads_kv, head_dim: of k and v, as the layer has them.
        page_size: rows of a page, a power of two and at least 16; None for one piece of memory a sequence.
        device, dtype: of the keys and values; dtype as the layer computes in, None for PyTorch's default.

    Attributes:
        k, v: ``(batch, max_seqlen, num_heads_kv, head_dim)``; with pages ``(num_pages, page_size,
            num_heads_kv, head_dim)``. What lies beyond a sequence's tokens is not read.
        seqlens: int32 ``(batch,)``, how many tokens each sequence has. It lives on the device, and is written
            in place, so a CUDA graph of a step goes on from where the last replay stopped.
        block_table: int32 ``(batch, max_pages)``: token p of sequence b is row ``p % page_size`` of page
            ``block_table[b, p // page_size]``; None without pages. At first every sequence has pages of its
            own; whoever shares them writes here.
        longest: a bound on ``seqlens`` that the host knows without asking the device, by which growth past
            max_seqlen is refused. Replays of a CUDA graph do not move it: add their tokens to it. Without
            that, a sequence that is full stays as it was.

    Raises:
        ValueError: a size outside its range, or a dtype that is not floating-point.
        TypeError: a size that is no integer.
    """

    def __init__(
        self,
        batch: int,
        max_seqlen: int,
        num_heads_kv: int,
        head_dim: int,
        *,
        page_size: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {"batch": batch, "max_seqlen": max_seqlen, "num_heads_kv": num_heads_kv, "head_dim": head_dim}
        check_integers(**sizes, **({} if page_size is None else {"page_size": page_size}))
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be at least 1, got {size}")
        if page_size is not None and (page_size < LEAST_PAGE_SIZE or page_size & (page_size - 1)):
            raise ValueError(
                f"page_size must be a power of two and at least {LEAST_PAGE_SIZE}, or None, got {page_size}"
            )
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype must be floating-point, as the layer's, or None, got {dtype}")
        self.max_seqlen = max_seqlen
        self.page_size = page_size
        self.longest = 0
        self.block_table: torch.Tensor | None = None
        rows = (batch, max_seqlen)
        if page_size is not None:
            pages = -(-max_seqlen // page_size)
            rows = (batch * pages, page_size)
            numbers = torch.arange(batch * pages, dtype=torch.int32, device=device)
            self.block_table = numbers.view(batch, pages)
        self.k, self.v = (
            torch.empty(*rows, num_heads_kv, head_dim, device=device, dtype=dtype) for _ in range(2)
        )
        self.seqlens = torch.zeros(batch, dtype=torch.int32, device=device)

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return self.seqlens.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> KVCache:
        """Return a cache with the same tokens on another device or in another dtype of keys and values.

        Tensors that are there already are shared, not copied, as ``torch.Tensor.to`` shares them.
        """
        moved = KVCache.__new__(KVCache)
        moved.max_seqlen, moved.page_size, moved.longest = self.max_seqlen, self.page_size, self.longest
        moved.k, moved.v = (x.to(device=device, dtype=dtype) for x in (self.k, self.v))
        moved.seqlens = self.seqlens.to(device=device)
        moved.block_table = None if self.block_table is None else self.block_table.to(device=device)
        return moved

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.seqlens.zero_()
        self.longest = 0

    def require_room(self, tokens: int) -> None:
        """Raise unless every sequence has room for so many more tokens.

        Raises:
            RuntimeError: the longest would have more than ``max_seqlen``.
        """
        if self.longest + tokens > self.max_seqlen:
            room = self.max_seqlen - self.longest
            raise RuntimeError(
                f"the cache was made for max_seqlen {self.max_seqlen} tokens a sequence, got {tokens} more "
                f"for one of {self.longest}; accepted: at most {room} more, a larger max_seqlen, or reset()"
            )

    def advance(self, tokens: int, lengths: torch.Tensor | None = None) -> None:
        """Count tokens whose keys and values have been written.

        Args:
            tokens: how many were written for each sequence.
            lengths: ``(batch,)``, how many of them count; None for all.

        Raises:
            RuntimeError: they do not fit.
        """
        self.require_room(tokens)
        self.seqlens.add_(tokens if lengths is None else lengths)
        self.longest += tokens

    def __repr__(self) -> str:
        pages = "" if self.page_size is None else f", page_size={self.page_size}"
        return (
            f"KVCache(batch={self.batch}, max_seqlen={self.max_seqlen}, num_heads_kv={self.k.shape[2]}, "
            f"head_dim={self.k.shape[3]}{pages}, device={self.k.device}, dtype={self.k.dtype})"
        )
