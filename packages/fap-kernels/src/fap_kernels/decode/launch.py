"""Plan a split sweep over a cache: tensors and options in, one launch or two out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..cache import MOST_SPLITS
from ..config import choose
from ..launch import Launch, key_arguments, part_arguments, score_arguments, strides_of
from ..rotary.launch import ROWS, angle_arguments, power_of_two
from .append import kvcache_append_kernel
from .combine import attention_combine_kernel
from .config import COMBINE, DECODE, DECODE_MANY, FEW_ROWS, MANY_ROWS
from .kernel import attention_decode_kernel

if TYPE_CHECKING:
    from ..cache import Cache
    from ..config import TileConfig
    from ..problem import AttentionProblem
    from ..target import Target

__all__ = ["choose_splits", "few_queries", "plan_append", "plan_decode"]

PROGRAMS_PER_PROCESSOR = {"contiguous": 1, "paged": 2}
"""How many a multiprocessor needs to be kept reading.

By descriptor, one has two tiles of K and of V on their way, 64 KB or more; with two programs 16 x 8k runs at
3,879 GB/s, not 4,066. By page, a program fetches by address and has one tile of each on its way: with one
program 16 x 8k ran at 2,909 GB/s, where 64 x 4k, which fills the chip twice over, ran at 4,292.
"""


def few_queries(problem: AttentionProblem) -> bool:
    """Whether a sequence has so few queries that its keys are better split among programs."""
    return problem.seqlen_q * (problem.nheads // problem.nheads_k) <= MANY_ROWS


def choose_splits(programs: int, places: int, tiles: int) -> int:
    """How many shares to split each sweep of ``tiles`` key tiles into.

    Args:
        programs: how many there are without a split.
        places: how many the chip runs at a time.
        tiles: key tiles of the longest sweep.

    Returns:
        The least number of shares with which the chip is done within 5% of the shortest time. That is counted
        in tiles: each wave of programs takes as long as a share's tiles, and one more until its first ones
        have arrived. It depends on sizes alone, never on the lengths, which the host does not know.
    """
    most = max(1, min(MOST_SPLITS, tiles))

    def time(splits: int) -> int:
        return -(-programs * splits // places) * (-(-tiles // splits) + 1)

    shortest = min(time(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if time(splits) * 0.95 <= shortest)


def plan_decode(
    problem: AttentionProblem,
    target: Target,
    processors: int,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    cache: Cache,
    num_splits: int = 0,
    config: TileConfig | None = None,
) -> list[Launch]:
    """The launches that fill ``out`` and ``softmax_lse``, both contiguous, one after the other.

    Args:
        processors: how many multiprocessors the chip has.
        num_splits: into how many shares the keys are split; 0 chooses.
        config: overrides the table.
    """
    rows = problem.seqlen_q * (problem.nheads // problem.nheads_k)
    config = config or choose(DECODE if rows <= FEW_ROWS else DECODE_MANY, problem, target)
    part = part_arguments(problem.head_dim)
    programs = problem.batch * problem.nheads_k * -(-rows // config.block_m)
    tiles = -(-problem.seqlen_k // config.block_n)
    places = processors * PROGRAMS_PER_PROCESSOR["contiguous" if cache.block_table is None else "paged"]
    splits = num_splits or choose_splits(programs, places, tiles)
    partial = splits > 1
    if partial:
        share_out = torch.empty(splits, *out.shape, dtype=torch.float32, device=out.device)
        share_lse = torch.empty(splits, *softmax_lse.shape, dtype=torch.float32, device=out.device)
    else:
        share_out, share_lse = out[None], softmax_lse[None]
    sweep = Launch(
        kernel=attention_decode_kernel,
        programs=programs * splits,
        arguments={
            "q": q,
            "q_strides": strides_of(q),
            **key_arguments(
                k_cache, v_cache, config.block_n, (part["PART0"], part["PART1"]), target, None, cache
            ),
            "share_out": share_out,
            # Not strides_of, which takes a single batch entry for one that is never stepped over.
            "out_strides": share_out.stride()[1:4],
            "share_lse": share_lse,
            "lse_strides": share_lse[0].stride()[:2],
            "nheads_k": problem.nheads_k,
            "splits": splits,
            **score_arguments(problem, alibi_slopes),
            **part,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "STAGES": config.num_stages,
            "PARTIAL": partial,
            "OVERLAP": partial and target.overlap,
        },
        num_warps=config.num_warps,
    )
    if not partial:
        return [sweep]
    return [sweep, _plan_combine(problem, target, share_out, share_lse, out, softmax_lse)]


def plan_append(
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: Cache,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    interleaved: bool,
) -> Launch:
    """The launch that writes k, rotated by ``angles``, and v behind each sequence's last row."""
    batch, seqlen_new, nheads_k, head_dim = k.shape
    paged = cache.block_table is not None
    turning = dict.fromkeys(("cos", "sin", "table_rows"), None) | dict.fromkeys(("HALF", "WIDTH", "REST"), 0)
    if angles is not None:
        turning = angle_arguments(head_dim, *angles, copy_rest=True)
    return Launch(
        kernel=kvcache_append_kernel,
        programs=batch * -(-seqlen_new * nheads_k // ROWS),
        arguments={
            "k": k,
            "k_strides": strides_of(k),
            "v": v,
            "v_strides": strides_of(v),
            "k_cache": k_cache,
            "k_cache_strides": strides_of(k_cache),
            "v_cache": v_cache,
            "v_cache_strides": strides_of(v_cache),
            "cache_seqlens": cache.seqlens,
            "cache_batch_idx": cache.batch_idx,
            "block_table": cache.block_table,
            "table_stride": cache.block_table.stride(0) if cache.block_table is not None else None,
            "page_bits": cache.page_size.bit_length() - 1 if paged else None,
            "capacity": cache.capacity,
            "nheads_k": nheads_k,
            "seqlen_new": seqlen_new,
            **turning,
            "HEAD_DIM": head_dim,
            "COLUMNS": power_of_two(head_dim),
            "ROWS": ROWS,
            "INTERLEAVED": interleaved,
        },
        num_warps=4,
    )


def _plan_combine(
    problem: AttentionProblem,
    target: Target,
    share_out: torch.Tensor,
    share_lse: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
) -> Launch:
    return Launch(
        kernel=attention_combine_kernel,
        programs=problem.batch * problem.seqlen_q * problem.nheads,
        arguments={
            "share_out": share_out,
            "share_lse": share_lse,
            "out": out,
            "lse": softmax_lse,
            "splits": share_out.shape[0],
            "nheads": problem.nheads,
            "seqlen_q": problem.seqlen_q,
            "HEAD_DIM": problem.head_dim,
            "WIDTH": power_of_two(problem.head_dim),
            "SHARES": COMBINE.block_n,
            "OVERLAP": target.overlap,
        },
        num_warps=COMBINE.num_warps,
        overlap=target.overlap,
    )
