"""The flash-attn functions over packed sequences: separate, kv-packed and qkv-packed inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fap_api._call import Options, Sequences, attention
from fap_api._validate import check_one_packing, split_packed

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

__all__ = ["flash_attn_varlen_func", "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func"]


def flash_attn_varlen_func(
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
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute exact attention over sequences of different lengths, packed without padding, with gradients.

    A drop-in for flash-attn 2's function of this name, with FlashAttention-3's ``seqused_q`` and
    ``seqused_k``. Each sequence is attended to as :func:`fap_api.flash_attn_func` does it: positions, causal
    masks, windows and ALiBi count from its own ends. A sequence may be empty on either side.

    Args:
        q: ``(total_q, nheads, headdim)``, headdim from 1 to 256, any strides.
        k, v: ``(total_k, nheads_k, headdim)`` with q's dtype and device; nheads_k divides nheads. With
            ``block_table`` ``(num_pages, page_size, nheads_k, headdim)``, the page size a power of two and at
            least 16. Dtypes as for :func:`fap_api.flash_attn_func`.
        cu_seqlens_q, cu_seqlens_k: int32 ``(batch + 1,)`` on q's device: sequence b has the rows from
            ``cu_seqlens[b]`` up to ``cu_seqlens[b + 1]``. The ``torch`` back end reads their values, and
            refuses wrong ones; the others do not, since that would make every call wait for the device. Rows
            before the first sequence and behind the last have no defined result.
        max_seqlen_q, max_seqlen_k: no sequence is longer; integers, or tensors of one, which are read (where
            they are on a device, the call waits for it).
        dropout_p, softmax_scale, causal, window_size, softcap, deterministic: as for
            :func:`fap_api.flash_attn_func`; a sequence's number is the batch index of its dropout mask.
        alibi_slopes: float32 ``(nheads,)`` or ``(batch, nheads)``.
        return_attn_probs: return ``(out, softmax_lse, S_dmask)``.
        block_table: int32 ``(batch, max_pages)``: key p of sequence b is row ``p % page_size`` of page
            ``block_table[b, p // page_size]``, and ``cu_seqlens_k`` tells the lengths alone. Keys and values
            in pages have no gradient.
        seqused_q, seqused_k: int32 ``(batch,)``, how many rows of each sequence are in use, from its first
            on; None for all. Others may hold anything; they get out 0, softmax_lse +inf and gradients 0.

    Returns:
        out: ``(total_q, nheads, headdim)`` in q's dtype. A query without any visible key gets 0.
        softmax_lse: only with ``return_attn_probs``; float32 (float64 for float64 inputs)
            ``(nheads, total_q)``, natural logarithm, without dropout; +inf for a query without keys. It is
            differentiable.
        S_dmask: only with ``return_attn_probs``; empty without dropout, else ``(batch, nheads, max_seqlen_q,
            max_seqlen_k)`` in q's dtype with both lengths rounded up to multiples of 128: each sequence's
            probabilities in its upper left corner, signed as for :func:`fap_api.flash_attn_func`; all else is
            +0.0. It has no gradient.

    Under torch.compile, one graph serves all totals and all ``max_seqlen_*``; these have to be integers.

    Raises:
        RuntimeError: shapes, dtypes or devices that do not fit or are not supported; a ``block_table`` where
            a gradient is needed; an explicitly chosen back end that cannot run the call, with every reason.
        ValueError: an option outside its range; an unknown value of ``FLASH_ATTENTION_USE_FLAGGEMS``.
        TypeError: an argument of the wrong type.
        ImportError: an explicitly chosen back end whose package is not installed.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    sequences = Sequences(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, block_table
    )
    return attention(q, k, v, options, sequences)


def flash_attn_varlen_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
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
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute exact attention over packed sequences, with keys and values in one tensor.

    Like :func:`flash_attn_varlen_func`, whose arguments, results and errors it shares, but for k and v:

    Args:
        q: ``(total_q, nheads, headdim)``.
        kv: ``(total_k, 2, nheads_k, headdim)``; its gradient is written in one piece.
    """
    k, v = split_packed("kv", kv, 2, rows="total")
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k, None)
    return attention(q, k, v, options, sequences)


def flash_attn_varlen_qkvpacked_func(
    qkv: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_seqlen: int | torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] | torch.Tensor = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute exact self-attention over packed sequences, with queries, keys and values in one tensor.

    Like :func:`flash_attn_varlen_func`, whose arguments, results and errors it shares, but for:

    Args:
        qkv: ``(total, 3, nheads, headdim)``; its gradient is written in one piece.
        cu_seqlens: int32 ``(batch + 1,)``, of queries and keys alike.
        max_seqlen: no sequence is longer.
    """
    q, k, v = split_packed("qkv", qkv, 3, rows="total")
    max_seqlen = check_one_packing(qkv, cu_seqlens, max_seqlen)
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic, return_attn_probs
    )
    sequences = Sequences(cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, seqused_q, seqused_k, None)
    return attention(q, k, v, options, sequences)
