"""How the configuration tables are written, and how a row is chosen.

A table lies beside its kernels and is read from the top: the first row that fits the call is taken.
Nothing is searched or timed at call time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .head_dim import split_head_dim

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .problem import AttentionProblem
    from .target import Target

__all__ = ["Row", "TileConfig", "choose"]


@dataclass(frozen=True, slots=True)
class TileConfig:
    """Shape and resources of one program.

    Attributes:
        block_m: queries in a tile.
        block_n: keys in a tile.
        num_warps: warps of a program.
        num_stages: depth of the pipeline that fetches the tiles a program sweeps.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a table: which calls it is for, and why it holds what it holds.

    Attributes:
        family: :attr:`fap_kernels.target.Target.family`.
        head_dim: the largest head dimension, as held in parts, that it is for.
        config: what to run.
        why: what was measured, or what else spoke for it.
        float32: for float32, whose products run without tensor cores, or for 16-bit types.
        bounded: only with (True) or without (False) a window or causal mask; None is both.
        plain: only calls without softcap, ALiBi and dropout, which leave more registers.
        seqlen_from: the least ``seqlen_k``.
        paged: only keys in pages (True), or none (False); None is both.
    """

    family: str
    head_dim: int
    config: TileConfig
    why: str
    float32: bool = False
    bounded: bool | None = None
    plain: bool = False
    seqlen_from: int = 0
    paged: bool | None = None

    def fits(self, problem: AttentionProblem, target: Target) -> bool:
        """Whether the row is for this call on this chip."""
        bounded = problem.window_left >= 0 or problem.window_right >= 0
        plain = problem.softcap == 0.0 and problem.alibi is None and problem.dropout_p == 0.0
        return (
            self.family == target.family
            and self.float32 == (problem.dtype == torch.float32)
            and sum(split_head_dim(problem.head_dim)) <= self.head_dim
            and self.bounded in (None, bounded)
            and (plain or not self.plain)
            and problem.seqlen_k >= self.seqlen_from
            and self.paged in (None, problem.paged)
        )


def choose(table: Iterable[Row], problem: AttentionProblem, target: Target) -> TileConfig:
    """The configuration of the first row that fits.

    Raises:
        LookupError: no row fits, which is a mistake in the table.
    """
    for row in table:
        if row.fits(problem, target):
            return row.config
    raise LookupError(f"no configuration for {problem} on {target}")
