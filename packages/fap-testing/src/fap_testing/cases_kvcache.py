"""Named calls of flash_attn_with_kvcache that cover every corner of its contract. Imports no torch.

``select_kvcache("quick")`` is small enough for Triton's interpreter on a CPU; ``select_kvcache("full")``
holds it and more, and wants a GPU. Other tags name a topic: ``select_kvcache("quick", "paged")``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from fap_testing.cases import HUGE_LAYOUTS, Case

if TYPE_CHECKING:
    from fap_testing.cases import Layout

__all__ = [
    "CACHE_LAYOUTS",
    "KVCACHE_FEATURES",
    "KVCacheCase",
    "all_kvcache_cases",
    "find_kvcache",
    "select_kvcache",
]

# How a cache may lie in memory: all that keep a unit last stride and do not involve q.
CACHE_LAYOUTS: tuple[Layout, ...] = (
    "contiguous",
    "heads_first",
    "sequence_first",
    "gapped",
    "unaligned",
    "kv_packed",
)

KVCACHE_FEATURES: dict[str, str] = {
    "softmax_scale": "a softmax_scale other than 1 / sqrt(head_dim)",
    "causal": "causal=True",
    "window": "a window_size other than (-1, -1)",
    "softcap": "softcap > 0",
    "alibi": "alibi_slopes",
    "gqa": "fewer key/value heads than query heads",
    "zero_length": "no sequence, no query, or a sequence without keys",
    "keyless_rows": "query rows whose mask leaves no key (out 0, LSE +inf)",
    "head_dim_unaligned": "a head_dim that is no multiple of 8",
    "head_dim_over_128": "a head_dim above 128",
    "strided": "q, k or v that are not contiguous, with unit last stride",
    "last_stride": "q, k and v whose last stride is not 1",
    "strided_cache": "caches that are not contiguous, with unit last stride",
    "append": "k and v, to be appended to the cache in place",
    "rotary": "rotary_cos and rotary_sin",
    "partial_rotary": "a rotary_dim below head_dim",
    "leftpad": "cache_leftpad",
    "batch_idx": "cache_batch_idx",
    "paged": "a block_table",
    "small_pages": "pages of fewer than 256 keys",
    "lse": "return_softmax_lse=True returns (out, softmax_lse)",
    "num_splits": "num_splits other than 0, with the same result within rounding",
    "batch_invariant": "with a fixed num_splits, a sequence's result is bitwise the same in any batch",
    "overflow_check": "a tensor of cache_seqlens that leaves no room for k raises; a number always must",
    "cuda_graph": "a call captured in a CUDA graph follows cache_seqlens when it is replayed",
    "error_messages": "mistakes raise before any work, with a message that names the argument",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class KVCacheCase:
    """One attention call over a key/value cache, without its data.

    Attributes:
        name: unique among the named cases; also the seed of the case's data.
        cache_seqlens: for each sequence, how many keys it has in the cache.
        lengths_as: how these are passed: an int32 tensor, one number for all, or not at all, which stands for
            the whole capacity.
        capacity: how many keys a sequence can have.
        seqlen_q: queries of each sequence.
        seqlen_new: keys to append to each sequence; 0 for a call without k and v.
        page_size: None, or how many keys a page holds; the cache then lies in pages in random order.
        leftpad: for each sequence, how many leading keys are padding; None for no argument.
        batch_idx: for each sequence, its row of the cache; None for no argument.
        rotary_dim: 0 for none.
        rotary_interleaved: as in flash_attn_with_kvcache.
        nheads, nheads_k, head_dim: sizes of q ``(batch, seqlen_q, nheads, head_dim)``, and of k and v.
        softmax_scale, causal, window_size, softcap: flash_attn_with_kvcache's options.
        alibi: None, ``"head"`` for slopes ``(nheads,)`` or ``"batch_head"`` for ``(batch, nheads)``.
        layout: how q, k and v lie in memory, one of :data:`fap_testing.cases.LAYOUTS`.
        cache_layout: how the caches or their pages do, one of :data:`CACHE_LAYOUTS`.
        tags: what :func:`select_kvcache` selects by.

    Raises:
        ValueError: sizes or options that contradict each other.
    """

    name: str
    cache_seqlens: tuple[int, ...]
    lengths_as: Literal["tensor", "number", "none"] = "tensor"
    capacity: int = 64
    seqlen_q: int = 1
    seqlen_new: int = 0
    page_size: int | None = None
    leftpad: tuple[int, ...] | None = None
    batch_idx: tuple[int, ...] | None = None
    rotary_dim: int = 0
    rotary_interleaved: bool = True
    nheads: int = 2
    nheads_k: int = 2
    head_dim: int = 16
    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: Literal["head", "batch_head"] | None = None
    layout: Layout = "contiguous"
    cache_layout: Layout = "contiguous"
    tags: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        broken = [rule for rule, is_broken in self._rules().items() if is_broken]
        if broken:
            raise ValueError(f"case {self.name!r} breaks a rule: {'; '.join(broken)}")
        # Refuses what no dense call accepts either.
        _ = self.fresh

    def __str__(self) -> str:
        return self.name

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return len(self.cache_seqlens)

    @property
    def batch_cache(self) -> int:
        """How many rows a cache that is not paged has: two are in no use if batch_idx is given."""
        return self.batch if self.batch_idx is None else max(self.batch_idx, default=-1) + 3

    @property
    def seqlens_k(self) -> tuple[int, ...]:
        """For each sequence, how many keys lie in the cache after the call, padding included."""
        return tuple(n + self.seqlen_new for n in self.cache_seqlens)

    @property
    def leftpads(self) -> tuple[int, ...]:
        """For each sequence, how many leading keys are padding."""
        return (0,) * self.batch if self.leftpad is None else self.leftpad

    @property
    def is_local(self) -> bool:
        """Whether queries have positions of their own: causal, or with a window."""
        return self.causal or self.window_size != (-1, -1)

    @property
    def seqlen_rotary(self) -> int:
        """How many positions the rotary tables have: the capacity, and those of queries beyond it."""
        last = max(self.cache_seqlens, default=0) + self.seqlen_q if self.is_local else 0
        return max(self.capacity, last)

    @property
    def fresh(self) -> Case:
        """The dense case with the sizes and the layout of q, k and v."""
        return self._dense(self.batch, self.seqlen_q, self.seqlen_new, self.layout)

    def sequence(self, index: int) -> Case:
        """The dense case of one sequence alone, without its padding."""
        return self._dense(1, self.seqlen_q, self.seqlens_k[index] - self.leftpads[index], "contiguous")

    @property
    def options(self) -> dict[str, Any]:
        """The options that are numbers, less those at their default."""
        interleaved = {} if self.rotary_interleaved else {"rotary_interleaved": False}
        return {**self.fresh.options, **interleaved}

    @property
    def features(self) -> frozenset[str]:
        """What an implementation must support to run this case: names from :data:`KVCACHE_FEATURES`."""
        asked = self.fresh.features - {"zero_length", "cross_lengths", "keyless_rows"}
        asked = asked.union(*(self.sequence(index).features for index in range(self.batch)))
        own = {
            "zero_length": self.batch == 0,
            "strided_cache": self.cache_layout != "contiguous",
            "append": self.seqlen_new > 0,
            "rotary": self.rotary_dim > 0,
            "partial_rotary": 0 < self.rotary_dim < self.head_dim,
            "leftpad": self.leftpad is not None,
            "batch_idx": self.batch_idx is not None,
            "paged": self.page_size is not None,
            "small_pages": self.page_size is not None and self.page_size < 256,
        }
        return (asked - {"cross_lengths"}) | {name for name, is_asked in own.items() if is_asked}

    def _dense(self, batch: int, seqlen_q: int, seqlen_k: int, layout: Layout) -> Case:
        shared = ("nheads", "nheads_k", "head_dim", "softmax_scale", "causal", "window_size", "softcap")
        options = {name: getattr(self, name) for name in (*shared, "alibi")}
        return Case(
            name=self.name, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k, layout=layout, **options
        )

    def _rules(self) -> dict[str, bool]:
        """Name every rule, and whether it is broken."""
        leftpad, batch_idx, page_size = self.leftpad, self.batch_idx, self.page_size
        rows = batch_idx or ()
        pads = zip(self.leftpads, self.cache_seqlens, strict=False)
        alike = len(set(self.cache_seqlens)) == 1
        whole = not self.seqlen_new and set(self.cache_seqlens) <= {self.capacity}
        return {
            f"sequences must fit the capacity {self.capacity}, got {self.seqlens_k}": any(
                not 0 <= n <= self.capacity for n in self.seqlens_k
            ),
            "lengths_as 'number' needs equal lengths": self.lengths_as == "number" and not alike,
            "lengths_as 'none' needs full caches and no new keys": self.lengths_as == "none" and not whole,
            f"leftpad must be (batch,) and at most the lengths {self.cache_seqlens}, got {leftpad}": (
                len(self.leftpads) != self.batch or any(not 0 <= pad <= n for pad, n in pads)
            ),
            f"batch_idx must be (batch,) and not negative, got {batch_idx}": (
                batch_idx is not None and (len(rows) != self.batch or any(row < 0 for row in rows))
            ),
            "batch_idx must name different rows where keys are appended": (
                self.seqlen_new > 0 and len(set(rows)) != len(rows)
            ),
            "page_size excludes leftpad": page_size is not None and leftpad is not None,
            "page_size excludes batch_idx": page_size is not None and batch_idx is not None,
            "page_size must divide the capacity": page_size is not None and self.capacity % page_size != 0,
            "rotary_dim needs new keys": self.rotary_dim > 0 and self.seqlen_new == 0,
            f"rotary_dim must be a multiple of 16 up to head_dim, got {self.rotary_dim}": (
                self.rotary_dim % 16 != 0 or not 0 <= self.rotary_dim <= self.head_dim
            ),
            f"layout {self.layout!r} is not for decoding": self.layout in HUGE_LAYOUTS,
            f"cache_layout must be one of {', '.join(CACHE_LAYOUTS)}, got {self.cache_layout!r}": (
                self.cache_layout not in CACHE_LAYOUTS
            ),
        }


def select_kvcache(*tags: str) -> tuple[KVCacheCase, ...]:
    """Return the named KV-cache cases that bear all of the tags.

    Raises:
        ValueError: no case bears them all.
    """
    chosen = tuple(case for case in all_kvcache_cases() if case.tags.issuperset(tags))
    if not chosen:
        known = sorted({tag for case in all_kvcache_cases() for tag in case.tags})
        raise ValueError(f"no KV-cache case has all of the tags {tags}, known tags: {', '.join(known)}")
    return chosen


def find_kvcache(name: str) -> KVCacheCase:
    """Return the KV-cache case of that name.

    Raises:
        KeyError: there is none.
    """
    by_name = {case.name: case for case in all_kvcache_cases()}
    if name not in by_name:
        raise KeyError(f"no KV-cache case is called {name!r}; cases_kvcache.all_kvcache_cases() has them all")
    return by_name[name]


@cache
def all_kvcache_cases() -> tuple[KVCacheCase, ...]:
    """Return every named KV-cache case."""
    from fap_testing._grids_kvcache import named_kvcache_cases

    cases = tuple(named_kvcache_cases())
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(f"names must differ, got twice: {sorted({n for n in names if names.count(n) > 1})}")
    return cases
