"""Which schedule computes a call: one written for the chip where it applies, else the portable one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .launch import descriptors_fit

if TYPE_CHECKING:
    from types import TracebackType

    import torch

    from .backward.launch import BackwardInputs
    from .launch import Launch
    from .packing import Packing
    from .problem import AttentionProblem
    from .target import Target

__all__ = [
    "explain_schedule",
    "explicit_schedule",
    "plan_backward_by_schedule",
    "plan_forward_by_schedule",
    "use_schedule",
]

_NAMES = ("hopper", "portable")
_explicit: str | None = None


class use_schedule:  # noqa: N801 - read and used as a function
    """Choose the kernels that compute attention: ``use_schedule("portable")``, also as a context manager.

    For comparing them. As a call it holds until the next one; in a ``with`` statement until the block's end.
    The choice is process-wide, and explicit: a call that the chosen schedule does not compute raises.

    Args:
        name: "portable" for the kernels in plain Triton, which run everything; "hopper" for those in Gluon
            for sm_90, which do not run everything, but also what nobody has measured yet; None goes back to
            the best one that is known to apply.

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


def explain_schedule(problem: AttentionProblem, *, backward: bool = False) -> str:
    """Which schedule computes the forward, or the backward, pass of a call, and why no other, as a sentence.

    Where the call would raise, since :class:`use_schedule` has chosen one that does not compute it, the
    sentence is that of the error.

    What only the tensors themselves tell is left out: the Hopper schedules also need addresses and strides
    that are multiples of 16 bytes.
    """
    from .target import target_of

    target = target_of(problem.device)
    name = "backward" if backward else "forward"
    if _explicit == "portable":
        return f"the portable {name}, chosen by use_schedule"
    reasons = _reasons_against_hopper(problem, target, backward)
    if not reasons:
        return f"the Hopper {name}"
    if _explicit == "hopper":
        return _refusal(reasons)
    if target.family != "sm_90":
        return f"the portable {name} ({target.family})"
    return f"the portable {name}, since the Hopper one does not take this call: {'; '.join(reasons)}"


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
) -> tuple[list[Launch], dict[str, torch.Tensor]]:
    """The launches that fill ``out`` and ``softmax_lse``, by the schedule for the call.

    Returns:
        The launches, and the memory that they need besides, by the name that kernels take it by.

    Raises:
        RuntimeError: an explicitly chosen schedule does not compute this call.
    """
    from .target import processors_of, target_of

    target = target_of(q.device)
    if _hopper_computes(problem, target, (q, k, v), backward=False):
        from .hopper.launch import plan_hopper_forward

        return plan_hopper_forward(
            problem, processors_of(q.device), q, k, v, out, softmax_lse, alibi_slopes, packing
        )
    from .forward.launch import plan_forward

    tensors = (q, k, v, out, softmax_lse, alibi_slopes, rng_state, packing)
    return [plan_forward(problem, target, *tensors)], {}


def plan_backward_by_schedule(
    problem: AttentionProblem,
    inputs: BackwardInputs,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dlse: torch.Tensor | None,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> tuple[list[Launch], dict[str, torch.Tensor]]:
    """The launches that fill ``dq``, ``dk`` and ``dv``, by the schedule for the call.

    Args:
        inputs: its ``lse`` and ``delta`` are filled as well.
        out, softmax_lse, dlse: of the forward pass; the vectors contiguous.

    Returns:
        The launches, and the memory that they need besides, by the name that kernels take it by.

    Raises:
        RuntimeError: an explicitly chosen schedule does not compute this call.
    """
    from .backward.launch import plan_delta, plan_dkdv, plan_dq
    from .target import processors_of, target_of

    target = target_of(inputs.q.device)
    tensors = (inputs.q, inputs.k, inputs.v, inputs.dout)
    if _hopper_computes(problem, target, tensors, backward=True):
        from .hopper.backward_launch import plan_hopper_backward

        return plan_hopper_backward(
            problem, processors_of(inputs.q.device), inputs, out, softmax_lse, dlse, dq, dk, dv
        )
    return [
        plan_delta(problem, out, softmax_lse, dlse, inputs),
        plan_dkdv(problem, target, inputs, dk, dv),
        plan_dq(problem, target, inputs, dq),
    ], {}


def _hopper_computes(
    problem: AttentionProblem, target: Target, fetched: tuple[torch.Tensor, ...], *, backward: bool
) -> bool:
    """Whether the Hopper schedule is to compute a call, of which it would fetch these tensors."""
    if _explicit == "portable":
        return False
    reasons = _reasons_against_hopper(problem, target, backward)
    if not reasons and not descriptors_fit(target, *fetched):
        reasons = ["it needs addresses and strides that are multiples of 16 bytes, and none of them 0"]
    if reasons and _explicit == "hopper":
        raise RuntimeError(_refusal(reasons))
    return not reasons


def _reasons_against_hopper(problem: AttentionProblem, target: Target, backward: bool) -> list[str]:
    from .hopper.conditions import backward_reasons_against, forward_reasons_against

    against = backward_reasons_against if backward else forward_reasons_against
    return against(problem, target, asked_for=_explicit == "hopper")


def _refusal(reasons: list[str]) -> str:
    why = "; ".join(reasons)
    return f"the schedule 'hopper' was chosen by use_schedule and does not compute this call: {why}"
