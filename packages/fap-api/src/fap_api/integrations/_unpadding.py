"""Where sequences lie in a batch of rows, told from 2-D masks, and the way to packed tokens and back."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.functional import pad

from fap_api.padding import index_first_axis, pad_input

__all__ = [
    "Unpadding",
    "number_sequences",
    "of_numbered_sequences",
    "of_padded_rows",
    "of_whole_rows",
    "whole",
]


class Unpadding(NamedTuple):
    """Where the sequences of one side, queries or keys, lie in a tensor ``(batch, seqlen, heads, headdim)``.

    Attributes:
        tokens: int64, the tokens that count, as indices into ``batch * seqlen``; None if all of them do.
        cu_seqlens: int32 ``(sequences + 1,)``, where each sequence begins and ends among those tokens.
        max_seqlen: no sequence is longer.
        seqlen: how many tokens of a row were looked at; 0 for all.
    """

    tokens: torch.Tensor | None
    cu_seqlens: torch.Tensor
    max_seqlen: int | torch.Tensor
    seqlen: int = 0

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tokens that count, ``(total, heads, headdim)``."""
        flat = x.flatten(0, 1)
        return flat if self.tokens is None else index_first_axis(flat, self.tokens)

    def put_back(self, x: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
        """Return packed tokens as rows ``(batch, seqlen, heads, headdim)``, 0 at those that do not count."""
        if self.tokens is None:
            return x.view(batch, seqlen, *x.shape[1:])
        return pad_input(x, self.tokens, batch, seqlen)


def whole(cu_seqlens: torch.Tensor, max_seqlen: int | torch.Tensor) -> Unpadding:
    """Describe sequences that lie one behind the other without padding, as data collators pack them."""
    return Unpadding(None, cu_seqlens.to(torch.int32), max_seqlen)


def of_whole_rows(x: torch.Tensor) -> Unpadding:
    """Describe rows ``(batch, seqlen, ...)`` each of which is one whole sequence."""
    batch, seqlen = x.shape[:2]
    cu_seqlens = torch.arange(0, (batch + 1) * seqlen, seqlen or 1, dtype=torch.int32, device=x.device)
    return Unpadding(None, cu_seqlens[: batch + 1], seqlen)


def of_padded_rows(mask: torch.Tensor) -> Unpadding:
    """Describe rows with one sequence each, possibly empty; mask ``(batch, seqlen)`` is 0 at padding."""
    real = mask != 0
    lengths = real.sum(1, dtype=torch.int32)
    cu_seqlens = pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    longest = int(lengths.max()) if lengths.numel() else 0
    return Unpadding(real.flatten().nonzero().flatten(), cu_seqlens, longest, mask.shape[1])


def number_sequences(position_ids: torch.Tensor) -> torch.Tensor:
    """Number the sequences of each row from 1, int32 (batch, seqlen): one begins wherever positions jump."""
    jumps = position_ids.diff(dim=1) != 1
    return pad(jumps, (1, 0)).cumsum(1, dtype=torch.int32) + 1


def of_numbered_sequences(mask: torch.Tensor) -> Unpadding:
    """Describe rows with any number of sequences each.

    Args:
        mask: integers ``(batch, seqlen)``: 0 at padding; in a row, tokens of equal number are one sequence.
    """
    numbers = mask.flatten()
    tokens = numbers.nonzero().flatten()
    sequence = torch.stack((tokens // mask.shape[1], numbers[tokens]))
    begins = torch.ones_like(tokens, dtype=torch.bool)
    begins[1:] = (sequence[:, 1:] != sequence[:, :-1]).any(0)
    cu_seqlens = pad(begins.nonzero().flatten(), (0, 1), value=tokens.numel()).to(torch.int32)
    longest = int(cu_seqlens.diff().max()) if tokens.numel() else 0
    return Unpadding(tokens, cu_seqlens, longest, mask.shape[1])
