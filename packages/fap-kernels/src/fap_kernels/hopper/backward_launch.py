"""Plan the Hopper backward: tensors and options in, launches out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..backward.config import DELTA, ROW_PADDING
from ..backward.launch import plan_delta
from ..launch import Launch, packing_arguments, score_arguments, strides_of, tiles_of
from .conditions import places_are_known
from .config import BACKWARD, LIFT, WARPGROUP_ROWS, BackwardConfig, choose
from .launch import heads_beside, tile_descriptor
from .query_grads import hopper_query_grads_kernel
from .work import CLUSTER

if TYPE_CHECKING:
    from ..backward.launch import BackwardInputs
    from ..problem import AttentionProblem

__all__ = ["empty_additions", "empty_dq_acc", "plan_hopper_backward", "plan_query_grads"]

LINE = 256
"""Numbers in a line of ``dq_acc`` as the TMA unit sees it, the most it takes; a 64 x 64 tile is 16 lines."""


def empty_dq_acc(
    problem: AttentionProblem, inputs: BackwardInputs, config: BackwardConfig | None = None
) -> torch.Tensor:
    """Memory to add dQ up in: float32 ``(batch, nheads, padded_rows(...), width)``."""
    config = config or _configured(problem)
    return torch.empty((*inputs.delta.shape, config.width), dtype=torch.float32, device=inputs.q.device)


def empty_additions(
    problem: AttentionProblem, inputs: BackwardInputs, config: BackwardConfig | None = None
) -> torch.Tensor | None:
    """Memory to count in what was added to ``dq_acc``: int32 ``(batch, nheads, padded_rows(...) // 64)``.

    None where nothing is counted: no order was asked for, and the table prefers memory full of zeros.
    """
    config = config or _configured(problem)
    if not (problem.deterministic or config.ordered or config.founded):
        return None
    batch, nheads, rows = inputs.delta.shape
    return torch.empty((batch, nheads, rows // DELTA.block_m), dtype=torch.int32, device=inputs.q.device)


def plan_hopper_backward(
    problem: AttentionProblem,
    processors: int,
    inputs: BackwardInputs,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dlse: torch.Tensor | None,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    config: BackwardConfig | None = None,
) -> tuple[list[Launch], dict[str, torch.Tensor]]:
    """The launches that fill ``dq``, ``dk`` and ``dv``, and the memory that they need besides, by name.

    Args:
        processors: multiprocessors of the chip.
        inputs: its ``lse`` and ``delta`` are filled as well.
        out, softmax_lse, dlse: of the forward pass; the vectors contiguous.
        config: overrides the table, in all functions of this module.
    """
    config = config or _configured(problem)
    dq_acc = empty_dq_acc(problem, inputs, config)
    additions = empty_additions(problem, inputs, config)
    # With counters the first one stores.
    workspaces = zeroed = {"dq_acc": dq_acc}
    if additions is not None:
        workspaces, zeroed = {"dq_acc": dq_acc, "additions": additions}, {"additions": additions}
    finishes = _finishes(problem, config, additions)
    gradients = _plan_gradients(
        problem, processors, inputs, dq_acc, dq if finishes else None, dk, dv, additions, config
    )
    tickets = gradients.arguments.get("tickets")
    if tickets is not None:
        workspaces, zeroed = workspaces | {"tickets": tickets}, zeroed | {"tickets": tickets}
    lift = _lift(problem, config)
    launches = [
        plan_delta(problem, out, softmax_lse, dlse, inputs, lift=lift, negative=True, release=True, **zeroed),
        gradients,
    ]
    if not finishes:
        launches.append(plan_query_grads(problem, inputs, dq_acc, dq, additions, config))
    return launches, workspaces


def _plan_gradients(
    problem: AttentionProblem,
    processors: int,
    inputs: BackwardInputs,
    dq_acc: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor,
    dv: torch.Tensor,
    additions: torch.Tensor | None,
    config: BackwardConfig,
) -> Launch:
    """The launch that fills ``dk`` and ``dv`` and adds to ``dq_acc``, which must hold zeros.

    So must its ``tickets``, if it has any. With ``additions``, which must hold zeros instead, it adds in the
    same order on every run, or in any once the first one has stored; in order it may fill ``dq`` as well.
    """
    from .backward import hopper_backward_kernel
    from .backward_relay import hopper_backward_relay_kernel
    from .backward_three import hopper_backward_three_kernel

    founded = _founded(problem, config)
    if config.relay and additions is not None:
        raise ValueError("the relay adds up dQ in no fixed order")
    if founded and additions is None:
        raise ValueError("where the first key tile stores dQ, it must be counted that it has")
    cluster = CLUSTER.value if _in_clusters(problem, config) else 1
    rows = config.block_n * cluster
    tiles, slots = tiles_of(inputs.packing, inputs.k, problem.batch, problem.seqlen_k, rows)
    programs = items = problem.nheads_k * tiles
    own: dict[str, Any]  # what only one of the kernels takes
    if config.relay:
        kernel, own = hopper_backward_relay_kernel, {"CLUSTER": cluster > 1}
    elif _in_three(problem, config):
        kernel, own = hopper_backward_three_kernel, _in_order_by_three(additions, dq_acc, dq)
        programs = min(processors, items)
        # Where each program has but one tile, there is none to draw.
        drawn = torch.empty(1, dtype=torch.int32, device=inputs.q.device) if items > programs else None
        own["tickets"] = drawn
    else:
        kernel = hopper_backward_kernel
        own = {"additions": additions, "FOUNDED": founded, "CLUSTER": cluster > 1}
    # What leaves for dq_acc at once: the tiles of 64 x 64 of both warpgroups, or one of a third.
    dq_tiles = 2 if kernel is hopper_backward_kernel else 1
    packed = problem.packed
    in_order = additions is not None and not founded
    beside = None if packed else _heads_beside(problem, processors // cluster, rows, in_order)
    return Launch(
        kernel=kernel,
        programs=programs * cluster,
        arguments={
            "q_part0": tile_descriptor(inputs.q, config.block_m, config.width, packed),
            "k_part0": tile_descriptor(inputs.k, config.block_n, config.width, packed),
            "v_part0": tile_descriptor(inputs.v, config.block_n, config.width, packed),
            "dout_part0": tile_descriptor(inputs.dout, config.block_m, config.width, packed),
            "dk_part0": tile_descriptor(dk, WARPGROUP_ROWS, config.width, packed),
            "dv_part0": tile_descriptor(dv, WARPGROUP_ROWS, config.width, packed),
            "lse_part0": _plain_descriptor(inputs.lse, [config.block_m]),
            "delta_part0": _plain_descriptor(inputs.delta, [config.block_m]),
            "dq_acc_part0": _plain_descriptor(dq_acc, [dq_tiles * WARPGROUP_ROWS**2 // LINE, LINE]),
            **own,
            "heads_beside": beside,
            "rows_padded": inputs.delta.shape[2],
            **packing_arguments(inputs.packing),
            **slots,
            "nheads": problem.nheads,
            **score_arguments(problem, inputs.alibi_slopes),
            "items": items,
            "WIDTH": config.width,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "STAGES": config.stages,
            "PADDING": ROW_PADDING,
        },
        num_warps=4,
        overlap=True,
        cluster=cluster,
    )


def plan_query_grads(
    problem: AttentionProblem,
    inputs: BackwardInputs,
    dq_acc: torch.Tensor,
    dq: torch.Tensor,
    additions: torch.Tensor | None = None,
    config: BackwardConfig | None = None,
    overlap: bool = True,
) -> Launch:
    """The launch that fills ``dq`` from ``dq_acc``, which was added to with these ``additions``.

    Args:
        overlap: start while the kernel before it still runs, and wait for it.
    """
    config = config or _configured(problem)
    lift = _lift(problem, config)
    packing = packing_arguments(inputs.packing)
    tiles, slots = tiles_of(inputs.packing, inputs.q, problem.batch, problem.seqlen_q, WARPGROUP_ROWS)
    return Launch(
        kernel=hopper_query_grads_kernel,
        programs=problem.nheads * tiles,
        arguments={
            "dq_acc": dq_acc,
            "additions": additions,
            "dq": dq,
            "dq_strides": strides_of(dq),
            "cu_seqlens_q": packing["cu_seqlens_q"],
            "seqused_q": packing["seqused_q"],
            **slots,
            "nheads": problem.nheads,
            "seqlen_q": problem.seqlen_q,
            "rows_padded": dq_acc.shape[2],
            "softmax_scale": problem.softmax_scale * 2.0**-lift,
            "HEAD_DIM": problem.head_dim,
            "WIDTH": dq_acc.shape[3],
            "BLOCK_M": config.block_m,
            "PADDING": ROW_PADDING,
            "OVERLAP": overlap,
        },
        num_warps=4,
        overlap=overlap,
    )


def _configured(problem: AttentionProblem) -> BackwardConfig:
    config = choose(BACKWARD, problem).config
    if config is None:
        raise LookupError(f"the table hands {problem} to the portable kernels")
    return config


def _in_three(problem: AttentionProblem, config: BackwardConfig) -> bool:
    """Whether a third warpgroup makes dQ of what two hand on, as the configuration prefers."""
    return config.three and problem.dtype == torch.bfloat16


def _founded(problem: AttentionProblem, config: BackwardConfig) -> bool:
    """Whether the first one stores dQ and the others add in any order, as the configuration prefers."""
    return config.founded and not problem.deterministic


def _in_clusters(problem: AttentionProblem, config: BackwardConfig) -> bool:
    """Whether programs share the queries that they sweep, as the configuration prefers."""
    return config.cluster and not problem.deterministic and not problem.packed and places_are_known()


def _lift(problem: AttentionProblem, config: BackwardConfig) -> int:
    """By how many powers of two all weights, and so the sum in ``dq_acc``, are too large."""
    lifted = _in_three(problem, config) or (config.relay and problem.dtype == torch.bfloat16)
    return LIFT if lifted else 0


def _finishes(problem: AttentionProblem, config: BackwardConfig, additions: torch.Tensor | None) -> bool:
    """Whether the last one to add to a tile of dQ writes it to its place, and no launch more is needed.

    It takes a third warpgroup, an order in which the first key tile is the last one for all query tiles, and
    that no query tile is left out.
    """
    offset = problem.seqlen_k - problem.seqlen_q
    all_see_keys = problem.seqlen_k > 0 and (problem.window_right < 0 or offset + problem.window_right >= 0)
    in_order = additions is not None and _in_three(problem, config)
    return in_order and not problem.packed and problem.window_left < 0 and all_see_keys


def _in_order_by_three(
    additions: torch.Tensor | None, dq_acc: torch.Tensor, dq: torch.Tensor | None
) -> dict[str, Any]:
    """What lets three warpgroups add in a fixed order, and finish ``dq``."""
    part = None if dq is None else tile_descriptor(dq, WARPGROUP_ROWS, WARPGROUP_ROWS, False)
    return {"additions": additions, "dq_part0": part, "dq_acc": None if dq is None else dq_acc}


def _heads_beside(problem: AttentionProblem, processors: int, rows: int, in_order: bool) -> int:
    """How many key heads are worked on side by side, where all have equally many tiles of ``rows`` keys."""
    key_tiles = max(-(-problem.seqlen_k // rows), 1)
    if in_order:
        # Fewer tiles of more heads wait for each other less.
        return max(processors // key_tiles, 1)
    if problem.window_right >= 0:
        # As query tiles of the forward: the launch shall not end with the long ones of one head alone.
        return heads_beside(key_tiles, problem.batch * problem.nheads_k, processors)
    return 1


def _plain_descriptor(x: torch.Tensor, block: list[int]) -> Any:
    """What moves blocks of a contiguous float32 tensor, seen as lines as long as a block's."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    shape = [x.numel()] if len(block) == 1 else [x.numel() // block[1], block[1]]
    strides = [1] if len(block) == 1 else [block[1], 1]
    layout = NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=len(block))
    return TensorDescriptor(x, shape, strides, block, layout)
