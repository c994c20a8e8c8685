"""The named and drawn KV-cache cases cover the contract; their inputs are reproducible and poisoned."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from fap_testing.cases import LAYOUTS
from fap_testing.cases_kvcache import (
    CACHE_LAYOUTS,
    KVCACHE_FEATURES,
    KVCacheCase,
    all_kvcache_cases,
    find_kvcache,
    select_kvcache,
)
from fap_testing.expectation_kvcache import expect_kvcache
from fap_testing.inputs_kvcache import make_kvcache_inputs
from fap_testing.reference_kvcache import kvcache_baseline, kvcache_reference
from fap_testing.strategies_kvcache import kvcache_cases

QUICKLY = settings(max_examples=25, deadline=None, derandomize=True)
OUTPUTS = {"lse", "num_splits", "batch_invariant", "overflow_check", "cuda_graph", "error_messages"}


@pytest.mark.parametrize("size", ["quick", "full"])
def test_every_input_feature_has_a_case(size):
    covered = frozenset().union(*(case.features for case in select_kvcache(size)))
    assert covered == KVCACHE_FEATURES.keys() - OUTPUTS


def test_the_corners_of_the_contract_have_quick_cases():
    cases = select_kvcache("quick")
    assert {case.layout for case in cases} == set(LAYOUTS)
    assert {case.cache_layout for case in cases} == set(CACHE_LAYOUTS)
    assert {case.page_size for case in cases} == {None, 16, 32, 64, 128, 256}
    assert {case.head_dim for case in cases} >= {8, 64, 80, 96, 128, 192, 256}
    assert {case.seqlen_q for case in cases} >= {0, 1, 2, 17, 130}
    assert {case.nheads // case.nheads_k for case in cases} >= {1, 3, 4, 16}
    assert {case.lengths_as for case in cases} == {"tensor", "number", "none"}
    appending = [case for case in cases if case.seqlen_new]
    for wanted in ([0], [1]):
        assert any([n for n in case.cache_seqlens if n in wanted] for case in appending)
    for page_size in (None, 16, 256):
        assert any(max(c.seqlens_k, default=0) == c.capacity for c in appending if c.page_size == page_size)
    turned = {(c.rotary_interleaved, c.is_local, c.page_size, bool(c.leftpad)) for c in cases if c.rotary_dim}
    assert turned >= {(i, local, 16, False) for i in (False, True) for local in (False, True)}
    assert turned >= {(i, local, None, True) for i in (False, True) for local in (False, True)}
    assert any(case.leftpad == case.cache_seqlens for case in cases)
    assert all(max(case.seqlens_k, default=0) <= 272 for case in cases)


def test_cases_are_found_by_name_and_by_tag():
    assert find_kvcache("paged_16_append_17") in select_kvcache("quick", "paged")
    assert set(select_kvcache("quick")) < set(select_kvcache("full")) == set(all_kvcache_cases())
    with pytest.raises(KeyError, match="no KV-cache case is called 'paged'"):
        find_kvcache("paged")
    with pytest.raises(ValueError, match=r"no KV-cache case has all of the tags .*known tags: append"):
        select_kvcache("slow")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seqlen_new": 33}, r"sequences must fit the capacity 64, got \(33, 65\)"),
        ({"cache_seqlens": (0, 65)}, "sequences must fit the capacity 64"),
        ({"lengths_as": "number"}, "lengths_as 'number' needs equal lengths"),
        ({"lengths_as": "none"}, "lengths_as 'none' needs full caches and no new keys"),
        ({"lengths_as": "none", "cache_seqlens": (64, 64), "seqlen_new": 1}, "lengths_as 'none' needs full"),
        ({"leftpad": (1, 0)}, r"leftpad must be \(batch,\) and at most the lengths \(0, 32\), got \(1, 0\)"),
        ({"leftpad": (0,)}, r"leftpad must be \(batch,\)"),
        ({"batch_idx": (1,)}, r"batch_idx must be \(batch,\) and not negative, got \(1,\)"),
        ({"batch_idx": (1, 1), "seqlen_new": 1}, "batch_idx must name different rows"),
        ({"page_size": 16, "leftpad": (0, 0)}, "page_size excludes leftpad"),
        ({"page_size": 16, "batch_idx": (0, 1)}, "page_size excludes batch_idx"),
        ({"page_size": 24}, "page_size must divide the capacity"),
        ({"rotary_dim": 16}, "rotary_dim needs new keys"),
        ({"rotary_dim": 8, "seqlen_new": 1}, "rotary_dim must be a multiple of 16 up to head_dim, got 8"),
        ({"rotary_dim": 32, "seqlen_new": 1}, "rotary_dim must be a multiple of 16 up to head_dim, got 32"),
        ({"layout": "far_rows"}, "layout 'far_rows' is not for decoding"),
        ({"cache_layout": "last_stride_2"}, "cache_layout must be one of contiguous, .*'last_stride_2'"),
        ({"nheads": 3}, "nheads_k must divide nheads"),
    ],
)
def test_contradictory_cases_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        KVCacheCase(**{"name": "wrong", "cache_seqlens": (0, 32)} | change)


def test_the_cases_import_without_torch():
    code = "import sys, fap_testing.cases_kvcache as c; c.select_kvcache(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


PADDED = KVCacheCase(
    name="x", cache_seqlens=(5, 0, 9), capacity=12, seqlen_new=2, leftpad=(2, 0, 9), batch_idx=(4, 0, 1)
)
PAGED = KVCacheCase(name="x", cache_seqlens=(31, 0, 16), capacity=48, seqlen_new=2, page_size=16)


def test_values_depend_on_name_and_seed_and_nothing_else():
    plain = make_kvcache_inputs(PADDED)
    again = make_kvcache_inputs(PADDED, dtype=torch.bfloat16, poison=False)
    held = ~plain.k_cache.isnan()
    assert torch.equal(again.k_cache[held], plain.k_cache.bfloat16()[held])
    assert not again.k_cache[~held].count_nonzero()
    assert not torch.equal(make_kvcache_inputs(PADDED, seed=1).k_cache[held], plain.k_cache[held])


def test_only_rows_with_keys_hold_numbers():
    inputs = make_kvcache_inputs(PADDED, dtype=torch.float16)
    assert inputs.cache_seqlens.tolist() == [5, 0, 9]
    assert inputs.cache_batch_idx.dtype == inputs.cache_leftpad.dtype == torch.int32
    for x in (inputs.k_cache, inputs.v_cache):
        assert x.shape[0] == 7
        held = [row.nonzero().flatten().tolist() for row in ~x.isnan().flatten(2).all(2)]
        assert held == [[], [], [], [], [2, 3, 4], [], []]
        memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        assert memory[: x.storage_offset()].isnan().all()
        assert memory[-128 * x.stride(1) :].isnan().all()
    assert [row.nonzero().flatten().tolist() for row in inputs.written] == [
        [0, 1], [9, 10], [], [], [5, 6], [], []
    ]  # fmt: skip


def test_pages_are_shuffled_and_what_is_free_is_poisoned():
    inputs = make_kvcache_inputs(PAGED)
    table = inputs.block_table
    assert (table.dtype, tuple(table.shape)) == (torch.int32, (3, 3))
    # 33, 2 and 18 keys: three, one and two pages.
    pages = [*table[0].tolist(), int(table[1, 0]), *table[2, :2].tolist()]
    assert len({*pages, int(table[1, 1])}) == 7
    held = (~inputs.k_cache.isnan()).flatten(2).all(2).sum(1)
    assert held[pages].tolist() == [16, 15, 0, 0, 16, 0]
    assert int(held.sum()) == 47
    assert inputs.written.sum(1)[pages].tolist() == [0, 1, 1, 2, 0, 2]
    assert any(
        make_kvcache_inputs(PAGED, seed=seed).block_table[0].tolist() != sorted(table[0].tolist())
        for seed in range(4)
    )


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "q", "k", "cache_seqlens", "block_table"])
def test_writes_where_nothing_is_appended_are_found(name):
    inputs = make_kvcache_inputs(PAGED)
    inputs.k_cache[inputs.written] = 1.0
    inputs.v_cache[inputs.written] = 1.0
    inputs.assert_untouched()
    with pytest.raises(AssertionError, match="memory of k_cache was written to"):
        inputs.assert_untouched(nothing_written=True)
    row = (~inputs.written).nonzero()[0].tolist()
    spoiled = getattr(inputs, name)
    spoiled[tuple(row) if name.endswith("_cache") else 0] += 1
    if spoiled.dtype == torch.float32 and name.endswith("_cache"):
        spoiled[tuple(row)] = 1.0
    with pytest.raises(AssertionError, match=f"{name} was written to"):
        inputs.assert_untouched()


def test_the_page_size_does_not_change_the_result():
    results = []
    for page_size in (None, 16, 48):
        case = KVCacheCase(
            name="x", cache_seqlens=(31, 0, 16), capacity=48, seqlen_new=2, page_size=page_size
        )
        inputs = make_kvcache_inputs(case)
        results.append(kvcache_reference(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.options))
    for result in results[1:]:
        assert torch.equal(result.out, results[0].out)
        assert torch.equal(result.softmax_lse, results[0].softmax_lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_baseline_meets_every_quick_case(dtype):
    for case in select_kvcache("quick"):
        inputs = make_kvcache_inputs(case, dtype=dtype)
        plain = kvcache_baseline(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.options)
        inputs.assert_untouched(nothing_written=True)
        expect_kvcache(inputs).check(**plain._asdict())


@QUICKLY
@given(case=kvcache_cases(max_head_dim=32))
def test_the_oracle_runs_drawn_cases_and_the_baseline_meets_it(case):
    inputs = make_kvcache_inputs(case)
    plain = kvcache_baseline(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.options)
    expect_kvcache(inputs).check(**plain._asdict())
    inputs.assert_untouched(nothing_written=True)


INPUT_FEATURES = sorted(KVCACHE_FEATURES.keys() - OUTPUTS)


@pytest.mark.parametrize("feature", ["paged", "leftpad", "batch_idx", "rotary", "append", "keyless_rows"])
def test_features_are_drawn(feature):
    wanted = settings(max_examples=2000, phases=[Phase.generate])
    assert feature in find(kvcache_cases(), lambda case: feature in case.features, settings=wanted).features


@pytest.mark.parametrize("feature", INPUT_FEATURES)
@settings(QUICKLY, max_examples=10)
@given(data=st.data())
def test_features_can_be_kept_out(feature, data):
    assert feature not in data.draw(kvcache_cases(without={feature})).features


def test_an_unknown_feature_is_refused():
    with pytest.raises(ValueError, match=r"unknown features \['dropout'\], accepted: softmax_scale"):
        kvcache_cases(without={"dropout"})
