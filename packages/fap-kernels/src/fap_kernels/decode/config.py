"""Tile sizes of the split-KV kernel. docs/performance/decode.md says how they were measured."""

from __future__ import annotations

from ..config import Row, TileConfig

__all__ = ["COMBINE", "DECODE", "DECODE_MANY", "FEW_ROWS", "MANY_ROWS"]

FEW_ROWS = 16
"""Rows of a tile that tensor cores take at least; more than these are held in tiles of DECODE_MANY."""

MANY_ROWS = 128
"""Queries times heads of a group up to which keys are split; beyond, the forward kernel fills the chip."""

DECODE = (
    Row(family="sm_90", head_dim=64, config=TileConfig(16, 128, 4, 4),
        why="as many bytes in flight as for d128; not measured"),
    # Of what is fetched by address, five stages keep two tiles on their way, where three or four keep one.
    Row(family="sm_90", head_dim=128, paged=True, seqlen_from=4096, config=TileConfig(16, 64, 4, 5),
        why="pages of 16: 4,023 GB/s at 16 x 8k, 4,196 at 64 x 4k, 3,753 at 1 x 64k; as below 3,922, 4,210, "
            "3,645, but at 128 x 1k 3,747 and 3,862"),
    Row(family="sm_90", head_dim=128, config=TileConfig(16, 128, 4, 3),
        why="4,066 GB/s at 16 x 8k, 4,270 at 64 x 4k; 64 keys 3,924, 4,233; two stages 3,929, 3,937"),
    Row(family="sm_90", head_dim=256, paged=True, config=TileConfig(16, 32, 4, 5),
        why="as many bytes in flight as for d128; 64 keys spill, with Triton 3.4 388 bytes; not measured"),
    Row(family="sm_90", head_dim=256, paged=False, config=TileConfig(16, 64, 4, 3),
        why="as many bytes in flight as for d128; not measured"),
    *(
        row
        for family in ("sm_80", "sm_100")
        for row in (
            Row(family=family, head_dim=128, config=TileConfig(16, 64, 4, 2), why="fits 99 KB; not measured"),
            Row(family=family, head_dim=256, config=TileConfig(16, 32, 4, 2), why="fits 99 KB; not measured"),
        )
    ),
    Row(family="gfx9", head_dim=256, config=TileConfig(16, 32, 4, 1), why="not measured"),
    Row(family="interpreter", head_dim=256, config=TileConfig(16, 16, 4, 1), why="several tiles of few keys"),
    *(
        Row(family=family, head_dim=256, config=TileConfig(16, 16, 8, 1), float32=True,
            why="larger tiles of float32 take minutes to compile")
        for family in ("sm_80", "sm_90", "sm_100", "gfx9", "interpreter")
    ),
)  # fmt: skip

DECODE_MANY = (
    Row(family="sm_90", head_dim=128, config=TileConfig(64, 64, 4, 3), why="not measured"),
    Row(family="sm_90", head_dim=256, config=TileConfig(64, 32, 4, 2), why="not measured"),
    *(
        row
        for family in ("sm_80", "sm_100")
        for row in (
            Row(family=family, head_dim=128, config=TileConfig(64, 64, 8, 2),
                why="fits 99 KB; four warps spill with Triton 3.4; not measured"),
            Row(family=family, head_dim=256, config=TileConfig(64, 32, 8, 2), why="fits 99 KB; not measured"),
        )
    ),
    Row(family="gfx9", head_dim=256, config=TileConfig(64, 32, 4, 1), why="not measured"),
    Row(family="interpreter", head_dim=256, config=TileConfig(32, 16, 4, 1), why="several tiles of few keys"),
    *(
        Row(family=family, head_dim=256, config=TileConfig(16, 16, 8, 1), float32=True,
            why="larger tiles of float32 take minutes to compile")
        for family in ("sm_80", "sm_90", "sm_100", "gfx9", "interpreter")
    ),
)  # fmt: skip

# Reads each share once, 32 of them at a time.
COMBINE = TileConfig(1, 32, 4, 1)
