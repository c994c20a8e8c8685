"""Hypothesis strategies for attention calls: random combinations of every feature.

Needs Hypothesis: ``pip install "fap-testing[hypothesis]"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fap_testing.cases import FEATURES, LAYOUTS, Case

try:
    from hypothesis import assume
    from hypothesis import strategies as st
except ImportError as error:
    raise ImportError(
        'fap_testing.strategies needs Hypothesis: pip install "fap-testing[hypothesis]"'
    ) from error

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["cases", "window_sizes"]


def window_sizes(max_bound: int = 80) -> st.SearchStrategy[tuple[int, int]]:
    """Draw window sizes ``(left, right)``, each -1 (no bound) or in [0, max_bound]."""
    bound = st.integers(-1, max_bound)
    return st.tuples(bound, bound)


def cases(
    *,
    max_seqlen: int = 70,
    max_head_dim: int = 64,
    max_batch: int = 2,
    without: Collection[str] = (),
) -> st.SearchStrategy[Case]:
    """Draw a :class:`fap_testing.cases.Case` that combines features at random, and shrinks to a plain call.

    Args:
        max_seqlen: largest number of queries, and of keys; the smallest is 0.
        max_head_dim: largest head dim; 256 is flash-attn's limit.
        max_batch: largest batch.
        without: names from :data:`fap_testing.cases.FEATURES` that no drawn case asks for.

    Raises:
        ValueError: an unknown name in ``without``.
    """
    unknown = sorted(set(without) - FEATURES.keys())
    if unknown:
        raise ValueError(f"without has unknown features {unknown}, accepted: {', '.join(FEATURES)}")
    return _cases(max_seqlen, max_head_dim, max_batch, frozenset(without))


@st.composite
def _cases(
    draw: st.DrawFn, max_seqlen: int, max_head_dim: int, max_batch: int, without: frozenset[str]
) -> Case:
    sizes = _draw_sizes(draw, max_seqlen, max_head_dim, max_batch, without)
    options = {
        field: draw(values)
        for field, (feature, values) in _options(max_seqlen).items()
        # Half of the options are left at their default, so that combinations of few features come up too.
        if feature not in without and draw(st.booleans())
    }
    chosen = sizes | options
    name = "drawn " + " ".join(f"{field}={value}" for field, value in chosen.items())
    case = Case(name=name, layout=draw(_layouts(sizes, without)), **chosen)
    assume(case.features.isdisjoint(without))
    return case


def _draw_sizes(
    draw: st.DrawFn, max_seqlen: int, max_head_dim: int, max_batch: int, without: frozenset[str]
) -> dict[str, Any]:
    lengths = st.integers(1 if "zero_length" in without else 0, max_seqlen)
    step = 8 if "head_dim_unaligned" in without else 1
    largest = min(max_head_dim, 128) if "head_dim_over_128" in without else max_head_dim
    seqlen_q, nheads_k = draw(lengths), draw(st.integers(1, 2))
    return {
        "batch": draw(st.integers(1, max_batch)),
        "seqlen_q": seqlen_q,
        "seqlen_k": seqlen_q if "cross_lengths" in without else draw(lengths),
        "nheads": nheads_k * (1 if "gqa" in without else draw(st.integers(1, 3))),
        "nheads_k": nheads_k,
        "head_dim": draw(st.integers(1, largest // step)) * step,
    }


def _options(max_seqlen: int) -> dict[str, tuple[str, st.SearchStrategy[Any]]]:
    """For each field of a Case, the feature it belongs to and its values."""
    return {
        "softmax_scale": ("softmax_scale", st.integers(-20, 20).map(lambda tenths: tenths / 10)),
        "causal": ("causal", st.just(True)),
        "window_size": ("window", window_sizes(max_seqlen + 10)),
        "softcap": ("softcap", st.integers(1, 60).map(lambda halves: halves / 2)),
        "alibi": ("alibi", st.sampled_from(["head", "batch_head"])),
        "dropout_p": ("dropout", st.integers(1, 95).map(lambda percent: percent / 100)),
    }


def _layouts(sizes: dict[str, Any], without: frozenset[str]) -> st.SearchStrategy[Any]:
    fitting = [
        layout
        for layout in LAYOUTS
        if (layout != "qkv_packed" or sizes["seqlen_q"] == sizes["seqlen_k"])
        and ("last_stride" not in without or layout != "last_stride_2")
        and ("strided" not in without or layout in ("contiguous", "last_stride_2"))
    ]
    return st.sampled_from(fitting)
