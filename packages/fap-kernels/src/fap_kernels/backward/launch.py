"""Plan the backward pass: tensors and options in, three launches out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..launch import Launch, descriptors_fit, option_arguments, part_arguments, row_arguments, strides_of
from .config import delta_config, dkdv_config, dq_config
from .delta import attention_delta_kernel
from .dkdv import attention_dkdv_kernel
from .dq import attention_dq_kernel

if TYPE_CHECKING:
    import torch

    from ..config import TileConfig
    from ..problem import AttentionProblem
    from ..target import Target

__all__ = ["plan_delta", "plan_dkdv", "plan_dq"]


def plan_delta(
    problem: AttentionProblem,
    target: Target,
    out: torch.Tensor,
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    delta: torch.Tensor,
) -> Launch:
    """The launch that fills ``delta``, float32 ``(batch, nheads, seqlen_q)``."""
    config = delta_config(problem, target)
    return Launch(
        kernel=attention_delta_kernel,
        programs=problem.batch * problem.nheads * -(-problem.seqlen_q // config.block_m),
        arguments={
            "out": out,
            "dout": dout,
            "dlse": dlse,
            "delta": delta,
            "out_strides": strides_of(out),
            "dout_strides": strides_of(dout),
            "dlse_strides": None if dlse is None else tuple(dlse.stride()),
            "nheads": problem.nheads,
            "seqlen_q": problem.seqlen_q,
            **part_arguments(problem.head_dim),
            "BLOCK_M": config.block_m,
        },
        num_warps=config.num_warps,
    )


def plan_dkdv(
    problem: AttentionProblem,
    target: Target,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    softmax_lse: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    rng_state: torch.Tensor | None,
    config: TileConfig | None = None,
) -> Launch:
    """The launch that fills ``dk`` and ``dv``; ``config`` overrides the table."""
    config = config or dkdv_config(problem, target)
    use_descriptors = descriptors_fit(target, q, k, v, dout)
    part = part_arguments(problem.head_dim)
    sizes = part["PART0"], part["PART1"]
    return Launch(
        kernel=attention_dkdv_kernel,
        programs=problem.batch * problem.nheads_k * -(-problem.seqlen_k // config.block_n),
        arguments={
            **row_arguments("q", q, config.block_m, sizes, use_descriptors),
            **row_arguments("k", k, config.block_n, sizes, use_descriptors),
            **row_arguments("v", v, config.block_n, sizes, use_descriptors),
            **row_arguments("dout", dout, config.block_m, sizes, use_descriptors),
            "lse": softmax_lse,
            "delta": delta,
            "dk": dk,
            "dk_strides": strides_of(dk),
            "dv": dv,
            "dv_strides": strides_of(dv),
            "nheads_k": problem.nheads_k,
            **option_arguments(problem, alibi_slopes, rng_state),
            **part,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "STAGES": config.num_stages,
        },
        num_warps=config.num_warps,
    )


def plan_dq(
    problem: AttentionProblem,
    target: Target,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    softmax_lse: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    rng_state: torch.Tensor | None,
    config: TileConfig | None = None,
) -> Launch:
    """The launch that fills ``dq``; ``config`` overrides the table."""
    config = config or dq_config(problem, target)
    use_descriptors = descriptors_fit(target, q, k, v, dout)
    part = part_arguments(problem.head_dim)
    sizes = part["PART0"], part["PART1"]
    return Launch(
        kernel=attention_dq_kernel,
        programs=problem.batch * problem.nheads * -(-problem.seqlen_q // config.block_m),
        arguments={
            **row_arguments("q", q, config.block_m, sizes, use_descriptors),
            **row_arguments("k", k, config.block_n, sizes, use_descriptors),
            **row_arguments("v", v, config.block_n, sizes, use_descriptors),
            **row_arguments("dout", dout, config.block_m, sizes, use_descriptors),
            "lse": softmax_lse,
            "delta": delta,
            "dq": dq,
            "dq_strides": strides_of(dq),
            "nheads": problem.nheads,
            **option_arguments(problem, alibi_slopes, rng_state),
            **part,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "STAGES": config.num_stages,
        },
        num_warps=config.num_warps,
    )
