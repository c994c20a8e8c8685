"""Named calls of flash_attn_varlen_func that cover every corner of its contract. Imports no torch.

``select_varlen("quick")`` is small enough for Triton's interpreter on a CPU; ``select_varlen("full")`` holds
it and more, and wants a GPU. Other tags name a topic: ``select_varlen("quick", "paged")``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from fap_testing.cases import HUGE_LAYOUTS, Case

if TYPE_CHECKING:
    from fap_testing.cases import Layout

__all__ = ["VARLEN_FEATURES", "VarlenCase", "all_varlen_cases", "find_varlen", "select_varlen"]

VARLEN_FEATURES: dict[str, str] = {
    "softmax_scale": "a softmax_scale other than 1 / sqrt(head_dim)",
    "causal": "causal=True",
    "window": "a window_size other than (-1, -1)",
    "softcap": "softcap > 0",
    "alibi": "alibi_slopes",
    "dropout": "dropout_p > 0",
    "gqa": "fewer key/value heads than query heads",
    "cross_lengths": "a sequence with seqlen_q != seqlen_k",
    "zero_length": "no sequence at all, or one without queries or without keys",
    "keyless_rows": "query rows whose mask leaves no key (out 0, LSE +inf, gradients 0)",
    "head_dim_unaligned": "a head_dim that is no multiple of 8",
    "head_dim_over_128": "a head_dim above 128",
    "strided": "inputs that are not contiguous, with unit last stride",
    "last_stride": "inputs whose last stride is not 1",
    "seqused": "seqused_q or seqused_k: sequences with more rows allocated than in use",
    "paged": "a block_table, with k and v in pages (forward only)",
    "backward": "gradients of q, k and v, unless they lie in pages",
    "lse": "return_attn_probs=True returns (out, softmax_lse, S_dmask)",
    "lse_gradient": "softmax_lse is differentiable",
    "dropout_mask": "S_dmask carries the dropout mask in its sign bit",
    "deterministic": "deterministic=True gives bitwise equal results on every run",
    "error_messages": "mistakes raise before any work, with a message that names the argument",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class VarlenCase:
    """One attention call over packed sequences, without its data.

    Attributes:
        name: unique among the named cases; also the seed of the case's data.
        seqlens_q, seqlens_k: for each sequence, how many rows of q and of k it has.
        seqused_q, seqused_k: how many of those are in use; None for all.
        page_size: None, or how many keys a page holds; k and v then lie in pages in random order.
        nheads, nheads_k, head_dim: sizes of q ``(total_q, nheads, head_dim)``, and of k and v.
        softmax_scale, causal, window_size, softcap, dropout_p: flash_attn_varlen_func's options.
        alibi: None, ``"head"`` for slopes ``(nheads,)`` or ``"batch_head"`` for ``(batch, nheads)``.
        layout: how the packed q, k and v lie in memory, one of :data:`fap_testing.cases.LAYOUTS`.
        tags: what :func:`select_varlen` selects by.

    Raises:
        ValueError: lengths or options that contradict each other.
    """

    name: str
    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    seqused_q: tuple[int, ...] | None = None
    seqused_k: tuple[int, ...] | None = None
    page_size: int | None = None
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
        if len(self.seqlens_q) != len(self.seqlens_k):
            raise ValueError(
                "seqlens_q and seqlens_k must name the same sequences, "
                f"got {len(self.seqlens_q)} and {len(self.seqlens_k)}"
            )
        for name, used, lengths in (
            ("seqused_q", self.seqused_q, self.seqlens_q),
            ("seqused_k", self.seqused_k, self.seqlens_k),
        ):
            if used is not None and (
                len(used) != len(lengths) or any(n > most for n, most in zip(used, lengths, strict=True))
            ):
                raise ValueError(f"{name} must be at most the sequences' lengths {lengths}, got {used}")
        if self.layout in HUGE_LAYOUTS or (self.page_size is not None and self.layout != "contiguous"):
            raise ValueError(
                f"layout {self.layout!r} is not for packed sequences with page_size {self.page_size}"
            )
        if self.layout == "qkv_packed" and self.seqlens_q != self.seqlens_k:
            raise ValueError(
                "layout 'qkv_packed' needs equal lengths, "
                f"got seqlens_q {self.seqlens_q} and seqlens_k {self.seqlens_k}"
            )
        # Refuses what no dense call accepts either.
        _ = self.packed

    def __str__(self) -> str:
        return self.name

    @property
    def batch(self) -> int:
        """How many sequences there are."""
        return len(self.seqlens_q)

    @property
    def used_q(self) -> tuple[int, ...]:
        """For each sequence, how many queries it has in use."""
        return self.seqlens_q if self.seqused_q is None else self.seqused_q

    @property
    def used_k(self) -> tuple[int, ...]:
        """For each sequence, how many keys it has in use."""
        return self.seqlens_k if self.seqused_k is None else self.seqused_k

    @property
    def packed(self) -> Case:
        """The dense case whose one sequence has the sizes and the layout of the packed tensors."""
        return self._dense(sum(self.seqlens_q), sum(self.seqlens_k), self.layout)

    def sequence(self, index: int) -> Case:
        """The dense case of one sequence alone."""
        return self._dense(self.used_q[index], self.used_k[index], "contiguous")

    @property
    def options(self) -> dict[str, Any]:
        """The options that are numbers, less those at their default."""
        return self.packed.options

    @property
    def features(self) -> frozenset[str]:
        """What an implementation must support to run this case: names from :data:`VARLEN_FEATURES`."""
        asked = self.packed.features - {"zero_length", "cross_lengths", "keyless_rows"}
        asked = asked.union(*(self.sequence(index).features for index in range(self.batch)))
        own = {
            "zero_length": self.batch == 0,
            "seqused": self.seqused_q is not None or self.seqused_k is not None,
            "paged": self.page_size is not None,
        }
        return asked | {name for name, is_asked in own.items() if is_asked}

    def _dense(self, seqlen_q: int, seqlen_k: int, layout: Layout) -> Case:
        shared = ("nheads", "nheads_k", "head_dim", "softmax_scale", "causal", "window_size", "softcap")
        options = {name: getattr(self, name) for name in (*shared, "alibi", "dropout_p")}
        return Case(name=self.name, seqlen_q=seqlen_q, seqlen_k=seqlen_k, layout=layout, **options)


def select_varlen(*tags: str) -> tuple[VarlenCase, ...]:
    """Return the named varlen cases that bear all of the tags.

    Raises:
        ValueError: no case bears them all.
    """
    chosen = tuple(case for case in all_varlen_cases() if case.tags.issuperset(tags))
    if not chosen:
        known = sorted({tag for case in all_varlen_cases() for tag in case.tags})
        raise ValueError(f"no varlen case has all of the tags {tags}, known tags: {', '.join(known)}")
    return chosen


def find_varlen(name: str) -> VarlenCase:
    """Return the varlen case of that name.

    Raises:
        KeyError: there is none.
    """
    by_name = {case.name: case for case in all_varlen_cases()}
    if name not in by_name:
        raise KeyError(f"no varlen case is called {name!r}; cases_varlen.all_varlen_cases() has them all")
    return by_name[name]


@cache
def all_varlen_cases() -> tuple[VarlenCase, ...]:
    """Return every named varlen case."""
    from fap_testing._grids_varlen import named_varlen_cases

    cases = tuple(named_varlen_cases())
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(f"names must differ, got twice: {sorted({n for n in names if names.count(n) > 1})}")
    return cases
