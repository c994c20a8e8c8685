"""Every mistake a caller can make must raise, and the message must name the argument and what was given."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fap_testing.cases import Case
from fap_testing.conformance.calls import require_that
from fap_testing.inputs import make_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fap_testing.conformance.subject import Subject

__all__ = ["MISTAKES", "Mistake", "check_mistake", "other_float", "require_refusal"]

_CASE = Case(name="bad_input", batch=2, seqlen_q=9, seqlen_k=11, nheads=4, nheads_k=2)


@dataclass(frozen=True, slots=True)
class Mistake:
    """A call that must be refused.

    Attributes:
        spoil: given good ``q``, ``k`` and ``v`` by name, returns the arguments to replace or add.
        says: regular expressions that must all be found in the message.
        option: the feature that the mistake is about, if any; a subject without it need not explain.
    """

    spoil: Callable[[Mapping[str, torch.Tensor]], dict[str, Any]]
    says: tuple[str, ...]
    option: str | None = None


def check_mistake(subject: Subject, dtype: torch.dtype, mistake: Mistake) -> None:
    """Check that a subject refuses a call with an error that says what is wrong."""
    subject.require("error_messages")
    if mistake.option is not None:
        subject.require(mistake.option)
    inputs = make_inputs(_CASE, dtype=dtype, device=subject.device, poison=False)
    arguments: dict[str, Any] = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
    arguments |= mistake.spoil(arguments)
    q, k, v = (arguments.pop(name) for name in ("q", "k", "v"))
    require_refusal(partial(subject.attention, q, k, v, **arguments), mistake.says)


def require_refusal(call: Callable[[], Any], says: tuple[str, ...]) -> None:
    """Require that a call raises, with a message in which all of the regular expressions are found."""
    try:
        call()
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        missing = [pattern for pattern in says if not re.search(pattern, str(error), re.IGNORECASE)]
        require_that(
            not missing,
            f"the message must name the argument and what was given; it lacks {missing}: "
            f"{type(error).__name__}: {error}",
        )
        return
    require_that(False, "the call must be refused with an error, and it returned")


def _option(name: str, value: Any, *says: str) -> Mistake:
    feature = {"dropout_p": "dropout", "window_size": "window", "alibi_slopes": "alibi"}.get(name, name)
    return Mistake(lambda _: {name: value}, (name, *says), feature)


def _slopes(make: Callable[[torch.Tensor], Any], *says: str) -> Mistake:
    def spoil(good: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        return {"alibi_slopes": make(torch.ones(_CASE.nheads, device=good["q"].device))}

    return Mistake(spoil, ("alibi_slopes", *says), "alibi")


def _kv(change: Callable[[torch.Tensor], torch.Tensor], *says: str) -> Mistake:
    return Mistake(lambda good: {"k": change(good["k"]), "v": change(good["v"])}, says)


def _all(change: Callable[[torch.Tensor], torch.Tensor], *says: str) -> Mistake:
    return Mistake(lambda good: {name: change(x) for name, x in good.items()}, says)


def other_float(dtype: torch.dtype) -> torch.dtype:
    """Return a 16-bit dtype other than the one given."""
    return torch.float16 if dtype == torch.bfloat16 else torch.bfloat16


MISTAKES: dict[str, Mistake] = {
    "q_of_rank_3": Mistake(lambda good: {"q": good["q"][0]}, (r"\bq\b", r"9, 4, 16")),
    "k_of_rank_3": Mistake(lambda good: {"k": good["k"][0]}, (r"\bk\b", r"11, 2, 16")),
    "v_of_rank_5": Mistake(lambda good: {"v": good["v"][None]}, (r"\bv\b", r"1, 2, 11, 2, 16")),
    "q_no_tensor": Mistake(lambda good: {"q": good["q"].tolist()}, (r"\bq\b", "list")),
    "batch_of_k_and_v": _kv(lambda x: x[:1], "batch", r"\b[kv]\b", r"\b1\b", r"\b2\b"),
    "batch_of_v": Mistake(lambda good: {"v": good["v"][:1]}, (r"\bv\b", r"\b1\b")),
    "seqlen_of_v": Mistake(lambda good: {"v": good["v"][:, :7]}, (r"\bv\b", r"\b7\b")),
    "heads_of_v": Mistake(lambda good: {"v": good["v"][:, :, :1]}, (r"\bv\b", r"\b1\b")),
    "head_dim_of_k_and_v": _kv(lambda x: x[..., :8], "head.?dim", r"\b[kv]\b", r"\b8\b"),
    "head_dim_0": _all(lambda x: x[..., :0], "head.?dim", r"\b0\b"),
    "head_dim_257": _all(lambda x: x[..., :1].repeat(1, 1, 1, 257), "head.?dim", r"\b257\b", r"\b256\b"),
    "heads_not_divisible": _kv(lambda x: x.repeat(1, 1, 2, 1)[:, :, :3], "heads", r"\b3\b", r"\b4\b"),
    "heads_0_in_k_and_v": _kv(lambda x: x[:, :, :0], "heads", r"\b0\b"),
    "integer_dtype": _all(lambda x: x.to(torch.int32), "int32"),
    "complex_dtype": _all(lambda x: x.to(torch.complex64), "complex64"),
    "mixed_dtype_of_k": Mistake(
        lambda good: {"k": good["k"].to(other_float(good["k"].dtype))}, ("dtype", r"\bk\b", "float16")
    ),
    "mixed_dtype_of_v": Mistake(
        lambda good: {"v": good["v"].to(other_float(good["v"].dtype))}, ("dtype", r"\bv\b", "float16")
    ),
    "mixed_devices": Mistake(lambda good: {"k": good["k"].to("meta")}, ("device", r"\bk\b", "meta")),
    "dropout_negative": _option("dropout_p", -0.1, "-0.1"),
    "dropout_1": _option("dropout_p", 1.0, r"\b1\.0"),
    "dropout_1.5": _option("dropout_p", 1.5, r"1\.5"),
    "dropout_nan": _option("dropout_p", math.nan, "nan"),
    "dropout_no_number": _option("dropout_p", "half", "half"),
    "window_of_length_1": _option("window_size", (3,), "3"),
    "window_of_length_3": _option("window_size", (3, 4, 5), "3, 4, 5"),
    "window_of_floats": _option("window_size", (1.5, 2.5), r"1\.5"),
    "window_of_text": _option("window_size", "wide", "wide"),
    "window_an_integer": _option("window_size", 7, "7"),
    "alibi_wrong_heads": _slopes(lambda x: x[:3], r"\b3\b", r"\b4\b"),
    "alibi_wrong_batch": _slopes(lambda x: x.repeat(3, 1), r"3, 4"),
    "alibi_wrong_rank": _slopes(lambda x: x.repeat(2, 1)[None], r"1, 2, 4"),
    "alibi_wrong_dtype": _slopes(lambda x: x.to(torch.float16), "float16", "float32"),
    "alibi_wrong_device": _slopes(lambda x: x.to("meta"), "meta"),
    "alibi_no_tensor": _slopes(lambda x: x.tolist(), "list"),
    "softcap_negative": _option("softcap", -2.0, r"-2"),
    "softcap_nan": _option("softcap", math.nan, "nan"),
    "softcap_infinite": _option("softcap", math.inf, "inf"),
    "softmax_scale_nan": _option("softmax_scale", math.nan, "nan"),
    "softmax_scale_infinite": _option("softmax_scale", math.inf, "inf"),
    "softmax_scale_no_number": _option("softmax_scale", "small", "small"),
}
