"""Exact attention on the GPU as plain functions: tensors in, tensors out, no autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import execute
from .problem import AttentionProblem
from .replay import Replays
from .support import require_supported

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["attention_backward", "attention_forward", "attention_probabilities"]

_forward_replays = Replays()
_backward_replays = Replays()


def attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute exact attention, its log-sum-exp and the state of its random numbers.

    For query i and key j of one head, with ``d = i + seqlen_k - seqlen_q - j``::

        logits = softcap(softmax_scale * q @ k^T) - alibi_slope * |d|      where -right <= d <= left
        out = dropout(softmax(logits)) @ v
        softmax_lse = log(sum(exp(logits)))                                 before dropout

    The algorithm is FlashAttention-2 (Dao, arXiv:2307.08691).

    Args:
        q: ``(batch, seqlen_q, nheads, head_dim)``, float16, bfloat16 or float32; head_dim 1 to 256.
        k, v: ``(batch, seqlen_k, nheads_k, head_dim)``, in q's dtype, where ``nheads_k`` divides ``nheads``:
            query head h reads key head ``h // (nheads // nheads_k)``. Any strides; a tensor whose last
            stride is not 1 is copied.
        softmax_scale: None stands for ``1 / sqrt(head_dim)``.
        causal: query i sees no key after its own position, aligned at the sequences' ends; the same
            as ``window_size=(left, 0)``.
        window_size: ``(left, right)`` in keys; -1 is no bound.
        softcap: c > 0 replaces each scaled product s by ``c * tanh(s / c)``; at most 1000, since s has a
            rounding error of about 1e-7 c.
        alibi_slopes: float32 ``(nheads,)`` or ``(batch, nheads)``.
        dropout_p: probability in [0, 1) of dropping a weight; the kept are scaled by
            ``1 / (1 - dropout_p)``.
        rng_state: int64 ``(2,)`` on q's device, seed and offset of the dropout mask, to draw a mask again.
            Drawn from the device's generator if None.

    Returns:
        ``out`` like q, contiguous; ``softmax_lse`` float32 ``(batch, nheads, seqlen_q)``, natural log;
        ``rng_state``, or None without dropout. A row that sees no key has out 0 and softmax_lse +inf.

    Raises:
        RuntimeError: tensors that do not fit together, or that these kernels do not support.
        ValueError, TypeError: an option out of range or of the wrong type.
    """
    # With dropout there is another tensor, drawn anew each time: such calls are planned each time.
    key = replay = None
    if dropout_p == 0.0:
        options = (softmax_scale, causal, window_size, softcap, dropout_p)
        key, replay = _forward_replays.find((q, k, v, alibi_slopes), options)
    if replay is not None:
        out, softmax_lse, *_ = replay.run(q, k, v, alibi_slopes)
        return out, softmax_lse, None
    problem = AttentionProblem.describe(
        q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, dropout_p=dropout_p,
    )  # fmt: skip
    given = {"q": q, "k": k, "v": v, "alibi_slopes": alibi_slopes}
    keep = _forward_replays.keeper(key, given)
    return execute.forward(problem, q, k, v, alibi_slopes, rng_state, keep=keep)


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    *,
    dlse: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of :func:`attention_forward` with respect to q, k and v.

    The weights are recomputed from the log-sum-exp (Dao et al., arXiv:2205.14135, appendix B.4); dQ, dK
    and dV are accumulated in float32.

    Args:
        dout: gradient of ``out``, in its shape and dtype, any strides.
        q, k, v: as given to the forward pass.
        out, softmax_lse: as it returned them.
        dlse: gradient of ``softmax_lse``, float32 in its shape, any strides; None for zero.
        softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p: as given to the forward pass.
        rng_state: as the forward pass returned it; needed iff ``dropout_p > 0``.
        deterministic: gradients must be bitwise equal on every run. The portable kernels' always are; those
            for Hopper then add up dQ in a fixed order, and leave head dims above 128 to the portable ones.

    Returns:
        ``dq`` like q, ``dk`` and ``dv`` like k and v, all contiguous. Rows that see no key, and keys that no
        query sees, have gradient 0.

    Raises:
        RuntimeError: tensors that do not fit together, or that these kernels do not support.
        ValueError, TypeError: an option out of range or of the wrong type.
    """
    given = {
        "dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": softmax_lse, "dlse": dlse,
        "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    key = replay = None
    if dropout_p == 0.0:
        options = (softmax_scale, causal, window_size, softcap, dropout_p, deterministic)
        key, replay = _backward_replays.find(tuple(given.values()), options)
    if replay is not None:
        dq, dk, dv, *_ = replay.run(*given.values())
        return dq, dk, dv
    problem = AttentionProblem.describe(
        q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, dropout_p=dropout_p, deterministic=deterministic, needs_grad=True,
    )  # fmt: skip
    execute.check_like("dout", dout, q)
    execute.check_like("out", out, q)
    _check_vector("softmax_lse", softmax_lse, problem, q)
    if dlse is not None:
        _check_vector("dlse", dlse, problem, q)
    keep = _backward_replays.keeper(key, given)
    return execute.backward(
        problem, dout, q, k, v, out, softmax_lse, dlse, alibi_slopes, rng_state, keep=keep
    )


def attention_probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    softmax_lse: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write out the attention weights, with the sign telling which of them dropout removed.

    For tests and for looking at: this is the matrix that attention exists not to store.

    Args:
        q, k: as given to the forward pass.
        softmax_lse: as it returned it, float32 ``(batch, nheads, seqlen_q)``.
        softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p: as given to the forward pass.
        rng_state: as the forward pass returned it; needed iff ``dropout_p > 0``.

    Returns:
        ``(batch, nheads, seqlen_q, seqlen_k)`` in q's dtype, both lengths rounded up to a multiple of 128:
        the weights ``exp(logits - softmax_lse)``, without dropout's scale, negative (-0.0 included) where
        dropped. Masked entries and those beyond the lengths are +0.0.

    Raises:
        RuntimeError: tensors that do not fit together, or that these kernels do not support.
        ValueError, TypeError: an option out of range or of the wrong type.
    """
    problem = AttentionProblem.describe(
        q, k, k, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, dropout_p=dropout_p,
    )  # fmt: skip
    require_supported(problem)
    _check_vector("softmax_lse", softmax_lse, problem, q)
    return execute.probabilities(problem, q, k, softmax_lse, alibi_slopes, rng_state)


def _check_vector(name: str, x: torch.Tensor, problem: AttentionProblem, q: torch.Tensor) -> None:
    shape = (problem.batch, problem.nheads, problem.seqlen_q)
    execute.check_vector(name, x, shape, "(batch, nheads, seqlen_q)", q)
