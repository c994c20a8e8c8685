"""Exact attention over packed sequences: the float64 oracle for varlen calls, one sequence at a time.

Each sequence goes through the dense oracle of :mod:`fap_testing.reference` by itself. That is slow, and
plainly what flash_attn_varlen_func promises.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from fap_testing.reference import (
    AttentionGradients,
    AttentionOptions,
    attention_baseline,
    attention_baseline_gradients,
    attention_reference,
    attention_reference_gradients,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Unpack

    from fap_testing.reference import AttentionResult

__all__ = [
    "VarlenOptions",
    "VarlenResult",
    "attention_varlen_baseline",
    "attention_varlen_baseline_gradients",
    "attention_varlen_reference",
    "attention_varlen_reference_gradients",
    "page_rows",
]


class VarlenResult(NamedTuple):
    """What attention over packed sequences computes.

    Attributes:
        out: ``(total_q, nheads, head_dim)``.
        softmax_lse: ``(nheads, total_q)``, natural logarithm, without dropout.
    """

    out: torch.Tensor
    softmax_lse: torch.Tensor


class VarlenOptions(AttentionOptions, total=False):
    """The keyword arguments of :func:`attention_varlen_reference`."""

    seqused_q: torch.Tensor | None
    seqused_k: torch.Tensor | None
    block_table: torch.Tensor | None


def attention_varlen_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    keep_mask: torch.Tensor | None = None,
) -> VarlenResult:
    """Compute attention over packed sequences in float64, differentiably: the oracle for varlen calls.

    Sequence b has the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1]`` and the keys alike, and is
    :func:`fap_testing.reference.attention_reference` of those alone: positions, causality, windows and ALiBi
    count within the sequence, from the lengths in use.

    Args:
        q: ``(total_q, nheads, head_dim)``, any floating dtype, any strides.
        k, v: ``(total_k, nheads_k, head_dim)``; with a block_table ``(num_blocks, page_size, nheads_k,
            head_dim)``.
        cu_seqlens_q, cu_seqlens_k: ``(batch + 1,)``, integers that begin with 0 and never fall.
        seqused_q, seqused_k: ``(batch,)``: how many of a sequence's rows count, from its first one. The rest
            is allocated but not read: it may hold NaN.
        block_table: ``(batch, max_blocks)``: key j of sequence b lies in page ``block_table[b, j //
            page_size]``, row ``j % page_size``. cu_seqlens_k then gives lengths only.
        softmax_scale, causal, window_size, softcap, dropout_p: as for the dense oracle.
        alibi_slopes: ``(nheads,)`` or ``(batch, nheads)``.
        keep_mask: bool ``(batch, nheads, >= max_seqlen_q, >= max_seqlen_k)``, True where a weight is kept;
            indexed by sequence, head, and the query's and the key's position in the sequence.

    Returns:
        float64 ``out`` and ``softmax_lse``. Rows that no sequence uses are as rows without keys: out 0, LSE
        +inf, no gradient.

    Raises:
        ValueError: shapes, lengths, pages or options that do not fit together.
    """
    options: VarlenOptions = {
        "seqused_q": seqused_q,
        "seqused_k": seqused_k,
        "block_table": block_table,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "dropout_p": dropout_p,
        "keep_mask": keep_mask,
    }
    return _attend(attention_reference, torch.float64, q, k, v, cu_seqlens_q, cu_seqlens_k, options)


def attention_varlen_baseline(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    **options: Unpack[VarlenOptions],
) -> VarlenResult:
    """Compute attention over packed sequences in the inputs' own dtype: its error is the yardstick.

    Arguments as for :func:`attention_varlen_reference`; see :func:`fap_testing.reference.attention_baseline`.
    """
    return _attend(attention_baseline, q.dtype, q, k, v, cu_seqlens_q, cu_seqlens_k, options)


def attention_varlen_reference_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None = None,
    **options: Unpack[VarlenOptions],
) -> AttentionGradients:
    """Compute attention over packed sequences and its gradients in float64.

    Args:
        q, k, v, cu_seqlens_q, cu_seqlens_k: as for :func:`attention_varlen_reference`.
        dout: gradient of out, ``(total_q, nheads, head_dim)``, or None for zero.
        dlse: gradient of softmax_lse, ``(nheads, total_q)``, or None for zero. At least one of the two.
        options: as for :func:`attention_varlen_reference`.

    Returns:
        float64 ``out`` and ``softmax_lse`` as there, ``dq``, ``dk`` and ``dv`` in the shapes of q, k and v,
        0 in the rows that no sequence uses. Pages get gradients too, which flash-attn does not offer.
    """
    call = attention_reference_gradients
    return _differentiate(call, torch.float64, q, k, v, cu_seqlens_q, cu_seqlens_k, dout, dlse, options)


def attention_varlen_baseline_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None = None,
    **options: Unpack[VarlenOptions],
) -> AttentionGradients:
    """Compute :func:`attention_varlen_baseline` and its gradients. Arguments as for the reference's."""
    call = attention_baseline_gradients
    return _differentiate(call, q.dtype, q, k, v, cu_seqlens_q, cu_seqlens_k, dout, dlse, options)


def page_rows(pages: torch.Tensor, page_size: int, seqlen: int) -> torch.Tensor:
    """Return where the first ``seqlen`` keys of a sequence lie among the rows of all pages laid end to end.

    Args:
        pages: one row of a block_table.
        page_size: rows in a page.
        seqlen: how many keys.

    Raises:
        ValueError: the row holds too few pages.
    """
    if seqlen > pages.numel() * page_size:
        raise ValueError(f"block_table has {pages.numel()} pages of {page_size} keys, needed for {seqlen}")
    position = torch.arange(seqlen, device=pages.device)
    return pages.long()[position // page_size] * page_size + position % page_size


class _Sequence(NamedTuple):
    """One sequence: its rows of q, its rows of k and v, and the dense oracle's options for it."""

    queries: slice
    keys: torch.Tensor
    options: AttentionOptions


def _attend(
    attention: Callable[..., AttentionResult],
    dtype: torch.dtype,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    options: VarlenOptions,
) -> VarlenResult:
    sequences = [*_sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)]
    rows_k, rows_v = _as_rows(k), _as_rows(v)
    out, lse = _nothing(q, dtype)
    for queries, keys, own in sequences:
        result = attention(q[queries][None], rows_k[keys][None], rows_v[keys][None], **own)
        out[queries], lse[:, queries] = result.out[0], result.softmax_lse[0]
    return VarlenResult(out, lse)


def _differentiate(
    gradients: Callable[..., AttentionGradients],
    dtype: torch.dtype,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    dout: torch.Tensor | None,
    dlse: torch.Tensor | None,
    options: VarlenOptions,
) -> AttentionGradients:
    for name, dy, shape in (("dout", dout, q.shape), ("dlse", dlse, (q.shape[1], q.shape[0]))):
        if dy is not None and tuple(dy.shape) != tuple(shape):
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(dy.shape)}")
    sequences = [*_sequences(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)]
    rows_k, rows_v = _as_rows(k), _as_rows(v)
    out, lse = _nothing(q, dtype)
    dq = torch.zeros_like(out)
    dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (rows_k, rows_v))
    for queries, keys, own in sequences:
        own_dout = None if dout is None else dout[queries][None]
        own_dlse = None if dlse is None else dlse[:, queries][None]
        tensors = (q[queries][None], rows_k[keys][None], rows_v[keys][None])
        result = gradients(*tensors, own_dout, own_dlse, **own)
        out[queries], lse[:, queries] = result.out[0], result.softmax_lse[0]
        dq[queries] = result.dq[0]
        # Sequences may share pages.
        dk.index_add_(0, keys, result.dk[0])
        dv.index_add_(0, keys, result.dv[0])
    return AttentionGradients(out, lse, dq, dk.reshape(k.shape), dv.reshape(v.shape))


def _nothing(q: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and LSE of rows that no sequence uses."""
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    lse_dtype = torch.promote_types(dtype, torch.float32)
    return out, torch.full((q.shape[1], q.shape[0]), torch.inf, dtype=lse_dtype, device=q.device)


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, 1) if x.dim() == 4 else x


def _sequences(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    *,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    keep_mask: torch.Tensor | None = None,
    **shared: Any,
) -> Iterator[_Sequence]:
    _check_tensors(q, k, v, block_table)
    starts_q, lengths_q = _spans("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    starts_k, lengths_k = _spans(
        "cu_seqlens_k", cu_seqlens_k, None if block_table is not None else k.shape[0]
    )
    batch, nheads = len(starts_q), q.shape[1]
    if len(starts_k) != batch:
        raise ValueError(
            f"cu_seqlens_q and cu_seqlens_k must have one length, got {batch + 1} and {len(starts_k) + 1}"
        )
    lengths_q = _used("seqused_q", seqused_q, lengths_q)
    lengths_k = _used("seqused_k", seqused_k, lengths_k)
    _check_options(batch, nheads, lengths_q, lengths_k, alibi_slopes, keep_mask)
    for index, (start, seqlen_q, seqlen_k) in enumerate(zip(starts_q, lengths_q, lengths_k, strict=True)):
        if block_table is None:
            keys = torch.arange(starts_k[index], starts_k[index] + seqlen_k, device=k.device)
        else:
            keys = page_rows(block_table[index].to(k.device), k.shape[1], seqlen_k)
        own: dict[str, Any] = dict(shared)
        if alibi_slopes is not None:
            own["alibi_slopes"] = alibi_slopes[index] if alibi_slopes.dim() == 2 else alibi_slopes
        if keep_mask is not None:
            own["keep_mask"] = keep_mask[index : index + 1, :, :seqlen_q, :seqlen_k]
        yield _Sequence(slice(start, start + seqlen_q), keys, cast("AttentionOptions", own))


def _spans(name: str, cu_seqlens: torch.Tensor, total: int | None) -> tuple[list[int], list[int]]:
    """Return where each sequence starts and how many rows it has."""
    bounds = [int(bound) for bound in cu_seqlens] if cu_seqlens.dim() == 1 else []
    lengths = [end - start for start, end in pairwise(bounds)]
    if not bounds or bounds[0] != 0 or any(length < 0 for length in lengths):
        raise ValueError(
            f"{name} must be (batch + 1,), begin with 0 and never fall, got {cu_seqlens.tolist()}"
        )
    if total is not None and bounds[-1] > total:
        raise ValueError(f"{name} must end within the {total} rows there are, got {bounds[-1]}")
    return bounds[:-1], lengths


def _used(name: str, seqused: torch.Tensor | None, lengths: list[int]) -> list[int]:
    if seqused is None:
        return lengths
    used = [int(n) for n in seqused] if seqused.dim() == 1 else []
    if len(used) != len(lengths) or any(not 0 <= n <= most for n, most in zip(used, lengths, strict=True)):
        raise ValueError(f"{name} must be at most the sequences' lengths {lengths}, got {seqused.tolist()}")
    return used


def _check_tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block_table: torch.Tensor | None
) -> None:
    if q.dim() != 3:
        raise ValueError(f"q must be (total_q, nheads, head_dim), got shape {tuple(q.shape)}")
    expected = "(total_k, nheads_k, head_dim)"
    if block_table is not None:
        expected = "(num_blocks, page_size, nheads_k, head_dim) with a block_table"
        if block_table.dim() != 2:
            raise ValueError(f"block_table must be (batch, max_blocks), got shape {tuple(block_table.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.dim() != (3 if block_table is None else 4):
            raise ValueError(f"{name} must be {expected}, got shape {tuple(x.shape)}")


def _check_options(
    batch: int,
    nheads: int,
    lengths_q: list[int],
    lengths_k: list[int],
    alibi_slopes: torch.Tensor | None,
    keep_mask: torch.Tensor | None,
) -> None:
    if alibi_slopes is not None and tuple(alibi_slopes.shape) not in ((nheads,), (batch, nheads)):
        raise ValueError(
            f"alibi_slopes must have shape (nheads,) = ({nheads},) or (batch, nheads) = ({batch}, {nheads}), "
            f"got {tuple(alibi_slopes.shape)}"
        )
    if keep_mask is None:
        return
    least = (max(lengths_q, default=0), max(lengths_k, default=0))
    shape = tuple(keep_mask.shape)
    if len(shape) != 4 or shape[:2] != (batch, nheads) or shape[2] < least[0] or shape[3] < least[1]:
        raise ValueError(
            "keep_mask must be (batch, nheads, >= max_seqlen_q, >= max_seqlen_k) = "
            f"({batch}, {nheads}, >= {least[0]}, >= {least[1]}), got {shape}"
        )
