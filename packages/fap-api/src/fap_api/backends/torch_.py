"""Exact attention in plain PyTorch, on any device, in chunks: never the whole score matrix at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fap_api.backends._chunks import ChunkedCall, Tile, grouped, ungrouped, wide_dtype
from fap_api.backends._dropout import draw_rng_state
from fap_api.backends._torch_kvcache import CachedCall, append, every_row, known_to_the_host, sequences
from fap_api.backends._torch_varlen import Sequence, packed_sequences

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fap_api.backends.base import NewKeys, Places, Score
    from fap_kernels.packing import Packing
    from fap_kernels.problem import AttentionProblem

__all__ = ["TorchBackend"]


class TorchBackend:
    """Online softmax over tiles; float16 and bfloat16 compute in float32, float64 in float64.

    Formulas: Dao, "FlashAttention-2", 2023, algorithms 1 and 2. With a gradient of the LSE, delta becomes
    ``rowsum(dout * out) - dlse``, since the LSE's derivative by a score is that score's probability.
    """

    name = "torch"

    def available(self) -> list[str]:
        """Return nothing: PyTorch is always here."""
        return []

    def missing_package(self) -> str | None:
        """Return None: PyTorch is always here."""
        return None

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:  # noqa: ARG002
        """Return nothing: every checked call runs here."""
        return []

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return ``out``, ``softmax_lse`` and, with dropout, ``rng_state``."""
        with _no_autocast(q):
            call = ChunkedCall(q, k, score)
            rng_state = draw_rng_state(q.device) if score.dropout_p else None
            value = grouped(v, v.shape[2], call.dtype)[:, 0]
            return *_forward_call(call, q, value, rng_state), rng_state

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        softmax_lse: torch.Tensor,
        dlse: torch.Tensor | None,
        rng_state: torch.Tensor | None,
        score: Score,
        deterministic: bool,  # noqa: ARG002 - every run is bitwise equal as it is
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ``dq``, ``dk`` and ``dv``."""
        with _no_autocast(dout):
            call = ChunkedCall(q, k, score)
            return _backward_call(call, dout, q, k, v, out, softmax_lse, dlse, rng_state)

    def probabilities(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        softmax_lse: torch.Tensor,
        rng_state: torch.Tensor,
        score: Score,
    ) -> torch.Tensor:
        """Return ``S_dmask``: the probabilities before dropout, negative where dropped."""
        with _no_autocast(q):
            result = q.new_zeros((q.shape[0], q.shape[2], *map(_padded, (q.shape[1], k.shape[1]))))
            _write_probabilities(ChunkedCall(q, k, score), softmax_lse, rng_state, result)
            return result

    def varlen_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Attend sequence by sequence. The lengths are read, so a device is waited for."""
        with _no_autocast(q):
            rng_state = draw_rng_state(q.device) if score.dropout_p else None
            out = q.new_zeros(q.shape)
            lse = torch.full((q.shape[1], len(q)), torch.inf, dtype=wide_dtype(q.dtype), device=q.device)
            for one in packed_sequences(q, k, packing):
                rows, own_q = one.queries, q[None, one.queries]
                call = _call_of(one, own_q, one.own_keys(k), score)
                value = grouped(one.own_keys(v), v.shape[-2], call.dtype)[:, 0]
                own_out, own_lse = _forward_call(call, own_q, value, rng_state)
                out[rows], lse[:, rows] = own_out[0], own_lse[0]
            return out, lse, rng_state

    def varlen_backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        softmax_lse: torch.Tensor,
        dlse: torch.Tensor | None,
        rng_state: torch.Tensor | None,
        packing: Packing,
        score: Score,
        deterministic: bool,  # noqa: ARG002 - every run is bitwise equal as it is
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ``dq``, ``dk`` and ``dv``, sequence by sequence."""
        with _no_autocast(dout):
            dq, dk, dv = (x.new_zeros(x.shape) for x in (q, k, v))
            for one in packed_sequences(q, k, packing):
                rows, keys = one.queries, one.keys
                own = q[None, rows], k[None, keys], v[None, keys]
                own_dlse = None if dlse is None else dlse[None, :, rows]
                gradients = _backward_call(
                    _call_of(one, own[0], own[1], score),
                    *(dout[None, rows], *own, out[None, rows]),
                    *(softmax_lse[None, :, rows], own_dlse, rng_state),
                )
                dq[rows], dk[keys], dv[keys] = (x[0] for x in gradients)
            return dq, dk, dv

    def varlen_probabilities(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        softmax_lse: torch.Tensor,
        rng_state: torch.Tensor,
        packing: Packing,
        score: Score,
    ) -> torch.Tensor:
        """Return ``S_dmask``, each sequence's probabilities in its upper left corner."""
        with _no_autocast(q):
            longest = map(_padded, (packing.max_seqlen_q, packing.max_seqlen_k))
            result = q.new_zeros((packing.batch, q.shape[1], *longest))
            for one in packed_sequences(q, k, packing):
                call = _call_of(one, q[None, one.queries], one.own_keys(k), score)
                own_lse, own = softmax_lse[None, :, one.queries], result[one.number : one.number + 1]
                _write_probabilities(call, own_lse, rng_state, own)
            return result

    def cached_forward(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        new: NewKeys | None,
        places: Places,
        score: Score,
        num_splits: int,  # noqa: ARG002 - nothing to split: the result is the same within rounding
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append, rotate and attend; sequence by sequence where their lengths are on the host."""
        with _no_autocast(q):
            seqlen_new = 0
            if new is not None:
                seqlen_new = new.k.shape[1]
                q = append(q, k_cache, v_cache, new, places, local=score.is_local)
            if known_to_the_host(q):
                keys = sequences(k_cache, v_cache, places, q.shape[0], seqlen_new)
                return self._attend_one_by_one(q, keys, score)
            k, v = (every_row(cache, places) for cache in (k_cache, v_cache))
            call = CachedCall(q, k, score, places, seqlen_new)
            value = grouped(v, v.shape[2], call.dtype)[:, 0]
            # What lies beyond the keys may be anything, and 0 * nan would be nan. It may be the cache itself.
            value = value.masked_fill(~call.exists()[..., None], 0.0)
            return _forward_call(call, q, value, None)

    def _attend_one_by_one(
        self, q: torch.Tensor, keys: Iterable[tuple[torch.Tensor, torch.Tensor]], score: Score
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        shape = (q.shape[0], q.shape[2], q.shape[1])
        lse = torch.empty(shape, dtype=wide_dtype(q.dtype), device=q.device)
        slopes = score.alibi_slopes
        for b, (k, v) in enumerate(keys):
            own = slopes[b] if slopes is not None and slopes.dim() == 2 else slopes
            out[b : b + 1], lse[b : b + 1], _ = self.forward(
                q[b : b + 1], k, v, score._replace(alibi_slopes=own)
            )
        return out, lse


def _no_autocast(x: torch.Tensor) -> torch.autocast:
    """Turn autocast off: even inside an operator it would cast the products to 16 bits."""
    return torch.autocast(x.device.type, enabled=False)


def _call_of(one: Sequence, q: torch.Tensor, k: torch.Tensor, score: Score) -> ChunkedCall:
    return ChunkedCall(q, k, score._replace(alibi_slopes=one.own_slopes(score.alibi_slopes)), one.number)


def _padded(seqlen: int) -> int:
    """Round up to the multiple of 128 that S_dmask's sides have in flash-attn."""
    return -(-seqlen // 128) * 128


def _write_probabilities(
    call: ChunkedCall, softmax_lse: torch.Tensor, rng_state: torch.Tensor, result: torch.Tensor
) -> None:
    """Write a call's signed probabilities to ``result``, ``(batch, nheads, padded, padded)`` and zero."""
    lse = softmax_lse.reshape(call.q.shape[:3])
    of_groups = result.view(call.heads, call.group, *result.shape[2:])
    for heads, queries in call.row_blocks():
        for tile in call.tiles(heads, queries):
            scores, _ = call.scores(tile)
            hidden = scores == -torch.inf
            p = scores.sub_(lse[heads, :, queries, None]).exp_()
            signed = torch.where(call.keep(tile, rng_state) | hidden, p, -p)
            of_groups[heads, :, queries, tile.keys] = signed.to(result.dtype)


def _forward_call(
    call: ChunkedCall, q: torch.Tensor, value: torch.Tensor, rng_state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``out`` and ``softmax_lse`` of a chunked call; ``value`` is v, wide and grouped."""
    out = torch.empty_like(call.q)
    lse = call.q.new_empty(call.q.shape[:3])
    for heads, queries in call.row_blocks():
        block = _forward_rows(call, value, heads, queries, rng_state)
        out[heads, :, queries], lse[heads, :, queries] = block
    return ungrouped(out, q), lse.view(q.shape[0], q.shape[2], q.shape[1])


def _forward_rows(
    call: ChunkedCall, value: torch.Tensor, heads: slice, queries: slice, rng_state: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out ``(heads, group, queries, d)`` and LSE ``(heads, group, queries)`` of one row block."""
    shape = (heads.stop - heads.start, call.group, queries.stop - queries.start)
    row_max = call.q.new_full(shape, -torch.inf)
    row_sum = call.q.new_zeros(shape)
    out = call.q.new_zeros((*shape, value.shape[-1]))
    for tile in call.tiles(heads, queries):
        scores, _ = call.scores(tile)
        new_max = torch.maximum(row_max, scores.amax(dim=-1))
        # Rows that have met no key yet subtract 0 rather than -inf, whose difference would be nan.
        base = new_max.masked_fill(new_max == -torch.inf, 0.0)
        p = scores.sub_(base[..., None]).exp_()
        shrink = (row_max - base).exp_()
        row_sum = row_sum * shrink + p.sum(dim=-1)
        if rng_state is not None:
            p.masked_fill_(~call.keep(tile, rng_state), 0.0)
        step = torch.bmm(p.flatten(1, 2), value[tile.heads, tile.keys]).view_as(out)
        out = torch.addcmul(step, out, shrink[..., None])
        row_max = new_max
    empty = row_max == -torch.inf
    scale = (1.0 / (1.0 - call.score.dropout_p)) / row_sum.masked_fill(empty, 1.0)
    lse = (row_max + row_sum.log()).masked_fill_(empty, torch.inf)
    return out * scale[..., None], lse


def _backward_call(
    call: ChunkedCall,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dlse: torch.Tensor | None,
    rng_state: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ``dq``, ``dk`` and ``dv`` of a chunked call."""
    value, dout = grouped(v, v.shape[2], call.dtype)[:, 0], grouped(dout, k.shape[2], call.dtype)
    lse = softmax_lse.reshape(call.q.shape[:3])
    delta = (dout * grouped(out, k.shape[2], call.dtype)).sum(dim=-1)
    if dlse is not None:
        delta -= dlse.reshape(delta.shape)
    # A row without keys has no gradient, whatever dlse says.
    delta.masked_fill_(lse == torch.inf, 0.0)

    dq, dk, dv = (torch.zeros_like(x) for x in (call.q, call.k, value))
    for heads, queries in call.row_blocks():
        for tile in call.tiles(heads, queries):
            _backward_tile(call, tile, value, dout, lse, delta, rng_state, (dq, dk, dv))
    return ungrouped(dq.mul_(call.q_factor), q), ungrouped(dk, k), ungrouped(dv, v)


def _backward_tile(
    call: ChunkedCall,
    tile: Tile,
    value: torch.Tensor,
    dout: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    rng_state: torch.Tensor | None,
    gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Add one tile's share to the grouped gradients ``dq`` (but for its scale), ``dk`` and ``dv``."""
    dq, dk, dv = gradients
    scores, tanh = call.scores(tile)
    p = scores.sub_(lse[tile.heads, :, tile.queries, None]).exp_()
    dout_rows = call.rows(dout, tile)
    dp = torch.bmm(dout_rows, value[tile.heads, tile.keys].transpose(1, 2)).view_as(p)
    kept = p
    if rng_state is not None:
        weight = call.keep(tile, rng_state).to(p.dtype).mul_(1.0 / (1.0 - call.score.dropout_p))
        kept = p * weight
        dp.mul_(weight)
    dv[tile.heads, tile.keys] += torch.bmm(kept.flatten(1, 2).transpose(1, 2), dout_rows)

    ds = dp.sub_(delta[tile.heads, :, tile.queries, None]).mul_(p)
    if tanh is not None:
        ds.mul_(tanh.square_().neg_().add_(1.0)).mul_(call.score.softcap)
    ds = ds.flatten(1, 2)
    dk[tile.heads, tile.keys] += torch.bmm(ds.transpose(1, 2), call.rows(call.q, tile))
    dq[tile.heads, :, tile.queries] += torch.bmm(ds, call.k[tile.heads, tile.keys]).view(
        dq[tile.heads, :, tile.queries].shape
    )
