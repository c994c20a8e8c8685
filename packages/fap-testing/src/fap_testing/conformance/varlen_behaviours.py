"""What a subject must do besides computing varlen cases rightly: all that dense attention must, and more."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fap_testing.cases_varlen import VarlenCase
from fap_testing.conformance.behaviours import BEHAVIOURS
from fap_testing.conformance.calls import call, forward, require_that, rows_apart
from fap_testing.conformance.dropout import DROPOUT_BEHAVIOURS
from fap_testing.conformance.varlen import as_dense, check_varlen_result
from fap_testing.expectation import expect_varlen
from fap_testing.inputs_varlen import make_varlen_inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from fap_testing.conformance.subject import Subject, VarlenSubject
    from fap_testing.inputs_varlen import VarlenInputs

__all__ = ["VARLEN_BEHAVIOURS"]

# Equal lengths on both sides, so that any subject can run it.
_PLAIN = VarlenCase(name="behaviour", seqlens_q=(67, 5, 30), seqlens_k=(67, 5, 30), head_dim=32)


def _inputs(subject: VarlenSubject, dtype: torch.dtype, case: VarlenCase = _PLAIN) -> VarlenInputs:
    return make_varlen_inputs(case, dtype=dtype, device=subject.device, seed=subject.seed)


def check_max_seqlen_types(subject: VarlenSubject, dtype: torch.dtype) -> None:
    """max_seqlen_q and max_seqlen_k may be tensors without dimensions, as transformers passes them."""
    inputs = _inputs(subject, dtype)
    expected = expect_varlen(inputs)
    for integer in (torch.int32, torch.int64):
        longest: dict[str, Any] = {"max_seqlen_q": torch.tensor(67, dtype=integer)}
        longest["max_seqlen_k"] = torch.tensor(67, dtype=integer, device=inputs.q.device)
        expected.check(out=forward(subject, inputs, inputs.q, inputs.k, inputs.v, **longest).out)


def check_max_seqlen_is_a_bound(subject: VarlenSubject, dtype: torch.dtype) -> None:
    """max_seqlen_q and max_seqlen_k may exceed the longest sequence's lengths, and change nothing."""
    inputs = _inputs(subject, dtype)
    result = call(subject, inputs, max_seqlen_q=300, max_seqlen_k=513)
    check_varlen_result(subject, inputs, result)


def check_deterministic_varlen(subject: VarlenSubject, dtype: torch.dtype) -> None:
    """With deterministic=True, unequal sequences too give bitwise the same on every run, and are right."""
    subject.require("deterministic", "cross_lengths")
    longest = 130 if torch.device(subject.device).type == "cpu" else 1100
    sizes: dict[str, Any] = {"nheads": 4, "nheads_k": 2 if subject.supports("gqa") else 4, "head_dim": 64}
    case = VarlenCase(name="deterministic", seqlens_q=(longest, 1, 40), seqlens_k=(77, longest, 40), **sizes)
    inputs = _inputs(subject, dtype, case)
    result = call(subject, inputs, deterministic=True)
    check_varlen_result(subject, inputs, result)
    first = result.tensors()
    for run in range(1, subject.repeats):
        again = call(subject, inputs, deterministic=True).tensors()
        for name, x in first.items():
            differing = int((again[name] != x).sum())
            require_that(
                differing == 0,
                f"with deterministic=True, {name} of run {run + 1} of {subject.repeats} differs from the "
                f"first in {differing} of {x.numel()} elements",
            )


def check_table_strides(subject: VarlenSubject, dtype: torch.dtype) -> None:
    """The rows of block_table may lie apart, as in a slice of a table for longer sequences."""
    subject.require("paged", "cross_lengths")
    lengths: dict[str, Any] = {"seqlens_q": (5, 9, 1), "seqlens_k": (300, 16, 512)}
    inputs = _inputs(subject, dtype, VarlenCase(name="table", page_size=256, head_dim=32, **lengths))
    if inputs.block_table is None:
        raise TypeError("a case with pages must have a table")
    result = call(subject, inputs, block_table=rows_apart(inputs.block_table))
    check_varlen_result(subject, inputs, result)


def check_positional_block_table(subject: VarlenSubject, dtype: torch.dtype) -> None:
    """block_table is the last of flash_attn_varlen_func's positional arguments, after return_attn_probs."""
    subject.require("paged", "cross_lengths", "lse", "deterministic")
    lengths: dict[str, Any] = {"seqlens_q": (5, 9), "seqlens_k": (40, 16)}
    inputs = _inputs(subject, dtype, VarlenCase(name="positional", page_size=256, head_dim=32, **lengths))
    options = (0.0, None, False, (-1, -1), 0.0, None, False, True, inputs.block_table)
    returned = subject.attention(inputs.q, inputs.k, inputs.v, *inputs.lengths.values(), *options)
    require_that(
        isinstance(returned, (tuple, list)) and len(returned) == 3,
        "the fifteenth positional argument is return_attn_probs, so three results are due",
    )
    expect_varlen(inputs).check(out=returned[0], softmax_lse=returned[1])


def _check_as_dense(
    behaviour: Callable[[Subject, torch.dtype], None], subject: VarlenSubject, dtype: torch.dtype
) -> None:
    behaviour(as_dense(subject), dtype)


VARLEN_BEHAVIOURS: dict[str, Callable[[VarlenSubject, torch.dtype], None]] = {
    **{name: partial(_check_as_dense, check) for name, check in (BEHAVIOURS | DROPOUT_BEHAVIOURS).items()},
    "max_seqlen_types": check_max_seqlen_types,
    "max_seqlen_is_a_bound": check_max_seqlen_is_a_bound,
    "deterministic_varlen": check_deterministic_varlen,
    "table_strides": check_table_strides,
    "positional_block_table": check_positional_block_table,
}
