"""How fap_kernels is held to one family of its schedules, so that each can be measured beside the other.

Nothing else in the bench knows how that is done.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fap_testing.bench.problem import Direction, Problem

__all__ = ["held_to", "missing", "reasons_against"]


def missing(family: str) -> str | None:
    """Return why fap_kernels has no such schedules here, or None.

    Args:
        family: "portable", plain Triton, or "hopper", Gluon for sm_90.
    """
    if family == "portable":
        return None
    return f"fap_kernels here has no schedules of the family {family!r}, only portable ones"


def held_to(family: str) -> AbstractContextManager[Any]:  # noqa: ARG001 - the portable family is all there is
    """Return what every call must run inside of to take this family's schedules, where they can run it."""
    return nullcontext()


def reasons_against(
    family: str,  # noqa: ARG001 - as above
    problem: Problem,  # noqa: ARG001
    direction: Direction,  # noqa: ARG001
) -> list[str]:
    """Return why this family's schedules would hand the call back to the portable ones."""
    return []
