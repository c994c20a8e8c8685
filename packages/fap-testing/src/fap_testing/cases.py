"""Named attention calls that cover every corner of flash_attn_func's contract. Imports no torch.

``select("quick")`` is small enough for Triton's interpreter on a CPU; ``select("full")`` holds it and more,
and wants a GPU; ``select("huge")`` reaches past 2^31 elements and wants a large one. Other tags name a topic:
``select("quick", "window")``. ``find("window_7_3_50x20")`` is one case.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args

__all__ = ["FEATURES", "HUGE_LAYOUTS", "LAYOUTS", "Case", "Layout", "all_cases", "find", "select"]

Layout = Literal[
    "contiguous",
    "heads_first",
    "sequence_first",
    "gapped",
    "unaligned",
    "qkv_packed",
    "kv_packed",
    "last_stride_2",
    "far_batches",
    "far_rows",
]
# These spread a few values over more than 2^31 elements: for a GPU with some 50 GB to spare.
HUGE_LAYOUTS: tuple[Layout, ...] = ("far_batches", "far_rows")
LAYOUTS: tuple[Layout, ...] = tuple(name for name in get_args(Layout) if name not in HUGE_LAYOUTS)

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
        layout: how q, k and v lie in memory, one of :data:`LAYOUTS` or :data:`HUGE_LAYOUTS`.
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
        layouts = get_args(Layout)
        if self.layout not in layouts:
            raise ValueError(f"layout must be one of {', '.join(layouts)}, got {self.layout!r}")
        if self.layout == "qkv_packed" and self.seqlen_q != self.seqlen_k:
            raise ValueError(
                "layout 'qkv_packed' needs equal lengths, "
                f"got seqlen_q {self.seqlen_q} and seqlen_k {self.seqlen_k}"
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
        given = {name: getattr(self, name) for name in defaults}
        return {name: value for name, value in given.items() if value != defaults[name]}

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
    from fap_testing._grids import named_cases

    cases = tuple(named_cases())
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(
            f"case names must differ, got twice: {sorted({n for n in names if names.count(n) > 1})}"
        )
    return cases
