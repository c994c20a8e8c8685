"""Which schedule computes a call: one written for the chip where it applies, else the portable one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .launch import descriptors_fit

if TYPE_CHECKING:
    from types import TracebackType

    import torch

    from .launch import Launch
    from .packing import Packing
    from .problem import AttentionProblem

__all__ = ["explain_schedule", "explicit_schedule", "plan_forward_by_schedule", "use_schedule"]

_NAMES = ("hopper", "portable")
_explicit: str | None = None


class use_schedule:  # noqa: N801 - read and used as a function
    """Choose the kernels that compute attention: ``use_schedule("portable")``, also as a context manager.

    For comparing them. As a call it holds until the next one; in a ``with`` statement until the block's end.
    The choice is process-wide, and explicit: a call that the chosen schedule does not compute raises.

    Args:
        name: "portable" for the kernels in plain Triton, which run everything; "hopper" for those in Gluon
            for sm_90, of which there is a forward pass; None goes back to the best one that applies.

    Raises:
        ValueError: there is no schedule of that name.
    """

    def __init__(self, name: str | None) -> None:
        global _explicit  # noqa: PLW0603 - process-wide by design
        if name is not None and name not in _NAMES:
            raise ValueError(f"schedule must be one of {', '.join(map(repr, _NAMES))} or None, got {name!r}")
        self._earlier = _explicit
        _explicit = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _explicit  # noqa: PLW0603
        _explicit = self._earlier


def explicit_schedule() -> str | None:
    """What :class:`use_schedule` has chosen, None where it has not."""
    return _explicit


def explain_schedule(problem: AttentionProblem) -> str:
    """Which schedule computes the forward pass of a call, and why no other, as a sentence.

    What only the tensors themselves tell is left out: the Hopper schedule also needs addresses and strides
    that are multiples of 16 bytes.
    """
    from .hopper.conditions import forward_reasons_against
    from .target import target_of

    target = target_of(problem.device)
    if _explicit == "portable":
        return "the portable forward, chosen by use_schedule"
    reasons = forward_reasons_against(problem, target)
    if not reasons:
        return "the Hopper forward"
    if target.family != "sm_90":
        return f"the portable forward ({target.family})"
    return f"the portable forward, since the Hopper one does not take this call: {'; '.join(reasons)}"


def plan_forward_by_schedule(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    rng_state: torch.Tensor | None,
    packing: Packing | None,
) -> list[Launch]:
    """The launches that fill ``out`` and ``softmax_lse``, by the schedule for the call.

    Raises:
        RuntimeError: an explicitly chosen schedule does not compute this call.
    """
    from .hopper.conditions import forward_reasons_against
    from .target import processors_of, target_of

    target = target_of(q.device)
    if _explicit != "portable":
        reasons = forward_reasons_against(problem, target)
        if not reasons and not descriptors_fit(target, q, k, v):
            reasons = ["it needs addresses and strides that are multiples of 16 bytes, and none of them 0"]
        if not reasons:
            from .hopper.launch import plan_hopper_forward

            return plan_hopper_forward(
                problem, processors_of(q.device), q, k, v, out, softmax_lse, alibi_slopes, packing
            )
        if _explicit == "hopper":
            raise RuntimeError(
                "the schedule 'hopper' was chosen by use_schedule and does not compute this call: "
                + "; ".join(reasons)
            )
    from .forward.launch import plan_forward

    return [plan_forward(problem, target, q, k, v, out, softmax_lse, alibi_slopes, rng_state, packing)]
