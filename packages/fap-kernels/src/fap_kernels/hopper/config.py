"""Configurations of the Hopper schedules. docs/performance/hopper.md says how they were measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..problem import AttentionProblem

__all__ = [
    "BACKWARD",
    "BACKWARD_64",
    "BACKWARD_128",
    "BACKWARD_256",
    "CLUSTERED_128",
    "FORWARD",
    "FOUNDED_128",
    "LIFT",
    "MOST_DRAWN",
    "ORDERED_64",
    "ORDERED_128",
    "REDO",
    "BackwardConfig",
    "HopperConfig",
    "HopperRow",
    "RedoConfig",
    "choose",
]

WARPGROUP_ROWS = 64
"""Queries of one warpgroup of the forward, keys of one of the backward."""

LIFT = 12
"""Where weights of the backward wait as float16 they are 2^LIFT times as large. So those of a million keys
still are normal numbers, and 1 is far from float16's end. Until they leave, so are all gradients."""

MOST_DRAWN = 128
"""Tickets that a program draws at most where it must know them again: 512 bytes, less than barriers take."""

Config = TypeVar("Config")

REGISTERS = 1 << 16
"""Of a multiprocessor."""


@dataclass(frozen=True, slots=True)
class HopperConfig:
    """Shape and resources of one program.

    Attributes:
        width: columns of a tile, a power of two; what the head dimension lacks of it is filled with zeros.
        warpgroups: how many of them multiply, 64 queries each; one, two or three.
        block_n: keys in a tile.
        stages: tiles of keys, and of values, that are fetched ahead; at least two, since a step waits for the
            next one's keys before it gives its values back, and at most eight.
        persistent: one program a multiprocessor takes query tile after query tile. Otherwise a program takes
            one, and the hardware hands them out.
        paired: hand out pairs of a long and a short query tile, which under a causal mask all have the same
            work.
        overlap_tiles: start on the next query tile's scores beside the last product of this one; needs a
            persistent program, and shared memory for another tile of queries.
        out_parts: in how many parts of its columns, one or two, the output leaves through shared memory of
            its own, beside the next query tile's first scores, whose queries are fetched while this one's
            last weights are multiplied; needs a persistent program, and shared memory for a part. 0 lets the
            output leave through the place of the queries, or as ``overlap_tiles`` says.
        queries_ahead: fetch the next query tile's queries while this one's are in use, as ``overlap_tiles``
            does too; needs a persistent program, and shared memory for another tile of queries.
        optimistic: stop raising the reference of the softmax once each row has met a key.
        turns: let one warpgroup multiply while another weighs.
        hold_queries: keep a tile's queries in registers while its keys are swept, which takes a fifth from
            what products read of shared memory at width 128; a register for every two columns.
        beside: programs that share a multiprocessor and its registers, where one has a single warpgroup: what
            one of them waits for, the others fill with their work.
        tickets: have persistent programs draw query tiles from a counter, which one launch more sets to 0:
            where tiles take unequally long, or programs do not end together though their tiles are alike.
        cluster: let two programs on different multiprocessors share query tiles of twice as many rows, and
            fetch half of the keys and values each for both, which takes half of the traffic from the L2
            cache; for two warpgroups.
    """

    width: int
    warpgroups: int
    block_n: int
    stages: int
    persistent: bool = False
    paired: bool = False
    overlap_tiles: bool = False
    out_parts: int = 0
    queries_ahead: bool = False
    optimistic: bool = True
    turns: bool = False
    hold_queries: bool = False
    beside: int = 1
    tickets: bool = False
    cluster: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.stages <= 8:
            raise ValueError(
                f"stages must be 2 to 8, got {self.stages}: with one the warpgroups would wait forever, "
                "and there are no barriers for more"
            )
        if self.out_parts not in (0, 1, 2):
            raise ValueError(f"out_parts must be 0, 1 or 2, got {self.out_parts}")
        if self.out_parts and (self.overlap_tiles or self.width < 64 * self.out_parts):
            raise ValueError(
                "the output leaves in parts of at least 64 columns, and where tiles overlap as a whole"
            )
        if self.out_parts and not self.persistent:
            raise ValueError("out_parts needs a persistent program: another has no next query tile")
        if self.beside > 1 and self.warpgroups > 1:
            raise ValueError("programs of several warpgroups leave no registers for another one beside them")
        if self.cluster and (self.warpgroups != 2 or self.stages > 4):
            raise ValueError("programs of a cluster have two warpgroups and at most four stages")
        if self.cluster and (self.overlap_tiles or self.tickets):
            raise ValueError("programs of a cluster neither overlap query tiles nor draw them")
        queries = WARPGROUP_ROWS * self.warpgroups * (2 if self.queries_ahead else 1)
        if self.cluster and 2 * self.stages * self.block_n <= queries:
            raise ValueError("keys and values of a cluster lie where the most shared memory is taken")

    @property
    def maxnreg(self) -> int | None:
        """Registers of a thread that let ``beside`` programs share a multiprocessor.

        That is before a program shares its own out: the warp that fetches counts as a warpgroup here, and
        leaves most of its registers to the other.
        """
        if self.beside == 1:
            return None
        threads = self.beside * 128 * (self.warpgroups + 1)
        return REGISTERS // threads // 8 * 8  # they are handed out in eights


@dataclass(frozen=True, slots=True)
class BackwardConfig:
    """Shape and resources of one program of the backward pass.

    Attributes:
        width: columns of a tile, 64, 128 or 256; what the head dimension lacks of it is filled with zeros.
        block_m: queries in a tile. A warpgroup's half of a tile of dQ is 64 x 64, so 8192 / width, and 64 of
            256 columns.
        stages: tiles of queries, and of the output's gradient, that are fetched ahead; at most two.
        ordered: let key tiles add to dQ one after the other, though nobody has asked for the same bits on
            every run: then no memory need be zeroed before, nor, with a third warpgroup, dQ be brought to its
            place after, which counts where sequences are short.
        founded: let the first key tile that visits a query tile store its dQ, and those that follow add in
            any order once it is there: no memory need be zeroed before either, and the key tiles with most
            work can come first. For two warpgroups, and programs that are no cluster.
        three: let a third warpgroup make dQ, and programs stay for one key tile after the other, where
            tensors are bfloat16; for width 64.
        cluster: let two programs on different multiprocessors have neighbouring key tiles, and fetch the
            queries or the output's gradient for both, which takes a quarter of the traffic from the L2 cache;
            for width 128, neither ordered nor founded, where sequences are not packed.
    """

    width: int
    block_m: int
    stages: int
    ordered: bool = False
    founded: bool = False
    three: bool = False
    cluster: bool = False

    def __post_init__(self) -> None:
        if self.founded and (self.ordered or self.three or self.relay):
            raise ValueError("founded is for two warpgroups, up to 128 columns, and not with ordered")
        if self.three and (self.width, self.block_m) != (64, 128):
            raise ValueError(
                f"three warpgroups take 64 columns and 128 queries, got {self.width} and {self.block_m}"
            )
        free = not (self.ordered or self.founded)
        if self.cluster and (self.width, self.block_m, self.stages, free) != (128, 64, 2, True):
            raise ValueError(
                "programs of a cluster take 128 columns, 64 queries in two stages, neither order nor founding"
            )

    @property
    def relay(self) -> bool:
        """Whether three warpgroups make a gradient each, since two cannot hold two gradients each."""
        return self.width > 128

    @property
    def block_n(self) -> int:
        """Keys in a tile."""
        return WARPGROUP_ROWS if self.relay else 2 * WARPGROUP_ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class HopperRow(Generic[Config]):
    """One row of the table: which calls it is for, and why it holds what it holds.

    Attributes:
        head_dim: the largest head dimension that it is for.
        config: what to run; None for the portable kernel.
        why: what was measured.
        bounded: only with (True) or without (False) a window or causal mask; None is both.
        plain: only calls without softcap and ALiBi (True), or with one of them (False); None is both.
        alibi: only with (True) or without (False) ALiBi; None is both.
        packed: only packed sequences (True), or none (False); None is both.
        bfloat16: only bfloat16 (True), or only others (False); None is both.
        windowed: only with (True) or without (False) a bound on the left; None is both.
        grouped: only where query heads share key heads (True), or where none do (False); None is both.
        seqlen_from, seqlen_below: the least ``seqlen_k``, and the least that is too long; None for any.
        queries_from, queries_below: the same of ``seqlen_q``.
        by_default: to be taken as a matter of course; else only where ``use_schedule("hopper")`` asks for it.
    """

    head_dim: int
    config: Config | None
    why: str
    bounded: bool | None = None
    plain: bool | None = None
    alibi: bool | None = None
    packed: bool | None = None
    bfloat16: bool | None = None
    windowed: bool | None = None
    grouped: bool | None = None
    seqlen_from: int = 0
    seqlen_below: int | None = None
    queries_from: int = 0
    queries_below: int | None = None
    by_default: bool = True

    def fits(self, problem: AttentionProblem) -> bool:
        """Whether the row is for this call."""
        bounded = problem.window_left >= 0 or problem.window_right >= 0
        plain = problem.softcap == 0.0 and problem.alibi is None
        return (
            problem.head_dim <= self.head_dim
            and self.bounded in (None, bounded)
            and self.plain in (None, plain)
            and self.alibi in (None, problem.alibi is not None)
            and self.packed in (None, problem.packed)
            and self.bfloat16 in (None, problem.dtype == torch.bfloat16)
            and self.windowed in (None, problem.window_left >= 0)
            and self.grouped in (None, problem.nheads != problem.nheads_k)
            and problem.seqlen_k >= self.seqlen_from
            and (self.seqlen_below is None or problem.seqlen_k < self.seqlen_below)
            and problem.seqlen_q >= self.queries_from
            and (self.queries_below is None or problem.seqlen_q < self.queries_below)
        )


@dataclass(frozen=True, slots=True)
class RedoConfig:
    """Shape and resources of a program that computes marked query tiles again.

    Attributes:
        block_m, block_n, num_warps, num_stages: as in :class:`fap_kernels.config.TileConfig`.
        scan: query tiles that a program looks at.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    scan: int


# One program a multiprocessor, which overlaps its query tiles, while its warpgroups take turns.
_FLOWING = {"persistent": True, "overlap_tiles": True, "turns": True}

# The same of three warpgroups that draw their query tiles, and overlap but the fetching of queries.
_DRAWN_64 = HopperConfig(64, 3, 128, 3, persistent=True, queries_ahead=True, turns=True, tickets=True)

# TFLOP/s against the portable kernel's and cuDNN's in the same run; H200, bf16, 16,384 tokens,
# nheads * head_dim = 2048, Triton 3.6. Read from the top; the first row that fits is taken.
FORWARD: tuple[HopperRow[HopperConfig], ...] = (
    # Packed: 32 sequences of 2048, and 65,536 tokens in lengths drawn from a log-normal ("mixed"); H100.
    HopperRow(head_dim=56, packed=True, plain=True, config=HopperConfig(64, 3, 128, 3), by_default=False,
              why="its speed on packed sequences is not measured at head dimensions below 64"),
    HopperRow(head_dim=64, packed=True, plain=True, bounded=False, config=_DRAWN_64,
              why="496 at 2k, 489 mixed; portable 408, 400; one warpgroup 439, 436"),
    HopperRow(head_dim=64, packed=True, plain=True,
              config=HopperConfig(64, 1, 64, 3, persistent=True, overlap_tiles=True, beside=3, tickets=True),
              why="436 at 2k, 451 mixed, H200; one tile a program 400, 414, portable 322, 334"),
    HopperRow(head_dim=128, packed=True, plain=True, bounded=True,
              config=HopperConfig(
                  128, 2, 128, 2, persistent=True, hold_queries=True, out_parts=1, tickets=True),
              why="537 at 2k, 546 mixed, H200; tiles overlapped, queries not held 511, 527"),
    HopperRow(head_dim=128, packed=True, plain=True, bounded=False,
              config=HopperConfig(
                  128, 2, 128, 2, persistent=True, turns=True, hold_queries=True, out_parts=1, tickets=True),
              why="638 at 2k, 627 mixed, H200; tiles overlapped, queries not held 628, 620"),
    HopperRow(head_dim=256, packed=True, plain=True,
              config=HopperConfig(256, 2, 64, 2, persistent=True, turns=True, tickets=True, out_parts=2),
              why="681, causal 583 at 2k, 562 mixed, H200; one tile a program 626, 519, 534"),

    # ALiBi raises logits far from where the sweep starts, so a reference that stays would be outgrown.
    HopperRow(head_dim=64, plain=False, config=HopperConfig(64, 1, 64, 3, optimistic=False, beside=3),
              why="0.98 to 1.03 of the portable kernel's speed at 4k; two warpgroups 0.80 to 0.95"),
    HopperRow(head_dim=128, plain=False, config=HopperConfig(128, 2, 128, 2, optimistic=False, turns=True),
              why="4k: softcap 395, causal 340, ALiBi, causal 484; portable 352, 335, 398"),
    HopperRow(head_dim=256, plain=False, config=HopperConfig(256, 2, 64, 2, optimistic=False),
              why="causal at 4k, softcap 1.47 and ALiBi 1.55 of the portable kernel's speed"),

    HopperRow(head_dim=32, bounded=True, config=HopperConfig(64, 3, 128, 3), by_default=False,
              why="the portable kernel is faster at head dimensions up to 32: by 1.08 at 4k, causal"),
    # A row of less than 64 columns costs the TMA unit as much as one of 64: fewer, larger tiles.
    HopperRow(head_dim=56, bounded=False, config=HopperConfig(64, 3, 128, 3, **_FLOWING),
              why="d40: 348 at 4k; tiles not overlapped 338; portable 223, cuDNN 295"),
    # A window has few key tiles for each query tile: what counts is what happens between query tiles.
    HopperRow(head_dim=64, windowed=True, seqlen_from=1024, config=HopperConfig(64, 1, 64, 3, beside=3),
              why="window of 256, 8k: 1.61 of the portable kernel's speed; two warpgroups 1.21, three 0.60"),
    HopperRow(head_dim=56, bounded=True, windowed=False, seqlen_from=1024,
              config=HopperConfig(64, 2, 128, 3, paired=True, **_FLOWING),
              why="d40: 301 at 4k; three warpgroups 281; portable 209, cuDNN 273"),
    HopperRow(head_dim=56, bounded=True, config=HopperConfig(64, 3, 128, 3), by_default=False,
              why="d40: the portable kernel is faster by 1.3 at 512, causal"),
    HopperRow(head_dim=64, bounded=False, seqlen_from=1024, config=_DRAWN_64,
              why="440 at 1k, 514 at 2k, 588 at 8k, 596 at 16k; no tickets 429, 504, 576; 589, none ahead"),
    HopperRow(head_dim=64, bounded=False,
              config=HopperConfig(
                  64, 1, 64, 3, persistent=True, hold_queries=True, out_parts=1, beside=3, tickets=True),
              why="380, 382 at 512, in two runs; tiles overlapped 371, 380; two warpgroups 377 to 382"),
    HopperRow(head_dim=64, bounded=True, windowed=False, seqlen_from=12288,
              config=HopperConfig(64, 3, 128, 3, turns=True),
              why="554 at 16k; drawn 550; 548 where pairs have 556, but they leave few heads' programs idle"),
    HopperRow(head_dim=64, bounded=True, windowed=False, seqlen_from=8192, config=_DRAWN_64,
              why="530 at 8k; one tile a program 520; of other runs portable 395, cuDNN 428"),
    HopperRow(head_dim=64, bounded=True, windowed=False, seqlen_from=2048,
              config=HopperConfig(64, 2, 128, 3, paired=True, **_FLOWING),
              why="423 at 2k, 480 at 4k; drawn, three warpgroups 423, 476; of other runs portable 331, 366"),
    HopperRow(head_dim=64, bounded=True,
              config=HopperConfig(
                  64, 1, 64, 3, persistent=True, paired=True, overlap_tiles=True, hold_queries=True,
                  beside=3),
              why="271 at 512, 346 at 1k; queries not held 269, 335; two warpgroups, held 262, 341"),

    # A cluster has 256 queries at a time, so with few of them many of its programs would have none.
    HopperRow(head_dim=128, bounded=False, seqlen_from=1024, queries_from=1024,
              config=HopperConfig(
                  128, 2, 128, 2, persistent=True, turns=True, hold_queries=True, out_parts=1,
                  cluster=True),
              why="604 at 1k, 680 at 2k, 739 at 8k, 764 at 16k; no clusters 574, 639, 722, 725"),
    HopperRow(head_dim=128, bounded=False, seqlen_from=2048, queries_below=1024,
              config=HopperConfig(
                  128, 2, 128, 2, persistent=True, turns=True, hold_queries=True, out_parts=1),
              why="642 at 2k, 720 at 8k, 733 at 16k; tiles overlapped, queries not held 636, 710, 729"),
    HopperRow(head_dim=128, bounded=False,
              config=HopperConfig(
                  128, 2, 64, 4, persistent=True, turns=True, hold_queries=True, out_parts=1),
              why="518 at 512; tiles overlapped, queries not held 511; 128 keys 500, in clusters 0.975"),
    HopperRow(head_dim=128, windowed=True, seqlen_from=1024,
              config=HopperConfig(128, 2, 128, 2, persistent=True, overlap_tiles=True),
              why="window of 256 at 8k: 1.05 of the portable kernel's speed, one tile a program 0.91"),
    # It takes 512 in pairs, of which few heads have too few for all multiprocessors.
    HopperRow(head_dim=128, bounded=True, windowed=False, seqlen_from=4096, queries_from=4096,
              config=HopperConfig(
                  128, 2, 128, 2, persistent=True, paired=True, turns=True, hold_queries=True, out_parts=1,
                  cluster=True),
              why="639 at 4k, 697 at 8k, 713 at 16k; one tile a program, no clusters 642, 701 at 8k, 16k"),
    HopperRow(head_dim=128, bounded=True, windowed=False, seqlen_from=4096, queries_below=4096,
              config=HopperConfig(128, 2, 128, 2, hold_queries=True),
              why="634 at 8k, 681 at 16k; queries not held 622, 665; of other runs portable 451, 476"),
    HopperRow(head_dim=128, bounded=True, windowed=False, seqlen_from=2048, queries_from=2048,
              config=HopperConfig(
                  128, 2, 64, 4, persistent=True, paired=True, turns=True, hold_queries=True, out_parts=1,
                  cluster=True),
              why="552 at 2k; no clusters 549; tiles overlapped, queries not held 543; 128 keys 548"),
    HopperRow(head_dim=128, bounded=True, windowed=False, seqlen_from=1024,
              config=HopperConfig(
                  128, 2, 64, 4, persistent=True, paired=True, turns=True, hold_queries=True, out_parts=1),
              why="458 at 1k, 549 at 2k; tiles overlapped, queries not held 454, 543; clusters 450, 552"),
    HopperRow(head_dim=128, bounded=True, config=HopperConfig(128, 2, 64, 4, tickets=True, **_FLOWING),
              why="341 at 512, 437 at 1k; pairs 329, 441"),

    HopperRow(head_dim=160, bounded=True, config=HopperConfig(256, 2, 64, 2, turns=True), by_default=False,
              why="d160: the portable kernel is faster by 1.11 at 4k, causal"),
    HopperRow(head_dim=256, bounded=False, seqlen_from=2048, queries_from=1024,
              config=HopperConfig(256, 2, 64, 2, persistent=True, out_parts=2, cluster=True),
              why="696 at 2k, 755 at 8k, 767 at 16k; no clusters 687, 747, 761"),
    HopperRow(head_dim=256, bounded=False,
              config=HopperConfig(256, 2, 64, 2, persistent=True, turns=True, out_parts=2),
              why="544 at 512, 697 at 2k, 752 at 8k; by the queries' place 494, 671, 747"),
    HopperRow(head_dim=256, bounded=True, windowed=False, seqlen_from=1024, queries_from=1024,
              config=HopperConfig(
                  256, 2, 64, 2, persistent=True, paired=True, out_parts=2, cluster=True),
              why="476 at 1k, 653 at 4k, 709 at 8k; no clusters 469, 632, one tile a program 676 at 8k"),
    HopperRow(head_dim=256, bounded=True, windowed=False, seqlen_from=1024, queries_below=1024,
              config=HopperConfig(256, 2, 64, 2, turns=True),
              why="with as many queries 676 at 8k; 686 where pairs, of which few heads have few, have 677"),
    HopperRow(head_dim=256, bounded=True, windowed=True, seqlen_from=8192,
              config=HopperConfig(256, 2, 64, 2, turns=True),
              why="causal, which the rows above have since: 686 at 8k, 706 at 16k; pairs 677, 685"),
    HopperRow(head_dim=256, bounded=True, windowed=True, seqlen_from=1024,
              config=HopperConfig(256, 2, 64, 2, persistent=True, paired=True, turns=True, out_parts=2),
              why="causal, as above: 470 at 1k, 572 at 2k, 649 at 4k; by the queries' place 544 at 2k"),
    HopperRow(head_dim=256, bounded=True,
              config=HopperConfig(256, 2, 64, 2, persistent=True, turns=True, tickets=True, out_parts=2),
              why="353 at 512, 443 at 1k; pairs 342, 470"),
)  # fmt: skip

# Run for marked tiles alone; small, so that many programs look at marks side by side.
REDO = {
    64: RedoConfig(64, 64, 4, 2, 16),
    128: RedoConfig(64, 64, 4, 2, 16),
    256: RedoConfig(64, 32, 8, 2, 16),
}

BACKWARD_64 = BackwardConfig(width=64, block_m=128, stages=2, three=True)
BACKWARD_128 = BackwardConfig(width=128, block_m=64, stages=2)
BACKWARD_256 = BackwardConfig(width=256, block_m=64, stages=2)
ORDERED_64 = replace(BACKWARD_64, ordered=True)
ORDERED_128 = replace(BACKWARD_128, ordered=True)
FOUNDED_128 = replace(BACKWARD_128, founded=True)
CLUSTERED_128 = replace(BACKWARD_128, cluster=True)

# TFLOP/s of the whole backward against the portable one's and cuDNN's in the same run; H200, bf16, 16,384
# tokens, nheads * head_dim = 2048, Triton 3.6; FA4's are of an H100. Read from the top; the first row that
# fits is taken.
BACKWARD: tuple[HopperRow[BackwardConfig], ...] = (
    HopperRow(head_dim=64, alibi=True, config=BACKWARD_64, by_default=False,
              why="with ALiBi the portable kernels are faster: causal at 4k by 1.3, float16 by 2.4"),
    HopperRow(head_dim=64, plain=False, bfloat16=False, config=BACKWARD_64, by_default=False,
              why="with softcap in float16 the portable kernels are faster: by 1.35 at 4k"),
    HopperRow(head_dim=64, windowed=True, bfloat16=False, config=BACKWARD_64, by_default=False,
              why="with a window to the left in float16 the portable kernels are faster: by 1.1 to 1.25"),
    HopperRow(head_dim=16, config=BACKWARD_64, by_default=False,
              why="d16: the portable kernels are faster: by 1.06 at 4k, causal 1.12"),
    HopperRow(head_dim=32, bfloat16=False, config=BACKWARD_64, by_default=False,
              why="d32 in float16: the portable kernels are faster: by 1.1 at 4k, causal 1.27"),
    HopperRow(head_dim=24, plain=True, windowed=False, packed=False, config=BACKWARD_64,
              why="d24: 1.37 of the portable kernels' speed at 512, 1.40 at 4k, causal 1.07, 1.30"),
    HopperRow(head_dim=32, bounded=True, seqlen_below=8192, config=BACKWARD_64, by_default=False,
              why="d32, causal: the portable kernels are faster: by 1.07 at 512"),
    HopperRow(head_dim=32, plain=True, windowed=False, packed=False, config=BACKWARD_64,
              why="d32: 1.10 of the portable kernels' speed at 512, 1.13 at 4k, causal 1.09 at 16k"),
    HopperRow(head_dim=32, config=BACKWARD_64, by_default=False,
              why="d32 with options, or packed, is not measured"),
    HopperRow(head_dim=64, plain=False, config=BACKWARD_64,
              why="with softcap 1.57 of the portable kernels' speed at 4k, causal 1.29"),
    HopperRow(head_dim=64, windowed=True, config=BACKWARD_64,
              why="at 8k 1.27 of the portable kernels' speed with 1024 keys, 1.05 with 256"),
    # Key tiles of a group are fewer and longer, and wait for each other longer.
    HopperRow(head_dim=64, packed=False, bounded=True, grouped=True, config=BACKWARD_64,
              why="causal, groups of 4: 423 at 2k; in order 389"),
    HopperRow(head_dim=64, packed=False, bfloat16=True, seqlen_below=4096, config=ORDERED_64,
              why="400 at 512, 458 at 1k, 493 at 2k; free order 425, 476 at 1k, 2k; causal 247 at 512"),
    HopperRow(head_dim=64, packed=False, bounded=False, seqlen_below=1024, config=ORDERED_64,
              why="float16: 297 at 512; free order 282"),
    HopperRow(head_dim=64, packed=False, bounded=True, seqlen_below=4096, config=ORDERED_64,
              why="float16, causal: 168 at 512, 374 at 2k; free order 163 at 512"),
    HopperRow(head_dim=64, bounded=False, config=BACKWARD_64,
              why="505 at 4k, 521 at 8k, 537 at 16k; in order 507, 519, 534; one tile a program 480, 506"),
    HopperRow(head_dim=64, seqlen_from=1024, config=BACKWARD_64,
              why="causal: 511 at 8k, 536 at 16k; two warpgroups 449, 476; d40 1.80 of portable"),
    HopperRow(head_dim=64, bfloat16=False, config=BACKWARD_64, by_default=False,
              why="packed, causal, float16: the portable kernels are faster by 1.06 at 512"),
    HopperRow(head_dim=64, config=BACKWARD_64,
              why="packed, causal: 1.11 of the portable kernels' speed at 512"),

    HopperRow(head_dim=128, alibi=True, config=BACKWARD_128, by_default=False,
              why="with ALiBi the portable kernels are faster: by 1.2 at 4k, causal 1.35"),
    HopperRow(head_dim=128, packed=False, bounded=True, windowed=False, grouped=True, config=BACKWARD_128,
              why="causal, groups of 4: 256 at 512, 456 at 2k; in order 247, 354"),
    HopperRow(head_dim=128, packed=False, plain=True, windowed=False, grouped=False, seqlen_below=4096,
              config=FOUNDED_128,
              why="full 376 at 512, 529 at 2k, causal 252, 457; in order 378, 517, 248, 446"),
    HopperRow(head_dim=128, packed=False, plain=True, bounded=True, windowed=False, grouped=False,
              seqlen_below=8192, config=FOUNDED_128,
              why="causal 505, 511 at 4k, in two runs; free order 500, 504; at 8k 552 to its 551"),
    HopperRow(head_dim=128, packed=False, seqlen_below=4096, config=ORDERED_128,
              why="plain calls, which rows above have since: 374 at 512, causal 434 at 2k; free 348, 406"),
    HopperRow(head_dim=128, bounded=False, plain=True, packed=False, config=CLUSTERED_128,
              why="580 at 8k; no clusters 571; causal 531, 550 (the GPU was slower that day than below)"),
    HopperRow(head_dim=128, bounded=False, config=BACKWARD_128,
              why="574 at 8k, 589 at 16k; portable 393, 405, cuDNN 531, 554, FA4 619, 637"),
    HopperRow(head_dim=128, windowed=True, config=BACKWARD_128,
              why="at 8k 1.29 of the portable kernels' speed with 1024 keys, 1.19 with 256"),
    HopperRow(head_dim=128, seqlen_from=1024, config=BACKWARD_128,
              why="causal: 547 at 8k, 579 at 16k; portable 337, 369, cuDNN 485, 540; softcap 1.33x"),
    HopperRow(head_dim=128, config=BACKWARD_128, by_default=False,
              why="packed, causal: the portable kernels are faster by 1.09 at 512"),
    HopperRow(head_dim=176, config=BACKWARD_256, by_default=False,
              why="d136, d160: the portable kernels are faster by 1.16 to 1.33"),
    HopperRow(head_dim=192, bounded=False, config=BACKWARD_256, by_default=False,
              why="d192, full: the portable kernels are faster by 1.06 to 1.09"),
    HopperRow(head_dim=256, config=BACKWARD_256,
              why="280 at 512, 425 at 16k, causal 191, 414; portable 204, 265, 140, 253; softcap 4x"),
)  # fmt: skip


def choose(table: Iterable[HopperRow[Config]], problem: AttentionProblem) -> HopperRow[Config]:
    """The first row that fits.

    Raises:
        LookupError: no row fits, which is a mistake in the table.
    """
    for row in table:
        if row.fits(problem):
            return row
    raise LookupError(f"no configuration for {problem}")
