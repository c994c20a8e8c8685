"""How fap_kernels is held to one family of its schedules, and which one it takes by itself.

Nothing else in the bench knows how that is done.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from fap_testing.bench.prefill import Prefill
from fap_testing.bench.varlen import Varlen

if TYPE_CHECKING:
    from fap_testing.bench.problem import Direction, Problem

__all__ = ["held_to", "hopper_configuration", "missing", "reasons_against"]

_SM_90 = 9


def missing(family: str) -> str | None:
    """Return why fap_kernels has no such schedules on this machine, or None.

    Args:
        family: "portable", plain Triton, or "hopper", Gluon for sm_90.
    """
    if family == "portable":
        return None
    if not hasattr(importlib.import_module("fap_kernels"), "use_schedule"):
        return f"fap_kernels here has no schedules of the family {family!r}, only portable ones"
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != _SM_90:
        return f"it is written for sm_90, and this is {torch.cuda.get_device_name()}"
    return None


def held_to(family: str) -> AbstractContextManager[Any]:
    """Return what every call must run inside of to take this family's schedules."""
    use_schedule = getattr(importlib.import_module("fap_kernels"), "use_schedule", None)
    # Without a choice, the portable family is all there is.
    held: AbstractContextManager[Any] = nullcontext() if use_schedule is None else use_schedule(family)
    return held


def reasons_against(family: str, problem: Problem, direction: Direction) -> list[str]:
    """Return why this family's schedules do not compute a call."""
    if family == "portable":
        return []
    if not isinstance(problem, (Prefill, Varlen)):
        return [f"the family {family!r} computes prefill and varlen, got {problem.kind}"]
    # A backward pass is measured behind a forward pass of the same family.
    reasons = _reasons_against_hopper(problem, "forward", asked_for=True)
    if direction in ("bwd", "both"):
        reasons += _reasons_against_hopper(problem, "backward", asked_for=True)
    return reasons


def hopper_configuration(problem: Problem, direction: str, family: str) -> str | None:
    """Return what the Hopper family would run a pass with, or None where it does not compute it.

    Args:
        direction: "forward" or "backward".
        family: the one that the call is held to, or "" for fap_kernels's own choice.
    """
    if family == "portable" or missing("hopper") is not None or not isinstance(problem, (Prefill, Varlen)):
        return None
    if _reasons_against_hopper(problem, direction, asked_for=family == "hopper"):
        return None
    if direction == "forward":
        processors = importlib.import_module("fap_kernels.target").processors_of(torch.device(problem.device))
        launch = importlib.import_module("fap_kernels.hopper.launch")
        return str(launch.forward_config(_described(problem), processors))
    config = importlib.import_module("fap_kernels.hopper.config")
    return str(config.choose(config.BACKWARD, _described(problem)).config)


def _reasons_against_hopper(problem: Prefill | Varlen, direction: str, asked_for: bool) -> list[str]:
    conditions = importlib.import_module("fap_kernels.hopper.conditions")
    target = importlib.import_module("fap_kernels.target").target_of(torch.device(problem.device))
    return list(getattr(conditions, f"{direction}_reasons_against")(_described(problem), target, asked_for))


def _described(problem: Prefill | Varlen) -> Any:
    """Return a call as fap_kernels's own description, without its data."""

    def like(seqlen: int, nheads: int) -> torch.Tensor:
        batch = () if isinstance(problem, Varlen) else (problem.batch,)
        shape = (*batch, seqlen, nheads, problem.head_dim)
        return torch.empty(shape, dtype=problem.torch_dtype, device="meta")

    where: dict[str, Any] = {}
    if isinstance(problem, Varlen):
        total, longest = sum(problem.lengths), max(problem.lengths)
        q, k = like(total, problem.nheads), like(total, problem.nheads_k)
        starts = torch.empty(problem.batch + 1, dtype=torch.int32, device="meta")
        describe = importlib.import_module("fap_kernels.packing").Packing.describe
        where["packing"] = describe(q, k, starts, starts, longest, longest)
    else:
        q, k = like(problem.seqlen_q, problem.nheads), like(problem.seqlen_k, problem.nheads_k)
    options = {"causal": problem.causal, "window_size": problem.window_size}
    return importlib.import_module("fap_kernels").AttentionProblem.describe(q, k, k, **where, **options)
