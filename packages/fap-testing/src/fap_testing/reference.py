"""Exact attention in plain PyTorch: the float64 oracle, and the same formula in the inputs' own dtype.

The oracle shares no code with any implementation it judges. It materialises the whole score matrix, so
its memory grows with ``batch * nheads * seqlen_q * seqlen_k * 8`` bytes (a few such matrices live at once).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Unpack

__all__ = [
    "AttentionGradients",
    "AttentionOptions",
    "AttentionResult",
    "attention_baseline",
    "attention_baseline_gradients",
    "attention_reference",
    "attention_reference_gradients",
    "visible_keys",
]


class AttentionResult(NamedTuple):
    """What attention computes.

    Attributes:
        out: ``(batch, seqlen_q, nheads, head_dim)``.
        softmax_lse: natural logarithm of the softmax's denominator, ``(batch, nheads, seqlen_q)``; +inf for
            rows without keys; without dropout.
        probabilities: normalised softmax weights ``(batch, nheads, seqlen_q, seqlen_k)``, before dropout;
            0 where masked.
    """

    out: torch.Tensor
    softmax_lse: torch.Tensor
    probabilities: torch.Tensor


class AttentionGradients(NamedTuple):
    """Attention's outputs and the gradients of its inputs, detached.

    Attributes:
        out, softmax_lse: as in :class:`AttentionResult`.
        dq: gradient of q, ``(batch, seqlen_q, nheads, head_dim)``.
        dk, dv: gradients of k and v, ``(batch, seqlen_k, nheads_k, head_dim)``.
    """

    out: torch.Tensor
    softmax_lse: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


class AttentionOptions(TypedDict, total=False):
    """The keyword arguments of :func:`attention_reference`."""

    softmax_scale: float | None
    causal: bool
    window_size: Sequence[int]
    softcap: float
    alibi_slopes: torch.Tensor | None
    dropout_p: float
    keep_mask: torch.Tensor | None


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    keep_mask: torch.Tensor | None = None,
) -> AttentionResult:
    """Compute attention in float64, differentiably: the oracle that every other result is measured by.

    The score of query i and key j is ``cap(softmax_scale * q_i . k_j) - slope * |d - j|`` with the diagonal
    ``d = i + seqlen_k - seqlen_q`` and ``cap(s) = softcap * tanh(s / softcap)``; then come the mask, the
    softmax and dropout, in this order.
    Formulas: flash-attn's documentation (Dao, 2023), and Press et al., 2022, for ALiBi. Where flash-attn
    contradicts its documentation (it clamps windows that reach past the keys), the documentation holds.

    Args:
        q: ``(batch, seqlen_q, nheads, head_dim)``, any floating dtype, any strides.
        k, v: ``(batch, seqlen_k, nheads_k, head_dim)``; nheads_k divides nheads and query head h reads
            key/value head ``h // (nheads // nheads_k)``.
        softmax_scale: None stands for ``1 / sqrt(head_dim)``.
        causal: forbid keys after ``i + seqlen_k - seqlen_q`` (aligned bottom-right).
        window_size: ``(left, right)``: keep key j iff ``i + seqlen_k - seqlen_q - left <= j`` and
            ``j <= i + seqlen_k - seqlen_q + right``; a negative bound is no bound; causal makes right 0.
        softcap: 0.0 is off.
        alibi_slopes: ``(nheads,)`` or ``(batch, nheads)``.
        dropout_p: in [0, 1); needs ``keep_mask``, and scales what is kept by ``1 / (1 - dropout_p)``.
        keep_mask: bool ``(batch, nheads, seqlen_q, seqlen_k)``, True where a weight is kept.

    Returns:
        float64 ``out``, ``softmax_lse`` and ``probabilities`` on q's device. Rows without keys have out 0,
        LSE +inf, and no gradient.

    Raises:
        ValueError: shapes or options that do not fit together.
    """
    wide = (x.to(torch.float64) for x in (q, k, v))
    return _attention(
        *wide,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        alibi_slopes=alibi_slopes,
        dropout_p=dropout_p,
        keep_mask=keep_mask,
    )


def attention_baseline(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Unpack[AttentionOptions]
) -> AttentionResult:
    """Compute attention as eager PyTorch does in the inputs' own dtype: its error is the yardstick.

    Arguments as for :func:`attention_reference`. Matrix products, scale, softcap and weights are rounded to
    the inputs' dtype. ``softmax_lse`` is computed from the same inputs in float32 at least: an implementation
    returns it in float32, so rounding it to 16 bits would excuse almost any error.
    """
    result = _attention(q, k, v, **options)
    if q.dtype in (torch.float16, torch.bfloat16):
        wide = (x.float() for x in (q, k, v))
        return result._replace(softmax_lse=_attention(*wide, **options).softmax_lse)
    return result


def attention_reference_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Compute attention and its gradients in float64, from a gradient of out, of the LSE, or of both.

    Args:
        q, k, v: as for :func:`attention_reference`.
        dout: gradient of out, ``(batch, seqlen_q, nheads, head_dim)``, or None for zero.
        dlse: gradient of softmax_lse, ``(batch, nheads, seqlen_q)``, or None for zero. It is without effect
            on rows without keys.
        options: as for :func:`attention_reference`.

    Returns:
        float64 ``out``, ``softmax_lse``, ``dq``, ``dk``, ``dv``.
    """
    wide = [x.detach().to(torch.float64).requires_grad_() for x in (q, k, v)]
    result = attention_reference(wide[0], wide[1], wide[2], **options)
    return _gradients(result, wide, dout, dlse)


def attention_baseline_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None = None,
    **options: Unpack[AttentionOptions],
) -> AttentionGradients:
    """Compute :func:`attention_baseline` and its gradients. Arguments as for the reference's gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    own = _attention(leaves[0], leaves[1], leaves[2], **options)
    gradients = _gradients(own, leaves, dout, dlse)
    with torch.no_grad():
        lse = attention_baseline(q, k, v, **options).softmax_lse
    return gradients._replace(softmax_lse=lse)


def visible_keys(
    seqlen_q: int,
    seqlen_k: int,
    *,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Return which keys each query may see, as a bool mask ``(seqlen_q, seqlen_k)``.

    Arguments as for :func:`attention_reference`. A row that is False throughout has no keys.
    """
    left, right = (int(bound) for bound in window_size)
    if causal:
        right = 0
    diagonal = torch.arange(seqlen_q, device=device)[:, None] + (seqlen_k - seqlen_q)
    key = torch.arange(seqlen_k, device=device)[None, :]
    visible = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    if left >= 0:
        visible &= key >= diagonal - left
    if right >= 0:
        visible &= key <= diagonal + right
    return visible


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    keep_mask: torch.Tensor | None = None,
) -> AttentionResult:
    _check_shapes(q, k, v)
    _check_dropout(q, k, dropout_p, keep_mask)
    (_, seqlen_q, nheads, head_dim), (_, seqlen_k, nheads_k, _) = q.shape, k.shape
    if softmax_scale is None:
        softmax_scale = 1.0 / math.sqrt(head_dim)

    query = q.transpose(1, 2)
    key, value = (x.transpose(1, 2).repeat_interleave(nheads // nheads_k, dim=1) for x in (k, v))
    scores = query @ key.transpose(-1, -2) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + _alibi_bias(alibi_slopes, q, seqlen_k)

    visible = visible_keys(seqlen_q, seqlen_k, causal=causal, window_size=window_size, device=q.device)
    keyless = ~visible.any(dim=-1)
    # Rows without keys get finite scores, so that neither the softmax nor its gradient meets inf - inf.
    scores = scores.masked_fill(~visible, -math.inf).masked_fill(keyless[:, None], 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(keyless, math.inf)
    probabilities = torch.softmax(scores, dim=-1).masked_fill(keyless[:, None], 0.0)

    weights = probabilities
    if keep_mask is not None:
        weights = (weights / (1.0 - dropout_p)).masked_fill(~keep_mask.to(q.device), 0.0)
    out = weights.to(v.dtype) @ value
    return AttentionResult(out.transpose(1, 2).contiguous(), lse, probabilities)


def _alibi_bias(alibi_slopes: torch.Tensor, q: torch.Tensor, seqlen_k: int) -> torch.Tensor:
    batch, seqlen_q, nheads, _ = q.shape
    if tuple(alibi_slopes.shape) not in ((nheads,), (batch, nheads)):
        raise ValueError(
            f"alibi_slopes must have shape (nheads,) = ({nheads},) or (batch, nheads) = ({batch}, {nheads}), "
            f"got {tuple(alibi_slopes.shape)}"
        )
    # Distances do not fit 16 bits: the bias keeps float32 at least, as it does in eager PyTorch.
    dtype = torch.promote_types(q.dtype, torch.float32)
    slopes = alibi_slopes.to(device=q.device, dtype=dtype).expand(batch, nheads)[:, :, None, None]
    query = torch.arange(seqlen_q, device=q.device)[:, None] + (seqlen_k - seqlen_q)
    key = torch.arange(seqlen_k, device=q.device)[None, :]
    return -slopes * (query - key).abs().to(dtype)


def _gradients(
    result: AttentionResult,
    leaves: Sequence[torch.Tensor],
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
) -> AttentionGradients:
    outputs = [("dout", result.out, dout), ("dlse", result.softmax_lse, dlse)]
    given = [(name, y, dy.to(y)) for name, y, dy in outputs if dy is not None]
    if not given:
        raise ValueError(
            "dout and dlse are both None, expected a gradient of out, of softmax_lse, or of both"
        )
    for name, y, dy in given:
        if y.shape != dy.shape:
            raise ValueError(f"{name} must have shape {tuple(y.shape)}, got {tuple(dy.shape)}")
    _, ys, dys = zip(*given, strict=True)
    # The LSE does not depend on v: materialize_grads makes that a gradient of zero.
    gradients = torch.autograd.grad(ys, leaves, dys, materialize_grads=True)
    # A materialised zero requires grad itself in some versions of PyTorch.
    dq, dk, dv = (dx.detach() for dx in gradients)
    return AttentionGradients(result.out.detach(), result.softmax_lse.detach(), dq, dk, dv)


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, seqlen, nheads, head_dim), got shape {tuple(x.shape)}")
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got k {tuple(k.shape)} and v {tuple(v.shape)}")
    if (q.shape[0], q.shape[3]) != (k.shape[0], k.shape[3]):
        raise ValueError(f"q and k must agree in batch and head_dim, got {tuple(q.shape)}, {tuple(k.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"k's heads must divide q's heads, got {k.shape[2]} and {q.shape[2]}")


def _check_dropout(
    q: torch.Tensor, k: torch.Tensor, dropout_p: float, keep_mask: torch.Tensor | None
) -> None:
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if (dropout_p > 0.0) != (keep_mask is not None):
        raise ValueError(
            "dropout_p > 0 and keep_mask go together: the reference draws no random numbers of its own; "
            f"got dropout_p {dropout_p} and keep_mask {'None' if keep_mask is None else 'given'}"
        )
    if keep_mask is None:
        return
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    if keep_mask.dtype != torch.bool or tuple(keep_mask.shape) != shape:
        raise ValueError(
            f"keep_mask must be bool of shape (batch, nheads, seqlen_q, seqlen_k) = {shape}, "
            f"got {keep_mask.dtype} {tuple(keep_mask.shape)}"
        )
