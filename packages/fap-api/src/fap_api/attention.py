"""The dense flash-attn functions: separate, kv-packed and qkv-packed inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fap_api._call import Options, attention
from fap_api._validate import split_packed

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func"]


def flash_attn_func(
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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute exact attention, ``softmax(q @ k^T * softmax_scale) @ v``, with gradients.

    A drop-in for flash-attn 2's function of this name; where flash-attn contradicts its documentation
    (windows wider than the keys, the LSE under ALiBi, the LSE's gradient), the documentation holds here.
    Formulas: Dao, "FlashAttention-2", 2023; Press et al., "Train Short, Test Long", 2022 (ALiBi).

    Args:
        q: ``(batch, seqlen_q, nheads, headdim)``, headdim from 1 to 256, any strides.
        k, v: ``(batch, seqlen_k, nheads_k, headdim)`` with q's dtype and device; nheads_k divides nheads, and
            query head h reads key/value head ``h // (nheads // nheads_k)``. Dtypes: float16 and bfloat16
            everywhere; float32 and float64 where the back end has them (``torch`` has both).
        dropout_p: probability of dropping an attention weight, in [0, 1); kept weights are scaled by
            ``1 / (1 - dropout_p)``. Whether a weight is kept depends on its position alone.
        softmax_scale: factor on the scores; None stands for ``1 / sqrt(headdim)``.
        causal: hide key j from query i if ``j > i + seqlen_k - seqlen_q`` (aligned bottom-right).
        window_size: ``(left, right)``, a sequence or CPU tensor of two integers: key j is visible to query i
            iff ``i + seqlen_k - seqlen_q - left <= j <= i + seqlen_k - seqlen_q + right``; -1 is no bound on
            that side.
        softcap: 0.0 for none, else scores become ``softcap * tanh(score / softcap)``, before ALiBi and mask.
            ``triton`` has it up to 1000.
        alibi_slopes: float32 ``(nheads,)`` or ``(batch, nheads)``: adds
            ``-slope * |i + seqlen_k - seqlen_q - j|`` to the scores.
        deterministic: gradients are bitwise equal on every run.
        return_attn_probs: return ``(out, softmax_lse, S_dmask)``.

    Returns:
        out: ``(batch, seqlen_q, nheads, headdim)`` in q's dtype. A query without any visible key gets 0.
        softmax_lse: only with ``return_attn_probs``; float32 (float64 for float64 inputs)
            ``(batch, nheads, seqlen_q)``, the natural logarithm of the softmax's denominator, without
            dropout; +inf for a query without keys. It is differentiable.
        S_dmask: only with ``return_attn_probs``; empty without dropout, else the normalised probabilities
            before dropout in q's dtype, ``(batch, nheads, seqlen_q, seqlen_k)`` with both lengths rounded up
            to multiples of 128. A negative sign (that of -0.0 too) marks a dropped weight; masked and padded
            entries are +0.0. It has no gradient.

    Under autocast, q, k and v are cast; alibi_slopes are not. Under torch.compile, environment variables are
    read when a graph is compiled.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit or are not supported; an explicitly chosen
            back end that cannot run the call, with every reason.
        ValueError: an option outside its range; an unknown value of ``FLASH_ATTENTION_USE_FLAGGEMS``.
        TypeError: an argument of the wrong type.
        ImportError: an explicitly chosen back end whose package is not installed.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return attention(q, k, v, options)


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute exact attention with keys and values in one tensor.

    Like :func:`flash_attn_func`, whose arguments, results and errors it shares, but for k and v:

    Args:
        q: ``(batch, seqlen_q, nheads, headdim)``.
        kv: ``(batch, seqlen_k, 2, nheads_k, headdim)``; its gradient is written in one piece.
    """
    k, v = split_packed("kv", kv, 2)
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return attention(q, k, v, options)


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute exact self-attention with queries, keys and values in one tensor.

    Like :func:`flash_attn_func`, whose arguments, results and errors it shares, but for q, k and v:

    Args:
        qkv: ``(batch, seqlen, 3, nheads, headdim)``; its gradient is written in one piece.
    """
    q, k, v = split_packed("qkv", qkv, 3)
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    return attention(q, k, v, options)
