"""Problems of the bench: what they count, what they draw, and whether their parts judge all of a result."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from fap_testing.bench.decode import Decode
from fap_testing.bench.judge import judge_of
from fap_testing.bench.prefill import Prefill
from fap_testing.bench.problem import spread_out, visible_pairs
from fap_testing.bench.varlen import Varlen, lognormal_lengths
from fap_testing.reference import attention_baseline_gradients, visible_keys

HEADS = {"nheads": 4, "nheads_k": 2, "head_dim": 16, "dtype": "fp32"}
PREFILL = Prefill(batch=3, seqlen_q=24, seqlen_k=40, causal=True, **HEADS)
VARLEN = Varlen(lengths=(5, 40, 17, 33), causal=True, **HEADS)
DECODE = Decode(lengths=(24, 61, 40), seqlen_q=3, causal=True, **HEADS)
PAGED = Decode(lengths=(24, 61, 40), seqlen_q=3, page_size=16, causal=True, **HEADS)
PROBLEMS = [PREFILL, VARLEN, DECODE, PAGED]
each_problem = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


@pytest.mark.parametrize("lengths", [(1, 1), (7, 7), (5, 12), (12, 5), (33, 20)])
@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (3, -1), (-1, 2), (-1, 0), (4, 1), (50, 60)])
def test_visible_pairs_are_counted_exactly(lengths, window):
    mask = visible_keys(*lengths, window_size=window)
    assert visible_pairs(*lengths, *window) == int(mask.sum())


def test_flops_follow_the_field():
    full = Prefill(batch=2, seqlen_q=64, seqlen_k=64, nheads=3, nheads_k=3, head_dim=32)
    assert full.flops("fwd") == 4 * 2 * 3 * 64 * 64 * 32
    causal = Prefill(batch=2, seqlen_q=64, seqlen_k=64, nheads=3, nheads_k=3, head_dim=32, causal=True)
    assert causal.flops("fwd") == full.flops("fwd") / 2
    assert full.flops("bwd") == 2.5 * full.flops("fwd")
    assert full.flops("both") == full.flops("fwd") + full.flops("bwd")


@pytest.mark.parametrize("causal", [False, True])
def test_flops_of_windows_count_what_is_visible(causal):
    window = (9, 4)
    dense = Prefill(batch=2, seqlen_q=30, seqlen_k=45, causal=causal, window_size=window, **HEADS)
    pairs = int(visible_keys(30, 45, causal=causal, window_size=window).sum())
    assert dense.flops("fwd") == 4 * 2 * 4 * 16 * pairs
    packed = Varlen(lengths=(5, 40), causal=causal, window_size=window, **HEADS)
    pairs = sum(int(visible_keys(n, n, causal=causal, window_size=window).sum()) for n in (5, 40))
    assert packed.flops("fwd") == 4 * 4 * 16 * pairs
    cached = Decode(lengths=(9, 30), seqlen_q=2, causal=causal, window_size=window, **HEADS)
    pairs = sum(int(visible_keys(2, n, causal=causal, window_size=window).sum()) for n in (9, 30))
    assert cached.flops("fwd") == 4 * 4 * 16 * pairs


def test_decoding_one_token_does_all_the_work_of_a_full_mask():
    causal = Decode(lengths=(100,), causal=True, **HEADS)
    assert causal.flops("fwd") == 4 * 4 * 16 * 100
    assert causal.mask == "full"


def test_decoding_must_move_the_keys_in_use_and_the_queries_twice():
    assert DECODE.moved_bytes() == 4 * 16 * (2 * 3 * 3 * 4 + 2 * (24 + 61 + 40) * 2)
    assert PAGED.moved_bytes() == DECODE.moved_bytes()


def test_tokens_and_width_are_kept_where_they_divide():
    problem = Prefill.of_tokens(128, 512, tokens=16384, width=2048, group=4)
    assert (problem.batch, problem.seqlen_q, problem.nheads, problem.nheads_k) == (32, 512, 16, 4)


def test_mixed_lengths_add_up_and_stay_below_the_longest():
    lengths = lognormal_lengths(65536, 16384)
    assert sum(lengths) == 65536
    assert max(lengths) <= 16384
    assert len(set(lengths)) > len(lengths) / 2
    assert lengths == lognormal_lengths(65536, 16384)


@pytest.mark.parametrize(("total", "count"), [(1, 1), (8, 1), (8, 3), (8, 8), (5, 99)])
def test_spread_out_numbers_are_distinct_and_hold_the_last(total, count):
    chosen = spread_out(total, count)
    assert len(chosen) == min(total, count) == len(set(chosen))
    assert max(chosen) == total - 1
    assert min(chosen) >= 0


@each_problem
def test_data_is_drawn_anew_and_alike_for_a_seed(problem):
    first, again, other = problem.draw(), problem.draw(), problem.draw(seed=1)
    assert torch.equal(first.q, again.q)
    assert not torch.equal(first.q, other.q)
    assert 0.5 < float(first.k.std()) < 2
    assert first.dout.shape == first.q.shape
    assert first.k.shape == first.v.shape


@each_problem
def test_right_results_are_found_right(problem):
    tensors = problem.draw()
    verdict = judge_of(problem, tensors, 1 << 20).verdict(solve(problem, tensors))
    assert verdict.message == ""
    assert verdict.error < 1e-5


@each_problem
@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_a_wrong_last_head_of_the_last_sequence_is_found(problem, name):
    tensors = problem.draw()
    results = solve(problem, tensors)
    last = last_rows(problem, tensors, results[name], of_keys=name in ("dk", "dv"))
    last[..., -1, :] += 0.01
    verdict = judge_of(problem, tensors, 1 << 20).verdict(results)
    assert name in verdict.message
    assert verdict.error > 1e-4


def test_not_a_number_and_another_shape_are_wrong():
    tensors = PREFILL.draw()
    judge = judge_of(PREFILL, tensors, 1 << 20)
    assert judge.verdict({"out": torch.full_like(tensors.q, float("nan"))}).message
    assert "shape" in judge.verdict({"out": tensors.q.transpose(1, 2)}).message


@each_problem
def test_what_is_too_large_for_the_oracle_is_judged_smaller(problem):
    judge = judge_of(problem, problem.draw(), 128)
    assert judge.problem != problem
    assert judge.problem.bounds == problem.bounds
    assert judge.problem.group == problem.group
    assert not judge.verdict(solve(judge.problem, judge.tensors)).message


def test_a_few_heads_stand_for_many_where_only_those_fit():
    problem = Prefill(batch=4, seqlen_q=32, seqlen_k=32, **HEADS)
    (part,) = problem.parts(problem.draw(), 2 * 32 * 32)
    assert (part.case.batch, part.case.nheads, part.case.nheads_k) == (1, 2, 1)
    heads = torch.arange(4).expand(4, 32, 4)
    assert part.rows(heads[..., None]).unique().tolist() == [2, 3]
    assert part.keys(heads[..., :2, None]).unique().tolist() == [1]


def solve(problem, tensors):
    """Attend sequence by sequence, written apart from the parts that the judge picks."""
    gradients = {
        n: torch.zeros_like(tensors.k if n in ("dk", "dv") else tensors.q) for n in ("out", "dq", "dk", "dv")
    }
    options = {"causal": problem.causal, "window_size": problem.window_size}
    for rows, keys in sequences(problem, tensors):
        found = attention_baseline_gradients(
            *(tensors.q[rows][None], tensors.k[keys][None], tensors.v[keys][None], tensors.dout[rows][None]),
            **options,
        )
        for name, target in gradients.items():
            target[keys if name in ("dk", "dv") else rows] = getattr(found, name)[0]
    return gradients


def sequences(problem, tensors):
    """Yield the index of each sequence's rows and keys."""
    if isinstance(problem, Varlen):
        starts = tensors.cu_seqlens.tolist()
        for begin, end in pairwise(starts):
            yield slice(begin, end), slice(begin, end)
        return
    for index in range(tensors.q.shape[0]):
        if not isinstance(problem, Decode):
            yield index, index
        elif tensors.block_table is None:
            yield index, (index, slice(problem.lengths[index]))
        else:
            places = torch.arange(problem.lengths[index])
            pages = tensors.block_table[index].long()[places // problem.page_size]
            yield index, (pages, places % problem.page_size)


def last_rows(problem, tensors, x, *, of_keys):
    """Return a view of the last sequence's last row."""
    if problem is PAGED and of_keys:
        last = problem.lengths[-1] - 1
        return x[int(tensors.block_table[-1, last // 16]), last % 16]
    if isinstance(problem, Varlen):
        return x[-1]
    return x[-1, problem.lengths[-1] - 1] if of_keys and problem is DECODE else x[-1, -1]
