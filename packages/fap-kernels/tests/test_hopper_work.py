"""How the Hopper forward divides its work, and how it mends marked tiles, in Triton's interpreter."""

from __future__ import annotations

import heapq
import itertools
import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from fap_kernels import AttentionProblem, attention_forward
from fap_kernels.hopper import work
from fap_kernels.hopper.launch import heads_beside, plan_redo
from fap_kernels.packing import slot_count

pytestmark = pytest.mark.interpreter
FIELDS = 15
BLOCK_M, BLOCK_N = 128, 64


@triton.jit
def list_work(
    found, cu_seqlens_q, cu_seqlens_k, entries, slots, nheads, seqlen_q, seqlen_k,
    window_left, window_right, items, heads_beside, tickets, MOST,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAIRED: tl.constexpr, CLUSTER: tl.constexpr,
):  # fmt: skip
    """Write down each turn of a program, ``(programs, MOST, FIELDS)``."""
    call = work.Call(
        cu_seqlens_q,
        cu_seqlens_k,
        None,
        None,
        entries,
        slots,
        nheads,
        1,
        seqlen_q,
        seqlen_k,
        window_left,
        window_right,
        items,
        heads_beside,
        tickets,
        True if CLUSTER else None,
    )
    row = found + tl.program_id(0) * MOST * 15
    turn, tile = work.next_tile(call, work.first_turn(call), BLOCK_M, PAIRED)
    while work.there_is(call, turn, PAIRED):
        sweep = work.sweep_of(call, tile, BLOCK_M, BLOCK_N)
        for part in range(BLOCK_M // 64):
            first_row = tile.first_query + part * 64
            above = work.steps_above(call, tile, sweep, first_row, 64, BLOCK_N)
            own = work.Sweep(sweep.top - above * BLOCK_N, sweep.count - above)
            phases = work.phases_of(call, tile, own, first_row, 64, BLOCK_N)
            tl.store(row + 13 + part, above)
            tl.store(row + 9 + 2 * part, phases.settled)
            tl.store(row + 10 + 2 * part, phases.unmasked_end)
        tl.store(row, 1)
        tl.store(row + 1, tile.batch)
        tl.store(row + 2, tile.head)
        tl.store(row + 3, tile.first_query)
        tl.store(row + 4, tile.seqlen_q)
        tl.store(row + 5, tile.seqlen_k)
        tl.store(row + 6, tile.q_start)
        tl.store(row + 7, sweep.top)
        tl.store(row + 8, sweep.count)
        row += 15
        turn, tile = work.next_tile(call, work.turn_after(call, turn), BLOCK_M, PAIRED)


def turns(
    lengths_q: list[int], lengths_k: list[int], nheads: int, window: tuple[Any, Any], paired: bool,
    packed: bool, tickets: bool = False, heads_beside: int | None = None, cluster: bool = False,
) -> list[list[list[int]]]:  # fmt: skip
    """The turns of each of three programs, or of those of three clusters."""
    programs, most = 6 if cluster else 3, 64
    tiles = -(-max(lengths_q) // (2 * BLOCK_M if cluster else BLOCK_M))
    entries, slots = None, len(lengths_q) * (-(-tiles // 2) if paired else tiles)
    if packed:
        entries, slots = len(lengths_q), slot_count(sum(lengths_q), len(lengths_q), BLOCK_M)
    items = nheads * slots
    bounds = [
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) if packed else None
        for lengths in (lengths_q, lengths_k)
    ]
    found = torch.zeros(programs, most, FIELDS, dtype=torch.int32)
    list_work[(programs,)](
        found,
        *bounds,
        entries,
        slots,
        nheads,
        max(lengths_q),
        max(lengths_k),
        *window,
        items,
        heads_beside,
        torch.zeros(1, dtype=torch.int32) if tickets else None,
        most,
        BLOCK_M,
        BLOCK_N,
        paired,
        cluster,
    )
    return [[turn for turn in program.tolist() if turn[0]] for program in found]


@pytest.mark.parametrize("seed", range(24))
def test_every_tile_has_one_turn_and_every_key_its_step(seed: int) -> None:
    rng = random.Random(seed)
    packed, paired = seed % 3 == 1, seed % 3 == 2
    count, nheads = rng.randint(1, 3), rng.randint(1, 2)
    if packed:
        lengths_q, lengths_k = ([rng.choice([0, 1, rng.randint(1, 500)]) for _ in range(count)] for _ in "qk")
        lengths_q[0], lengths_k[0] = 300, 200
    else:
        lengths_q, lengths_k = [rng.randint(65, 700)] * count, [rng.randint(1, 700)] * count
    bound = rng.choice([None, 0, rng.randint(0, 300)]), rng.choice([None, 0, rng.randint(0, 300)])
    beside = rng.choice([None, 1, 2, 5]) if seed % 3 == 0 else None
    tickets = packed and seed % 2 == 1
    cluster = not packed and seed % 2 == 1
    programs = turns(lengths_q, lengths_k, nheads, bound, paired, packed, tickets, beside, cluster)
    found = [turn for program in programs for turn in program]
    expected = {
        (batch, head, first + after)
        for batch, length in enumerate(lengths_q)
        for head in range(nheads)
        for first in range(0, length, 2 * BLOCK_M if cluster else BLOCK_M)
        for after in ((0, BLOCK_M) if cluster else (0,))  # the second half may lie beyond the end
    }
    assert len(found) == len(expected)
    assert {tuple(turn[1:4]) for turn in found} == expected
    for turn in found:
        check_sweep(turn, lengths_q[turn[1]], lengths_k[turn[1]], bound, cluster)
    if cluster:
        for first, second in zip(programs[::2], programs[1::2], strict=True):
            assert [turn[7:9] for turn in first] == [turn[7:9] for turn in second], "other keys"
            assert [turn[3] + BLOCK_M for turn in first] == [turn[3] for turn in second], "not side by side"


def test_heads_side_by_side_leave_the_short_tiles_to_the_end() -> None:
    first, second, third = turns([512], [512], 3, (None, 0), False, False, heads_beside=2)
    in_order = [turn for three in itertools.zip_longest(first, second, third) for turn in three if turn]
    tiles = [(turn[2], turn[3]) for turn in in_order]
    assert tiles == [
        *((head, first_query) for first_query in (384, 256, 128, 0) for head in (0, 1)),
        *((2, first_query) for first_query in (384, 256, 128, 0)),
    ]


def check_sweep(turn: list[int], seqlen_q: int, seqlen_k: int, bound: tuple[Any, Any], cluster: bool) -> None:
    """Every visible key is visited, no unmasked step needs a mask, and settled rows have met a key."""
    _, _, _, first_query, length_q, length_k, _, top, count, *parts = turn
    assert (length_q, length_k) == (seqlen_q, seqlen_k)
    end, last = top + BLOCK_N, top - (count - 1) * BLOCK_N
    seen = visible(first_query, seqlen_q, seqlen_k, max(end, seqlen_k), bound)
    assert last >= 0
    assert not seen[:, :last].any(), "a visible key lies below the last step"
    assert not seen[:, end:].any(), "a visible key lies above the first step"
    for part, (settled, unmasked_end, above) in enumerate(
        zip(parts[0:4:2], parts[1:4:2], parts[4:], strict=True)
    ):
        assert 0 <= above < count
        asks = bound[1] is not None and (part == 0 or cluster)
        assert above == 0 or asks, "the kernel does not ask"
        own_top, own_count = top - above * BLOCK_N, count - above
        assert 1 <= settled <= own_count
        assert bound != (None, None) or settled == 1, "the kernel has no loop for it"
        assert bound[0] is not None or max(settled, unmasked_end) == own_count, "a step would be left out"
        rows = seen[part * 64 : (part + 1) * 64]
        assert not rows[:, own_top + BLOCK_N :].any(), "a visible key lies above the first own step"
        for step in range(settled, unmasked_end):
            first_key = own_top - step * BLOCK_N
            assert rows[:, first_key : first_key + BLOCK_N].all(), "an unmasked step holds a hidden key"
        if unmasked_end > settled:
            met = rows[:, own_top - (settled - 1) * BLOCK_N :].any(1)
            assert met.all(), "a row has met no key when it is settled"


def test_the_first_keys_of_a_causal_tile_are_the_last_warpgroups() -> None:
    found = [turn for program in turns([512], [512], 1, (None, 0), False, False) for turn in program]
    assert sorted((turn[3], *turn[13:]) for turn in found) == [(first, 1, 0) for first in (0, 128, 256, 384)]


def visible(
    first_query: int, seqlen_q: int, seqlen_k: int, columns: int, bound: tuple[Any, Any]
) -> torch.Tensor:
    """Which of the first ``columns`` keys the queries of a tile see."""
    queries = torch.arange(first_query, max(min(first_query + BLOCK_M, seqlen_q), first_query))[:, None]
    keys = torch.arange(columns)[None, :]
    distance = queries + seqlen_k - seqlen_q - keys
    seen = (keys < seqlen_k).expand(len(queries), -1)
    if bound[0] is not None:
        seen = seen & (distance <= bound[0])
    if bound[1] is not None:
        seen = seen & (distance >= -bound[1])
    return seen


@pytest.mark.parametrize("bound", [(None, None), (None, 0), (40, 30), (200, 0), (None, 70)], ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(300, 300), (300, 190), (200, 520), (129, 1)])
def test_the_steps_add_up_to_attention(seqlen_q: int, seqlen_k: int, bound: tuple[Any, Any]) -> None:
    """The schedule in PyTorch: masked steps are online, the others keep to a reference that stays."""
    torch.manual_seed(0)
    scores = torch.randn(seqlen_q, seqlen_k, dtype=torch.float64) * 3.0
    v = torch.randn(seqlen_k, 8, dtype=torch.float64)
    tiles = range(0, seqlen_q, BLOCK_M)
    seen = torch.cat([visible(first, seqlen_q, seqlen_k, seqlen_k, bound) for first in tiles])
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), 1).nan_to_num(0.0)
    out = torch.empty(seqlen_q, 8, dtype=torch.float64)
    for turn in itertools.chain(*turns([seqlen_q], [seqlen_k], 1, bound, False, False)):
        for part in range(BLOCK_M // 64):
            rows = slice(turn[3] + part * 64, min(turn[3] + part * 64 + 64, seqlen_q))
            if rows.start < seqlen_q:
                out[rows] = sweep(turn, part, scores[rows], seen[rows], v)
    torch.testing.assert_close(out, weights @ v)


def sweep(
    turn: list[int],
    part: int,
    scores: torch.Tensor,
    seen: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    """One warpgroup's rows of the output; keys that do not exist are zeros, as TMA fetches them."""
    settled, unmasked_end, above = turn[9 + 2 * part], turn[10 + 2 * part], turn[13 + part]
    top, count = turn[7] - above * BLOCK_N, turn[8] - above
    missing = max(0, top + BLOCK_N - len(v))
    scores, seen = (torch.nn.functional.pad(x, (0, missing)) for x in (scores, seen))
    v = torch.nn.functional.pad(v, (0, 0, 0, missing))
    row_max = scores.new_full((len(scores), 1), -torch.inf)
    row_sum, acc = torch.zeros_like(row_max), scores.new_zeros(len(scores), v.shape[1])
    for step in range(count):
        keys = slice(top - step * BLOCK_N, top - step * BLOCK_N + BLOCK_N)
        x, reference, rescale = scores[:, keys], row_max, 1.0
        if not settled <= step < unmasked_end:
            x = x.masked_fill(~seen[:, keys], -torch.inf)
            new_max = torch.maximum(row_max, x.amax(1, keepdim=True))
            reference = new_max.masked_fill(new_max == -torch.inf, 0.0)
            rescale = torch.exp(row_max - reference)
            row_max = new_max
        p = torch.exp(x - reference)
        row_sum, acc = row_sum * rescale + p.sum(1, keepdim=True), acc * rescale + p @ v[keys]
    return torch.where(row_sum == 0.0, 0.0, acc / row_sum)


def test_pairs_of_clusters_have_equal_work() -> None:
    programs = turns([1536] * 3, [1536] * 3, 1, (None, 0), True, False, cluster=True)
    assert {sum(turn[8] for turn in program) for program in programs} == {84}


def test_pairs_have_equal_work() -> None:
    programs = turns([1024] * 3, [1024] * 3, 1, (None, 0), True, False)
    steps = {sum(turn[8] for turn in program) for program in programs}
    assert len(steps) == 1


def end_of_a_launch(tiles: int, heads: int, beside: int, processors: int) -> float:
    """When the last processor is done, as a ratio to when all would be if the work were shared out evenly.

    Query tile n takes n + 2 units of time, and whoever is free takes the next one.
    """
    together = [min(beside, heads - first) for first in range(0, heads, beside)]
    times = [tile + 2 for several in together for tile in range(tiles, 0, -1) for _ in range(several)]
    free = [0] * processors
    for time in times:
        heapq.heapreplace(free, free[0] + time)
    return max(free) / (sum(times) / processors)


@pytest.mark.parametrize(("tiles", "heads"), [(64, 16), (43, 64), (64, 32), (32, 32), (86, 32), (128, 8)])
def test_heads_side_by_side_leave_no_processor_without_work(tiles: int, heads: int) -> None:
    assert end_of_a_launch(tiles, heads, heads_beside(tiles, heads, 132), 132) < 1.03


def test_heads_one_after_the_other_would() -> None:
    assert end_of_a_launch(64, 16, 1, 132) > 1.1
    assert end_of_a_launch(43, 64, 1, 132) > 1.04


@pytest.mark.parametrize("tiles", [1, 3, 43, 66, 128, 132, 5000])
@pytest.mark.parametrize("heads", [1, 2, 3, 5, 16, 64, 100])
def test_the_last_heads_are_no_fewer(tiles: int, heads: int) -> None:
    beside = heads_beside(tiles, heads, 132)
    assert 1 <= beside <= heads
    least = min(max(round(132 / tiles), 1), heads)
    assert least <= beside < 2 * least
    assert heads % beside == 0 or heads % beside >= least or beside == least


@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
def test_marked_tiles_are_computed_again_and_no_others(head_dim: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 150, 4, head_dim)
    k, v = (torch.randn(2, 90, 2, head_dim) for _ in range(2))
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])
    options = {"causal": True, "softcap": 5.0, "alibi_slopes": slopes}
    right, right_lse, _ = attention_forward(q, k, v, **options)
    out, lse = right.clone(), right_lse.clone()
    out[1, 70:128, 2] = torch.nan  # the rows of one tile of 64 queries
    lse[1, 2, 100] = torch.nan
    out[0, 3, 0] = 7.0  # garbage that nothing marks
    problem = AttentionProblem.describe(q, k, v, **options)
    plan_redo(problem, q, k, v, out, lse, slopes, overlap=False).run(q.device)
    assert out[0, 3, 0].eq(7.0).all()
    out[0, 3, 0] = right[0, 3, 0]
    torch.testing.assert_close(out, right, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, right_lse, atol=1e-5, rtol=1e-5)
