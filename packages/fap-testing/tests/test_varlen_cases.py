"""The named and drawn varlen cases cover the contract; their inputs are reproducible and poisoned."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from fap_testing.cases import LAYOUTS
from fap_testing.cases_varlen import VARLEN_FEATURES, VarlenCase, all_varlen_cases, find_varlen, select_varlen
from fap_testing.expectation import expect_varlen
from fap_testing.inputs_varlen import make_varlen_inputs, make_varlen_keep_mask
from fap_testing.reference_varlen import attention_varlen_baseline_gradients, attention_varlen_reference
from fap_testing.strategies_varlen import varlen_cases

QUICKLY = settings(max_examples=25, deadline=None, derandomize=True)
OUTPUTS = {"backward", "lse", "lse_gradient", "dropout_mask", "deterministic", "error_messages"}


@pytest.mark.parametrize("size", ["quick", "full"])
def test_every_input_feature_has_a_case(size):
    covered = frozenset().union(*(case.features for case in select_varlen(size)))
    assert covered == VARLEN_FEATURES.keys() - OUTPUTS


def test_the_corners_of_the_contract_have_quick_cases():
    cases = select_varlen("quick")
    assert {case.layout for case in cases} == set(LAYOUTS)
    pairs = {(n, m) for case in cases for n, m in zip(case.used_q, case.used_k, strict=True)}
    assert {(min(n, 2), min(m, 2)) for n, m in pairs} == {(n, m) for n in range(3) for m in range(3)}
    assert any(case.batch == 0 for case in cases)
    assert any(case.batch > 1 and not sum(case.seqlens_q) and not sum(case.seqlens_k) for case in cases)
    assert any(case.batch > 2 and 2 * max(case.seqlens_k) == sum(case.seqlens_k) for case in cases)
    swapped = [case for case in cases if max(case.seqlens_q, default=0) == 1 and case.nheads > case.nheads_k]
    assert any(0 in case.seqlens_q and 0 in case.seqlens_k for case in swapped)
    assert {case.page_size for case in cases} == {None, 16, 32, 64}
    assert all(sum(case.seqlens_q) <= 130 and sum(case.seqlens_k) <= 130 for case in cases)


def test_cases_are_found_by_name_and_by_tag():
    assert find_varlen("gqa_4_2_one_query_and_empty") in select_varlen("quick", "gqa")
    assert set(select_varlen("quick")) < set(select_varlen("full")) == set(all_varlen_cases())
    with pytest.raises(KeyError, match="no varlen case is called 'gqa'"):
        find_varlen("gqa")
    with pytest.raises(ValueError, match=r"no varlen case has all of the tags .*known tags: alibi"):
        select_varlen("slow")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seqlens_q": (3,)}, "seqlens_q and seqlens_k must name the same sequences, got 1 and 2"),
        ({"seqused_k": (5, 1)}, r"seqused_k must be at most the sequences' lengths \(4, 4\), got \(5, 1\)"),
        ({"seqused_q": (1,)}, "seqused_q must be at most the sequences' lengths"),
        ({"layout": "qkv_packed", "seqlens_q": (5, 3)}, "layout 'qkv_packed' needs equal lengths"),
        (
            {"layout": "gapped", "page_size": 16},
            "layout 'gapped' is not for packed sequences with page_size 16",
        ),
        ({"layout": "far_rows"}, "layout 'far_rows' is not for packed sequences"),
        ({"nheads": 3}, "nheads_k must divide nheads"),
    ],
)
def test_contradictory_cases_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VarlenCase(**{"name": "wrong", "seqlens_q": (4, 4), "seqlens_k": (4, 4)} | change)


def test_the_cases_import_without_torch():
    code = "import sys, fap_testing.cases_varlen as c; c.select_varlen(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


USED = VarlenCase(
    name="x", seqlens_q=(5, 0, 7), seqlens_k=(40, 3, 9), seqused_q=(5, 0, 2), seqused_k=(33, 3, 0)
)
PAGED = VarlenCase(name="x", seqlens_q=(5, 0, 7), seqlens_k=(40, 3, 9), seqused_k=(33, 3, 0), page_size=16)


def test_values_depend_on_name_and_seed_and_nothing_else():
    plain = make_varlen_inputs(USED)
    again = make_varlen_inputs(USED, dtype=torch.bfloat16, poison=False)
    used = ~plain.k.isnan()
    assert torch.equal(again.k[used], plain.k.bfloat16()[used])
    assert not again.k[~used].count_nonzero()
    assert not torch.equal(make_varlen_inputs(USED, seed=1).k[used], plain.k[used])


def test_rows_not_in_use_and_everything_around_are_poisoned():
    inputs = make_varlen_inputs(USED, dtype=torch.float16)
    assert inputs.cu_seqlens_k.tolist() == [0, 40, 43, 52]
    assert (inputs.cu_seqlens_q.dtype, inputs.seqused_q.dtype) == (torch.int32, torch.int32)
    for x in (inputs.q, inputs.dout, inputs.dlse.T):
        assert x.isnan().flatten(1).all(1).tolist() == [False] * 7 + [True] * 5
    for x in (inputs.k, inputs.v):
        assert x.isnan().flatten(1).all(1).tolist() == [False] * 33 + [True] * 7 + [False] * 3 + [True] * 9
        memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        assert memory[: x.storage_offset()].isnan().all()
        assert x.storage_offset() >= 128 * x.stride(0)
        assert memory[-128 * x.stride(0) :].isnan().all()
    inputs.k[0, 0, 0] = 1.0
    with pytest.raises(AssertionError, match="memory of k was written to"):
        inputs.assert_untouched()


def test_pages_are_shuffled_and_what_is_free_is_poisoned():
    inputs = make_varlen_inputs(PAGED)
    table = inputs.block_table
    assert (table.dtype, tuple(table.shape)) == (torch.int32, (3, 4))
    assert inputs.k.shape[1] == 16
    pages = [*table[0, :3].tolist(), int(table[1, 0])]
    assert len({*pages, int(table[2, 0])}) == 5
    for x in (inputs.k, inputs.v):
        in_use = (~x.isnan()).flatten(2).all(2).sum(1)
        assert in_use[pages].tolist() == [16, 16, 1, 3]
        assert int(in_use.sum()) == 36
    assert any(
        make_varlen_inputs(PAGED, seed=seed).block_table[0, :3].tolist() != sorted(table[0, :3].tolist())
        for seed in range(4)
    )


def test_the_page_size_does_not_change_the_result():
    options = {name: getattr(PAGED, name) for name in ("name", "seqlens_q", "seqlens_k", "seqused_k")}
    results = []
    for page_size in (None, 16, 64):
        inputs = make_varlen_inputs(VarlenCase(**options, page_size=page_size))
        results.append(
            attention_varlen_reference(
                inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k, **inputs.options
            )
        )
    for result in results[1:]:
        assert torch.equal(result.out, results[0].out)
        assert torch.equal(result.softmax_lse, results[0].softmax_lse)


@QUICKLY
@given(case=varlen_cases(max_seqlen=20, max_head_dim=16))
def test_the_oracle_runs_drawn_cases_and_the_baseline_meets_it(case):
    inputs = make_varlen_inputs(case)
    keep_mask = make_varlen_keep_mask(case)
    plain = attention_varlen_baseline_gradients(
        *(inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.dout, inputs.dlse),
        **inputs.options,
        keep_mask=keep_mask,
    )
    expect_varlen(inputs, keep_mask=keep_mask).check(**plain._asdict())
    inputs.assert_untouched()


@pytest.mark.parametrize("feature", ["seqused", "paged", "cross_lengths", "gqa", "dropout", "alibi"])
def test_features_are_drawn(feature):
    wanted = settings(max_examples=2000, phases=[Phase.generate])
    assert feature in find(varlen_cases(), lambda case: feature in case.features, settings=wanted).features


@pytest.mark.parametrize("feature", sorted(VARLEN_FEATURES.keys() - OUTPUTS))
@settings(QUICKLY, max_examples=10)
@given(data=st.data())
def test_features_can_be_kept_out(feature, data):
    assert feature not in data.draw(varlen_cases(without={feature})).features


def test_an_unknown_feature_is_refused():
    with pytest.raises(ValueError, match=r"unknown features \['rotary'\], accepted: softmax_scale"):
        varlen_cases(without={"rotary"})
