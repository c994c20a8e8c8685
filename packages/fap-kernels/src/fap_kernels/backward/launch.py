"""Plan the backward pass: tensors and options in, three launches out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import choose
from ..launch import (
    Launch,
    descriptors_fit,
    option_arguments,
    packing_arguments,
    part_arguments,
    row_arguments,
    strides_of,
    tiles_of,
)
from .config import DELTA, DKDV, DQ, ROW_PADDING, padded_rows
from .delta import attention_delta_kernel
from .dkdv import attention_dkdv_kernel
from .dq import attention_dq_kernel

if TYPE_CHECKING:
    import torch

    from ..config import TileConfig
    from ..packing import Packing
    from ..problem import AttentionProblem
    from ..target import Target

__all__ = ["BackwardInputs", "plan_delta", "plan_dkdv", "plan_dq"]


class BackwardInputs(NamedTuple):
    """What the kernels that follow the delta kernel read.

    Attributes:
        q, k, v, dout: as given, with unit last stride.
        lse, delta: float32 ``(batch, nheads, padded_rows(...))``, written by the delta kernel.
        alibi_slopes, rng_state: as given, or None.
        packing: where packed sequences lie. All tensors then come as one batch entry.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor
    alibi_slopes: torch.Tensor | None
    rng_state: torch.Tensor | None
    packing: Packing | None = None


def plan_delta(
    problem: AttentionProblem,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dlse: torch.Tensor | None,
    inputs: BackwardInputs,
    dq_acc: torch.Tensor | None = None,
    additions: torch.Tensor | None = None,
    tickets: torch.Tensor | None = None,
    progress: torch.Tensor | None = None,
    heads: int | None = None,
    lift: int = 0,
    negative: bool = False,
    release: bool = False,
) -> Launch:
    """The launch that fills ``inputs.lse`` and ``inputs.delta``, from contiguous vectors.

    Args:
        dq_acc: float32 ``(batch, nheads, padded_rows(...), width)``, contiguous; filled with zeros.
        additions: int32 ``(batch, nheads, padded_rows(...) // DELTA.block_m)``, contiguous; likewise.
        tickets: int32 ``(1,)``; likewise.
        progress: int32 of any shape, contiguous; likewise.
        heads: fill what belongs to so many of the batch's heads alone, and all of ``progress``.
        lift: lower the LSE by so much, so that weights come out 2^lift times as large.
        negative: fill ``inputs.delta`` with ``-delta``.
        release: let the launch that follows start while this one runs, if it is one that overlaps.
    """
    config = DELTA
    rows_swept = padded_rows(problem.seqlen_q)
    packing = packing_arguments(inputs.packing)
    tiles, slots = tiles_of(inputs.packing, inputs.q, problem.batch, rows_swept, ROW_PADDING)
    programs = problem.nheads * tiles * (ROW_PADDING // config.block_m)
    if heads is not None:  # which come first
        programs = programs // (problem.batch * problem.nheads) * heads
    return Launch(
        kernel=attention_delta_kernel,
        programs=programs,
        arguments={
            "out": out,
            "out_strides": strides_of(out),
            "dout": inputs.dout,
            "dout_strides": strides_of(inputs.dout),
            "softmax_lse": softmax_lse,
            "lse_rows": softmax_lse.shape[2],
            "dlse": dlse,
            "lse": inputs.lse,
            "delta": inputs.delta,
            "dq_acc": dq_acc,
            "additions": additions,
            "tickets": tickets,
            "progress": progress,
            "progress_count": None if progress is None else progress.numel(),
            "lift": float(lift),
            "nheads": problem.nheads,
            "seqlen_q": problem.seqlen_q,
            "rows_swept": rows_swept,
            "rows_padded": inputs.delta.shape[2],
            "cu_seqlens_q": packing["cu_seqlens_q"],
            "seqused_q": packing["seqused_q"],
            **slots,
            **part_arguments(problem.head_dim),
            "BLOCK_M": config.block_m,
            "PADDING": ROW_PADDING,
            "WIDTH": 0 if dq_acc is None else dq_acc.shape[3],
            "NEGATIVE": negative,
            "RELEASE": release,
        },
        num_warps=config.num_warps,
    )


def plan_dkdv(
    problem: AttentionProblem,
    target: Target,
    inputs: BackwardInputs,
    dk: torch.Tensor,
    dv: torch.Tensor,
    config: TileConfig | None = None,
) -> Launch:
    """The launch that fills ``dk`` and ``dv``; ``config`` overrides the table."""
    config = config or choose(DKDV, problem, target)
    tiles, slots = tiles_of(inputs.packing, inputs.k, problem.batch, problem.seqlen_k, config.block_n)
    return Launch(
        kernel=attention_dkdv_kernel,
        programs=problem.nheads_k * tiles,
        arguments={
            **slots,
            **_sweep_arguments(problem, target, inputs, config),
            "dk": dk,
            "dk_strides": strides_of(dk),
            "dv": dv,
            "dv_strides": strides_of(dv),
            "nheads_k": problem.nheads_k,
        },
        num_warps=config.num_warps,
    )


def plan_dq(
    problem: AttentionProblem,
    target: Target,
    inputs: BackwardInputs,
    dq: torch.Tensor,
    config: TileConfig | None = None,
) -> Launch:
    """The launch that fills ``dq``; ``config`` overrides the table."""
    config = config or choose(DQ, problem, target)
    tiles, slots = tiles_of(inputs.packing, inputs.q, problem.batch, problem.seqlen_q, config.block_m)
    return Launch(
        kernel=attention_dq_kernel,
        programs=problem.nheads * tiles,
        arguments={
            **slots,
            **_sweep_arguments(problem, target, inputs, config),
            "dq": dq,
            "dq_strides": strides_of(dq),
            "nheads": problem.nheads,
        },
        num_warps=config.num_warps,
    )


def _sweep_arguments(
    problem: AttentionProblem, target: Target, inputs: BackwardInputs, config: TileConfig
) -> dict[str, Any]:
    """What dK/dV and dQ are given alike: one sweeps queries and the other keys, over the same tensors."""
    q, k, v, dout, lse, delta, alibi_slopes, rng_state, packing = inputs
    use_descriptors = descriptors_fit(target, q, k, v, dout)
    part = part_arguments(problem.head_dim)
    sizes = part["PART0"], part["PART1"]
    return {
        **row_arguments("q", q, config.block_m, sizes, use_descriptors, problem.packed),
        **row_arguments("k", k, config.block_n, sizes, use_descriptors, problem.packed),
        **row_arguments("v", v, config.block_n, sizes, use_descriptors, problem.packed),
        **row_arguments("dout", dout, config.block_m, sizes, use_descriptors, problem.packed),
        "lse": lse,
        "delta": delta,
        "rows_padded": delta.shape[2],
        **packing_arguments(packing),
        **option_arguments(problem, alibi_slopes, rng_state),
        **part,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "STAGES": config.num_stages,
        "PADDING": ROW_PADDING,
    }
