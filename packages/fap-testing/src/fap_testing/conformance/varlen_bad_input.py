"""Every mistake in a call over packed sequences must raise, and name the argument and what was given."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fap_testing.cases_varlen import VarlenCase
from fap_testing.conformance.bad_input import MISTAKES, Mistake, check_mistake, require_refusal
from fap_testing.conformance.varlen import as_dense
from fap_testing.inputs_varlen import make_varlen_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fap_testing.conformance.subject import VarlenSubject

__all__ = ["VARLEN_MISTAKES", "VarlenMistake", "check_varlen_mistake"]

_SIZES: dict[str, Any] = {"seqlens_q": (5, 9), "seqlens_k": (30, 9), "nheads": 4, "nheads_k": 2}
_CASES = {
    "plain": VarlenCase(name="bad_input", **_SIZES),
    "paged": VarlenCase(name="bad_input_paged", page_size=16, **_SIZES),
    "seqused": VarlenCase(name="bad_input_seqused", seqused_q=(5, 1), seqused_k=(20, 3), **_SIZES),
}
# Mistakes in dense calls that are mistakes here too, whatever the layout.
_ALIKE = (
    "heads_of_v",
    "head_dim_of_k_and_v",
    "head_dim_0",
    "head_dim_257",
    "heads_not_divisible",
    "heads_0_in_k_and_v",
    "integer_dtype",
    "complex_dtype",
    "mixed_dtype_of_k",
    "mixed_dtype_of_v",
    "mixed_devices",
)


@dataclass(frozen=True, slots=True)
class VarlenMistake(Mistake):
    """A call over packed sequences that must be refused.

    Attributes:
        call: which good call is spoiled.
    """

    call: str = "plain"


def check_varlen_mistake(subject: VarlenSubject, dtype: torch.dtype, mistake: Mistake) -> None:
    """Check that a subject refuses a call with an error that says what is wrong."""
    if not isinstance(mistake, VarlenMistake):
        check_mistake(as_dense(subject), dtype, mistake)
        return
    case = _CASES[mistake.call]
    # The good call has to be in the subject's reach, else there is nothing to explain.
    subject.require("error_messages", *case.features)
    inputs = make_varlen_inputs(case, dtype=dtype, device=subject.device, poison=False)
    arguments: dict[str, Any] = {
        "q": inputs.q,
        "k": inputs.k,
        "v": inputs.v,
        **inputs.lengths,
        **inputs.options,
    }
    arguments |= mistake.spoil(arguments)
    tensors = [arguments.pop(name) for name in ("q", "k", "v")]
    require_refusal(partial(subject.attention, *tensors, **arguments), mistake.says)


def _change(call: str, names: str, change: Callable[[Any], Any], *says: str) -> VarlenMistake:
    """Spoil every one of some arguments; the message must name the first one."""
    arguments = names.split()

    def spoil(good: Mapping[str, Any]) -> dict[str, Any]:
        return {name: change(good[name]) for name in arguments}

    return VarlenMistake(spoil, (rf"\b{arguments[0]}\b", *says), None, call)


def _pages_of(size: int) -> VarlenMistake:
    """Pages of a size that is no power of two, or below 16."""

    def spoil(good: Mapping[str, Any]) -> dict[str, Any]:
        table = torch.arange(8, dtype=torch.int32, device=good["q"].device).reshape(2, 4)
        return {
            "k": good["k"].new_zeros(8, size, 2, 16),
            "v": good["v"].new_zeros(8, size, 2, 16),
            "block_table": table,
        }

    return VarlenMistake(spoil, ("page", rf"\b{size}\b"), None, "paged")


def _own() -> dict[str, VarlenMistake]:
    to_int64 = partial(torch.Tensor.to, dtype=torch.int64)
    mistakes = {
        "q_of_rank_4": _change("plain", "q", lambda x: x[None], "1, 14, 4, 16"),
        "k_of_rank_4": _change("plain", "k", lambda x: x[None], "1, 39, 2, 16"),
        "v_of_rank_2": _change("plain", "v", lambda x: x[0], "2, 16"),
        "rows_of_v": _change("plain", "v", lambda x: x[:7], r"\b7\b"),
        "sequences_of_cu_seqlens_k": _change("plain", "cu_seqlens_k", lambda x: x[:2], "cu_seqlens_q"),
        "k_of_rank_3_with_pages": _change("paged", "k v", lambda x: x[0], "16, 2, 16"),
        "block_table_int64": _change("paged", "block_table", to_int64, "int64", "int32"),
        "block_table_of_rank_1": _change("paged", "block_table", lambda x: x[0]),
        "block_table_of_batch_1": _change("paged", "block_table", lambda x: x[:1], r"\b1, "),
        "page_size_8": _pages_of(8),
        "page_size_24": _pages_of(24),
    }
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        mistakes |= {
            f"{name}_int64": _change("plain", name, to_int64, "int64", "int32"),
            f"{name}_of_rank_2": _change("plain", name, lambda x: x[None], "1, 3"),
            f"{name}_empty": _change("plain", name, lambda x: x[:0], r"\b0\b"),
            f"{name}_on_meta": _change("plain", name, lambda x: x.to("meta"), "meta"),
            f"{name}_no_tensor": _change("plain", name, lambda x: x.tolist(), "list"),
        }
    for name in ("max_seqlen_q", "max_seqlen_k"):
        mistakes |= {
            f"{name}_negative": _change("plain", name, lambda _: -1, "-1"),
            f"{name}_no_integer": _change("plain", name, lambda _: 30.5, r"30\.5"),
        }
    for name in ("seqused_q", "seqused_k"):
        mistakes |= {
            f"{name}_int64": _change("seqused", name, to_int64, "int64", "int32"),
            f"{name}_of_batch_1": _change("seqused", name, lambda x: x[:1], r"\b1\b"),
        }
    return mistakes


VARLEN_MISTAKES: dict[str, Mistake] = {
    **{name: mistake for name, mistake in MISTAKES.items() if name in _ALIKE or mistake.option is not None},
    **_own(),
}
