"""Seeded inputs for a KV-cache case, with NaN around them and in every row of the cache without a key."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fap_testing.cases import Case
from fap_testing.inputs_varlen import contiguous_placement, shuffle_pages
from fap_testing.layouts import Buffer, place_qkv

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fap_testing.cases_kvcache import KVCacheCase
    from fap_testing.layouts import Placement

__all__ = ["KVCacheInputs", "make_kvcache_inputs"]

_INTEGERS = ("cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table")


@dataclass(frozen=True, slots=True, eq=False)
class KVCacheInputs:
    """The tensors of one call.

    Attributes:
        case: what they were made for.
        q: ``(batch, seqlen_q, nheads, head_dim)``.
        k_cache, v_cache: ``(batch_cache, capacity, nheads_k, head_dim)``, or of a paged case ``(num_blocks,
            page_size, nheads_k, head_dim)``. A call writes to them.
        k, v: ``(batch, seqlen_new, nheads_k, head_dim)``, or None.
        rotary_cos, rotary_sin: ``(seqlen_rotary, rotary_dim / 2)`` of unrelated angles, or None.
        cache_seqlens: int32 ``(batch,)``, a number, or None.
        cache_batch_idx, cache_leftpad: int32 ``(batch,)``, or None.
        block_table: int32 ``(batch, max_blocks)``, or None. Entries beyond a sequence's pages name a page
            that is full of NaN.
        alibi_slopes: float32 ``(nheads,)`` or ``(batch, nheads)``, or None.
        written: bool, the first two dimensions of the caches: the rows that a call must write.
        before: copies of k_cache and v_cache as they were made.
    """

    case: KVCacheCase
    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    rotary_cos: torch.Tensor | None
    rotary_sin: torch.Tensor | None
    cache_seqlens: torch.Tensor | int | None
    cache_batch_idx: torch.Tensor | None
    cache_leftpad: torch.Tensor | None
    block_table: torch.Tensor | None
    alibi_slopes: torch.Tensor | None
    written: torch.Tensor
    before: tuple[torch.Tensor, torch.Tensor]
    buffers: tuple[Buffer, ...]
    integers: Mapping[str, torch.Tensor]

    @property
    def options(self) -> dict[str, Any]:
        """flash_attn_with_kvcache's keyword arguments, k and v included, less those at their default."""
        names = ("k", "v", "rotary_cos", "rotary_sin", *_INTEGERS, "alibi_slopes")
        tensors = {name: x for name in names if (x := getattr(self, name)) is not None}
        return {**tensors, **self.case.options}

    def assert_untouched(self, *, nothing_written: bool = False) -> None:
        """Raise AssertionError if a call wrote to anything but the rows of the caches that it must write.

        Args:
            nothing_written: allow no write at all, as after a call that was refused.
        """
        written = self.written[..., None, None].expand(self.k_cache.shape)
        allowed = {} if nothing_written else {"k_cache": written, "v_cache": written}
        for buffer in self.buffers:
            buffer.assert_untouched(
                but={name: mask for name, mask in allowed.items() if name in buffer.views}
            )
        for name, before in self.integers.items():
            if not torch.equal(getattr(self, name), before):
                raise AssertionError(
                    f"{name} was written to: {before.tolist()} became {getattr(self, name).tolist()}"
                )


def make_kvcache_inputs(
    case: KVCacheCase,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    poison: bool = True,
) -> KVCacheInputs:
    """Make the tensors of a call over a KV cache, standard normal and reproducible.

    The values in use depend on the case's name, its sizes and the seed; not on dtype (but for rounding),
    device, layout or page size.

    Args:
        case: lengths, options and memory layout.
        dtype: of all floating tensors but alibi_slopes.
        device: of all tensors.
        seed: another seed gives other values.
        poison: put NaN before, between and after the tensors, and into free pages, rows of the cache without
            a sequence, left padding, and whatever lies beyond a sequence's keys. Without, zeros.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) ^ seed)
    empty = math.nan if poison else 0.0
    values = _draw(case, generator)
    tables = _integer_tensors(case)
    num_blocks = 0
    if case.page_size is not None:
        pages = shuffle_pages(case.seqlens_k, case.page_size, generator, case.capacity // case.page_size)
        tables["block_table"], num_blocks = pages
    rows = _rows(case, tables.get("block_table"))
    written = torch.zeros(_cache_shape(case, num_blocks)[:2], dtype=torch.bool)
    for b, (n, end) in enumerate(zip(case.cache_seqlens, case.seqlens_k, strict=True)):
        written.view(-1)[rows[b, n:end]] = True
    for name in ("k_cache", "v_cache"):
        values[name] = _store(values[name], rows, case, num_blocks, empty)

    dtypes = {"alibi_slopes": torch.float32}
    values = {name: x.to(device=device, dtype=dtypes.get(name, dtype)) for name, x in values.items()}
    buffers = tuple(
        Buffer({name: (values[name], place) for name, place in group.items()}, poison=poison)
        for group in _placements(case, values)
    )
    views = {name: view for buffer in buffers for name, view in buffer.views.items()}
    tables = {name: x.to(device) for name, x in tables.items()}
    arguments: dict[str, Any] = dict.fromkeys(
        ("k", "v", "rotary_cos", "rotary_sin", "alibi_slopes", *_INTEGERS)
    )
    if case.lengths_as == "number":
        arguments["cache_seqlens"] = case.cache_seqlens[0]
    return KVCacheInputs(
        case=case,
        **arguments | views | tables,
        written=written.to(device),
        before=(views["k_cache"].clone(), views["v_cache"].clone()),
        buffers=buffers,
        integers={name: x.clone() for name, x in tables.items()},
    )


def _draw(case: KVCacheCase, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Draw all floating tensors; the caches row by row, as if not paged."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    heads_k = (case.nheads_k, case.head_dim)
    values = {
        "q": draw(case.batch, case.seqlen_q, case.nheads, case.head_dim),
        "k_cache": draw(case.batch_cache, case.capacity, *heads_k),
        "v_cache": draw(case.batch_cache, case.capacity, *heads_k),
    }
    if case.seqlen_new:
        values["k"] = draw(case.batch, case.seqlen_new, *heads_k)
        values["v"] = draw(case.batch, case.seqlen_new, *heads_k)
    if case.rotary_dim:
        # Unrelated angles: a wrong position or pair shows at once, however far along the sequence.
        turns = torch.rand(case.seqlen_rotary, case.rotary_dim // 2, generator=generator)
        values["rotary_cos"], values["rotary_sin"] = (2 * math.pi * turns).cos(), (2 * math.pi * turns).sin()
    if case.alibi is not None:
        shape = (case.nheads,) if case.alibi == "head" else (case.batch, case.nheads)
        values["alibi_slopes"] = torch.rand(shape, generator=generator) * 0.9 + 0.05
    return values


def _integer_tensors(case: KVCacheCase) -> dict[str, torch.Tensor]:
    lengths = case.cache_seqlens if case.lengths_as == "tensor" else None
    given = {"cache_seqlens": lengths, "cache_batch_idx": case.batch_idx, "cache_leftpad": case.leftpad}
    return {name: torch.tensor(x, dtype=torch.int32) for name, x in given.items() if x is not None}


def _rows(case: KVCacheCase, block_table: torch.Tensor | None) -> torch.Tensor:
    """Return ``(batch, capacity)``: where each sequence's rows lie in the flattened cache."""
    position = torch.arange(case.capacity)
    if block_table is None or case.page_size is None:
        slots = torch.tensor(_slots(case), dtype=torch.int64)
        return slots[:, None] * case.capacity + position
    page = block_table.long()[:, position // case.page_size]
    return page * case.page_size + position % case.page_size


def _slots(case: KVCacheCase) -> tuple[int, ...]:
    return tuple(range(case.batch)) if case.batch_idx is None else case.batch_idx


def _store(
    drawn: torch.Tensor, rows: torch.Tensor, case: KVCacheCase, num_blocks: int, empty: float
) -> torch.Tensor:
    """Put the keys in use where they belong, with poison everywhere else."""
    stored = torch.full(_cache_shape(case, num_blocks), empty)
    for b, (slot, pad, n) in enumerate(zip(_slots(case), case.leftpads, case.cache_seqlens, strict=True)):
        stored.flatten(0, 1)[rows[b, pad:n]] = drawn[slot, pad:n]
    return stored


def _cache_shape(case: KVCacheCase, num_blocks: int) -> tuple[int, int, int, int]:
    heads = (case.nheads_k, case.head_dim)
    if case.page_size is None:
        return (case.batch_cache, case.capacity, *heads)
    return (num_blocks, case.page_size, *heads)


def _placements(case: KVCacheCase, values: Mapping[str, torch.Tensor]) -> list[dict[str, Placement]]:
    """Return the buffers: for each, where its tensors lie."""
    blocks, seqlen, nheads_k, head_dim = values["k_cache"].shape
    stored = Case(
        name=case.name, batch=blocks, seqlen_q=seqlen, seqlen_k=seqlen, nheads=nheads_k, nheads_k=nheads_k,
        head_dim=head_dim, layout=case.cache_layout,
    )  # fmt: skip
    fresh = [{n: place for n, place in group.items() if n in values} for group in place_qkv(case.fresh)]
    cached = [
        {f"{n}_cache": place for n, place in group.items() if n in ("k", "v")} for group in place_qkv(stored)
    ]
    single = ("rotary_cos", "rotary_sin", "alibi_slopes")
    alone = [{name: contiguous_placement(values[name])} for name in single if name in values]
    return [group for group in (*fresh, *cached, *alone) if group]
