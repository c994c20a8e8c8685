"""Hypothesis strategies for calls over a key/value cache.

Needs Hypothesis: ``pip install "fap-testing[hypothesis]"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fap_testing.cases_kvcache import CACHE_LAYOUTS, KVCACHE_FEATURES, KVCacheCase
from fap_testing.strategies import cases

# Importing fap_testing.strategies has said so if Hypothesis is missing.
from hypothesis import assume  # isort: skip
from hypothesis import strategies as st  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Collection

    from fap_testing.cases import Case

__all__ = ["kvcache_cases"]

_OF_THE_CALL = (
    "nheads",
    "nheads_k",
    "head_dim",
    "softmax_scale",
    "causal",
    "window_size",
    "softcap",
    "alibi",
)
_OF_DENSE = frozenset(
    {"softmax_scale", "causal", "window", "softcap", "alibi", "gqa", "head_dim_unaligned"}
    | {"head_dim_over_128", "strided", "last_stride"}
)
_UNLIKE_DECODING = frozenset({"dropout", "cross_lengths", "zero_length", "keyless_rows"})


def kvcache_cases(
    *,
    max_batch: int = 4,
    max_queries: int = 20,
    max_capacity: int = 70,
    max_head_dim: int = 64,
    without: Collection[str] = (),
) -> st.SearchStrategy[KVCacheCase]:
    """Draw a :class:`fap_testing.cases_kvcache.KVCacheCase` with random lengths and features.

    Args:
        max_batch: largest number of sequences.
        max_queries: largest number of queries, and of new keys; the smallest is 0.
        max_capacity: largest number of keys of a sequence; pages round it up.
        max_head_dim: largest head dim.
        without: names from :data:`fap_testing.cases_kvcache.KVCACHE_FEATURES` that no drawn case asks for.

    Raises:
        ValueError: an unknown name in ``without``.
    """
    unknown = sorted(set(without) - KVCACHE_FEATURES.keys())
    if unknown:
        raise ValueError(f"without has unknown features {unknown}, accepted: {', '.join(KVCACHE_FEATURES)}")
    excluded = (set(without) & _OF_DENSE) | _UNLIKE_DECODING
    dense = cases(max_seqlen=max_capacity, max_head_dim=max_head_dim, max_batch=1, without=excluded)
    return _kvcache_cases(dense, max_batch, max_queries, max_capacity, frozenset(without))


@st.composite
def _kvcache_cases(
    draw: st.DrawFn,
    dense: st.SearchStrategy[Case],
    max_batch: int,
    max_queries: int,
    max_capacity: int,
    without: frozenset[str],
) -> KVCacheCase:
    call = draw(dense)
    smallest = 1 if "zero_length" in without else 0
    sizes: dict[str, Any] = {"seqlen_q": draw(st.integers(smallest, max_queries))}
    sizes["seqlen_new"] = 0 if "append" in without else draw(st.integers(0, max_queries))
    if call.layout == "qkv_packed":
        assume("append" not in without)
        sizes["seqlen_new"] = sizes["seqlen_q"]
    batch = draw(st.integers(1, max_batch))
    sizes |= draw(_storage(batch, without))
    page_size = sizes.get("page_size") or 1
    least = sizes["seqlen_new"] + smallest
    sizes["capacity"] = -(-draw(st.integers(least, max(least, max_capacity))) // page_size) * page_size
    room = sizes["capacity"] - sizes["seqlen_new"]
    # One sequence in three fills the cache to its last row.
    length = st.one_of(st.integers(smallest, room), st.integers(smallest, room), st.just(room))
    sizes["cache_seqlens"] = draw(st.tuples(*[length] * batch))
    if sizes.pop("leftpad", False):
        sizes["leftpad"] = tuple(draw(st.integers(0, n)) for n in sizes["cache_seqlens"])
    sizes |= draw(_rotary(call.head_dim, sizes["seqlen_new"], without))
    options = {name: getattr(call, name) for name in _OF_THE_CALL}
    name = "drawn " + " ".join(f"{field}={value}" for field, value in (sizes | options).items())
    case = KVCacheCase(name=name, layout=call.layout, **sizes, **options)
    assume(case.features.isdisjoint(without))
    return case


@st.composite
def _storage(draw: st.DrawFn, batch: int, without: frozenset[str]) -> dict[str, Any]:
    """Draw where a cache's rows lie, and whether they are padded: ``leftpad`` is True or absent."""
    drawn: dict[str, Any] = {}
    page_sizes = [256] if "small_pages" in without else [16, 32, 64, 256]
    if "paged" not in without and draw(st.booleans()):
        drawn["page_size"] = draw(st.sampled_from(page_sizes))
    else:
        if "batch_idx" not in without and draw(st.booleans()):
            drawn["batch_idx"] = tuple(draw(st.permutations(range(batch + 1)))[:batch])
        if "leftpad" not in without and draw(st.booleans()):
            drawn["leftpad"] = True
    if "strided_cache" not in without:
        drawn["cache_layout"] = draw(st.sampled_from(CACHE_LAYOUTS))
    return drawn


@st.composite
def _rotary(draw: st.DrawFn, head_dim: int, seqlen_new: int, without: frozenset[str]) -> dict[str, Any]:
    fitting = [n for n in range(16, head_dim + 1, 16) if "partial_rotary" not in without or n == head_dim]
    if "rotary" in without or not seqlen_new or not fitting or not draw(st.booleans()):
        return {}
    return {"rotary_dim": draw(st.sampled_from(fitting)), "rotary_interleaved": draw(st.booleans())}
