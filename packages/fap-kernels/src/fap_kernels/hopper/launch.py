"""Plan the Hopper forward: tensors and options in, launches out."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from ..launch import (
    Launch,
    descriptor_fields,
    packing_arguments,
    part_arguments,
    score_arguments,
    strides_of,
    tiles_of,
)
from .conditions import places_are_known
from .config import FORWARD, MOST_DRAWN, REDO, WARPGROUP_ROWS, HopperConfig, choose
from .redo import hopper_redo_kernel
from .tickets import hopper_tickets_kernel
from .work import CLUSTER

if TYPE_CHECKING:
    from ..packing import Packing
    from ..problem import AttentionProblem

__all__ = ["forward_config", "plan_hopper_forward", "plan_redo", "tile_descriptor"]

BUSY = 0.75
"""Where pairs of query tiles keep multiprocessors busy for less of the time, programs take single ones."""


def forward_config(problem: AttentionProblem, processors: int) -> HopperConfig:
    """What the table says, or where its pairs leave too many multiprocessors idle, the same tile by tile.

    Args:
        processors: multiprocessors of the chip.

    Raises:
        LookupError: the table hands the call to the portable kernel.
    """
    config = choose(FORWARD, problem).config
    if config is None:
        raise LookupError(f"the table hands {problem} to the portable kernel")
    # Where three programs share a multiprocessor it was not measured.
    if not config.paired or config.beside > 1 or _busy(problem, config, processors) >= BUSY:
        return config
    return replace(
        config, persistent=False, paired=False, overlap_tiles=False, queries_ahead=False, out_parts=0,
        cluster=False,
    )  # fmt: skip


def _busy(problem: AttentionProblem, config: HopperConfig, processors: int) -> float:
    """For how much of the time programs that take pairs have one, if all pairs take equally long."""
    together = CLUSTER.value if config.cluster else 1
    rows = 2 * WARPGROUP_ROWS * config.warpgroups * together
    pairs = problem.batch * problem.nheads * -(-problem.seqlen_q // rows)
    programs = max(processors // together, 1)
    return pairs / (-(-pairs // programs) * programs)


def plan_hopper_forward(
    problem: AttentionProblem,
    processors: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    packing: Packing | None = None,
    config: HopperConfig | None = None,
) -> tuple[list[Launch], dict[str, torch.Tensor]]:
    """The launches that fill ``out`` and ``softmax_lse``, and the memory that they need besides, by name.

    Args:
        processors: multiprocessors of the chip.
        q, k, v, out, softmax_lse: packed tensors come as one batch entry, as for
            :func:`fap_kernels.forward.launch.plan_forward`.
        config: overrides :func:`forward_config`.
    """
    from .forward import hopper_forward_kernel

    config = config or forward_config(problem, processors)
    if config.cluster and not places_are_known():
        config = replace(config, cluster=False)
    common = _common_arguments(problem, softmax_lse, alibi_slopes, packing)
    block_m = WARPGROUP_ROWS * config.warpgroups
    packed = problem.packed
    if packed and config.paired:
        raise ValueError("packed sequences have different lengths, and so no pairs of equal work")
    if packed and config.cluster:
        raise ValueError("programs of a cluster share no packed sequences")
    cluster = CLUSTER.value if config.cluster else 1
    item = block_m * cluster
    rows = 2 * item if config.paired else item
    tiles, slots = tiles_of(packing, q, problem.batch, problem.seqlen_q, rows)
    items = problem.nheads * tiles
    processors = max(processors // cluster, 1)  # or pairs of them
    programs = min(processors * config.beside, items) if config.persistent else items
    beside = None
    if problem.window_right >= 0 and not packed and (config.tickets or not config.persistent):
        beside = heads_beside(-(-problem.seqlen_q // item), problem.batch * problem.nheads, processors)
    # Where each program has but one tile, there is none to draw.
    draw = config.tickets and items > programs
    tickets = torch.empty(1, dtype=torch.int32, device=q.device) if draw else None
    # A program has room for so many tickets, and all together for all. Where the mark stands, assembly says.
    again = config.optimistic and not packed and places_are_known()
    again = again and (not draw or items <= programs * MOST_DRAWN)
    forward = Launch(
        kernel=hopper_forward_kernel,
        programs=programs * cluster,
        arguments={
            "q_part0": tile_descriptor(q, WARPGROUP_ROWS, config.width, packed),
            "k_part0": tile_descriptor(k, config.block_n, config.width, packed),
            "v_part0": tile_descriptor(v, config.block_n, config.width, packed),
            "out_part0": tile_descriptor(
                out, WARPGROUP_ROWS, config.width // max(config.out_parts, 1), packed
            ),
            **common,
            **slots,
            "items": items,
            "heads_beside": beside,
            "tickets": tickets,
            "WIDTH": config.width,
            "BLOCK_N": config.block_n,
            "STAGES": config.stages,
            "WARPGROUPS": config.warpgroups,
            "Q_STAGES": 2 if config.overlap_tiles or config.queries_ahead else 1,
            "OVERLAP_TILES": config.overlap_tiles,
            "OUT_PARTS": config.out_parts,
            "PAIRED": config.paired,
            "OPTIMISTIC": config.optimistic,
            "TURNS": config.turns,
            "HOLD_QUERIES": config.hold_queries,
            "CLUSTER": config.cluster,
            "ASSEMBLED": places_are_known(),
            "AGAIN": again,
        },
        num_warps=4,
        overlap=draw,
        maxnreg=config.maxnreg,
        cluster=cluster,
    )
    launches, workspaces = [forward], {}
    if tickets is not None:
        launches.insert(0, Launch(hopper_tickets_kernel, 1, {"tickets": tickets}, num_warps=1))
        workspaces = {"tickets": tickets}
    if config.optimistic and not again:
        launches.append(plan_redo(problem, q, k, v, out, softmax_lse, alibi_slopes, packing))
    return launches, workspaces


def heads_beside(tiles: int, heads: int, processors: int) -> int:
    """How many of ``heads``, of so many query tiles each, are worked on side by side, under a causal mask.

    One after the other, the launch ends with the tiles of the last head, the long ones first, and where these
    are fewer than ``processors``, some have nothing to do: for a tenth of the time at 64 tiles a head. So
    there are about as many tiles side by side as processors, and among the last heads no fewer; more heads
    would only share the cache.
    """
    least = min(max(round(processors / max(tiles, 1)), 1), max(heads, 1))
    return next((beside for beside in range(least, 2 * least) if not 0 < heads % beside < least), least)


def plan_redo(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    packing: Packing | None = None,
    overlap: bool = True,
) -> Launch:
    """The launch that computes those query tiles again in whose ``softmax_lse`` there is a NaN.

    Args:
        overlap: start while the kernel before it still runs, and wait for it.
    """
    redo = next(config for head_dim, config in REDO.items() if problem.head_dim <= head_dim)
    tiles, slots = tiles_of(packing, q, problem.batch, problem.seqlen_q, redo.block_m)
    tiles *= problem.nheads
    tensors = {"q": q, "k": k, "v": v, "out": out}
    return Launch(
        kernel=hopper_redo_kernel,
        programs=-(-tiles // redo.scan),
        arguments={
            **tensors,
            **{f"{name}_strides": strides_of(x) for name, x in tensors.items()},
            **_common_arguments(problem, softmax_lse, alibi_slopes, packing),
            **slots,
            "tile_count": tiles,
            **part_arguments(problem.head_dim),
            "BLOCK_M": redo.block_m,
            "BLOCK_N": redo.block_n,
            "STAGES": redo.num_stages,
            "SCAN": redo.scan,
            "OVERLAP": overlap,
        },
        num_warps=redo.num_warps,
        overlap=overlap,
    )


def _common_arguments(
    problem: AttentionProblem,
    softmax_lse: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    packing: Packing | None,
) -> dict[str, Any]:
    return {
        "lse": softmax_lse,
        "lse_rows": softmax_lse.shape[2],
        **packing_arguments(packing),
        "nheads": problem.nheads,
        **score_arguments(problem, alibi_slopes),
    }


def tile_descriptor(x: torch.Tensor, rows: int, columns: int, packed: bool) -> Any:
    """What fetches, or stores, tiles of ``(batch, seqlen, nheads, head_dim)``."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    shape, strides, block = descriptor_fields(x, rows, columns, packed)
    layout = NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=len(shape))
    return TensorDescriptor(x, shape, strides, block, layout)
