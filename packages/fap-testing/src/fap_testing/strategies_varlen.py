"""Hypothesis strategies for calls over packed sequences.

Needs Hypothesis: ``pip install "fap-testing[hypothesis]"``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fap_testing.cases_varlen import VARLEN_FEATURES, VarlenCase
from fap_testing.strategies import cases

# Importing fap_testing.strategies has said so if Hypothesis is missing.
from hypothesis import assume  # isort: skip
from hypothesis import strategies as st  # isort: skip

if TYPE_CHECKING:
    from collections.abc import Collection

    from fap_testing.cases import Case

__all__ = ["varlen_cases"]

_OF_THE_CALL = ("nheads", "nheads_k", "head_dim", "softmax_scale", "causal", "window_size", "softcap")
_OWN = frozenset({"seqused", "paged"})


def varlen_cases(
    *,
    max_batch: int = 4,
    max_seqlen: int = 40,
    max_head_dim: int = 64,
    without: Collection[str] = (),
) -> st.SearchStrategy[VarlenCase]:
    """Draw a :class:`fap_testing.cases_varlen.VarlenCase` with random lengths and features.

    Args:
        max_batch: largest number of sequences.
        max_seqlen: largest number of queries, and of keys, of a sequence; the smallest is 0.
        max_head_dim: largest head dim.
        without: names from :data:`fap_testing.cases_varlen.VARLEN_FEATURES` that no drawn case asks for.

    Raises:
        ValueError: an unknown name in ``without``.
    """
    unknown = sorted(set(without) - VARLEN_FEATURES.keys())
    if unknown:
        raise ValueError(f"without has unknown features {unknown}, accepted: {', '.join(VARLEN_FEATURES)}")
    dense = cases(max_seqlen=max_seqlen, max_head_dim=max_head_dim, max_batch=1, without=set(without) - _OWN)
    return _varlen_cases(dense, max_batch, max_seqlen, frozenset(without))


@st.composite
def _varlen_cases(
    draw: st.DrawFn, dense: st.SearchStrategy[Case], max_batch: int, max_seqlen: int, without: frozenset[str]
) -> VarlenCase:
    first = draw(dense)
    same = first.layout == "qkv_packed" or "cross_lengths" in without
    length = st.integers(1 if "zero_length" in without else 0, max_seqlen)
    others = draw(st.lists(st.tuples(length, length), max_size=max_batch - 1))
    pairs = [(first.seqlen_q, first.seqlen_k), *((n, n if same else m) for n, m in others)]
    lengths: dict[str, Any] = {
        "seqlens_q": tuple(n for n, _ in pairs),
        "seqlens_k": tuple(m for _, m in pairs),
    }
    for side in "qk":
        if "seqused" not in without and draw(st.booleans()):
            most = lengths[f"seqlens_{side}"]
            lengths[f"seqused_{side}"] = tuple(draw(st.integers(0, n)) for n in most)
    paged = "paged" not in without and first.layout == "contiguous" and draw(st.booleans())
    lengths["page_size"] = draw(st.sampled_from([16, 32])) if paged else None
    options = {name: getattr(first, name) for name in (*_OF_THE_CALL, "alibi", "dropout_p")}
    name = "drawn " + " ".join(f"{field}={value}" for field, value in (lengths | options).items())
    case = VarlenCase(name=name, layout=first.layout, **lengths, **options)
    assume(case.features.isdisjoint(without))
    return case
