"""What a program of the Hopper backward works on, and what surrounds it, in Triton's interpreter."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import triton
import triton.language as tl

from fap_kernels import AttentionProblem
from fap_kernels.backward.config import padded_rows
from fap_kernels.backward.launch import BackwardInputs, plan_delta
from fap_kernels.hopper import backward_work, work
from fap_kernels.hopper.backward_launch import empty_additions, lag_of, lead_of, plan_query_grads
from fap_kernels.packing import Packing, slot_count

pytestmark = pytest.mark.interpreter
FIELDS = 17
BLOCK_N = 128


@triton.jit
def list_work(
    found, waits, cu_seqlens_q, cu_seqlens_k, entries, slots, nheads, group, seqlen_q, seqlen_k,
    window_left, window_right, items, heads_beside,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, LAST_FIRST: tl.constexpr, CLUSTER: tl.constexpr,
    FOUNDED: tl.constexpr,
):  # fmt: skip
    """Write down what each program works on, ``(items, FIELDS)``, and for each step two numbers.

    The first query of its tile, and how many key tiles come before this one there.
    """
    call = work.Call(
        cu_seqlens_q,
        cu_seqlens_k,
        None,
        None,
        entries,
        slots,
        nheads,
        group,
        seqlen_q,
        seqlen_k,
        window_left,
        window_right,
        items,
        heads_beside,
        None,
        True if CLUSTER else None,
    )
    tile = backward_work.key_tile_of(call, work.program(call), BLOCK_N, LAST_FIRST)
    sweep = backward_work.sweep_of(call, tile, 0, 0, BLOCK_M, BLOCK_N)
    row = found + tl.program_id(0) * 17
    tl.store(row, tile.batch)
    tl.store(row + 1, tile.head_k)
    tl.store(row + 2, tile.first_key)
    tl.store(row + 3, tile.seqlen_q)
    tl.store(row + 4, tile.seqlen_k)
    tl.store(row + 5, tile.q_start)
    tl.store(row + 6, tile.k_start)
    tl.store(row + 7, sweep.start)
    tl.store(row + 8, sweep.leading)
    tl.store(row + 9, sweep.unmasked_end)
    tl.store(row + 10, sweep.count)
    for half in range(2):
        first_key = tile.first_key + half * BLOCK_N // 2
        own = backward_work.own_sweep_of(call, tile, sweep, first_key, BLOCK_N // 2, BLOCK_M)
        tl.store(row + 11 + half * 3, own.hidden)
        tl.store(row + 12 + half * 3, own.leading)
        tl.store(row + 13 + half * 3, own.unmasked_end)
    for number in range(sweep.count):
        first_query = backward_work.first_query_of(sweep, number, BLOCK_M, FOUNDED)
        if FOUNDED:
            before = backward_work.tiles_before(call, tile, first_query, BLOCK_N)
        else:
            before = backward_work.tiles_after(call, tile, first_query, BLOCK_M, BLOCK_N)
        step = waits + (tl.program_id(0) * 16 + number) * 2
        tl.store(step, first_query)
        tl.store(step + 1, before)


def programs(
    lengths_q: list[int], lengths_k: list[int], nheads: int, group: int, window: tuple[Any, Any],
    packed: bool, block_m: int, heads_beside: int = 1, last_first: bool = False, cluster: bool = False,
    founded: bool = False,
) -> tuple[list[list[int]], list[list[list[int]]]]:  # fmt: skip
    """What each program works on, and at each step the query and how many key tiles come before this one."""
    bounds = [
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32) if packed else None
        for lengths in (lengths_q, lengths_k)
    ]
    together = 2 if cluster else 1
    entries, slots = None, len(lengths_k) * -(-max(lengths_k) // (BLOCK_N * together))
    if packed:
        entries, slots = len(lengths_k), slot_count(sum(lengths_k), len(lengths_k), BLOCK_N)
    items = (nheads // group) * slots
    found = torch.zeros(items * together, FIELDS, dtype=torch.int32)
    waits = torch.full((items * together, 16, 2), -1, dtype=torch.int32)
    list_work[(items * together,)](
        found, waits, *bounds, entries, slots, nheads, group, max(lengths_q), max(lengths_k), *window, items,
        None if packed else heads_beside, block_m, BLOCK_N, last_first, cluster, founded,
    )  # fmt: skip
    return found.tolist(), waits.tolist()


@triton.jit
def list_shares(
    found, nheads, group, seqlen_q, seqlen_k, items, heads_beside,
    BLOCK_N: tl.constexpr, CLUSTER: tl.constexpr,
):  # fmt: skip
    """Write down the share of each item, and how many programs its head has, ``(items, 5)``."""
    call = work.Call(
        None, None, None, None, None, None, nheads, group, seqlen_q, seqlen_k, None, None, items,
        heads_beside, None, True if CLUSTER else None,
    )  # fmt: skip
    share = backward_work.share_of(call, tl.program_id(0), BLOCK_N, 64)
    row = found + tl.program_id(0) * 5
    tl.store(row, share.batch)
    tl.store(row + 1, share.head_k)
    tl.store(row + 2, share.first)
    tl.store(row + 3, share.end)
    tl.store(row + 4, backward_work.programs_of_head(call, BLOCK_N))


def visible(seqlen_q: int, seqlen_k: int, window: tuple[Any, Any]) -> torch.Tensor:
    distance = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q - torch.arange(seqlen_k)[None, :]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if window[0] is not None:
        seen = seen & (distance <= window[0])
    if window[1] is not None:
        seen = seen & (distance >= -window[1])
    return seen


class Draw(NamedTuple):
    """A random call; the arguments of :func:`programs`."""

    lengths_q: list[int]
    lengths_k: list[int]
    nheads: int
    group: int
    window: tuple[Any, Any]
    packed: bool
    block_m: int
    heads_beside: int
    last_first: bool


def draw(seed: int) -> Draw:
    rng = random.Random(seed)
    packed, block_m = seed % 2 == 1, rng.choice([64, 128])
    count, nheads_k, group = rng.randint(1, 3), rng.randint(1, 3), rng.choice([1, 2])
    if packed:
        lengths_q, lengths_k = ([rng.choice([0, 1, rng.randint(1, 500)]) for _ in range(count)] for _ in "qk")
        lengths_q[0], lengths_k[0] = 300, 200
    else:
        lengths_q, lengths_k = [rng.randint(1, 700)] * count, [rng.randint(1, 700)] * count
    window = rng.choice([None, 0, rng.randint(0, 300)]), rng.choice([None, 0, rng.randint(0, 300)])
    beside, last_first = rng.choice([1, 2, 5, 99]), rng.choice([False, True])
    return Draw(lengths_q, lengths_k, nheads_k * group, group, window, packed, block_m, beside, last_first)


@pytest.mark.parametrize("seed", range(24))
def test_every_key_tile_has_its_program_and_every_query_its_step(seed: int) -> None:
    lengths_q, lengths_k, nheads, group, window, packed, block_m, *_ = drawn = draw(seed)
    count, nheads_k = len(lengths_q), nheads // group
    found, _ = programs(*drawn)
    expected = {
        (batch, head, first)
        for batch in range(count)
        for head in range(nheads_k)
        for first in range(0, lengths_k[batch], BLOCK_N)
    }
    if packed:  # a few programs have nothing to do
        empty = [row for row in found if row[2] >= row[4]]
        assert len(empty) <= count * nheads_k
        assert all(row[10] == 0 for row in empty)
        found = [row for row in found if row[2] < row[4]]
    assert len(found) == len(expected)
    assert {tuple(row[:3]) for row in found} == expected
    for row in found:
        batch = row[0]
        assert row[3:5] == [lengths_q[batch], lengths_k[batch]]
        assert row[5:7] == ([sum(lengths_q[:batch]), sum(lengths_k[:batch])] if packed else [0, 0])
        check_sweep(row, window, block_m)


@pytest.mark.parametrize("seed", range(0, 48, 2))
def test_programs_of_a_cluster_have_neighbouring_keys_and_sweep_the_same_queries(seed: int) -> None:
    drawn = draw(seed)._replace(last_first=False)
    found, _ = programs(*drawn, cluster=True)
    assert len(found) == 2 * len(drawn.lengths_k) * drawn.nheads // drawn.group * -(
        -drawn.lengths_k[0] // 256
    )
    assert len({tuple(row[:3]) for row in found}) == len(found)
    for first, second in zip(found[::2], found[1::2], strict=True):
        assert first[2] % (2 * BLOCK_N) == 0
        assert second[:3] == [*first[:2], first[2] + BLOCK_N]
        assert second[7:11] == first[7:11]
        for row in (first, second):
            check_sweep(row, drawn.window, drawn.block_m, cluster=True)


def check_sweep(row: list[int], window: tuple[Any, Any], block_m: int, cluster: bool = False) -> None:
    """Every query that sees a key is visited, and no unmasked step needs a mask."""
    _, _, first_key, seqlen_q, seqlen_k, _, _, start, leading, unmasked_end, count = row[:11]
    assert start % block_m == 0
    assert 0 <= leading <= unmasked_end <= count
    assert window[0] is not None or unmasked_end == count, "a step would be left out"
    if first_key >= seqlen_k and cluster:
        assert row[11] == row[14] == count, "these keys do not exist, but others of the cluster's do"
        return
    if first_key >= seqlen_k:
        assert count == 0, "these keys do not exist"
        return
    assert start + count * block_m < seqlen_q + block_m or count == 0, "a step without any query"
    seen = visible(seqlen_q, seqlen_k, window)[:, first_key : first_key + BLOCK_N]
    visited = slice(start, start + count * block_m)
    assert seen.sum() == seen[visited].sum(), "a query that sees a key is not visited"
    unmasked = slice(start + leading * block_m, start + unmasked_end * block_m)
    if unmasked_end > leading:
        assert first_key + BLOCK_N <= seqlen_k, "keys that do not exist need a mask"
        assert seen[unmasked].all(), "an unmasked step holds a hidden pair"
    for half, (hidden, own_leading, own_unmasked_end) in enumerate((row[11:14], row[14:17])):
        assert 0 <= hidden <= own_leading <= own_unmasked_end <= count
        assert own_leading == max(leading, hidden)
        assert own_unmasked_end == max(unmasked_end, hidden)
        own_keys = slice(half * BLOCK_N // 2, (half + 1) * BLOCK_N // 2)
        assert not seen[start : start + hidden * block_m, own_keys].any(), "a pair is left out"


def test_half_of_the_keys_are_left_out_where_no_query_sees_them() -> None:
    causal, _ = programs([256], [256], 1, 1, (None, 0), False, 64)
    assert [row[10:] for row in causal] == [[4, 0, 2, 4, 1, 2, 4], [2, 0, 2, 2, 1, 2, 2]]
    short, _ = programs([256], [60], 1, 1, (None, None), False, 64)
    assert [row[10:] for row in short] == [[4, 0, 4, 4, 4, 4, 4]], "keys that do not exist"


@pytest.mark.parametrize("founded", [False, True])
@pytest.mark.parametrize("seed", range(40))
def test_all_that_come_before_at_a_query_tile_are_of_earlier_programs(seed: int, founded: bool) -> None:
    """Key tiles from the last one on, or founded from the first one on; each visits its queries once."""
    drawn = draw(seed)._replace(last_first=not founded)
    found, waits = programs(*drawn, founded=founded)
    added: dict[tuple[int, ...], list[int]] = {}
    for row, steps in zip(found, waits, strict=True):
        batch, head, first_key, start, count = row[0], row[1], row[2], row[7], row[10]
        queries = list(range(start, start + count * drawn.block_m, drawn.block_m))
        assert [first_query for first_query, _ in steps[:count]] == queries[:: -1 if founded else 1]
        for first_query, before in steps[:count]:
            # Programs in the order of their numbers: all that this one waits for is done.
            earlier = added.setdefault((batch, head, first_query), [])
            assert before == len(earlier)
            assert not earlier or earlier[-1] == first_key + (-BLOCK_N if founded else BLOCK_N)
            earlier.append(first_key)


@pytest.mark.parametrize("founded", [False, True])
@pytest.mark.parametrize(
    "window", [(65, None), (64, None), (65, 0), (1, None), (0, 63), (None, 64), (None, 65)]
)
def test_where_windows_end_at_a_tile_all_that_come_before_are_counted(
    window: tuple[Any, Any], founded: bool
) -> None:
    """Where a bound is off by one no random call is sure to tell."""
    added: dict[int, int] = {}
    found, waits = programs([512], [512], 1, 1, window, False, 64, last_first=not founded, founded=founded)
    for row, steps in zip(found, waits, strict=True):
        for first_query, before in steps[: row[10]]:
            assert before == added.get(first_query, 0)
            added[first_query] = before + 1


QueryTile = tuple[int, ...]
Addition = tuple[QueryTile, int]
"""To which query tile, and how many others must have been made before."""


def additions_of_each(seed: int, founded: bool = False) -> list[list[Addition]]:
    """Of each key tile of a random call the additions, in the order of its steps."""
    drawn = draw(seed)._replace(last_first=not founded)
    found, waits = programs(*drawn, founded=founded)
    return [
        [
            ((row[0], row[1], member, first_query), before)
            for member in range(drawn.group)
            for first_query, before in waits[index][: row[10]]
        ]
        for index, row in enumerate(found)
    ]


def add_one(
    queues: list[list[Addition]], additions: dict[QueryTile, int], rng: random.Random, founded: bool = False
) -> None:
    """Let one that can go on make the next addition of its queue; if ``founded``, count the first alone."""
    able = [
        queue
        for queue in queues
        if queue and additions.get(queue[0][0], 0) >= (min(queue[0][1], 1) if founded else queue[0][1])
    ]
    assert able or not any(queues), "all wait for each other"
    if able:
        tile, before = rng.choice(able).pop(0)
        if founded and before > 0:
            return
        assert additions.get(tile, 0) == before, "out of order, or stored twice"
        additions[tile] = before + 1


@pytest.mark.parametrize("resident", [1, 2, 7])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("warps", "founded"), [(1, False), (2, False), (2, True)])
def test_a_few_programs_at_a_time_add_everything(warps: int, founded: bool, seed: int, resident: int) -> None:
    """The protocol: warps of a program send tiles, each in its own order; any one that can go on does.

    Two share them, or, of the rows that are its own, one sends all, as also the last to add goes from tile to
    tile.
    """
    additions: dict[QueryTile, int] = {}
    rng = random.Random(seed)
    left = [[sent[warp::warps] for warp in range(warps)] for sent in additions_of_each(seed, founded)]
    running: list[list[list[Addition]]] = []
    while left or any(any(sent) for sent in running):
        running = [sent for sent in running if any(sent)]
        while left and len(running) < resident:
            running.append(left.pop(0))
        add_one([warp for sent in running for warp in sent], additions, rng, founded)


@pytest.mark.parametrize("resident", [1, 2, 7])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_few_programs_that_stay_add_everything(ahead: int, seed: int, resident: int) -> None:
    """Some of many programs never get to run before the others end. Those draw tiles, also some ahead."""
    additions: dict[QueryTile, int] = {}
    rng = random.Random(seed)
    left = [tiles for tiles in additions_of_each(seed) if tiles]
    running: list[list[list[Addition]]] = [[] for _ in range(resident)]
    while left or any(running):
        for tiles in rng.sample(running, resident):
            tiles[:] = [tile for tile in tiles if tile]
            while left and len(tiles) <= ahead:
                tiles.append(left.pop(0))
        add_one([tiles[0] for tiles in running if tiles], additions, rng)


@pytest.mark.parametrize("window", [(None, None), (None, 0), (40, 30), (200, 0), (None, 70)], ids=str)
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(300, 300), (300, 190), (200, 520), (129, 1)])
@pytest.mark.parametrize("block_m", [64, 128])
def test_the_steps_add_up_to_the_gradients(
    seqlen_q: int, seqlen_k: int, window: tuple[Any, Any], block_m: int
) -> None:
    """The schedule in PyTorch: what does not exist is fetched as zeros, only masked steps have a mask.

    Logits are far below 0, so that weights of keys that do not exist would be infinite.
    """
    torch.manual_seed(0)
    q, k, v, dout = (torch.randn(n, 8, dtype=torch.float64) for n in (seqlen_q, seqlen_k, seqlen_k, seqlen_q))
    q[:, 0], k[:, 0] = -40.0, 40.0
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    hidden = ~visible(seqlen_q, seqlen_k, window)
    scores = (leaves[0] @ leaves[1].T).masked_fill(hidden, -torch.inf)
    weights = torch.softmax(scores.masked_fill(hidden.all(1, keepdim=True), 0.0), 1).masked_fill(hidden, 0.0)
    out = weights @ leaves[2]
    right = torch.autograd.grad(out, leaves, dout)
    lse = torch.where(hidden.all(1), torch.inf, torch.logsumexp(scores.detach(), 1))
    delta = (out.detach() * dout).sum(1)

    grown = [len(x) + BLOCK_N for x in (q, k, v)]
    dq, dk, dv = (torch.zeros(n, 8, dtype=torch.float64) for n in grown)
    q, dout = (torch.nn.functional.pad(x, (0, 0, 0, BLOCK_N)) for x in (q, dout))
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, BLOCK_N)) for x in (k, v))
    lse = torch.nn.functional.pad(lse, (0, BLOCK_N), value=torch.inf)
    delta = torch.nn.functional.pad(delta, (0, BLOCK_N))
    hidden = torch.nn.functional.pad(hidden, (0, BLOCK_N, 0, BLOCK_N), value=True)
    hidden[seqlen_q:, :seqlen_k] = False  # no mask is needed there
    for row in programs([seqlen_q], [seqlen_k], 1, 1, window, False, block_m)[0]:
        start, count = row[7], row[10]
        for half, (left_out, leading, unmasked_end) in enumerate((row[11:14], row[14:17])):
            keys = slice(row[2] + half * BLOCK_N // 2, row[2] + (half + 1) * BLOCK_N // 2)
            for step in range(left_out, count):
                queries = slice(start + step * block_m, start + (step + 1) * block_m)
                p = torch.exp(k[keys] @ q[queries].T - lse[queries])
                if not leading <= step < unmasked_end:
                    p = p.masked_fill(hidden[queries, keys].T, 0.0)
                ds = p * (v[keys] @ dout[queries].T - delta[queries])
                dv[keys] += p @ dout[queries]
                dk[keys] += ds @ q[queries]
                dq[queries] += ds.T @ k[keys]
    for mine, expected in zip((dq, dk, dv), right, strict=True):
        torch.testing.assert_close(mine[: len(expected)], expected)


def as_registers_hold_it(dq: torch.Tensor) -> torch.Tensor:
    """``fap_kernels.hopper.backward`` stores a 64 x 64 accumulator so; Gluon has no interpreter to ask."""
    return dq.reshape(4, 2, 8, 8, 4, 2).permute(3, 0, 2, 4, 1, 5).reshape(64 * 64)


def call(
    packed: bool, head_dim: int, width: int
) -> tuple[AttentionProblem, BackwardInputs, torch.Tensor, torch.Tensor, list[int]]:
    """A call, what its kernels read, its out, the memory for dQ, and where each sequence starts there."""
    torch.manual_seed(0)
    lengths, packing = [70, 0, 150], None
    if packed:
        q, dout = (torch.randn(sum(lengths), 2, head_dim) for _ in "qo")
        bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        packing = Packing.describe(q, q, bounds, bounds, 150, 150)
        problem = AttentionProblem.describe(q, q, q, packing=packing)
        q, dout = q[None], dout[None]
        starts = [(sum(lengths[:entry]) + entry * 128) // 128 * 128 for entry in range(3)]
    else:
        q, dout = (torch.randn(2, 150, 2, head_dim) for _ in "qo")
        problem = AttentionProblem.describe(q, q, q)
        starts = [0]
    rows = padded_rows(q.shape[1], problem.batch if packed else 0)
    lse, delta = torch.empty(q.shape[0], 2, rows), torch.empty(q.shape[0], 2, rows)
    inputs = BackwardInputs(q, q, q, dout, lse, delta, None, None, packing)
    return problem, inputs, q, torch.full((*lse.shape, width), torch.nan), starts


@pytest.mark.parametrize(("head_dim", "width"), [(64, 64), (40, 64), (96, 128)])
@pytest.mark.parametrize("packed", [False, True])
def test_dq_comes_to_its_place(head_dim: int, width: int, packed: bool) -> None:
    problem, inputs, q, dq_acc, starts = call(packed, head_dim, width)
    expected = torch.zeros_like(q)
    lengths = [70, 0, 150] if packed else [150]
    for batch, head in itertools.product(range(q.shape[0]), range(2)):
        first = 0
        for start, length in zip(starts, lengths, strict=True):
            own = torch.randn(-(-length // 64) * 64, width)
            expected[batch, first : first + length, head] = own[:length, :head_dim] * problem.softmax_scale
            tiles = [
                as_registers_hold_it(own[row : row + 64, column : column + 64])
                for row in range(0, len(own), 64)
                for column in range(0, width, 64)
            ]
            if tiles:
                dq_acc[batch, head].view(-1)[start * width :][: len(own) * width] = torch.cat(tiles)
            first += length
    dq = torch.full_like(q, torch.nan)
    plan_query_grads(problem, inputs, dq_acc, dq, overlap=False).run(q.device)
    torch.testing.assert_close(dq, expected)
    if not packed:  # the first head of the second entry is the third one
        dq = torch.full_like(q, torch.nan)
        plan_query_grads(problem, inputs, dq_acc, dq, first_head=3, overlap=False).run(q.device)
        expected[0], expected[1, :, 0] = torch.nan, torch.nan
        torch.testing.assert_close(dq, expected, equal_nan=True)


@pytest.mark.parametrize(("head_dim", "block_m"), [(64, 128), (96, 64)])
def test_dq_is_zero_where_nothing_was_added(head_dim: int, block_m: int) -> None:
    problem, inputs, q, dq_acc, _ = call(False, head_dim, 8192 // block_m)
    additions = empty_additions(replace(problem, deterministic=True), inputs)
    assert additions is not None
    additions.zero_()
    additions[1, 0, 0] = 3
    dq_acc[1, 0, :block_m] = 1.0
    dq = torch.full_like(q, torch.nan)
    plan_query_grads(problem, inputs, dq_acc, dq, additions, overlap=False).run(q.device)
    expected = torch.zeros_like(q)
    expected[1, :block_m, 0] = problem.softmax_scale
    torch.testing.assert_close(dq, expected)


@pytest.mark.parametrize("packed", [False, True])
def test_the_delta_kernel_zeroes_what_is_added_to(packed: bool) -> None:
    problem, inputs, q, dq_acc, starts = call(packed, 64, 64)
    additions = empty_additions(replace(problem, deterministic=True), inputs)
    assert additions is not None
    additions.fill_(7)
    lse, tickets = torch.zeros(q.shape[0], 2, q.shape[1]), torch.full((1,), 7, dtype=torch.int32)
    progress = torch.full((550, 2), 7, dtype=torch.int32)
    plan_delta(problem, q, lse, None, inputs, dq_acc, additions, tickets, progress).run(q.device)
    assert tickets.item() == 0
    assert progress.eq(0).all()
    lengths = [70, 0, 150] if packed else [150]
    for start, length in zip(starts, lengths, strict=True):
        swept = dq_acc[:, :, start : start + -(-length // 128) * 128]
        assert swept.eq(0.0).all()
        assert additions[:, :, start // 64 : (start + length + 63) // 64].eq(0).all()


def test_the_delta_kernel_leaves_later_heads_to_others() -> None:
    problem, inputs, q, dq_acc, _ = call(False, 64, 64)
    inputs.lse.fill_(7.0)
    lse, progress = torch.zeros(2, 2, 150), torch.full((4, 2), 7, dtype=torch.int32)
    plan_delta(problem, q, lse, None, inputs, dq_acc, progress=progress, heads=3).run(q.device)
    assert progress.eq(0).all()
    for batch, head in itertools.product(range(2), range(2)):
        left = (batch, head) == (1, 1)
        assert inputs.lse[batch, head].eq(7.0).all() == left
        assert dq_acc[batch, head].isnan().all() == left


@pytest.mark.parametrize("seed", range(0, 80, 2))
def test_shares_of_a_head_are_its_queries_and_only_what_has_begun_is_waited_for(seed: int) -> None:
    drawn, rng = draw(seed), random.Random(seed)
    cluster, processors = rng.random() < 0.5, rng.choice([1, 2, 5])
    batch, nheads_k = len(drawn.lengths_q), drawn.nheads // drawn.group
    seqlen_q, seqlen_k = drawn.lengths_q[0], drawn.lengths_k[0]
    together = 2 if cluster else 1
    count = -(-seqlen_k // (BLOCK_N * together))
    items = batch * nheads_k * count
    shares = torch.zeros(items, 5, dtype=torch.int32)
    list_shares[(items,)](
        shares, drawn.nheads, drawn.group, seqlen_q, seqlen_k, items, drawn.heads_beside, BLOCK_N, cluster
    )
    rows: dict[tuple[int, int], list[int]] = {}
    for entry, head, first, end, working in shares.tolist():
        assert working == count * together
        rows.setdefault((entry, head), []).extend(range(first, end, 64))
    assert len(rows) == batch * nheads_k
    assert all(sorted(found) == list(range(0, seqlen_q, 64)) for found in rows.values())
    items_of: dict[tuple[int, ...], list[int]] = {}
    for item, share in enumerate(shares.tolist()):
        items_of.setdefault(tuple(share[:2]), []).append(item)
    block = count * drawn.heads_beside
    lead, lag = lead_of(items, block, processors), lag_of(items, block, processors)
    heads = [tuple(share[:2]) for share in shares.tolist()]
    finished = set(sorted(items_of)[: (items - lag) // count])
    assert set(heads[: items - lag]) == finished, "the launch behind has the other heads"
    assert set(heads[lead:]) == set(sorted(items_of)[lead // count :]), "the launch before has the first ones"
    for item, head in enumerate(heads[: items - lag]):
        assert max(items_of[head]) < item + lag, "what has not begun is waited for by what finishes a head"
    for head in heads[lead:]:
        assert max(items_of[head]) - lead < min(items_of[head]), "and by what needs a prepared one"
