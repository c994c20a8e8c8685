"""Call a subject on a case's inputs and take its answer apart, strictly."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from fap_testing.conformance.subject import UnsupportedError
from fap_testing.inputs_varlen import VarlenInputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from fap_testing.cases import Case
    from fap_testing.conformance.subject import Subject
    from fap_testing.inputs import CaseInputs

__all__ = [
    "CallResult",
    "NonconformityError",
    "call",
    "check_refusal",
    "forward",
    "keep_mask_of",
    "kind_of",
    "require_like",
    "require_that",
    "rows_apart",
    "seeded",
]

_MASK_BLOCK = 128
_R = TypeVar("_R")


class NonconformityError(AssertionError):
    """The subject breaks its contract. Kept apart from an AssertionError that the subject itself raises."""


@dataclass(frozen=True, slots=True, eq=False)
class CallResult:
    """What one call returned; None for what the subject does not provide or was not asked for.

    Attributes:
        out: in the shape of q.
        softmax_lse: ``(batch, nheads, seqlen_q)``, or of packed sequences ``(nheads, total_q)``.
        s_dmask: as returned, see :func:`keep_mask_of`.
        dq, dk, dv: gradients, in the shapes of q, k and v.
    """

    out: torch.Tensor
    softmax_lse: torch.Tensor | None = None
    s_dmask: torch.Tensor | None = None
    dq: torch.Tensor | None = None
    dk: torch.Tensor | None = None
    dv: torch.Tensor | None = None

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the results that an oracle can check, by name."""
        names = ("out", "softmax_lse", "dq", "dk", "dv")
        return {name: x for name in names if (x := getattr(self, name)) is not None}


def require_that(condition: bool, message: str) -> None:
    """Raise NonconformityError with the message unless the condition holds."""
    if not condition:
        raise NonconformityError(message)


@contextmanager
def seeded(device: torch.device | str, seed: int) -> Iterator[None]:
    """Seed every generator that the device draws from, and put the caller's state back afterwards."""
    device = torch.device(device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def rows_apart(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` ``(rows, columns)`` as a slice of a tensor twice as wide, whose other half misleads."""
    return torch.cat((x, x.flip((0, 1))), dim=1)[:, : x.shape[1]]


def call(
    subject: Subject,
    inputs: CaseInputs | VarlenInputs,
    *,
    use_dout: bool = True,
    use_dlse: bool = True,
    **extra: Any,
) -> CallResult:
    """Run a subject forward, and backward as far as it supports that, on a case's inputs.

    Args:
        subject: what to run.
        inputs: from :func:`fap_testing.inputs.make_inputs`, or for packed sequences from
            :func:`fap_testing.inputs_varlen.make_varlen_inputs`. Pages get no gradients.
        use_dout, use_dlse: which outputs get a gradient. The LSE gets one only if the subject supports
            ``lse_gradient``.
        extra: keyword arguments beyond the case's own, such as ``deterministic=True``.

    Raises:
        NonconformityError: the answer has the wrong structure, shape, dtype or device, or lacks a gradient.
    """
    wants_gradients = subject.provides("backward", inputs.case) and "paged" not in inputs.case.features
    q, k, v = inputs.leaves() if wants_gradients else (inputs.q, inputs.k, inputs.v)
    result = forward(subject, inputs, q, k, v, **extra)
    if not wants_gradients:
        return result
    outputs = [(result.out, inputs.dout)] if use_dout else []
    if use_dlse and result.softmax_lse is not None and subject.provides("lse_gradient", inputs.case):
        require_that(
            result.softmax_lse.requires_grad,
            "softmax_lse must be differentiable, got one that does not require grad; "
            "declare 'lse_gradient' unsupported if that is meant",
        )
        outputs.append((result.softmax_lse, inputs.dlse.to(result.softmax_lse.dtype)))
    require_that(
        result.out.requires_grad,
        "out must be differentiable, got one that does not require grad; "
        "declare 'backward' unsupported if that is meant",
    )
    ys, dys = zip(*outputs, strict=True)
    # v has no part in the LSE, so its gradient may be absent when only the LSE is differentiated.
    dq, dk, dv = torch.autograd.grad(ys, (q, k, v), dys, materialize_grads=not use_dout)
    for name, x, dx in (("dq", q, dq), ("dk", k, dk), ("dv", v, dv)):
        require_like(name, dx, x.shape, x.dtype, x.device)
    lse = None if result.softmax_lse is None else result.softmax_lse.detach()
    return CallResult(result.out.detach(), lse, result.s_dmask, dq.detach(), dk.detach(), dv.detach())


def forward(
    subject: Subject,
    inputs: CaseInputs | VarlenInputs,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    **extra: Any,
) -> CallResult:
    """Run a subject's forward pass on tensors that stand in for the inputs' own q, k and v."""
    lengths = inputs.lengths if isinstance(inputs, VarlenInputs) else {}
    options = lengths | inputs.options | extra
    wants_lse = options.pop("return_attn_probs", subject.provides("lse", inputs.case))
    if wants_lse:
        options["return_attn_probs"] = True
    returned = subject.attention(q, k, v, **options)
    if not wants_lse:
        require_that(
            isinstance(returned, torch.Tensor),
            f"attention must return out alone without return_attn_probs, got {kind_of(returned)}",
        )
        require_like("out", returned, q.shape, q.dtype, q.device)
        return CallResult(returned)
    require_that(
        isinstance(returned, (tuple, list)) and len(returned) == 3,
        f"return_attn_probs=True must return (out, softmax_lse, S_dmask), got {kind_of(returned)}",
    )
    out, lse, s_dmask = returned
    require_like("out", out, q.shape, q.dtype, q.device)
    # (batch, nheads, seqlen_q), or of packed sequences (nheads, total_q).
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])
    lse_dtypes = (torch.float32, torch.promote_types(q.dtype, torch.float32))
    require_like("softmax_lse", lse, lse_shape, lse_dtypes, q.device)
    return CallResult(out, lse, s_dmask)


def keep_mask_of(s_dmask: torch.Tensor, case: Case) -> torch.Tensor:
    """Read the dropout mask out of S_dmask: its sign bit is set where a weight was dropped, -0.0 included.

    Args:
        s_dmask: ``(batch, nheads, round_up(seqlen_q, 128), round_up(seqlen_k, 128))`` in q's dtype.
        case: the sizes to cut it down to.

    Returns:
        bool ``(batch, nheads, seqlen_q, seqlen_k)``, True where a weight is kept; of no meaning where masked.

    Raises:
        NonconformityError: S_dmask has another shape.
    """
    rows, columns = (-(-n // _MASK_BLOCK) * _MASK_BLOCK for n in (case.seqlen_q, case.seqlen_k))
    shape = (case.batch, case.nheads, rows, columns)
    require_that(
        tuple(s_dmask.shape) == shape,
        "with dropout, S_dmask must have shape "
        f"(batch, nheads, round_up(seqlen_q, 128), round_up(seqlen_k, 128)) = {shape}, "
        f"got {tuple(s_dmask.shape)}",
    )
    return ~torch.signbit(s_dmask[:, :, : case.seqlen_q, : case.seqlen_k])


def check_refusal(declared: Iterable[str], run: Callable[[], _R], check: Callable[[_R], None]) -> None:
    """Check that a declared gap is loud, or no gap after all: users suffer from silently wrong results.

    Args:
        declared: what the subject declares unsupported.
        run: calls the subject.
        check: raises AssertionError for a wrong result.

    Raises:
        UnsupportedError: the call was refused with an error, as it should be.
        NonconformityError: it returned a wrong result.
    """
    reason = f"declared unsupported: {', '.join(declared)}"
    try:
        result = run()
    except NonconformityError:
        raise
    except Exception as refusal:  # noqa: BLE001 - any error counts as a refusal
        raise UnsupportedError(f"{reason}; refused with {type(refusal).__name__}: {refusal}") from None
    try:
        check(result)
    except AssertionError as wrong:
        raise NonconformityError(
            f"{reason}, but the call returned a wrong result without an error:\n{wrong}"
        ) from wrong


def require_like(
    name: str,
    x: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype | tuple[torch.dtype, ...],
    device: torch.device,
) -> None:
    """Require a tensor of a shape, of one of some dtypes, on a device."""
    require_that(isinstance(x, torch.Tensor), f"{name} must be a tensor, got {kind_of(x)}")
    require_that(
        tuple(x.shape) == tuple(shape), f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}"
    )
    accepted = dtype if isinstance(dtype, tuple) else (dtype,)
    require_that(
        x.dtype in accepted, f"{name} must have dtype {' or '.join(map(str, accepted))}, got {x.dtype}"
    )
    require_that(x.device == device, f"{name} must be on {device}, got {x.device}")


def kind_of(x: Any) -> str:
    """Say what was returned."""
    if isinstance(x, torch.Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    return f"{type(x).__name__} of length {len(x)}" if isinstance(x, (tuple, list)) else type(x).__name__
