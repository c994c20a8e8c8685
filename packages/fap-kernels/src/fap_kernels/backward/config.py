"""Tile sizes of the backward pass. docs/performance/portable.md says how they were measured."""

from __future__ import annotations

from ..config import Row, TileConfig

__all__ = ["DELTA", "DKDV", "DQ", "ROW_PADDING", "padded_rows"]

ROW_PADDING = 128
"""The vectors of one number a query row are padded to a multiple of this, the largest BLOCK_M."""


def padded_rows(rows: int, entries: int = 0) -> int:
    """Length of a vector of one number a query row.

    Args:
        rows: queries of each batch entry, or of all packed ones together.
        entries: how many entries are packed; each may need one padding of its own.
    """
    return -(-rows // ROW_PADDING) * ROW_PADDING + entries * ROW_PADDING


# Reads out and dout once: any size that keeps the memory busy.
DELTA = TileConfig(64, 64, 4, 1)

# x FA2: FlashAttention-2's whole backward over this kernel alone, in the same run; H200, bf16, 16,384
# tokens of nheads * head_dim = 2048, Triton 3.6. The two kernels' shares add up: 1 / (1 / dkdv + 1 / dq).
DKDV = (
    Row(family="sm_90", head_dim=64, config=TileConfig(32, 128, 4, 2), plain=True, bounded=False,
        why="s4k: 1.96x FA2; (64, 64) 1.70x; one more stage 1.84x"),
    Row(family="sm_90", head_dim=64, config=TileConfig(64, 64, 4, 2), plain=True,
        why="causal: 1.63x FA2 at 2k, 1.56x at 16k"),
    Row(family="sm_90", head_dim=80, config=TileConfig(64, 64, 4, 2), plain=True,
        why="no spills; not measured"),
    Row(family="sm_90", head_dim=128, config=TileConfig(64, 128, 8, 2),
        plain=True, bounded=True, seqlen_from=8192,
        why="causal: 1.85x FA2 at 8k and 16k; (64, 64) 1.80x, 1.74x"),
    Row(family="sm_90", head_dim=128, config=TileConfig(64, 64, 4, 2), plain=True,
        why="2.28-2.41x FA2 full, 1.93x causal at 2k"),
    Row(family="sm_90", head_dim=128, config=TileConfig(32, 64, 4, 2),
        why="spills least with every option on"),
    Row(family="sm_90", head_dim=160, config=TileConfig(64, 128, 8, 2), plain=True, seqlen_from=4096,
        why="2.89x FA2 full, 2.73x causal at 16k; (32, 64) on four warps 2.64x, 2.74x"),
    Row(family="sm_90", head_dim=192, config=TileConfig(32, 64, 4, 2), plain=True,
        why="2.30x FA2 full, 1.83-1.89x causal; (64, 64) 1.30x; d160 at 2k: 2.71x, 2.81x"),
    Row(family="sm_90", head_dim=192, config=TileConfig(32, 64, 8, 2),
        why="spills least with every option on; plain calls run at 0.9x FA2"),
    Row(family="sm_90", head_dim=256, config=TileConfig(64, 64, 8, 2), plain=True,
        why="1.46-1.57x FA2 full, 1.24-1.30x causal"),
    Row(family="sm_90", head_dim=256, config=TileConfig(16, 64, 8, 2),
        why="spills least with every option on"),

    Row(family="sm_100", head_dim=128, config=TileConfig(64, 64, 4, 2),
        why="no spills; not measured"),
    Row(family="sm_100", head_dim=256, config=TileConfig(32, 64, 8, 2),
        why="spills least; not measured"),

    Row(family="sm_80", head_dim=64, config=TileConfig(32, 64, 4, 2),
        why="fits 99 KB; not measured"),
    Row(family="sm_80", head_dim=128, config=TileConfig(32, 64, 8, 2),
        why="fits 99 KB; not measured"),
    Row(family="sm_80", head_dim=256, config=TileConfig(16, 64, 8, 2),
        why="fits 99 KB; not measured"),

    Row(family="gfx9", head_dim=64, config=TileConfig(32, 64, 4, 1), why="no spills; not measured"),
    Row(family="gfx9", head_dim=128, config=TileConfig(32, 64, 8, 1),
        why="no spills; not measured"),
    Row(family="gfx9", head_dim=256, config=TileConfig(16, 64, 8, 1),
        why="no spills; not measured"),

    Row(family="interpreter", head_dim=256, config=TileConfig(16, 32, 4, 1),
        why="several tiles even of short sequences"),
    *(
        Row(family=family, head_dim=256, config=TileConfig(16, 16, 8, 1), float32=True,
            why="larger tiles of float32 take minutes to compile")
        for family in ("sm_80", "sm_90", "sm_100")
    ),
    Row(family="gfx9", head_dim=256, config=TileConfig(16, 16, 4, 1), float32=True,
        why="not measured"),
    Row(family="interpreter", head_dim=256, config=TileConfig(16, 32, 4, 1), float32=True,
        why="several tiles even of short sequences"),
)  # fmt: skip

DQ = (
    Row(family="sm_90", head_dim=64, config=TileConfig(64, 64, 4, 3), plain=True, bounded=True,
        why="causal: 4.03x FA2 at 2k, 3.5x at 16k"),
    Row(family="sm_90", head_dim=64, config=TileConfig(128, 64, 8, 3), plain=True, bounded=False,
        why="4.00x FA2 at 2k, 3.54x at 16k"),
    Row(family="sm_90", head_dim=128, config=TileConfig(128, 64, 8, 3), plain=True,
        why="3.5x FA2 full, 3.3x causal; two stages lose 20%"),
    Row(family="sm_90", head_dim=128, config=TileConfig(64, 32, 4, 2),
        why="no spills with every option on"),
    Row(family="sm_90", head_dim=256, config=TileConfig(128, 32, 8, 3), plain=True, bounded=False,
        why="s4k: 4.16x FA2; 64 queries 3.50x"),
    Row(family="sm_90", head_dim=256, config=TileConfig(64, 32, 4, 3), plain=True,
        why="causal: 3.4x FA2"),
    Row(family="sm_90", head_dim=256, config=TileConfig(64, 32, 8, 2),
        why="no spills with every option on"),

    Row(family="sm_100", head_dim=128, config=TileConfig(64, 64, 4, 2),
        why="no spills; not measured"),
    Row(family="sm_100", head_dim=256, config=TileConfig(64, 32, 4, 2),
        why="no spills; not measured"),

    Row(family="sm_80", head_dim=128, config=TileConfig(64, 64, 8, 2),
        why="fits 99 KB; not measured"),
    Row(family="sm_80", head_dim=256, config=TileConfig(64, 16, 8, 2),
        why="fits 99 KB; not measured"),

    Row(family="gfx9", head_dim=128, config=TileConfig(64, 32, 4, 1),
        why="no spills; not measured"),
    Row(family="gfx9", head_dim=256, config=TileConfig(32, 32, 4, 1),
        why="no spills; not measured"),

    Row(family="interpreter", head_dim=256, config=TileConfig(32, 16, 4, 1),
        why="several tiles even of short sequences"),
    *(
        Row(family=family, head_dim=256, config=TileConfig(16, 16, 8, 1), float32=True,
            why="larger tiles of float32 take minutes to compile")
        for family in ("sm_80", "sm_90", "sm_100")
    ),
    Row(family="gfx9", head_dim=256, config=TileConfig(16, 16, 4, 1), float32=True,
        why="not measured"),
    Row(family="interpreter", head_dim=256, config=TileConfig(32, 16, 4, 1), float32=True,
        why="several tiles even of short sequences"),
)  # fmt: skip
