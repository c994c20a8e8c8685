"""Drawn cases combine everything, keep out what they are told to, and the oracle can run them all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from fap_testing.cases import FEATURES
from fap_testing.conformance import Subject, check_case
from fap_testing.strategies import cases, window_sizes

OUTPUTS = {"backward", "lse", "lse_gradient", "dropout_mask", "deterministic", "error_messages"}
INPUT_FEATURES = sorted(FEATURES.keys() - OUTPUTS)
QUICKLY = settings(max_examples=30, deadline=None)


@settings(QUICKLY, derandomize=True)
@given(case=cases(max_seqlen=40, max_head_dim=24))
def test_right_attention_passes_drawn_cases(eager_attention, case):
    check_case(Subject(attention=eager_attention(), dtypes=(torch.float32,)), case, torch.float32)


@pytest.mark.parametrize("feature", sorted(set(INPUT_FEATURES) - {"keyless_rows", "zero_length"}))
def test_every_feature_is_drawn(feature):
    drawn = find(
        cases(max_head_dim=256),
        lambda case: feature in case.features,
        settings=settings(max_examples=2000, phases=[Phase.generate]),
    )
    assert feature in drawn.features


@pytest.mark.parametrize("feature", INPUT_FEATURES)
@settings(QUICKLY, derandomize=True)
@given(data=st.data())
def test_features_can_be_kept_out(feature, data):
    assert feature not in data.draw(cases(max_head_dim=256, without={feature})).features


def test_everything_can_be_kept_out():
    @settings(QUICKLY, derandomize=True)
    @given(case=cases(without=INPUT_FEATURES))
    def plain(case):
        assert not case.features

    plain()


@settings(QUICKLY, derandomize=True)
@given(window=window_sizes(9))
def test_windows_are_pairs_of_bounds(window):
    assert len(window) == 2
    assert all(-1 <= bound <= 9 for bound in window)


def test_an_unknown_feature_is_refused():
    with pytest.raises(ValueError, match=r"unknown features \['rotary'\], accepted: softmax_scale"):
        cases(without={"rotary"})
