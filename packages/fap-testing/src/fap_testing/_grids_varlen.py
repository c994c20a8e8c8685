"""The named varlen cases, topic by topic. Quick ones hold up to 130 tokens; full ones cross many tiles."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from fap_testing.cases import LAYOUTS
from fap_testing.cases_varlen import VarlenCase

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["named_varlen_cases"]

Lengths = tuple[tuple[int, ...], tuple[int, ...]]

# What every feature is tried on: unequal, empty on either side, one token, more queries than keys.
_MIXED: Lengths = ((17, 0, 1, 23, 5), (9, 4, 37, 23, 0))
_SAME: Lengths = ((19, 1, 0, 34), (19, 1, 0, 34))
_MIXED_FULL: Lengths = ((300, 0, 1, 129, 513, 64), (170, 65, 700, 129, 0, 257))


def named_varlen_cases() -> Iterator[VarlenCase]:
    """Yield every named varlen case, tagged with its size and its topic."""
    grids = {
        "lengths": _lengths,
        "window": _windows,
        "gqa": _gqa,
        "head_dim": _head_dims,
        "scores": _scores,
        "alibi": _alibi,
        "dropout": _dropout,
        "layout": _layouts,
        "seqused": _seqused,
        "paged": _paged,
        "combined": _combined,
    }
    for topic, grid in grids.items():
        for case in grid():
            yield replace(case, tags=case.tags | {topic})


def _quick(name: str, lengths: Lengths = _MIXED, **rest: Any) -> VarlenCase:
    return VarlenCase(
        name=name, seqlens_q=lengths[0], seqlens_k=lengths[1], tags=frozenset({"quick", "full"}), **rest
    )


def _full(name: str, lengths: Lengths = _MIXED_FULL, **rest: Any) -> VarlenCase:
    options = {"head_dim": 64} | rest
    return VarlenCase(
        name=f"{name}_full", seqlens_q=lengths[0], seqlens_k=lengths[1], tags=frozenset({"full"}), **options
    )


def _lengths() -> Iterator[VarlenCase]:
    quick: dict[str, Lengths] = {
        "mixed": _MIXED,
        "single": ((33,), (33,)),
        "single_longer_keys": ((13,), (66,)),
        "single_longer_queries": ((66,), (13,)),
        "one_token_each": ((1, 1, 1), (1, 1, 1)),
        "one_query_each": ((1, 1, 1, 1), (5, 64, 1, 17)),
        "one_as_long_as_the_rest": ((60, 20, 25, 15), (60, 15, 20, 25)),
        "long_one_last": ((3, 5, 64), (3, 5, 64)),
        "tile_edges": ((16, 32, 64), (64, 16, 32)),
        "empty_keys_first": ((7, 9), (0, 9)),
        "empty_queries_first": ((0, 9), (7, 9)),
        "empty_last": ((9, 7, 0), (9, 0, 7)),
        "empty_between": ((9, 0, 0, 11), (9, 0, 0, 11)),
        "no_queries_at_all": ((0, 0), (5, 9)),
        "no_keys_at_all": ((5, 9), (0, 0)),
        "all_empty": ((0, 0, 0), (0, 0, 0)),
        "no_sequences": ((), ()),
        "many": ((1, 2, 3, 4, 5, 6, 7, 8), (8, 7, 6, 5, 4, 3, 2, 1)),
    }
    full: dict[str, Lengths] = {
        "mixed": _MIXED_FULL,
        "one_as_long_as_the_rest": ((1024, 256, 1, 0, 767), (1024, 300, 700, 23, 1)),
        "tile_edges": ((128, 256, 127, 129, 1), (128, 255, 129, 127, 64)),
        "one_query_each": ((1,) * 40, tuple(range(0, 1200, 30))),
        "many": (tuple(range(60)), tuple(reversed(range(60)))),
        "long": ((2048, 1023, 1), (2048, 1025, 2049)),
    }
    for causal in (False, True):
        suffix = "_causal" if causal else ""
        for name, lengths in quick.items():
            yield _quick(f"lengths_{name}{suffix}", lengths, causal=causal)
        for name, lengths in full.items():
            yield _full(f"lengths_{name}{suffix}", lengths, causal=causal)


def _windows() -> Iterator[VarlenCase]:
    # 12, 25 and 200 reach past the keys, so upstream takes them for no bound. Yet 12 hides
    # keys from the first of 17 queries that have 9.
    for window in [(0, 0), (5, 0), (0, 5), (7, 3), (-1, 4), (4, -1), (200, 200), (-1, 12), (-1, 25)]:
        yield _quick(f"window_{_bounds(window)}", window_size=window)
    for window in [(5, 3), (0, -1)]:
        yield _quick(f"window_{_bounds(window)}_causal", window_size=window, causal=True)
    for window in [(0, 0), (127, 0), (128, 128), (300, 17), (-1, 400), (64, -1)]:
        yield _full(f"window_{_bounds(window)}", window_size=window)


def _bounds(window: tuple[int, int]) -> str:
    return "_".join("all" if bound < 0 else str(bound) for bound in window)


def _gqa() -> Iterator[VarlenCase]:
    for (nheads, nheads_k), causal in product([(4, 2), (6, 3), (3, 1)], (False, True)):
        options: dict[str, Any] = {"nheads": nheads, "nheads_k": nheads_k, "causal": causal}
        name = f"gqa_{nheads}_{nheads_k}" + ("_causal" if causal else "")
        yield _quick(name, **options)
        yield _full(name, head_dim=128, **options)
        # Upstream swaps heads for queries here, and crashes on the empty sequence: its issue 1537.
        yield _quick(f"{name}_one_query_and_empty", ((1, 0, 1, 1), (21, 6, 0, 40)), **options)
        yield _quick(f"{name}_one_query_each", ((1, 1, 1), (21, 6, 40)), **options)
        yield _full(f"{name}_one_query_and_empty", ((1, 0, 1, 1), (821, 6, 0, 300)), **options)


def _head_dims() -> Iterator[VarlenCase]:
    for head_dim in (1, 8, 24, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256):
        lengths = ((18, 3), (20, 0)) if head_dim > 64 else _MIXED
        yield _quick(f"head_dim_{head_dim}", lengths, head_dim=head_dim, causal=True)
        for causal in (False, True):
            yield _full(f"head_dim_{head_dim}" + "_causal" * causal, head_dim=head_dim, causal=causal)


def _scores() -> Iterator[VarlenCase]:
    for softmax_scale in (0.0, 1.0, -0.4, 10.0):
        yield _quick(f"softmax_scale_{softmax_scale:g}", softmax_scale=softmax_scale, causal=True)
    capped: list[tuple[float, float | None]] = [(0.3, None), (15.0, None), (1.0, 30.0)]
    for softcap, scale in capped:
        yield _quick(f"softcap_{softcap:g}", softcap=softcap, softmax_scale=scale, causal=True)
    for softcap, head_dim in product((1.0, 30.0), (64, 128)):
        yield _full(f"softcap_{softcap:g}_d{head_dim}", softcap=softcap, head_dim=head_dim)


def _alibi() -> Iterator[VarlenCase]:
    shapes: tuple[Literal["head", "batch_head"], ...] = ("head", "batch_head")
    for alibi, causal in product(shapes, (False, True)):
        name = f"alibi_{alibi}" + "_causal" * causal
        yield _quick(name, alibi=alibi, causal=causal, nheads=4)
        yield _full(name, alibi=alibi, causal=causal, nheads=4)


def _dropout() -> Iterator[VarlenCase]:
    for dropout_p, causal in product((0.1, 0.5, 0.9), (False, True)):
        name = f"dropout_{dropout_p:g}" + "_causal" * causal
        yield _quick(name, dropout_p=dropout_p, causal=causal)
        yield _full(name, dropout_p=dropout_p, causal=causal)


def _layouts() -> Iterator[VarlenCase]:
    for layout in LAYOUTS[1:]:
        yield _quick(f"layout_{layout}", _SAME, nheads=4, layout=layout, causal=True)
        if layout != "qkv_packed":
            yield _quick(f"layout_{layout}_mixed", nheads=4, layout=layout)
            yield _full(f"layout_{layout}", nheads=4, layout=layout)


def _seqused() -> Iterator[VarlenCase]:
    some_q, some_k = (12, 0, 1, 20, 0), (9, 2, 21, 0, 0)
    some_q_full, some_k_full = (200, 0, 1, 1, 500, 0), (1, 60, 513, 100, 0, 257)
    for causal in (False, True):
        suffix = "_causal" * causal
        yield _quick(f"seqused_both{suffix}", seqused_q=some_q, seqused_k=some_k, causal=causal)
        yield _quick(f"seqused_q{suffix}", seqused_q=some_q, causal=causal)
        yield _quick(f"seqused_k{suffix}", seqused_k=some_k, causal=causal)
        yield _full(f"seqused_both{suffix}", seqused_q=some_q_full, seqused_k=some_k_full, causal=causal)
    yield _quick("seqused_all", seqused_q=_MIXED[0], seqused_k=_MIXED[1], causal=True)
    yield _quick("seqused_none", seqused_q=(0,) * 5, seqused_k=(0,) * 5)


def _paged() -> Iterator[VarlenCase]:
    pages = ((5, 0, 1, 23, 7), (16, 9, 70, 33, 0))
    for page_size, causal in product((16, 32, 64), (False, True)):
        name = f"paged_{page_size}" + "_causal" * causal
        yield _quick(name, pages, page_size=page_size, causal=causal, nheads=4)
    options: dict[str, Any] = {"nheads": 4, "window_size": (30, 3), "softcap": 3.0, "alibi": "batch_head"}
    yield _quick("paged_features", pages, page_size=16, **options)
    yield _quick("paged_seqused", pages, page_size=16, seqused_k=(15, 0, 64, 17, 0), causal=True)
    yield _quick("paged_dropout", pages, page_size=16, dropout_p=0.3)
    for page_size, causal in product((16, 32, 64, 128, 256, 512), (False, True)):
        name = f"paged_{page_size}" + "_causal" * causal
        yield _full(name, page_size=page_size, causal=causal, nheads=4, head_dim=128)


def _combined() -> Iterator[VarlenCase]:
    every: dict[str, Any] = {"nheads": 4, "softcap": 5.0, "softmax_scale": 0.7, "alibi": "batch_head"}
    yield _quick("combined_window_softcap_alibi", window_size=(9, 4), **every)
    gapped = {"layout": "gapped", "head_dim": 20, "dropout_p": 0.3, **every}
    yield _quick("combined_dropout", window_size=(20, -1), causal=True, seqused_k=(9, 1, 30, 23, 0), **gapped)
    for head_dim, dropout_p in product((40, 64, 128), (0.0, 0.2)):
        name = f"combined_d{head_dim}_dropout_{dropout_p:g}"
        rest = {"layout": "kv_packed", "window_size": (200, 30), "dropout_p": dropout_p, **every}
        yield _full(name, head_dim=head_dim, **rest)
