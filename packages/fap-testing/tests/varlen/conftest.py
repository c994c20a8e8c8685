"""Attention over packed sequences apart from its oracle, for the suite to judge: right, or with one bug."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class EagerVarlen:
    """flash_attn_varlen_func, each sequence through ``dense``; ``bug`` breaks it, or dense, in one way."""

    dense: Any
    bug: str = ""

    def __call__(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
        seqused_q=None,
        seqused_k=None,
    ):
        options = {"dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal}
        options |= {"window_size": window_size, "softcap": softcap}
        if self.bug == "max_seqlen_must_be_int" and not isinstance(max_seqlen_q, int):
            raise TypeError(f"max_seqlen_q must be an int, got {max_seqlen_q!r}")
        if self.bug != "accepts_anything":
            check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table)
            check_per_sequence(cu_seqlens_q.shape[0] - 1, alibi_slopes, seqused_q, seqused_k)
        max_seqlen_q, max_seqlen_k = int(max_seqlen_q), int(max_seqlen_k)
        batch, nheads = cu_seqlens_q.shape[0] - 1, q.shape[1]
        # A graph even where no sequence has a row.
        out = torch.zeros_like(q) + 0.0 * (q[:0].sum() + k[:0].sum() + v[:0].sum())
        lse = torch.full((nheads, q.shape[0]), torch.inf) + 0.0 * (q[:0].sum() + k[:0].sum()).float()
        s_dmask = q.new_zeros((batch, nheads, *(-(-n // 128) * 128 for n in (max_seqlen_q, max_seqlen_k))))
        flat_k, flat_v = (x if block_table is None else x.flatten(0, 1) for x in (k, v))
        for b in range(batch):
            rows = self._rows("q", b, cu_seqlens_q, seqused_q, q.shape[0])
            keys = self._keys(b, cu_seqlens_k, seqused_k, block_table, k)
            if self.bug == "stops_at_empty" and not (rows.numel() and keys.numel()):
                break
            query, key, value = q[rows], flat_k[keys], flat_v[keys]
            if self.bug == "gradient_of_first_sequence" and b:
                key = key.detach()
            slopes = self._slopes(alibi_slopes, b)
            bug = "gqa_interleaved" if self.bug == "one_query_swaps_heads" and max_seqlen_q == 1 else self.bug
            if self.bug == "dropout_same_for_all" and dropout_p:
                torch.manual_seed(1)
            result = self.dense(bug)(
                query[None], key[None], value[None], **options, alibi_slopes=slopes, return_attn_probs=True
            )
            out = out.index_put((rows,), result[0][0])
            lse = lse.index_put((torch.arange(nheads)[:, None], rows), result[1][0])
            if dropout_p:
                of = 0 if self.bug == "s_dmask_of_sequence_0" else b
                s_dmask[of, :, : rows.numel(), : keys.numel()] = result[2][
                    0, :, : rows.numel(), : keys.numel()
                ]
        if self.bug == "writes_unused_rows":
            out = torch.where(lse.T[..., None].isinf(), 1e-4, out)
        if not return_attn_probs:
            return out
        lse = lse.T.contiguous() if self.bug == "lse_transposed" else lse
        return out, lse, s_dmask if dropout_p else q.new_empty(0)

    def _rows(self, side, b, cu_seqlens, seqused, total):
        start, end = cu_seqlens[b : b + 2].tolist()
        if seqused is not None and self.bug != f"ignores_seqused_{side}":
            end = start + int(seqused[b])
        if self.bug == "drops_last_key" and side == "k":
            end = max(start, end - 1)
        if self.bug == "leaks" and side == "k" and end > start:
            end = min(end + 1, total)
        if self.bug == "starts_one_late" and side == "k" and b:
            start, end = min(start + 1, total), min(end + 1, total)
        return torch.arange(start, end)

    def _keys(self, b, cu_seqlens_k, seqused_k, block_table, k):
        rows = self._rows("k", b, cu_seqlens_k, seqused_k, k.shape[0])
        if block_table is None:
            return rows
        position = torch.arange(rows.numel())
        table = block_table[0 if self.bug == "table_of_sequence_0" else b].long()
        if self.bug == "table_must_be_contiguous":
            table = block_table.as_strided((table.numel(),), (1,), b * table.numel()).long()
        if self.bug == "pages_in_order":
            table = (table[0] + torch.arange(table.numel())) % k.shape[0]
        return table[position // k.shape[1]] * k.shape[1] + position % k.shape[1]

    def _slopes(self, alibi_slopes, b):
        if not isinstance(alibi_slopes, torch.Tensor) or alibi_slopes.dim() != 2:
            return alibi_slopes
        return alibi_slopes[0 if self.bug == "slopes_of_sequence_0" else b]


def check_arguments(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table):
    """Refuse the mistakes that dense attention cannot see, with a message that names the argument."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        rank = 4 if block_table is not None and name != "q" else 3
        if x.dim() != rank:
            raise RuntimeError(f"{name} must have {rank} dimensions, got shape {tuple(x.shape)}")
        if x.device != q.device:
            raise RuntimeError(f"device of {name} must be q's {q.device}, got {x.device}")
        if not x.dtype.is_floating_point:
            raise RuntimeError(f"{name} must be floating, got {x.dtype}")
    if k.shape != v.shape:
        raise RuntimeError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    batch = None
    for name, x in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        check_integers(name, x, q.device, dims=1)
        if x.shape[0] == 0 or (batch is not None and x.shape[0] != batch):
            raise RuntimeError(f"{name} must be (batch + 1,) as cu_seqlens_q is, got length {x.shape[0]}")
        batch = x.shape[0]
    for name, n in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(n, (int, torch.Tensor)) or int(n) < 0:
            raise RuntimeError(f"{name} must be an integer from 0 on, got {n}")
    if block_table is not None:
        check_integers("block_table", block_table, q.device, dims=2)
        if block_table.shape[0] != batch - 1:
            raise RuntimeError(f"block_table must have {batch - 1} rows, got {tuple(block_table.shape)}")
        if k.shape[1] < 16 or k.shape[1] & (k.shape[1] - 1):
            raise RuntimeError(f"page size must be a power of two of at least 16, got {k.shape[1]}")


def check_per_sequence(batch, alibi_slopes, seqused_q, seqused_k):
    if isinstance(alibi_slopes, torch.Tensor) and alibi_slopes.dim() > 1 and alibi_slopes.shape[0] != batch:
        raise RuntimeError(f"alibi_slopes must be (batch, nheads), got {tuple(alibi_slopes.shape)}")
    for name, x in (("seqused_q", seqused_q), ("seqused_k", seqused_k)):
        if x is not None:
            check_integers(name, x, x.device, dims=1)
            if x.shape[0] != batch:
                raise RuntimeError(f"{name} must be (batch,) = ({batch},), got length {x.shape[0]}")


def check_integers(name, x, device, dims):
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype != torch.int32:
        raise RuntimeError(f"{name} must have dtype int32, got {x.dtype}")
    if x.device != device:
        raise RuntimeError(f"{name} must be on {device}, got {x.device}")
    if x.dim() != dims:
        raise RuntimeError(f"{name} must have {dims} dimensions, got shape {tuple(x.shape)}")


@pytest.fixture(scope="session")
def eager_varlen(eager_attention):
    return partial(EagerVarlen, eager_attention)
