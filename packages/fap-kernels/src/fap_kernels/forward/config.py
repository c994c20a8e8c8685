"""Tile sizes of the forward pass. docs/performance/portable.md says how they were measured."""

from __future__ import annotations

from ..config import Row, TileConfig

__all__ = ["FORWARD", "PROBABILITIES"]

# x FA2: our speed over that of PyTorch's FlashAttention-2 back end in the same run; H200, bf16,
# 16,384 tokens, nheads * head_dim = 2048, Triton 3.6.
FORWARD = (
    Row(family="sm_90", head_dim=48, config=TileConfig(128, 64, 8, 3), plain=True,
        why="d40, s4k: 1.46x FA2 full, 1.33x causal; four warps lost 15%"),
    Row(family="sm_90", head_dim=64, config=TileConfig(64, 128, 4, 2), plain=True, bounded=False,
        why="1.52x FA2 at 2k, 1.45x at 16k"),
    Row(family="sm_90", head_dim=64, config=TileConfig(64, 128, 4, 3), plain=True, seqlen_from=8192,
        why="causal: 1.36x FA2 at 8k, 1.39-1.48x at 16k"),
    Row(family="sm_90", head_dim=64, config=TileConfig(64, 64, 4, 3),
        why="causal, 2k: 1.29-1.42x FA2, 128 keys 1.24-1.31x; no spills with every option on"),
    Row(family="sm_90", head_dim=80, config=TileConfig(64, 64, 4, 3),
        why="s4k: 1.64x FA2 full, 1.58x causal"),
    Row(family="sm_90", head_dim=96, config=TileConfig(128, 64, 8, 3), plain=True,
        why="s4k: 1.37x FA2 full, 1.33x causal; 64 queries 1.20x"),
    Row(family="sm_90", head_dim=128, config=TileConfig(128, 128, 8, 3),
        plain=True, bounded=False, seqlen_from=4096,
        why="1.41x FA2 at 4k, 1.51x at 16k (530 TFLOP/s); (64, 64) 1.36x, 1.40x"),
    Row(family="sm_90", head_dim=128, config=TileConfig(128, 128, 8, 3),
        plain=True, bounded=True, seqlen_from=12288,
        why="causal, 16k: 1.54-1.59x FA2; (64, 64) 1.49-1.53x"),
    Row(family="sm_90", head_dim=128, config=TileConfig(64, 64, 4, 3),
        why="2k: 1.40-1.53x FA2 full, 1.58-1.68x causal; no spills with every option on"),
    Row(family="sm_90", head_dim=160, config=TileConfig(64, 64, 4, 2),
        why="d160, s4k: 1.91x FA2 full, 1.86x causal"),
    Row(family="sm_90", head_dim=192, config=TileConfig(128, 64, 8, 3), plain=True,
        why="s4k: 1.54x FA2 full, 1.52x causal"),
    Row(family="sm_90", head_dim=256, config=TileConfig(128, 64, 8, 2), plain=True,
        why="1.59-1.67x FA2 full, 1.44-1.83x causal; d224, s4k: 1.84x, 1.75x"),
    Row(family="sm_90", head_dim=256, config=TileConfig(128, 32, 8, 3),
        why="the largest that does not spill with every option on"),

    Row(family="sm_100", head_dim=64, config=TileConfig(128, 64, 4, 3),
        why="compiles without spills; not measured"),
    Row(family="sm_100", head_dim=128, config=TileConfig(128, 64, 8, 2),
        why="compiles without spills; not measured"),
    Row(family="sm_100", head_dim=256, config=TileConfig(128, 32, 8, 2),
        why="compiles without spills; not measured"),

    Row(family="sm_80", head_dim=64, config=TileConfig(64, 64, 4, 3),
        why="fits 99 KB; not measured"),
    Row(family="sm_80", head_dim=128, config=TileConfig(64, 64, 4, 2),
        why="fits 99 KB; not measured"),
    Row(family="sm_80", head_dim=256, config=TileConfig(64, 32, 8, 2),
        why="fits 99 KB; not measured"),

    Row(family="gfx9", head_dim=64, config=TileConfig(128, 64, 4, 1),
        why="no spills; not measured"),
    Row(family="gfx9", head_dim=128, config=TileConfig(128, 64, 8, 1),
        why="no spills; not measured"),
    Row(family="gfx9", head_dim=256, config=TileConfig(64, 32, 4, 1),
        why="no spills; not measured"),

    Row(family="interpreter", head_dim=256, config=TileConfig(32, 16, 4, 1),
        why="several tiles even of short sequences"),

    # float32 products are scalar FMAs whose operands Triton holds in registers whole: larger tiles spill by
    # kilobytes and take minutes to compile.
    *(
        row
        for family in ("sm_80", "sm_90", "sm_100")
        for row in (
            Row(family=family, head_dim=64, config=TileConfig(32, 32, 8, 1), float32=True,
                why="no spills"),
            Row(family=family, head_dim=128, config=TileConfig(32, 16, 8, 1), float32=True,
                why="compiles in 2 s"),
            Row(family=family, head_dim=256, config=TileConfig(16, 16, 8, 1), float32=True,
                why="compiles in 1 s"),
        )
    ),
    Row(family="gfx9", head_dim=256, config=TileConfig(16, 16, 4, 1), float32=True,
        why="not measured"),
    Row(family="interpreter", head_dim=256, config=TileConfig(32, 16, 4, 1), float32=True,
        why="several tiles even of short sequences"),
)  # fmt: skip

# Written to be looked at, not to be fast: one size that every chip holds.
PROBABILITIES = TileConfig(32, 32, 4, 1)
