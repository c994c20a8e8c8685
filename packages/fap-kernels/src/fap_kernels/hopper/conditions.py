"""Which calls the Hopper schedules are for. Everything else runs on the portable kernels."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ..backward.config import padded_rows
from .config import BACKWARD, FORWARD, choose

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..problem import AttentionProblem
    from ..target import Target
    from .config import HopperRow

__all__ = ["backward_reasons_against", "forward_reasons_against", "places_are_known"]

_logger = logging.getLogger("fap_kernels")

FEWEST_QUERIES = 65
"""Fewer fill no second warpgroup."""

LEAST_WORK = 2**30
"""Floating-point operations of the forward: some 4 us. A second launch costs the host more than is saved."""

MOST_NUMBERS = 2**31
"""Of a vector of one number a query row: the TMA unit counts in 32 bits."""


def forward_reasons_against(problem: AttentionProblem, target: Target, asked_for: bool = False) -> list[str]:
    """Every reason why the Hopper forward does not compute ``problem``, its tensors' addresses aside.

    Args:
        asked_for: by ``use_schedule("hopper")``, where it may also run what it is not known to be faster at.
    """
    own = []
    if problem.seqlen_q < FEWEST_QUERIES:
        own.append(f"it is for {FEWEST_QUERIES} queries and more, got {problem.seqlen_q}")
    work = 4 * problem.batch * problem.nheads * problem.seqlen_q * problem.seqlen_k * problem.head_dim
    if work < LEAST_WORK and not asked_for:
        own.append("it launches two kernels, which would cost this small call more than it saves")
    return _reasons_against(problem, target, own, FORWARD, asked_for)


def backward_reasons_against(problem: AttentionProblem, target: Target, asked_for: bool = False) -> list[str]:
    """Every reason why the Hopper backward does not compute ``problem``, its tensors' addresses aside.

    Args:
        asked_for: by ``use_schedule("hopper")``, where it may also run what it is not known to be faster at.
    """
    own = []
    config = choose(BACKWARD, problem).config
    if problem.deterministic and config is not None and config.relay:
        own.append("above 128 columns it adds up dQ in no fixed order, and deterministic is True")
    if problem.batch * problem.nheads * padded_rows(problem.seqlen_q, 1) >= MOST_NUMBERS:
        own.append(f"batch * nheads * seqlen_q, padded, must stay below {MOST_NUMBERS}")
    return _reasons_against(problem, target, own, BACKWARD, asked_for)


def _reasons_against(
    problem: AttentionProblem,
    target: Target,
    own: list[str],
    table: Iterable[HopperRow[Any]],
    asked_for: bool,
) -> list[str]:
    """What the passes share, then the ``own`` reasons of one, then that of its table."""
    if target.family != "sm_90":
        return [f"it is written for sm_90, got {target.family}"]
    reasons = []
    if not _gluon_is_here():
        reasons.append("it needs Triton 3.6 or later")
    if problem.dtype not in (torch.float16, torch.bfloat16):
        reasons.append(f"it computes float16 and bfloat16, got {problem.dtype}")
    if problem.dropout_p > 0.0:
        reasons.append(f"it has no dropout, got dropout_p {problem.dropout_p}")
    if problem.paged or problem.cached:
        reasons.append("it has neither pages nor a cache")
    if problem.head_dim % 8:
        reasons.append(f"head_dim must be a multiple of 8, got {problem.head_dim}")
    reasons += own
    row = choose(table, problem)
    if row.config is None or not (row.by_default or asked_for):
        reasons.append(row.why)
    return reasons


@cache
def _gluon_is_here() -> bool:
    return _triton() >= (3, 6)


@cache
def places_are_known() -> bool:
    """Whether this version of Triton is one of which it is known where shared memory and tensor maps lie.

    That is what :mod:`fap_kernels.hopper.cluster` and :mod:`fap_kernels.hopper.mbarriers` rely on. Where not,
    a log line says so, once: programs fetch all that they read, and the warps of a warpgroup meet more often.
    """
    known = (3, 6) <= _triton() <= (3, 9)
    if not known:
        _logger.warning(
            "programs form no clusters, and warps meet where they wait, which is slower: where Triton %d.%d "
            "puts what they share is not known",
            *_triton(),
        )
    return known


def _triton() -> tuple[int, int]:
    import triton  # whose distribution has another name in some builds of PyTorch

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)
