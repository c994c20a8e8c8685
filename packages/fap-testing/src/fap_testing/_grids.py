"""The named cases, topic by topic. Quick ones stay below 71 tokens; full ones cross many kernel tiles."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

from fap_testing.cases import HUGE_LAYOUTS, LAYOUTS, Case

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["named_cases"]


def named_cases() -> Iterator[Case]:
    """Yield every named case, tagged with its size and its topic."""
    grids = {
        "lengths": _lengths,
        "window": _windows,
        "gqa": _gqa,
        "head_dim": _head_dims,
        "softmax_scale": _scales,
        "softcap": _softcaps,
        "alibi": _alibi,
        "dropout": _dropout,
        "layout": _layouts,
        "combined": _combined,
    }
    for topic, grid in grids.items():
        for case in grid():
            yield replace(case, tags=case.tags | {topic})


def _quick(
    name: str, lengths: tuple[int, int] = (33, 33), heads: tuple[int, int] = (2, 2), **rest: Any
) -> Case:
    return _case(name, lengths, heads, frozenset({"quick", "full"}), rest)


def _full(name: str, lengths: tuple[int, int], heads: tuple[int, int] = (2, 2), **rest: Any) -> Case:
    name = f"{name}_{lengths[0]}x{lengths[1]}" + ("_causal" if rest.get("causal") else "")
    return _case(name, lengths, heads, frozenset({"full"}), {"head_dim": 64} | rest)


def _case(
    name: str, lengths: tuple[int, int], heads: tuple[int, int], tags: frozenset[str], rest: dict[str, Any]
) -> Case:
    (seqlen_q, seqlen_k), (nheads, nheads_k) = lengths, heads
    return Case(
        name=name, tags=tags, seqlen_q=seqlen_q, seqlen_k=seqlen_k, nheads=nheads, nheads_k=nheads_k, **rest
    )


def _causal_too() -> Iterator[tuple[str, bool]]:
    yield "", False
    yield "_causal", True


def _lengths() -> Iterator[Case]:
    quick = [(1, 1), (1, 37), (37, 1), (17, 17), (64, 64), (65, 63), (13, 70), (70, 13)]
    for lengths, (suffix, causal) in product(quick, _causal_too()):
        yield _quick(f"lengths_{lengths[0]}x{lengths[1]}{suffix}", lengths, causal=causal)
    unequal = [(1, 2049), (3, 799), (239, 1), (113, 203), (128, 217), (256, 512), (512, 256), (799, 3)]
    long = [(1023, 1024), (1024, 1023), (1024, 1024), (2048, 2048)]
    for lengths, causal in product(unequal + long, (False, True)):
        yield _full("lengths", lengths, (3, 3), batch=2, causal=causal)
    for batch, lengths in [(2, (0, 5)), (2, (5, 0)), (2, (0, 0)), (0, (5, 5))]:
        yield _quick(f"zero_length_{batch}x{lengths[0]}x{lengths[1]}", lengths, batch=batch)
    yield _quick("batch_3", heads=(1, 1), batch=3, causal=True)


def _windows() -> Iterator[Case]:
    # 25 and 200 reach past the keys: with more queries than keys, upstream takes them for no bound.
    quick = [(0, 0), (5, 0), (0, 5), (7, 3), (-1, 4), (4, -1), (200, 200), (-1, 25)]
    for window, lengths in product(quick, [(33, 33), (20, 50), (50, 20)]):
        name = f"{_window_name(window)}_{lengths[0]}x{lengths[1]}"
        yield _quick(name, lengths, (1, 1), window_size=window)
    for window, lengths in product([(5, 3), (0, -1)], [(33, 33), (50, 20)]):
        name = f"{_window_name(window)}_{lengths[0]}x{lengths[1]}_causal"
        yield _quick(name, lengths, window_size=window, causal=True)
    full = [(0, 0), (127, 0), (128, 128), (300, 17), (-1, 400), (64, -1)]
    for window, lengths in product(full, [(1000, 1000), (400, 900), (900, 400)]):
        yield _full(_window_name(window), lengths, window_size=window)


def _window_name(window: tuple[int, int]) -> str:
    return "window_" + "_".join("all" if bound < 0 else str(bound) for bound in window)


def _gqa() -> Iterator[Case]:
    for heads, (suffix, causal) in product([(4, 2), (6, 3), (3, 1)], _causal_too()):
        name = f"gqa_{heads[0]}_{heads[1]}"
        yield _quick(f"{name}{suffix}", (19, 35), heads, batch=2, causal=causal)
        yield _full(name, (300, 513), heads, batch=2, causal=causal, head_dim=128)


def _head_dims() -> Iterator[Case]:
    for head_dim in (1, 2, 8, 24, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256):
        yield _quick(f"head_dim_{head_dim}", (18, 35), (1, 1), head_dim=head_dim, causal=True)
        for causal in (False, True):
            yield _full(f"head_dim_{head_dim}", (300, 400), head_dim=head_dim, causal=causal)


def _scales() -> Iterator[Case]:
    # At 10, exp(score) overflows float32 unless the row's maximum is taken off first.
    for scale in (0.0, 1e-3, 1.0, 3.0, -0.4, 10.0):
        yield _quick(f"softmax_scale_{scale:g}", softmax_scale=scale, causal=True)
    for scale in (-0.4, 3.0):
        yield _full(f"softmax_scale_{scale:g}", (512, 640), softmax_scale=scale, head_dim=128)


def _softcaps() -> Iterator[Case]:
    for softcap, scale in [(0.3, None), (15.0, None), (30.0, 2.0), (1.0, 30.0)]:
        name = f"softcap_{softcap:g}" + (f"_scale_{scale:g}" if scale else "")
        yield _quick(name, (20, 37), softcap=softcap, softmax_scale=scale, causal=True)
    for softcap, head_dim in product((1.0, 30.0), (64, 128, 256)):
        yield _full(f"softcap_{softcap:g}_d{head_dim}", (500, 600), softcap=softcap, head_dim=head_dim)


def _alibi() -> Iterator[Case]:
    shapes: tuple[Literal["head", "batch_head"], ...] = ("head", "batch_head")
    for alibi, lengths, (suffix, causal) in product(shapes, [(33, 33), (20, 45), (45, 20)], _causal_too()):
        name = f"alibi_{alibi}_{lengths[0]}x{lengths[1]}{suffix}"
        yield _quick(name, lengths, (4, 2), batch=2, alibi=alibi, causal=causal)
    for alibi, head_dim, causal in product(shapes, (64, 128), (False, True)):
        name = f"alibi_{alibi}_d{head_dim}"
        yield _full(name, (400, 700), (4, 2), batch=2, alibi=alibi, causal=causal, head_dim=head_dim)


def _dropout() -> Iterator[Case]:
    for dropout_p, (suffix, causal) in product((0.1, 0.5, 0.9), _causal_too()):
        name = f"dropout_{dropout_p:g}"
        yield _quick(f"{name}{suffix}", (21, 70), batch=2, dropout_p=dropout_p, causal=causal)
        yield _full(name, (300, 500), batch=2, dropout_p=dropout_p, causal=causal)
    for head_dim in (40, 96, 128, 192, 256):
        yield _full(f"dropout_0.17_d{head_dim}", (300, 333), dropout_p=0.17, head_dim=head_dim)


def _layouts() -> Iterator[Case]:
    for layout, (suffix, causal) in product(LAYOUTS[1:], _causal_too()):
        lengths = (19, 19) if layout == "qkv_packed" else (19, 37)
        yield _quick(f"layout_{layout}{suffix}", lengths, (4, 2), batch=2, layout=layout, causal=causal)
    for layout, head_dim in product(LAYOUTS[1:], (64, 96, 128)):
        yield _full(
            f"layout_{layout}_d{head_dim}", (300, 300), (4, 2), batch=2, layout=layout, head_dim=head_dim
        )
    for layout in HUGE_LAYOUTS:
        yield Case(
            name=f"layout_{layout}",
            batch=2,
            seqlen_q=40,
            seqlen_k=40,
            layout=layout,
            causal=True,
            tags=frozenset({"huge"}),
        )


def _combined() -> Iterator[Case]:
    every: dict[str, Any] = {"heads": (4, 2), "batch": 2, "softcap": 5.0, "softmax_scale": 0.7}
    yield _quick("combined_window_softcap_alibi", (30, 47), window_size=(9, 4), alibi="head", **every)
    yield _quick("combined_keyless_alibi", (47, 30), window_size=(9, 4), alibi="batch_head", **every)
    gapped = {"layout": "gapped", "head_dim": 20, "alibi": "batch_head", **every}
    yield _quick("combined_dropout", (30, 47), window_size=(20, -1), causal=True, dropout_p=0.3, **gapped)
    packed = {"layout": "kv_packed", "window_size": (200, 30), "alibi": "batch_head", **every}
    for head_dim, dropout_p in product((40, 64, 128, 160), (0.0, 0.2)):
        name = f"combined_d{head_dim}_dropout_{dropout_p:g}"
        yield _full(name, (333, 257), head_dim=head_dim, dropout_p=dropout_p, **packed)
