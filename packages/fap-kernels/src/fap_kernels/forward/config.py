"""Tile sizes of the forward pass: a table, each row with what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import TileConfig

if TYPE_CHECKING:
    from ..problem import AttentionProblem
    from ..target import Target


def forward_config(problem: AttentionProblem, target: Target) -> TileConfig:
    return TileConfig(128, 128, 8, 3)


def probabilities_config(problem: AttentionProblem, target: Target) -> TileConfig:
    return TileConfig(32, 32, 4, 1)
