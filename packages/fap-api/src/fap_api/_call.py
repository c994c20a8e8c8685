"""From a user's arguments to the operator: autocast, checks, the choice of a back end, and their memory.

:func:`attention` casts as autocast says, has :func:`_plan` look up or make the operator's options, and calls
the operator of ``_ops`` or ``_varlen_ops``, which calls the back end. Making a plan is to check the call
(``AttentionProblem.describe``) and to choose a back end (``select.choose``). It depends on shapes, dtypes and
options and not on data, so it is kept, and a repeated call pays for one look-up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad

from fap_api import _dispatch, _flops, _ops, _varlen_ops
from fap_api._plans import Plans
from fap_api._validate import refuse_tangents
from fap_api.backends import select
from fap_kernels.packing import Packing, check_length
from fap_kernels.problem import AttentionProblem

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Options", "Sequences", "attention", "describe"]


class Options(NamedTuple):
    """The options of one attention call as given to :func:`fap_api.flash_attn_func`."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: Sequence[int] | torch.Tensor
    softcap: float
    alibi_slopes: torch.Tensor | None
    deterministic: bool
    return_attn_probs: bool


class Sequences(NamedTuple):
    """Where packed sequences lie, as given to :func:`fap_api.flash_attn_varlen_func`."""

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    max_seqlen_q: int | torch.Tensor
    max_seqlen_k: int | torch.Tensor
    seqused_q: torch.Tensor | None
    seqused_k: torch.Tensor | None
    block_table: torch.Tensor | None

    def with_integers(self) -> Sequences:
        """Return it with ``max_seqlen_*`` as integers of at least 0; tensors of one are read."""
        if type(self.max_seqlen_q) is type(self.max_seqlen_k) is int:
            return self
        bounds_q, bounds_k, longest_q, longest_k, *rest = self
        # Not _replace, which the compiler of torch 2.8 does not follow.
        longest_q, longest_k = (
            check_length("max_seqlen_q", longest_q),
            check_length("max_seqlen_k", longest_k),
        )
        return Sequences(bounds_q, bounds_k, longest_q, longest_k, *rest)

    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Return all of it but the lengths of the longest sequences."""
        return self.cu_seqlens_q, self.cu_seqlens_k, self.seqused_q, self.seqused_k, self.block_table


class _Plan(NamedTuple):
    """The operator's options after ``alibi_slopes``, in its order."""

    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    deterministic: bool
    backend: str


_plans: Plans[_Plan] = Plans()
# Types whose values never change.
_PLAIN = frozenset((bool, int, float, type(None)))
_BOUNDS = frozenset((int,))


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, sequences: Sequences | None = None
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run one attention call, dense or over packed sequences; results as for the public functions."""
    compiling = torch.compiler.is_compiling()
    if compiling or torch._C._is_any_autocast_enabled():
        q, k, v = _autocast(q, k, v)
    operators: Any = _ops
    operator: Any = _ops.attention_forward
    places: tuple[Any, ...] = ()
    if sequences is not None:
        operators, operator = _varlen_ops, _varlen_ops.attention_varlen_forward
        places = sequences = sequences.with_integers()
    plan = (_new_plan if compiling else _plan)(q, k, v, options, sequences)
    slopes = options.alibi_slopes
    if not compiling:
        if torch._C._len_torch_dispatch_stack():
            _flops.teach_active_counters()
        if forward_ad._current_level >= 0:
            refuse_tangents(q, k, v)
    arguments = (q, k, v, *places, slopes, *plan)
    if compiling:
        out, softmax_lse, rng_state = operator(*arguments)
    else:
        tensors = (q, k, v, slopes) if sequences is None else (q, k, v, slopes, *sequences.tensors())
        # Not _needs_grad: by now they are known to be tensors.
        if not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
            out, softmax_lse, rng_state = _dispatch.call(operator, operators.forward, tensors, arguments)
        elif _dispatch.unobserved(tensors):
            out, softmax_lse, rng_state = operators.record_forward(*arguments, operators.forward_with_state)
        else:
            out, softmax_lse, rng_state = operator(*arguments)
    if not options.return_attn_probs:
        return out  # type: ignore[no-any-return]
    if not plan.dropout_p:
        return out, softmax_lse, torch.empty(0, dtype=q.dtype, device=q.device)
    # S_dmask has no gradient, as in flash-attn.
    scale, left, right, softcap, dropout_p, _, backend = plan
    tensors = q.detach(), k.detach(), softmax_lse.detach(), rng_state
    score = slopes, scale, left, right, softcap, dropout_p, backend
    if sequences is None:
        return out, softmax_lse, _ops.attention_probabilities(*tensors, *score)
    return out, softmax_lse, _varlen_ops.attention_varlen_probabilities(*tensors, *sequences, *score)


def describe(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, sequences: Sequences | None = None
) -> AttentionProblem:
    """Check one call as it would run now, autocast and gradient mode included, and describe it."""
    return _describe(*_autocast(q, k, v), options, sequences)


def _describe(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, sequences: Sequences | None
) -> AttentionProblem:
    slopes = options.alibi_slopes
    packing = None if sequences is None else Packing.describe(q, k, *sequences)
    problem = AttentionProblem.describe(
        q,
        k,
        v,
        softmax_scale=options.softmax_scale,
        causal=options.causal,
        window_size=options.window_size,
        softcap=options.softcap,
        alibi_slopes=slopes,
        dropout_p=options.dropout_p,
        deterministic=options.deterministic,
        needs_grad=_needs_grad(q, k, v),
        return_attn_probs=options.return_attn_probs,
        packing=packing,
    )
    if problem.paged and problem.needs_grad:
        raise RuntimeError(_varlen_ops.PAGES_HAVE_NO_GRADIENT)
    if slopes is not None and slopes.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            "alibi_slopes must not require a gradient, since attention computes none for them, "
            "got requires_grad=True; accepted: alibi_slopes.detach()"
        )
    return problem


def _plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, sequences: Sequences | None
) -> _Plan:
    p, scale, causal, window, softcap, slopes, deterministic, return_attn_probs = options
    numbers = (p, scale, causal, softcap, deterministic, return_attn_probs)
    # Equal values of two types may be right and wrong: True, 1 and 1.0.
    kinds = tuple(map(type, numbers))
    if type(window) is not tuple or not _BOUNDS.issuperset(map(type, window)) or not _PLAIN.issuperset(kinds):
        return _new_plan(q, k, v, options, sequences)
    tensors: tuple[torch.Tensor | None, ...] = (q, k, v, slopes)
    lengths = None
    if sequences is not None:
        tensors += sequences.tensors()
        lengths = sequences.max_seqlen_q, sequences.max_seqlen_k
    rest = (kinds, numbers, window, lengths)
    return _plans.get(tensors, rest, _new_plan, (q, k, v, options, sequences))


def _new_plan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, sequences: Sequences | None
) -> _Plan:
    problem = _describe(q, k, v, options, sequences)
    return _Plan(
        problem.softmax_scale,
        problem.window_left,
        problem.window_right,
        problem.softcap,
        problem.dropout_p,
        problem.deterministic,
        select.choose(problem),
    )


def _needs_grad(*tensors: torch.Tensor) -> bool:
    if not torch.is_grad_enabled():
        return False
    # Nobody has checked yet that these are tensors.
    return any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)


def _autocast(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Cast q, k and v to autocast's dtype where it is on; float64 stays, as in PyTorch's own operators."""
    # Meta tensors have no autocast, and asking for it is an error.
    if not isinstance(q, torch.Tensor) or q.is_meta or not torch.is_autocast_enabled(q.device.type):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    return _cast(q, dtype), _cast(k, dtype), _cast(v, dtype)


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dtype == torch.float64:
        return x
    return x.to(dtype)
