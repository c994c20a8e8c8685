"""Attention over a KV cache written apart from the oracle, for the suite to judge: right, or with one bug."""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch


@dataclass(frozen=True)
class EagerKVCache:
    """flash_attn_with_kvcache in plain PyTorch, in float32 at least; ``bug`` breaks it in one way."""

    bug: str = ""

    def __call__(
        self,
        q,
        k_cache,
        v_cache,
        k=None,
        v=None,
        rotary_cos=None,
        rotary_sin=None,
        cache_seqlens=None,
        cache_batch_idx=None,
        cache_leftpad=None,
        block_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        rotary_interleaved=True,
        alibi_slopes=None,
        num_splits=0,
        return_softmax_lse=False,
    ):
        call = SimpleNamespace(**{name: x for name, x in locals().items() if name != "self"})
        if self.bug != "accepts_anything":
            check_arguments(**vars(call))
        if self.bug == "copies_strided_caches":
            call.k_cache, call.v_cache = k_cache.contiguous(), v_cache.contiguous()
        batch, new = q.shape[0], 0 if k is None else k.shape[1]
        call.capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
        lengths = self._lengths(cache_seqlens, batch, call.capacity)
        overflow = max(lengths, default=0) + new > call.capacity
        message = f"cache_seqlens {lengths} and {new} new keys must fit the capacity {call.capacity}"
        if overflow and self.bug not in ("overflow_unchecked", "overflow_found_late"):
            raise RuntimeError(message)
        out = torch.zeros(q.shape, dtype=torch.promote_types(q.dtype, torch.float32))
        lse = torch.full((batch, q.shape[2], q.shape[1]), math.inf, dtype=out.dtype)
        for b, n in enumerate(lengths):
            out[b], lse[b] = self._decode(call, b, n, n + new, out.dtype)
        if overflow and self.bug == "overflow_found_late":
            raise RuntimeError(message)
        if self.bug == "advances_cache_seqlens" and isinstance(cache_seqlens, torch.Tensor):
            cache_seqlens += new
        out = out.to(q.dtype)
        if self.bug != "returns_a_graph":
            out = out.detach()
        if self.bug == "lse_base_2":
            lse = lse / math.log(2.0)
        wants_lse = return_softmax_lse or self.bug == "always_returns_lse"
        return (out, lse.detach().float()) if wants_lse else out

    def _decode(self, call, b, n, last, dtype):
        """Append to one sequence, and attend to it."""
        pages, rows = self._addresses(call, b)
        pad = 0 if call.cache_leftpad is None or self.bug == "leftpad_ignored" else int(call.cache_leftpad[b])
        left, right = (int(bound) for bound in call.window_size)
        right = 0 if call.causal and self.bug != "causal_ignored" else right
        query = call.q[b].to(dtype)
        if call.k is not None:
            local = call.causal or (max(left, right) >= 0 and self.bug != "window_is_not_local")
            start = n - pad if self.bug == "leftpad_shifts_rotary" else n
            query, fresh_k, fresh_v = self._turned(call, b, start, local, dtype)
            self._append(call, pages, rows, b, n, fresh_k, fresh_v)
        if self.bug == "new_keys_unseen":
            last = n
        if self.bug == "reads_past_the_length" and last < call.capacity:
            last += 1
        last = min(last, call.capacity)
        key, value = (x[pages[pad:last], rows[pad:last]].to(dtype) for x in (call.k_cache, call.v_cache))
        slopes = call.alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[0 if self.bug == "slopes_of_sequence_0" else b]
        if self.bug == "depends_on_batch" and call.q.shape[0] > 1:
            query = query * (1.0 + 2.0**-22)
        scores = self._scores(query, key, call.softmax_scale, call.softcap, slopes)
        keep = self._keep(query.shape[0], key.shape[0], left, right, pad)
        return self._attend(scores.masked_fill(~keep, -math.inf), value, call.num_splits)

    def _turned(self, call, b, start, local, dtype):
        """Rotate a sequence's queries and new keys, and round them to the cache's dtype."""
        query, k, v = call.q[b].to(dtype), call.k[b], call.v[b]
        if call.rotary_cos is None:
            return query, k, v
        positions = range(start, start + k.shape[0])
        turn = self._turn(call.rotary_cos.to(dtype), call.rotary_sin.to(dtype), call.rotary_interleaved)
        if self.bug == "rotates_values":
            v = turn(v.to(dtype), positions).to(v.dtype)
        advance = {"queries_always_advance": 1, "queries_never_advance": 0}.get(self.bug, int(local))
        furthest = call.rotary_cos.shape[0] - 1
        if self.bug != "queries_not_rotated":
            own = [min(start + advance * i, furthest) for i in range(query.shape[0])]
            query = turn(query, own).to(call.q.dtype).to(dtype)
        return query, turn(k.to(dtype), positions).to(k.dtype), v

    def _lengths(self, cache_seqlens, batch, capacity):
        if cache_seqlens is None:
            return [0 if self.bug == "no_lengths_are_0" else capacity] * batch
        if isinstance(cache_seqlens, int):
            return [cache_seqlens] * batch
        lengths = cache_seqlens.tolist()
        return [max(lengths, default=0)] * batch if self.bug == "longest_for_all" else lengths

    def _addresses(self, call, b):
        """For each position of a sequence, the cache's row and the place in it; a few more than there are."""
        position, size = torch.arange(call.capacity + 8), call.k_cache.shape[1]
        if call.block_table is None:
            index = None if self.bug == "batch_idx_ignored" else call.cache_batch_idx
            return torch.full_like(position, b if index is None else int(index[b])), position
        table = call.block_table[0 if self.bug == "table_of_sequence_0" else b].long()
        if self.bug == "table_must_be_contiguous":
            table = call.block_table.as_strided((table.numel(),), (1,), b * table.numel()).long()
        if self.bug == "pages_in_order":
            table = table[0] + torch.arange(table.numel())
        pages = table[(position // size).clamp(max=table.numel() - 1)]
        if self.bug == "next_page_one_row_late":
            pages = table[((position - 1).clamp(0) // size).clamp(max=table.numel() - 1)]
        return pages, position % size

    def _turn(self, cos, sin, interleaved):
        if self.bug == "other_rotary_convention":
            interleaved = not interleaved

        def turn(x, positions):
            places = list(positions)
            c, s = cos[places][:, None], sin[places][:, None]
            if self.bug == "rotates_backwards":
                s = -s
            half = cos.shape[1]
            pairs = x[..., : 2 * half].unflatten(-1, (half, 2) if interleaved else (2, half))
            real, imaginary = pairs.unbind(-1 if interleaved else -2)
            turned = torch.stack(
                (real * c - imaginary * s, real * s + imaginary * c), -1 if interleaved else -2
            )
            rest = x[..., 2 * half :]
            return torch.cat((turned.flatten(-2), 0 * rest if self.bug == "drops_unrotated" else rest), -1)

        return turn

    def _append(self, call, pages, rows, b, n, k, v):
        at = slice(n, n + k.shape[0])
        if self.bug == "appends_one_late" and at.stop < call.capacity:
            at = slice(n + 1, at.stop + 1)
        if self.bug == "appends_one_early" and n > 0:
            at = slice(n - 1, at.stop - 1)
        if self.bug == "appends_to_own_row":
            pages = torch.full_like(pages, b)
        fits = torch.arange(at.start, at.stop) < call.capacity
        call.k_cache[pages[at][fits], rows[at][fits]] = k[fits]
        if self.bug != "values_not_appended":
            call.v_cache[pages[at][fits], rows[at][fits]] = v[fits]
        if self.bug == "rounds_the_cache":
            call.k_cache.copy_(call.k_cache.to(torch.bfloat16))
        if self.bug == "zeroes_the_tail":
            tail = slice(at.stop, call.capacity)
            call.v_cache[pages[tail], rows[tail]] = 0.0

    def _scores(self, query, key, softmax_scale, softcap, slopes):
        heads = torch.arange(query.shape[1])
        heads = (
            heads % key.shape[1] if self.bug == "gqa_interleaved" else heads // (len(heads) // key.shape[1])
        )
        scale = (
            query.shape[-1] ** -0.5 if softmax_scale is None or self.bug == "scale_ignored" else softmax_scale
        )
        scores = torch.einsum("ihd,jhd->hij", query, key[:, heads]) * scale
        if softcap and self.bug != "softcap_ignored":
            scores = softcap * torch.tanh(scores / softcap)
        if slopes is None:
            return scores
        offset = 0 if self.bug == "alibi_from_top_left" else key.shape[0] - query.shape[0]
        distance = torch.arange(query.shape[0])[:, None] + offset - torch.arange(key.shape[0])
        return scores - slopes[:, None, None] * distance.abs()

    def _keep(self, seqlen_q, seqlen_k, left, right, pad):
        diagonal = 0 if self.bug == "causal_top_left" else seqlen_k - seqlen_q
        diagonal += self.bug == "causal_off_by_one"
        diagonal += pad * (self.bug == "leftpad_moves_the_diagonal")
        offset = torch.arange(seqlen_k) - torch.arange(seqlen_q)[:, None] - diagonal
        left -= self.bug == "window_left_off_by_one" and left > 0
        return ((left < 0) | (offset >= -left)) & ((right < 0) | (offset <= right))

    def _attend(self, scores, value, num_splits):
        """Attend to the keys part by part, and merge the parts by their LSE."""
        heads = torch.arange(scores.shape[0])
        heads = (
            heads % value.shape[1]
            if self.bug == "gqa_interleaved"
            else heads // (len(heads) // value.shape[1])
        )
        size = max(math.ceil(scores.shape[-1] / max(num_splits, 1)), 1)
        outs, stats = [], []
        for start in range(0, size * max(num_splits, 1), size):
            part, v = scores[..., start : start + size], value[start : start + size][:, heads]
            top = part.amax(-1) if part.shape[-1] else torch.full(part.shape[:2], -math.inf, dtype=part.dtype)
            if self.bug != "empty_splits_are_nan":
                top = top.nan_to_num(neginf=0.0)
            p = torch.exp(part - top[..., None])
            total = p.sum(-1)
            outs.append(torch.einsum("hij,jhd->hid", p, v) / total.clamp(min=1e-30)[..., None])
            stats.append(top + total.log())
        lse = torch.logsumexp(torch.stack(stats), 0)
        weights = torch.exp(torch.stack(stats) - lse.nan_to_num(neginf=0.0))
        if self.bug == "merges_unweighted":
            weights = torch.full_like(weights, 1.0 / len(stats))
        out = (torch.stack(outs) * weights[..., None]).sum(0).transpose(0, 1)
        keyless = lse.isinf()
        if self.bug == "keyless_rows_average" and value.shape[0]:
            out = torch.where(keyless.T[..., None], value.mean(0)[heads], out)
        return out, lse if self.bug == "lse_minus_inf" else lse.masked_fill(keyless, math.inf)


def check_arguments(
    q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
    block_table, softmax_scale, causal, window_size, softcap, rotary_interleaved, alibi_slopes, num_splits,
    return_softmax_lse,
):  # fmt: skip
    """Refuse every mistake with a message that names the argument and what was given."""
    check_combination(
        k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table
    )
    check_tensors(q, k_cache, v_cache, k, v, paged=block_table is not None)
    check_integers(q.shape[0], k_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    if rotary_cos is not None:
        check_rotary(q, rotary_cos, rotary_sin)
    for name, x in (("softcap", softcap), ("softmax_scale", softmax_scale or 0.0)):
        if not isinstance(x, (int, float)) or not math.isfinite(x) or (name == "softcap" and x < 0):
            raise RuntimeError(f"{name} must be a finite number, softcap at least 0, got {x!r}")
    bounds = window_size.tolist() if isinstance(window_size, torch.Tensor) else window_size
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 2:
        raise RuntimeError(f"window_size must be two integers, got {window_size!r}")
    if not isinstance(num_splits, int) or not 0 <= num_splits <= 128:
        raise RuntimeError(f"num_splits must be an integer in 0..128, got {num_splits!r}")
    if alibi_slopes is not None:
        shape = tuple(alibi_slopes.shape) if isinstance(alibi_slopes, torch.Tensor) else "a list"
        if shape not in ((q.shape[2],), (q.shape[0], q.shape[2])):
            raise RuntimeError(f"alibi_slopes must be (nheads,) or (batch, nheads) of {q.shape}, got {shape}")


def check_combination(k, v, cos, sin, cache_seqlens, cache_batch_idx, cache_leftpad, block_table):
    for broken, message in (
        ((k is None) != (v is None), "k and v go together: give both or neither"),
        (k is not None and cache_seqlens is None, "k needs cache_seqlens, got None"),
        ((cos is None) != (sin is None), "rotary_cos and rotary_sin go together: give both or neither"),
        (cos is not None and k is None, "rotary_cos needs new keys in k, got None"),
        (block_table is not None and cache_leftpad is not None, "block_table excludes cache_leftpad"),
        (block_table is not None and cache_batch_idx is not None, "block_table excludes cache_batch_idx"),
    ):
        if broken:
            raise RuntimeError(message)


def check_tensors(q, k_cache, v_cache, k, v, *, paged):
    tensors = {"q": q, "k_cache": k_cache, "v_cache": v_cache, "k": k, "v": v}
    for name, x in tensors.items():
        if x is None:
            continue
        if not isinstance(x, torch.Tensor) or x.dim() != 4:
            got = tuple(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise RuntimeError(f"{name} must be a tensor of 4 dimensions, got {got}")
        if not x.dtype.is_floating_point or x.dtype != q.dtype:
            raise RuntimeError(f"dtype of {name} must be floating and q's {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise RuntimeError(f"device of {name} must be q's {q.device}, got {x.device}")
        if x.shape[3] != q.shape[3] or not 1 <= x.shape[3] <= 256:
            raise RuntimeError(f"head dim of {name} must be q's {q.shape[3]}, at most 256, got {x.shape[3]}")
        if name.endswith("cache") and x.stride(-1) != 1:
            raise RuntimeError(f"{name} must have a last stride of 1, got stride {x.stride()}")
    if k_cache.shape != v_cache.shape:
        raise RuntimeError(f"v_cache must have k_cache's shape {k_cache.shape}, got {tuple(v_cache.shape)}")
    if q.shape[2] % k_cache.shape[2]:
        raise RuntimeError(f"heads of k_cache must divide q's {q.shape[2]}, got {k_cache.shape[2]}")
    for name, x in (("k", k), ("v", v)):
        expected = None if x is None else (q.shape[0], k.shape[1], *k_cache.shape[2:])
        if x is not None and tuple(x.shape) != expected:
            raise RuntimeError(f"{name} must have shape {expected}, got {tuple(x.shape)}")
    size = k_cache.shape[1]
    if k is not None and not paged and k.shape[1] > size:
        raise RuntimeError(f"k must fit the capacity {size}, got {k.shape[1]} new keys")
    if paged and (size < 16 or size & (size - 1)):
        raise RuntimeError(f"page size must be a power of two of at least 16, got {size}")


def check_integers(batch, k_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table):
    tensors = {"cache_batch_idx": cache_batch_idx, "cache_leftpad": cache_leftpad, "block_table": block_table}
    if isinstance(cache_seqlens, torch.Tensor):
        tensors["cache_seqlens"] = cache_seqlens
    elif cache_seqlens is not None and (not isinstance(cache_seqlens, int) or cache_seqlens < 0):
        raise RuntimeError(f"cache_seqlens must be a tensor or a number from 0 on, got {cache_seqlens!r}")
    for name, x in tensors.items():
        if x is None:
            continue
        if x.dtype != torch.int32:
            raise RuntimeError(f"{name} must be int32, got {x.dtype}")
        if x.dim() != (2 if name == "block_table" else 1) or x.shape[0] != batch:
            raise RuntimeError(
                f"{name} must have one entry for each of {batch} sequences, got {tuple(x.shape)}"
            )
    if block_table is None and cache_batch_idx is None and k_cache.shape[0] != batch:
        raise RuntimeError(f"batch of k_cache must be q's {batch}, got {k_cache.shape[0]}")


def check_rotary(q, cos, sin):
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise RuntimeError(
            f"rotary_cos and rotary_sin must both be 2-D, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if cos.dtype != q.dtype or sin.dtype != q.dtype:
        raise RuntimeError(f"dtype of rotary_cos and rotary_sin must be q's {q.dtype}, got {cos.dtype}")
    rotary_dim = 2 * cos.shape[1]
    if rotary_dim % 16 or rotary_dim > q.shape[3]:
        raise RuntimeError(f"rotary dim must be a multiple of 16 up to {q.shape[3]}, got {rotary_dim}")


@pytest.fixture(scope="session")
def eager_kvcache():
    return EagerKVCache
