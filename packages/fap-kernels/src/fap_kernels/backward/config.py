"""Tile sizes of the backward pass: a table, each row with what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..config import TileConfig

if TYPE_CHECKING:
    from ..problem import AttentionProblem
    from ..target import Target


def delta_config(problem, target) -> TileConfig:
    return TileConfig(64, 64, 4, 1)
def dkdv_config(problem, target) -> TileConfig:
    return TileConfig(64, 128, 8, 2)
def dq_config(problem, target) -> TileConfig:
    return TileConfig(128, 64, 8, 2)
