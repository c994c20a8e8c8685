"""Plan the forward pass: tensors and options in, a launch out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import choose
from ..launch import (
    Launch,
    descriptors_fit,
    key_arguments,
    option_arguments,
    packing_arguments,
    page_arguments,
    part_arguments,
    row_arguments,
    strides_of,
    tiles_of,
)
from .config import FORWARD, PROBABILITIES
from .kernel import attention_forward_kernel
from .probabilities import attention_probabilities_kernel

if TYPE_CHECKING:
    import torch

    from ..cache import Cache
    from ..config import TileConfig
    from ..packing import Packing
    from ..problem import AttentionProblem
    from ..target import Target

__all__ = ["PROBABILITY_TILE", "plan_forward", "plan_probabilities"]

PROBABILITY_TILE = 128
"""flash-attn pads both sides of the weights it returns to a multiple of this."""


def plan_forward(
    problem: AttentionProblem,
    target: Target,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    rng_state: torch.Tensor | None,
    packing: Packing | None = None,
    cache: Cache | None = None,
    config: TileConfig | None = None,
) -> Launch:
    """The launch that fills ``out`` and ``softmax_lse``; ``config`` overrides the table.

    Packed tensors come as one batch entry: q ``(1, total_q, nheads, head_dim)``, softmax_lse
    ``(1, nheads, total_q)``. ``cache`` says where in k and v the keys lie, if they lie in a cache.
    """
    config = config or choose(FORWARD, problem, target)
    use_descriptors = descriptors_fit(target, q, k, v)
    part = part_arguments(problem.head_dim)
    sizes = part["PART0"], part["PART1"]
    tiles, slots = tiles_of(packing, q, problem.batch, problem.seqlen_q, config.block_m)
    return Launch(
        kernel=attention_forward_kernel,
        programs=problem.nheads * tiles,
        arguments={
            **row_arguments("q", q, config.block_m, sizes, use_descriptors, problem.packed),
            **packing_arguments(packing),
            **slots,
            **key_arguments(k, v, config.block_n, sizes, target, packing, cache),
            "out": out,
            "out_strides": strides_of(out),
            "lse": softmax_lse,
            "lse_rows": softmax_lse.shape[2],
            "nheads": problem.nheads,
            **option_arguments(problem, alibi_slopes, rng_state),
            **part,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "STAGES": config.num_stages,
        },
        num_warps=config.num_warps,
    )


def plan_probabilities(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    softmax_lse: torch.Tensor,
    weights: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    rng_state: torch.Tensor | None,
    packing: Packing | None = None,
) -> Launch:
    """The launch that fills ``weights``, whose last two sizes are multiples of PROBABILITY_TILE."""
    config = PROBABILITIES
    part = part_arguments(problem.head_dim)
    sizes = part["PART0"], part["PART1"]
    rows, columns = weights.shape[2:]
    options = option_arguments(problem, alibi_slopes, rng_state)
    del options["keep_scale"]
    return Launch(
        kernel=attention_probabilities_kernel,
        programs=problem.batch * problem.nheads * (rows // config.block_m) * (columns // config.block_n),
        arguments={
            **row_arguments("q", q, config.block_m, sizes, use_descriptors=False, packed=problem.packed),
            **row_arguments("k", k, config.block_n, sizes, use_descriptors=False, packed=problem.packed),
            **packing_arguments(packing),
            **page_arguments(packing),
            "lse": softmax_lse,
            "lse_rows": softmax_lse.shape[2],
            "weights": weights,
            "rows_stored": rows,
            "columns_stored": columns,
            "nheads": problem.nheads,
            **options,
            **part,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        },
        num_warps=config.num_warps,
    )
