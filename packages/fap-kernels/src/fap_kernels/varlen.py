"""Exact attention over packed sequences as plain functions: tensors in, tensors out, no autograd."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import execute
from .packing import Packing
from .problem import AttentionProblem
from .replay import Replays
from .support import require_supported

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["attention_varlen_backward", "attention_varlen_forward", "attention_varlen_probabilities"]

_forward_replays = Replays()
_backward_replays = Replays()


def attention_varlen_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Compute exact attention over sequences of different lengths, packed without padding.

    Each sequence is attended to as :func:`fap_kernels.attention_forward` does it, in one launch for all and
    without a look at the lengths from the host.

    Args:
        q: ``(total_q, nheads, head_dim)``, float16, bfloat16 or float32; head_dim 1 to 256.
        k, v: ``(total_k, nheads_k, head_dim)``, in q's dtype, where ``nheads_k`` divides ``nheads``.
        cu_seqlens_q, cu_seqlens_k: int32 ``(batch + 1,)`` on q's device; sequence b has the rows from
            ``cu_seqlens[b]`` up to ``cu_seqlens[b + 1]``. A sequence may be empty on either side.
        max_seqlen_q, max_seqlen_k: no sequence is longer. Queries beyond ``max_seqlen_q`` are not computed.
        seqused_q, seqused_k: int32 ``(batch,)``, how many rows of each sequence count, from its first on;
            None for all. The queries that do not count get out 0 and softmax_lse +inf.
        block_table: int32 ``(batch, max_pages)``; k and v are then ``(num_pages, page_size, nheads_k,
            head_dim)``, key p of sequence b is row ``p % page_size`` of page ``block_table[b, p //
            page_size]``, and ``cu_seqlens_k`` tells the lengths alone. The page size is a power of two and at
            least 16. There is no backward pass for keys in pages.
        softmax_scale, causal, window_size, softcap, dropout_p, rng_state: as for the dense function;
            positions are counted within each sequence, and causal masks align each at its own ends.
        alibi_slopes: float32 ``(nheads,)`` or ``(batch, nheads)``.

    Returns:
        ``out`` like q, contiguous; ``softmax_lse`` float32 ``(nheads, total_q)``, natural log; ``rng_state``,
        or None without dropout. A row that sees no key has out 0 and softmax_lse +inf.

    Raises:
        RuntimeError: tensors that do not fit together, or that these kernels do not support.
        ValueError, TypeError: an option out of range or of the wrong type.
    """
    given = {
        "q": q, "k": k, "v": v, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
        "seqused_k": seqused_k, "block_table": block_table, "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    key = replay = None
    # With dropout there is another tensor, drawn anew each time, and the rows that seqused_q leaves out are
    # written by no kernel: such calls are planned each time.
    if dropout_p == 0.0 and seqused_q is None:
        options = (
            max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap, dropout_p,
        )  # fmt: skip
        key, replay = _forward_replays.find(tuple(given.values()), options)
    if replay is not None:
        out, softmax_lse, *_ = replay.run(*given.values())
        return out, softmax_lse, None
    packing = Packing.describe(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, block_table
    )
    problem = AttentionProblem.describe(
        q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, dropout_p=dropout_p, packing=packing,
    )  # fmt: skip
    q = q[None]
    if block_table is None:
        k, v = k[None], v[None]
    keep = _forward_replays.keeper(key, given)
    out, softmax_lse, rng_state = execute.forward(problem, q, k, v, alibi_slopes, rng_state, packing, keep)
    return out[0], softmax_lse[0], rng_state


def attention_varlen_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    dlse: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
    deterministic: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the gradients of :func:`attention_varlen_forward` with respect to q, k and v.

    Args:
        dout: gradient of ``out``, in its shape and dtype, any strides.
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k: as given to the
            forward pass.
        out, softmax_lse: as it returned them.
        dlse: gradient of ``softmax_lse``, float32 ``(nheads, total_q)``, any strides; None for zero.
        softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p: as given to the forward pass.
        rng_state: as the forward pass returned it; needed iff ``dropout_p > 0``.
        deterministic: gradients must be bitwise equal on every run. The portable kernels' always are; those
            for Hopper then add up dQ in a fixed order, and leave head dims above 128 to the portable ones.

    Returns:
        ``dq`` like q, ``dk`` and ``dv`` like k and v, all contiguous; 0 where a row does not count.

    Raises:
        RuntimeError: tensors that do not fit together, or that these kernels do not support.
        ValueError, TypeError: an option out of range or of the wrong type.
    """
    given = {
        "dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": softmax_lse, "dlse": dlse,
        "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "alibi_slopes": alibi_slopes,
    }  # fmt: skip
    key = replay = None
    if dropout_p == 0.0 and seqused_q is None and seqused_k is None:
        options = (
            max_seqlen_q, max_seqlen_k, softmax_scale, causal, window_size, softcap, dropout_p, deterministic
        )  # fmt: skip
        key, replay = _backward_replays.find(tuple(given.values()), options)
    if replay is not None:
        dq, dk, dv, *_ = replay.run(*given.values())
        return dq[0], dk[0], dv[0]
    packing = Packing.describe(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k
    )
    problem = AttentionProblem.describe(
        q, k, v, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, dropout_p=dropout_p, deterministic=deterministic, needs_grad=True,
        packing=packing,
    )  # fmt: skip
    execute.check_like("dout", dout, q)
    execute.check_like("out", out, q)
    shape = (problem.nheads, q.shape[0])
    execute.check_vector("softmax_lse", softmax_lse, shape, "(nheads, total_q)", q)
    if dlse is not None:
        execute.check_vector("dlse", dlse, shape, "(nheads, total_q)", q)
        dlse = dlse[None]
    dout, q, k, v, out, softmax_lse = (x[None] for x in (dout, q, k, v, out, softmax_lse))
    keep = _backward_replays.keeper(key, given)
    dq, dk, dv = execute.backward(
        problem, dout, q, k, v, out, softmax_lse, dlse, alibi_slopes, rng_state, packing, keep
    )
    return dq[0], dk[0], dv[0]


def attention_varlen_probabilities(
    q: torch.Tensor,
    k: torch.Tensor,
    softmax_lse: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    rng_state: torch.Tensor | None = None,
) -> torch.Tensor:
    """Write out the attention weights, with the sign telling which of them dropout removed.

    For tests and for looking at, as :func:`fap_kernels.attention_probabilities` is.

    Args:
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, block_table: as
            given to the forward pass.
        softmax_lse: as it returned it, float32 ``(nheads, total_q)``.
        softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p: as given to the forward pass.
        rng_state: as the forward pass returned it; needed iff ``dropout_p > 0``.

    Returns:
        ``(batch, nheads, max_seqlen_q, max_seqlen_k)`` in q's dtype, both lengths rounded up to a multiple of
        128: each sequence's weights in its upper left corner, else +0.0.

    Raises:
        RuntimeError: tensors that do not fit together, or that these kernels do not support.
        ValueError, TypeError: an option out of range or of the wrong type.
    """
    packing = Packing.describe(
        q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, block_table
    )
    problem = AttentionProblem.describe(
        q, k, k, softmax_scale=softmax_scale, causal=causal, window_size=window_size, softcap=softcap,
        alibi_slopes=alibi_slopes, dropout_p=dropout_p, packing=packing,
    )  # fmt: skip
    require_supported(problem)
    execute.check_vector("softmax_lse", softmax_lse, (problem.nheads, q.shape[0]), "(nheads, total_q)", q)
    q, softmax_lse = q[None], softmax_lse[None]
    if block_table is None:
        k = k[None]
    return execute.probabilities(problem, q, k, softmax_lse, alibi_slopes, rng_state, packing)
