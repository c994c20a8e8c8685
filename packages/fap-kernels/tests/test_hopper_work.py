"""How the Hopper forward divides its work, and how it mends marked tiles, in Triton's interpreter."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from fap_kernels import AttentionProblem, attention_forward
from fap_kernels.hopper import work
from fap_kernels.hopper.launch import plan_redo
from fap_kernels.packing import slot_count

pytestmark = pytest.mark.interpreter
FIELDS = 13
BLOCK_M, BLOCK_N = 128, 64


@triton.jit
def list_work(
    found, cu_seqlens_q, cu_seqlens_k, entries, slots, nheads, seqlen_q, seqlen_k,
    window_left, window_right, items, tickets, MOST,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PAIRED: tl.constexpr,
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
        tickets,
    )
    row = found + tl.program_id(0) * MOST * 13
    turn, tile = work.next_tile(call, work.first_turn(call), BLOCK_M, PAIRED)
    while work.there_is(call, turn, PAIRED):
        sweep = work.sweep_of(call, tile, BLOCK_M, BLOCK_N)
        for part in range(BLOCK_M // 64):
            phases = work.phases_of(call, tile, sweep, tile.first_query + part * 64, 64, BLOCK_N)
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
        row += 13
        turn, tile = work.next_tile(call, work.turn_after(call, turn), BLOCK_M, PAIRED)


def turns(
    lengths_q: list[int], lengths_k: list[int], nheads: int, window: tuple[Any, Any], paired: bool,
    packed: bool, tickets: bool = False,
) -> list[list[list[int]]]:  # fmt: skip
    """The turns of each of three programs."""
    programs, most = 3, 64
    tiles = -(-max(lengths_q) // BLOCK_M)
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
        torch.zeros(1, dtype=torch.int32) if tickets else None,
        most,
        BLOCK_M,
        BLOCK_N,
        paired,
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
    found = [
        turn
        for program in turns(lengths_q, lengths_k, nheads, bound, paired, packed, tickets=packed and seed % 2)
        for turn in program
    ]
    expected = {
        (batch, head, first)
        for batch, length in enumerate(lengths_q)
        for head in range(nheads)
        for first in range(0, length, BLOCK_M)
    }
    assert len(found) == len(expected)
    assert {tuple(turn[1:4]) for turn in found} == expected
    for turn in found:
        check_sweep(turn, lengths_q[turn[1]], lengths_k[turn[1]], bound)


def check_sweep(turn: list[int], seqlen_q: int, seqlen_k: int, bound: tuple[Any, Any]) -> None:
    """Every visible key is visited, no unmasked step needs a mask, and settled rows have met a key."""
    _, _, _, first_query, length_q, length_k, _, top, count, *phases = turn
    assert (length_q, length_k) == (seqlen_q, seqlen_k)
    end, last = top + BLOCK_N, top - (count - 1) * BLOCK_N
    seen = visible(first_query, seqlen_q, seqlen_k, max(end, seqlen_k), bound)
    assert last >= 0
    assert not seen[:, :last].any(), "a visible key lies below the last step"
    assert not seen[:, end:].any(), "a visible key lies above the first step"
    for part, (settled, unmasked_end) in enumerate(zip(phases[::2], phases[1::2], strict=True)):
        assert 1 <= settled <= count
        assert bound != (None, None) or settled == 1, "the kernel has no loop for it"
        assert bound[0] is not None or max(settled, unmasked_end) == count, "a step would be left out"
        rows = seen[part * 64 : (part + 1) * 64, :end]
        for step in range(settled, unmasked_end):
            first_key = top - step * BLOCK_N
            assert rows[:, first_key : first_key + BLOCK_N].all(), "an unmasked step holds a hidden key"
        if unmasked_end > settled:
            met = rows[:, top - (settled - 1) * BLOCK_N :].any(1)
            assert met.all(), "a row has met no key when it is settled"


def visible(
    first_query: int, seqlen_q: int, seqlen_k: int, columns: int, bound: tuple[Any, Any]
) -> torch.Tensor:
    """Which of the first ``columns`` keys the queries of a tile see."""
    queries = torch.arange(first_query, min(first_query + BLOCK_M, seqlen_q))[:, None]
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
                out[rows] = sweep(turn, *turn[9 + 2 * part : 11 + 2 * part], scores[rows], seen[rows], v)
    torch.testing.assert_close(out, weights @ v)


def sweep(
    turn: list[int],
    settled: int,
    unmasked_end: int,
    scores: torch.Tensor,
    seen: torch.Tensor,
    v: torch.Tensor,
) -> torch.Tensor:
    """One warpgroup's rows of the output; keys that do not exist are zeros, as TMA fetches them."""
    top, count = turn[7:9]
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


def test_pairs_have_equal_work() -> None:
    programs = turns([1024] * 3, [1024] * 3, 1, (None, 0), True, False)
    steps = {sum(turn[8] for turn in program) for program in programs}
    assert len(steps) == 1


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
