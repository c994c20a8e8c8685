"""Telling which back end a call would take, and why each other one would not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fap_api._call import Options, Sequences, describe
from fap_api._kvcache_call import KVCacheOptions, KVCacheTensors, describe_with_kvcache
from fap_api.backends import select
from fap_api.backends.registry import BACKENDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from fap_kernels.problem import AttentionProblem

__all__ = ["Explanation", "explain", "explain_varlen", "explain_with_kvcache"]


@dataclass(frozen=True)
class Explanation:
    """Which back end one call would take. ``str()`` of it is meant to be read.

    Attributes:
        backend: the name of the back end that would run the call; None if the call would raise.
        chosen_by: what made the choice: ``use_backend`` or the environment variable.
        reasons: for every back end, why it cannot run the call; empty for those that can.
        error: the message that the call would raise with, or None.
        schedule: how the back end would compute it, where it has more than one way; else None.
    """

    backend: str | None
    chosen_by: str
    reasons: Mapping[str, tuple[str, ...]]
    error: str | None = None
    schedule: str | None = None

    def __str__(self) -> str:
        if self.error is None:
            lines = [f"attention would run on {self.backend!r} ({self.chosen_by})"]
        else:
            # The error of an explicit choice says itself what made it.
            told = "" if self.chosen_by in self.error else f" ({self.chosen_by})"
            lines = [f"attention would raise: {self.error}{told}"]
        if self.schedule is not None:
            lines.append(f"  {self.backend}: {self.schedule}")
        for name, reasons in self.reasons.items():
            if name == self.backend:
                continue
            if not reasons:
                lines.append(f"  {name}: could run it too")
            lines.extend(f"  {name}: {reason}" for reason in reasons)
        return "\n".join(lines)


def explain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Explanation:
    """Tell, without running it, which back end an attention call would take and why no other.

    Arguments as for :func:`fap_api.flash_attn_func`; whether a gradient is needed follows from the tensors
    and the gradient mode.

    Raises:
        RuntimeError, ValueError, TypeError: the arguments are wrong, whatever the back end.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return _explain(describe(q, k, v, options))


def explain_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int | torch.Tensor,
    max_seqlen_k: int | torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: torch.Tensor | None = None,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
) -> Explanation:
    """Tell, without running it, which back end a call over packed sequences would take and why no other.

    Arguments and errors as for :func:`fap_api.flash_attn_varlen_func`; the values of ``cu_seqlens_*``,
    ``seqused_*`` and ``block_table`` are not looked at.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    sequences = Sequences(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, block_table
    )
    return _explain(describe(q, k, v, options, sequences))


def explain_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor | None = None,
    v: torch.Tensor | None = None,
    rotary_cos: torch.Tensor | None = None,
    rotary_sin: torch.Tensor | None = None,
    cache_seqlens: int | torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: torch.Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Explanation:
    """Tell which back end a call over a KV cache would take and why no other; nothing is run or written.

    Arguments and errors as for :func:`fap_api.flash_attn_with_kvcache`; lengths in tensors are not looked at.
    """
    tensors = KVCacheTensors(
        q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, cache_seqlens, cache_batch_idx, cache_leftpad,
        block_table, alibi_slopes,
    )  # fmt: skip
    options = KVCacheOptions(
        softmax_scale, causal, window_size, softcap, rotary_interleaved, num_splits, return_softmax_lse
    )
    return _explain(describe_with_kvcache(tensors, options))


def _explain(problem: AttentionProblem) -> Explanation:
    _, chosen_by = select.setting()
    reasons = {name: tuple(select.reasons_against(name, problem)) for name in BACKENDS}
    try:
        backend = select.choose(problem)
        return Explanation(backend, chosen_by, reasons, schedule=_schedule(backend, problem))
    except (ImportError, RuntimeError) as error:
        return Explanation(None, chosen_by, reasons, str(error))


def _schedule(backend: str, problem: AttentionProblem) -> str | None:
    if backend != "triton":
        return None
    from fap_kernels import explain_schedule

    forward = explain_schedule(problem)
    return f"{forward}; {explain_schedule(problem, backward=True)}" if problem.needs_grad else forward
