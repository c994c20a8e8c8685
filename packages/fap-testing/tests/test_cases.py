"""The named cases cover the contract, and Cases refuse nonsense."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fap_testing.cases import FEATURES, LAYOUTS, Case, all_cases, find, select
from fap_testing.reference import visible_keys

OUTPUTS = {"backward", "lse", "lse_gradient", "dropout_mask", "deterministic", "error_messages"}


@pytest.mark.parametrize("size", ["quick", "full"])
def test_every_input_feature_has_a_case(size):
    covered = frozenset().union(*(case.features for case in select(size)))
    assert covered == FEATURES.keys() - OUTPUTS


@pytest.mark.parametrize("size", ["quick", "full"])
def test_the_corners_of_the_contract_have_cases(size):
    cases = select(size)
    head_dims = {case.head_dim for case in cases}
    assert head_dims >= {1, 8, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256}
    assert {case.layout for case in cases} == set(LAYOUTS)
    assert {case.alibi for case in cases} == {None, "head", "batch_head"}
    lengths = {(min(case.seqlen_q, 2), min(case.seqlen_k, 2)) for case in cases}
    assert lengths >= {(0, 2), (2, 0), (0, 0), (1, 1), (1, 2), (2, 1)}
    assert any(case.seqlen_q > case.seqlen_k > 1 and case.causal for case in cases)
    assert any((case.softmax_scale or 0.0) < 0.0 for case in cases)
    assert any(case.softmax_scale == 0.0 for case in cases)
    assert any(case.nheads_k == 1 < case.nheads for case in cases)


def test_quick_cases_are_small_enough_for_an_interpreter():
    for case in select("quick"):
        assert max(case.seqlen_q, case.seqlen_k) <= 70
        assert case.batch * case.nheads <= 12


@pytest.mark.parametrize("case", select("quick"), ids=str)
def test_a_case_knows_whether_it_has_rows_without_keys(case):
    mask = visible_keys(case.seqlen_q, case.seqlen_k, causal=case.causal, window_size=case.window_size)
    assert case.has_keyless_rows == bool((~mask.any(-1)).any())
    assert ("keyless_rows" in case.features) == case.has_keyless_rows


def test_options_are_those_that_differ_from_the_default():
    assert Case(name="plain").options == {}
    case = Case(
        name="all",
        softmax_scale=0.0,
        causal=True,
        window_size=(3, 0),
        softcap=1.0,
        dropout_p=0.5,
        alibi="head",
    )
    assert case.options == {
        "softmax_scale": 0.0, "causal": True, "window_size": (3, 0), "softcap": 1.0, "dropout_p": 0.5
    }  # fmt: skip


def test_cases_are_found_by_name_and_by_tag():
    assert find("gqa_4_2") in select("quick", "gqa")
    assert set(select("quick")) < set(select("full")) == set(all_cases()) - set(select("huge"))
    with pytest.raises(KeyError, match="no case is called 'gqa'"):
        find("gqa")
    with pytest.raises(ValueError, match=r"no case has all of the tags .*known tags: alibi"):
        select("slow")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nheads": 3}, "nheads_k must divide nheads, got 2 and 3"),
        ({"layout": "diagonal"}, "layout must be one of contiguous"),
        ({"layout": "qkv_packed", "seqlen_k": 5}, "needs equal lengths"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
    ],
)
def test_contradictory_cases_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Case(name="wrong", **change)


@pytest.mark.smoke
def test_cases_and_the_package_import_without_torch():
    code = (
        "import sys, fap_testing, fap_testing.cases as c; c.select('quick'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
