"""Named attention calls that cover every corner of flash_attn_func's contract. Imports no torch.

``select("quick")`` is small enough for Triton's interpreter on a CPU; ``select("full")`` is everything, and
wants a GPU. Other tags name a topic: ``select("quick", "window")``. ``find("window_7_3_50x20")`` is one case.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["FEATURES", "LAYOUTS", "Case", "Layout", "all_cases", "find", "select"]

Layout = Literal[
    "contiguous",
    "heads_first",
    "sequence_first",
    "gapped",
    "unaligned",
    "qkv_packed",
    "kv_packed",
    "last_stride_2",
]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

FEATURES: dict[str, str] = {
    "softmax_scale": "a softmax_scale other than 1 / sqrt(head_dim)",
    "causal": "causal=True",
    "window": "a window_size other than (-1, -1)",
    "softcap": "softcap > 0",
    "alibi": "alibi_slopes",
    "dropout": "dropout_p > 0",
    "gqa": "fewer key/value heads than query heads",
    "cross_lengths": "seqlen_q != seqlen_k",
    "zero_length": "a batch or sequence length of 0",
    "keyless_rows": "query rows whose mask leaves no key (out 0, LSE +inf, gradients 0)",
    "head_dim_unaligned": "a head_dim that is no multiple of 8",
    "head_dim_over_128": "a head_dim above 128",
    "strided": "inputs that are not contiguous, with unit last stride",
    "last_stride": "inputs whose last stride is not 1",
    "backward": "gradients of q, k and v",
    "lse": "return_attn_probs=True returns (out, softmax_lse, S_dmask)",
    "lse_gradient": "softmax_lse is differentiable",
    "dropout_mask": "S_dmask carries the dropout mask in its sign bit",
    "deterministic": "deterministic=True gives bitwise equal results on every run",
    "error_messages": "mistakes raise before any work, with a message that names the argument",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One attention call without its data.

    Attributes:
        name: unique among the named cases; also the seed of the case's data.
        batch, seqlen_q, seqlen_k, nheads, nheads_k, head_dim: sizes of q ``(batch, seqlen_q, nheads,
            head_dim)`` and of k and v ``(batch, seqlen_k, nheads_k, head_dim)``.
        softmax_scale, causal, window_size, softcap, dropout_p: flash_attn_func's options.
        alibi: None, ``"head"`` for slopes ``(nheads,)`` or ``"batch_head"`` for ``(batch, nheads)``.
        layout: how q, k and v lie in memory, one of :data:`LAYOUTS`.
        tags: what :func:`select` selects by.

    Raises:
        ValueError: sizes or options that contradict each other.
    """

    name: str
    batch: int = 1
    seqlen_q: int = 33
    seqlen_k: int = 33
    nheads: int = 2
    nheads_k: int = 2
    head_dim: int = 16
    softmax_scale: float | None = None
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: Literal["head", "batch_head"] | None = None
    dropout_p: float = 0.0
    layout: Layout = "contiguous"
    tags: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.nheads_k < 1 or self.nheads % self.nheads_k:
            raise ValueError(f"nheads_k must divide nheads, got {self.nheads_k} and {self.nheads}")
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {self.layout!r}")
        if self.layout == "qkv_packed" and self.seqlen_q != self.seqlen_k:
            raise ValueError(
                f"layout 'qkv_packed' needs equal lengths, got seqlen_q {self.seqlen_q}, seqlen_k {self.seqlen_k}"
            )
        if not 0.0 <= self.dropout_p < 1.0:
            raise ValueError(f"dropout_p must be in [0, 1), got {self.dropout_p}")

    def __str__(self) -> str:
        return self.name

    @property
    def options(self) -> dict[str, Any]:
        """flash_attn_func's keyword arguments, less those at their default and less alibi_slopes."""
        defaults = {
            "softmax_scale": None,
            "causal": False,
            "window_size": (-1, -1),
            "softcap": 0.0,
            "dropout_p": 0.0,
        }
        return {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}

    @property
    def has_keyless_rows(self) -> bool:
        """Whether some query row has no key at all."""
        right = 0 if self.causal else self.window_size[1]
        first_diagonal = self.seqlen_k - self.seqlen_q
        return self.seqlen_q > 0 and (self.seqlen_k == 0 or (right >= 0 and first_diagonal + right < 0))

    @property
    def features(self) -> frozenset[str]:
        """What an implementation must support to run this case: names from :data:`FEATURES`."""
        asked = {
            "softmax_scale": self.softmax_scale is not None,
            "causal": self.causal,
            "window": self.window_size != (-1, -1),
            "softcap": self.softcap > 0.0,
            "alibi": self.alibi is not None,
            "dropout": self.dropout_p > 0.0,
            "gqa": self.nheads_k != self.nheads,
            "cross_lengths": self.seqlen_q != self.seqlen_k,
            "zero_length": 0 in (self.batch, self.seqlen_q, self.seqlen_k),
            "keyless_rows": self.has_keyless_rows,
            "head_dim_unaligned": self.head_dim % 8 != 0,
            "head_dim_over_128": self.head_dim > 128,
            "strided": self.layout not in ("contiguous", "last_stride_2"),
            "last_stride": self.layout == "last_stride_2",
        }
        return frozenset(name for name, is_asked in asked.items() if is_asked)


def select(*tags: str) -> tuple[Case, ...]:
    """Return the named cases that bear all of the tags.

    Raises:
        ValueError: no case bears them all.
    """
    chosen = tuple(case for case in all_cases() if case.tags.issuperset(tags))
    if not chosen:
        known = sorted({tag for case in all_cases() for tag in case.tags})
        raise ValueError(f"no case has all of the tags {tags}, known tags: {', '.join(known)}")
    return chosen


def find(name: str) -> Case:
    """Return the case of that name.

    Raises:
        KeyError: there is none.
    """
    by_name = {case.name: case for case in all_cases()}
    if name not in by_name:
        raise KeyError(f"no case is called {name!r}; fap_testing.cases.all_cases() has them all")
    return by_name[name]


@cache
def all_cases() -> tuple[Case, ...]:
    """Return every named case."""
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
    found: dict[str, Case] = {}
    for topic, grid in grids.items():
        for size, case in grid():
            if case.name in found:
                raise ValueError(f"two cases are called {case.name!r}")
            sizes = {"quick", "full"} if size == "quick" else {"full"}
            found[case.name] = replace(case, tags=frozenset({topic, *sizes}))
    return tuple(found.values())


_Sized = tuple[Literal["quick", "full"], Case]


def _lengths() -> Iterator[_Sized]:
    quick = [(1, 1), (1, 37), (37, 1), (17, 17), (64, 64), (65, 63), (13, 70), (70, 13)]
    full = [
        (1, 2049), (3, 799), (239, 1), (113, 203), (128, 217), (256, 512), (512, 256), (799, 3),
        (1023, 1024), (1024, 1023), (1024, 1024), (2048, 2048),
    ]  # fmt: skip
    for (seqlen_q, seqlen_k), causal in product(quick, (False, True)):
        name = f"lengths_{seqlen_q}x{seqlen_k}{'_causal' * causal}"
        yield "quick", Case(name=name, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=causal)
    for (seqlen_q, seqlen_k), causal in product(full, (False, True)):
        name = f"lengths_{seqlen_q}x{seqlen_k}{'_causal' * causal}"
        yield "full", Case(
            name=name, batch=2, nheads=3, nheads_k=3, head_dim=64, seqlen_q=seqlen_q, seqlen_k=seqlen_k, causal=causal
        )
    for batch, seqlen_q, seqlen_k in [(2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 5, 5)]:
        name = f"zero_length_{batch}x{seqlen_q}x{seqlen_k}"
        yield "quick", Case(name=name, batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    yield "quick", Case(name="batch_3", batch=3, nheads=1, nheads_k=1, causal=True)


def _windows() -> Iterator[_Sized]:
    windows = [(0, 0), (5, 0), (0, 5), (7, 3), (-1, 4), (4, -1), (200, 200), (-1, 25)]
    for window, (seqlen_q, seqlen_k) in product(windows, [(33, 33), (20, 50), (50, 20)]):
        name = f"window_{window[0]}_{window[1]}_{seqlen_q}x{seqlen_k}".replace("-1", "all")
        yield "quick", Case(name=name, seqlen_q=seqlen_q, seqlen_k=seqlen_k, window_size=window, nheads=1, nheads_k=1)
    for window, (seqlen_q, seqlen_k) in product([(5, 3), (0, -1)], [(33, 33), (50, 20)]):
        name = f"window_{window[0]}_{window[1]}_causal_{seqlen_q}x{seqlen_k}".replace("-1", "all")
        yield "quick", Case(name=name, seqlen_q=seqlen_q, seqlen_k=seqlen_k, window_size=window, causal=True)
    windows = [(0, 0), (127, 0), (128, 128), (300, 17), (-1, 400), (64, -1)]
    for window, (seqlen_q, seqlen_k) in product(windows, [(1000, 1000), (400, 900), (900, 400)]):
        name = f"window_{window[0]}_{window[1]}_{seqlen_q}x{seqlen_k}".replace("-1", "all")
        yield "full", Case(name=name, seqlen_q=seqlen_q, seqlen_k=seqlen_k, window_size=window, head_dim=64)


def _gqa() -> Iterator[_Sized]:
    for (nheads, nheads_k), causal in product([(4, 2), (6, 3), (3, 1)], (False, True)):
        name = f"gqa_{nheads}_{nheads_k}{'_causal' * causal}"
        sizes = {"batch": 2, "nheads": nheads, "nheads_k": nheads_k}
        yield "quick", Case(name=name, seqlen_q=19, seqlen_k=35, causal=causal, **sizes)
        yield "full", Case(name=f"{name}_300x513", seqlen_q=300, seqlen_k=513, causal=causal, head_dim=128, **sizes)


def _head_dims() -> Iterator[_Sized]:
    for head_dim in (1, 2, 8, 24, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256):
        one_head: dict[str, Any] = {"head_dim": head_dim, "nheads": 1, "nheads_k": 1}
        yield "quick", Case(name=f"head_dim_{head_dim}", seqlen_q=18, seqlen_k=35, causal=True, **one_head)
        for causal in (False, True):
            name = f"head_dim_{head_dim}_300x400{'_causal' * causal}"
            yield "full", Case(name=name, seqlen_q=300, seqlen_k=400, causal=causal, **one_head)


def _scales() -> Iterator[_Sized]:
    for scale in (0.0, 1e-3, 1.0, 3.0, -0.4, 40.0):
        yield "quick", Case(name=f"softmax_scale_{scale:g}", softmax_scale=scale, causal=True)
    for scale in (-0.4, 3.0):
        yield "full", Case(
            name=f"softmax_scale_{scale:g}_512x640", softmax_scale=scale, seqlen_q=512, seqlen_k=640, head_dim=128
        )


def _softcaps() -> Iterator[_Sized]:
    for softcap, scale in [(0.3, None), (15.0, None), (30.0, 2.0), (1.0, 200.0)]:
        name = f"softcap_{softcap:g}" + (f"_scale_{scale:g}" if scale else "")
        yield "quick", Case(name=name, softcap=softcap, softmax_scale=scale, seqlen_q=20, seqlen_k=37, causal=True)
    for softcap, head_dim in product((1.0, 30.0), (64, 128, 256)):
        name = f"softcap_{softcap:g}_500x600_d{head_dim}"
        yield "full", Case(name=name, softcap=softcap, seqlen_q=500, seqlen_k=600, head_dim=head_dim)


def _alibi() -> Iterator[_Sized]:
    shapes: tuple[Literal["head", "batch_head"], ...] = ("head", "batch_head")
    for alibi, causal, lengths in product(shapes, (False, True), [(33, 33), (20, 45), (45, 20)]):
        name = f"alibi_{alibi}_{lengths[0]}x{lengths[1]}{'_causal' * causal}"
        yield "quick", Case(
            name=name, batch=2, nheads=4, nheads_k=2, seqlen_q=lengths[0], seqlen_k=lengths[1], alibi=alibi, causal=causal
        )
    for alibi, causal, head_dim in product(shapes, (False, True), (64, 128)):
        name = f"alibi_{alibi}_400x700_d{head_dim}{'_causal' * causal}"
        yield "full", Case(
            name=name, batch=2, nheads=4, seqlen_q=400, seqlen_k=700, alibi=alibi, causal=causal, head_dim=head_dim
        )


def _dropout() -> Iterator[_Sized]:
    for dropout_p, causal in product((0.1, 0.5, 0.9), (False, True)):
        name = f"dropout_{dropout_p:g}{'_causal' * causal}"
        options: dict[str, Any] = {"batch": 2, "dropout_p": dropout_p, "causal": causal}
        yield "quick", Case(name=name, seqlen_q=21, seqlen_k=70, **options)
        yield "full", Case(name=f"{name}_300x500", seqlen_q=300, seqlen_k=500, head_dim=64, **options)
    for head_dim in (40, 96, 128, 192, 256):
        name = f"dropout_0.17_d{head_dim}"
        yield "full", Case(name=name, seqlen_q=300, seqlen_k=333, dropout_p=0.17, head_dim=head_dim)


def _layouts() -> Iterator[_Sized]:
    for layout, causal in product(LAYOUTS[1:], (False, True)):
        options: dict[str, Any] = {"batch": 2, "nheads": 4, "nheads_k": 2, "layout": layout, "causal": causal}
        name = f"layout_{layout}{'_causal' * causal}"
        yield "quick", Case(name=name, seqlen_q=19, seqlen_k=19 if layout == "qkv_packed" else 37, **options)
        for head_dim in (64, 96, 128):
            yield "full", Case(name=f"{name}_300x300_d{head_dim}", seqlen_q=300, seqlen_k=300, head_dim=head_dim, **options)


def _combined() -> Iterator[_Sized]:
    every: dict[str, Any] = {"batch": 2, "nheads": 4, "nheads_k": 2, "softcap": 5.0, "softmax_scale": 0.7}
    yield "quick", Case(name="combined_window_softcap_alibi", seqlen_q=30, seqlen_k=47, window_size=(9, 4), alibi="head", **every)
    yield "quick", Case(name="combined_keyless_alibi", seqlen_q=47, seqlen_k=30, window_size=(9, 4), alibi="batch_head", **every)
    yield "quick", Case(
        name="combined_dropout_everything", seqlen_q=30, seqlen_k=47, window_size=(20, -1), causal=True, dropout_p=0.3,
        alibi="batch_head", layout="gapped", head_dim=20, **every,
    )  # fmt: skip
    for head_dim, dropout_p in product((40, 64, 128, 160), (0.0, 0.2)):
        yield "full", Case(
            name=f"combined_d{head_dim}_dropout_{dropout_p:g}", seqlen_q=333, seqlen_k=257, window_size=(200, 30),
            alibi="batch_head", layout="kv_packed", head_dim=head_dim, dropout_p=dropout_p, **every,
        )  # fmt: skip
