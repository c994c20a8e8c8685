"""What a row of a configuration table holds, and how one is chosen."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TileConfig"]


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
