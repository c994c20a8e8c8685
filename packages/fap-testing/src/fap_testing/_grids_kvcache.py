"""The named KV-cache cases, topic by topic. Quick ones have up to 130 keys; full ones cross many tiles."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from fap_testing.cases import LAYOUTS
from fap_testing.cases_kvcache import CACHE_LAYOUTS, KVCacheCase

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["named_kvcache_cases"]

# Nothing, one key, some, many; with 17 more keys, the last one reaches the capacity of 64 exactly.
_MIXED = (0, 1, 18, 47)
_MIXED_FULL = (0, 1, 129, 700, 2031)
_CAPACITY_FULL = 2048


def named_kvcache_cases() -> Iterator[KVCacheCase]:
    """Yield every named KV-cache case, tagged with its size and its topic."""
    grids = {
        "append": _append,
        "lengths": _lengths,
        "gqa": _gqa,
        "head_dim": _head_dims,
        "paged": _paged,
        "leftpad": _leftpad,
        "batch_idx": _batch_idx,
        "rotary": _rotary,
        "window": _windows,
        "scores": _scores,
        "layout": _layouts,
        "combined": _combined,
    }
    for topic, grid in grids.items():
        for case in grid():
            yield replace(case, tags=case.tags | {topic})


def _quick(name: str, cache_seqlens: tuple[int, ...] = _MIXED, **rest: Any) -> KVCacheCase:
    return KVCacheCase(name=name, cache_seqlens=cache_seqlens, tags=frozenset({"quick", "full"}), **rest)


def _full(name: str, cache_seqlens: tuple[int, ...] = _MIXED_FULL, **rest: Any) -> KVCacheCase:
    options = {"head_dim": 64, "capacity": _CAPACITY_FULL} | rest
    return KVCacheCase(name=f"{name}_full", cache_seqlens=cache_seqlens, tags=frozenset({"full"}), **options)


def _append() -> Iterator[KVCacheCase]:
    for new, queries, causal in product((0, 1, 17), (1, 2, 17), (False, True)):
        name = f"append_{new}_q{queries}" + "_causal" * causal
        yield _quick(name, seqlen_new=new, seqlen_q=queries, causal=causal)
        yield _full(name, seqlen_new=new, seqlen_q=queries, causal=causal)
    for new, causal in product((0, 1, 130), (False, True)):
        name = f"append_{new}_q130" + "_causal" * causal
        lengths = (0, 37) if new > 1 else (0, 1, 167)
        yield _quick(name, lengths, capacity=168, seqlen_new=new, seqlen_q=130, causal=causal)
    yield _full("append_130_q130_causal", (0, 700, 1918), seqlen_new=130, seqlen_q=130, causal=True)


def _lengths() -> Iterator[KVCacheCase]:
    lengths: dict[str, tuple[int, ...]] = {
        "single": (41,),
        "all_empty": (0, 0, 0),
        "one_key_each": (1, 1, 1),
        "full": (64, 64),
        "tile_edges": (15, 16, 17, 31, 32, 33, 63, 64),
        "one_as_long_as_the_rest": (60, 15, 20, 25),
        "no_sequences": (),
    }
    for (name, seqlens), causal in product(lengths.items(), (False, True)):
        suffix = "_causal" * causal
        yield _quick(f"lengths_{name}{suffix}", seqlens, seqlen_q=3, causal=causal)
        room: dict[str, Any] = {"seqlen_new": 3, "capacity": 67}
        yield _quick(f"lengths_{name}_append{suffix}", seqlens, seqlen_q=3, causal=causal, **room)
    yield _quick("lengths_none", (64, 64), lengths_as="none", seqlen_q=5, causal=True)
    yield _quick("lengths_number", (33, 33), lengths_as="number", seqlen_q=5, causal=True)
    yield _quick("lengths_number_append", (33, 33), lengths_as="number", seqlen_q=5, seqlen_new=5)
    yield _quick("lengths_number_full", (59, 59), lengths_as="number", seqlen_q=5, seqlen_new=5)
    yield _quick("no_queries", seqlen_q=0)
    yield _quick("no_queries_append", seqlen_q=0, seqlen_new=3, causal=True)
    yield _full("lengths_none", (2048, 2048), lengths_as="none", seqlen_q=5, causal=True)
    yield _full("lengths_many", tuple(range(0, 2048, 33)), seqlen_new=1, causal=True)
    yield _full("lengths_long", (65_000, 1, 40_000), capacity=65_001, seqlen_new=1, head_dim=128)


def _gqa() -> Iterator[KVCacheCase]:
    heads = [(4, 1), (8, 2), (6, 2)]
    for (nheads, nheads_k), queries, new in product(heads, (1, 2, 17), (0, 1)):
        options: dict[str, Any] = {"nheads": nheads, "nheads_k": nheads_k, "seqlen_q": queries}
        options |= {"seqlen_new": new, "causal": True}
        name = f"gqa_{nheads}_{nheads_k}_q{queries}_append_{new}"
        yield _quick(name, **options)
        yield _full(name, **options | {"head_dim": 128})
    for nheads, queries in product((32, 64), (1, 5)):
        options = {"nheads": nheads, "nheads_k": 8, "head_dim": 128, "seqlen_q": queries, "causal": True}
        yield _full(f"gqa_{nheads}_8_q{queries}", seqlen_new=queries, **options)
    yield _quick("gqa_32_2_q3", nheads=32, nheads_k=2, seqlen_q=3, causal=True)


def _head_dims() -> Iterator[KVCacheCase]:
    for head_dim in (8, 32, 40, 59, 64, 80, 96, 128, 192, 256):
        options: dict[str, Any] = {"head_dim": head_dim, "seqlen_new": 1, "causal": True}
        yield _quick(f"head_dim_{head_dim}", (0, 21), capacity=32, seqlen_q=2, **options)
        for nheads, nheads_k in ((2, 2), (8, 2)):
            heads: dict[str, Any] = {"nheads": nheads, "nheads_k": nheads_k}
            yield _full(f"head_dim_{head_dim}_heads_{nheads}_{nheads_k}", **options, **heads)


def _paged() -> Iterator[KVCacheCase]:
    sizes = {16: (0, 15, 16, 63), 32: (0, 31, 32, 63), 64: (0, 1, 64, 127), 128: (5, 127), 256: (3, 255)}
    for (page_size, lengths), new, causal in product(sizes.items(), (0, 1, 17), (False, True)):
        name = f"paged_{page_size}_append_{new}" + "_causal" * causal
        # Appending 1 fills the longest sequence's last page, and with it the capacity.
        pages = (max(lengths) + new) // page_size + (new != 1)
        options: dict[str, Any] = {"page_size": page_size, "capacity": pages * page_size, "causal": causal}
        yield _quick(name, lengths, seqlen_q=max(new, 1), seqlen_new=new, nheads=4, **options)
    yield _quick("paged_lengths_none", (64, 64), lengths_as="none", page_size=16, seqlen_q=3, causal=True)
    number: dict[str, Any] = {"lengths_as": "number", "page_size": 16}
    yield _quick("paged_lengths_number", (31, 31), seqlen_q=3, seqlen_new=3, **number)
    for page_size, (queries, new) in product((16, 32, 64, 128, 256, 512), ((1, 1), (17, 17), (5, 0))):
        name = f"paged_{page_size}_q{queries}_append_{new}"
        options = {"page_size": page_size, "nheads": 8, "head_dim": 128, "causal": True}
        yield _full(name, seqlen_q=queries, seqlen_new=new, **options)


def _leftpad() -> Iterator[KVCacheCase]:
    pads = (0, 1, 5, 40)
    for new, causal in product((0, 1, 5), (False, True)):
        name = f"leftpad_append_{new}" + "_causal" * causal
        yield _quick(name, seqlen_q=5, seqlen_new=new, leftpad=pads, causal=causal)
        yield _full(name, seqlen_q=5, seqlen_new=new, leftpad=(0, 1, 100, 650, 17), causal=causal)
    yield _quick("leftpad_everything", seqlen_q=3, leftpad=_MIXED)
    yield _quick("leftpad_everything_append", seqlen_q=3, seqlen_new=2, leftpad=_MIXED, causal=True)
    yield _quick("leftpad_nothing", seqlen_q=3, leftpad=(0, 0, 0, 0), causal=True)
    features: dict[str, Any] = {"window_size": (9, 0), "softcap": 5.0, "alibi": "batch_head", "nheads": 4}
    yield _quick("leftpad_features", seqlen_q=5, seqlen_new=5, leftpad=pads, nheads_k=2, **features)


def _batch_idx() -> Iterator[KVCacheCase]:
    index = (3, 0, 5, 1)
    for new, causal in product((0, 1, 5), (False, True)):
        name = f"batch_idx_append_{new}" + "_causal" * causal
        yield _quick(name, seqlen_q=5, seqlen_new=new, batch_idx=index, causal=causal)
        yield _full(name, seqlen_q=5, seqlen_new=new, batch_idx=(3, 0, 6, 1, 4), causal=causal)
    yield _quick("batch_idx_shared", (11, 40, 64), seqlen_q=3, batch_idx=(2, 2, 2), causal=True)
    yield _quick("batch_idx_leftpad", seqlen_q=5, seqlen_new=5, batch_idx=index, leftpad=(0, 0, 9, 40))


def _rotary() -> Iterator[KVCacheCase]:
    modes: dict[str, dict[str, Any]] = {
        "": {},
        "_causal": {"causal": True},
        "_window": {"window_size": (20, 3)},
        "_window_left": {"window_size": (20, -1)},
    }
    conventions = {"interleaved": True, "halves": False}
    shapes = product(modes.items(), conventions.items(), ((1, 1), (5, 5), (5, 1), (2, 7)))
    for (mode, options), (convention, interleaved), (queries, new) in shapes:
        name = f"rotary_{convention}_q{queries}_append_{new}{mode}"
        turned: dict[str, Any] = {"rotary_interleaved": interleaved, **options}
        yield _quick(name, seqlen_q=queries, seqlen_new=new, rotary_dim=16, **turned)
        if new == queries:
            yield _full(name, seqlen_q=queries, seqlen_new=new, rotary_dim=64, **turned)
    for convention, interleaved in conventions.items():
        common: dict[str, Any] = {"rotary_interleaved": interleaved, "seqlen_q": 3, "seqlen_new": 3}
        common |= {"causal": True}
        for rotary_dim, head_dim in ((16, 32), (32, 59), (48, 80), (64, 64), (16, 256)):
            name = f"rotary_{convention}_{rotary_dim}_of_{head_dim}"
            yield _quick(name, (0, 21), capacity=32, rotary_dim=rotary_dim, head_dim=head_dim, **common)
        rest: dict[str, dict[str, Any]] = {
            "paged": {"page_size": 16},
            "leftpad": {"leftpad": (0, 1, 5, 40)},
            "batch_idx": {"batch_idx": (3, 0, 5, 1)},
            "gqa": {"nheads": 8},
        }
        for topic, options in rest.items():
            yield _quick(f"rotary_{convention}_{topic}", rotary_dim=16, **common, **options)
            yield _quick(
                f"rotary_{convention}_{topic}_one_position", rotary_dim=16, **_not_causal(common, options)
            )
            yield _full(f"rotary_{convention}_{topic}", **_longer(common, options))


def _not_causal(common: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    return {**common, **options, "causal": False}


def _longer(common: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    longer = {"rotary_dim": 64, "head_dim": 128, **common, **options}
    if "leftpad" in options:
        longer["leftpad"] = (0, 1, 100, 650, 17)
    if "batch_idx" in options:
        longer["batch_idx"] = (3, 0, 6, 1, 4)
    return longer


def _windows() -> Iterator[KVCacheCase]:
    # 90 reaches past the keys.
    windows = [(0, 0), (5, 0), (0, 5), (7, 3), (-1, 4), (4, -1), (90, 90), (-1, 25)]
    for window, (queries, new) in product(windows, ((1, 1), (5, 0))):
        yield _quick(
            f"window_{_bounds(window)}_q{queries}", window_size=window, seqlen_q=queries, seqlen_new=new
        )
    for window in [(5, 3), (0, -1)]:
        yield _quick(f"window_{_bounds(window)}_causal", window_size=window, seqlen_q=5, causal=True)
    for window in [(0, 0), (127, 0), (128, 128), (300, 17), (64, -1)]:
        yield _full(f"window_{_bounds(window)}", window_size=window, seqlen_q=9, seqlen_new=9)


def _bounds(window: tuple[int, int]) -> str:
    return "_".join("all" if bound < 0 else str(bound) for bound in window)


def _scores() -> Iterator[KVCacheCase]:
    for softmax_scale in (0.0, 1.0, -0.4, 10.0):
        yield _quick(f"softmax_scale_{softmax_scale:g}", softmax_scale=softmax_scale, seqlen_q=3, causal=True)
    capped: list[tuple[float, float | None]] = [(0.3, None), (15.0, None), (1.0, 30.0)]
    for softcap, scale in capped:
        yield _quick(f"softcap_{softcap:g}", softcap=softcap, softmax_scale=scale, seqlen_q=3, causal=True)
        yield _full(f"softcap_{softcap:g}", softcap=softcap, softmax_scale=scale, head_dim=128)
    shapes: tuple[Literal["head", "batch_head"], ...] = ("head", "batch_head")
    for alibi, causal, queries in product(shapes, (False, True), (1, 5)):
        name = f"alibi_{alibi}_q{queries}" + "_causal" * causal
        options: dict[str, Any] = {"alibi": alibi, "causal": causal, "seqlen_q": queries, "nheads": 4}
        yield _quick(name, seqlen_new=1, **options)
        yield _quick(f"{name}_gqa", **options | {"nheads_k": 1})
        yield _full(name, seqlen_new=1, **options)


def _layouts() -> Iterator[KVCacheCase]:
    for layout in LAYOUTS[1:]:
        yield _quick(f"layout_{layout}", nheads=4, layout=layout, seqlen_q=5, seqlen_new=5, causal=True)
    for layout in CACHE_LAYOUTS[1:]:
        options: dict[str, Any] = {"cache_layout": layout, "seqlen_q": 5, "seqlen_new": 5, "causal": True}
        yield _quick(f"cache_layout_{layout}", nheads=4, **options)
        yield _quick(f"cache_layout_{layout}_paged", nheads=4, page_size=16, **options)
        yield _full(f"cache_layout_{layout}", nheads=4, **options)


def _combined() -> Iterator[KVCacheCase]:
    every: dict[str, Any] = {"nheads": 8, "nheads_k": 2, "softcap": 5.0, "softmax_scale": 0.7}
    every |= {"alibi": "batch_head", "rotary_dim": 16, "seqlen_q": 5, "seqlen_new": 5}
    rest: dict[str, dict[str, Any]] = {
        "leftpad_batch_idx": {
            "leftpad": (0, 1, 9, 40),
            "batch_idx": (3, 0, 5, 1),
            "cache_layout": "kv_packed",
        },
        "paged": {"page_size": 16, "cache_layout": "heads_first", "layout": "gapped"},
    }
    for name, options in rest.items():
        yield _quick(f"combined_{name}", window_size=(20, 2), **every, **options)
        yield _quick(f"combined_{name}_causal", causal=True, **every, **options)
    for head_dim, page_size in product((64, 80, 128), (None, 64)):
        sizes: dict[str, Any] = {"head_dim": head_dim, "page_size": page_size, "window_size": (300, 0)}
        yield _full(f"combined_d{head_dim}_page_{page_size}", **every, **sizes)
