"""The varlen suite passes right attention and fails wrong attention, each bug by a check that is about it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from fap_testing.cases_varlen import find_varlen, select_varlen
from fap_testing.conformance import (
    Subject,
    UnsupportedError,
    VarlenConformance,
    VarlenSubject,
    check_varlen_case,
    conformance_checks,
    run_conformance,
)
from fap_testing.strategies_varlen import varlen_cases

CAUGHT_BY = {
    "accepts_anything": "refuses_cu_seqlens_q_int64",
    "alibi_from_top_left": "alibi_head-float32",
    "causal_top_left": "lengths_mixed_causal-float32",
    "drops_last_key": "lengths_single-float32",
    "dropout_fixed_seed": "dropout_reproducible-float32",
    "dropout_not_rescaled": "dropout_0.5-float32",
    "dropout_same_for_all": "dropout_mask_varies-float32",
    "gqa_interleaved": "gqa_4_2-float32",
    "gradient_of_first_sequence": "lengths_many-float32",
    "gradients_off_by_a_thousandth": "out_gradient_alone-float32",
    "ignores_seqused_k": "seqused_k-float32",
    "ignores_seqused_q": "seqused_q-float32",
    "keyless_rows_nan": "lengths_no_keys_at_all-float32",
    "leaks": "lengths_mixed-float32",
    "lse_gradient_zero": "lse_gradient_alone-float32",
    "lse_minus_inf": "lengths_empty_keys_first-float32",
    "lse_transposed": "lengths_mixed-float32",
    "max_seqlen_must_be_int": "max_seqlen_types-float32",
    "one_query_swaps_heads": "gqa_4_2_one_query_and_empty-float32",
    "pages_in_order": "paged_16-float32",
    "random_noise": "deterministic_varlen-float32",
    "s_dmask_of_sequence_0": "dropout_0.5-float32",
    "slopes_of_sequence_0": "alibi_batch_head-float32",
    "softcap_ignored": "softcap_0.3-float32",
    "starts_one_late": "lengths_many-float32",
    "stops_at_empty": "lengths_empty_between-float32",
    "table_must_be_contiguous": "table_strides-float32",
    "table_of_sequence_0": "paged_16-float32",
    "window_clamped": "window_all_12-float32",
    "writes_inputs": "lengths_single-float32",
    "writes_unused_rows": "seqused_q-float32",
}


def subject_of(attention, **options):
    return VarlenSubject(**{"attention": attention, "dtypes": (torch.float32,), "repeats": 3} | options)


@pytest.mark.smoke
def test_right_attention_passes_every_check(eager_varlen):
    report = run_conformance(subject_of(eager_varlen()))
    report.raise_for_failures()
    assert not report.of("unsupported")
    assert len(report.of("passed")) == len(report.outcomes) > len(select_varlen("quick"))


def test_right_attention_passes_in_16_bits(eager_varlen):
    run_conformance(subject_of(eager_varlen(), dtypes=(torch.bfloat16,), repeats=2)).raise_for_failures()


@pytest.mark.parametrize("bug", CAUGHT_BY)
def test_each_bug_is_caught_by_the_check_about_it(eager_varlen, bug):
    checks = {check.name: check for check in conformance_checks(subject_of(eager_varlen(bug)))}
    with pytest.raises((AssertionError, TypeError)):
        checks[CAUGHT_BY[bug]].run()


def test_the_class_wants_a_subject_of_its_own_kind(eager_varlen):
    class Wrong(VarlenConformance):
        subject = Subject(attention=eager_varlen(), dtypes=(torch.float32,))

    class Metafunc:
        fixturenames = ("conformance_check",)

    with pytest.raises(TypeError, match="subject must be a VarlenSubject, got Subject"):
        Wrong().pytest_generate_tests(Metafunc())


def test_what_is_declared_and_refused_is_unsupported(eager_varlen):
    def without_pages(*tensors, **options):
        if "block_table" in options:
            raise AssertionError("block_table is not supported")
        return eager_varlen()(*tensors, **options)

    subject = subject_of(without_pages, unsupported={"paged"})
    with pytest.raises(UnsupportedError, match="declared unsupported: paged; refused with AssertionError"):
        check_varlen_case(subject, find_varlen("paged_16"), torch.float32)


def test_what_is_declared_but_silently_wrong_fails(eager_varlen):
    subject = subject_of(eager_varlen("pages_in_order"), unsupported={"paged"})
    with pytest.raises(AssertionError, match="declared unsupported: paged, but the call returned a wrong"):
        check_varlen_case(subject, find_varlen("paged_16"), torch.float32)


def test_a_subject_without_lse_and_gradients_is_checked_by_its_output_alone(eager_varlen):
    @torch.no_grad()
    def forward_only(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return eager_varlen()(q, k, v, *lengths, causal=causal)

    subject = subject_of(forward_only, unsupported={"lse", "backward", "dropout"})
    check_varlen_case(subject, find_varlen("lengths_mixed_causal"), torch.float32)
    report = run_conformance(
        subject_of(forward_only, unsupported={"lse", "backward", "dropout"}),
        cases=select_varlen("quick", "seqused"),
    )
    assert {o.name for o in report.failures} >= {"seqused_k-float32", "seqused_q-float32"}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=varlen_cases(max_head_dim=32))
def test_right_attention_passes_drawn_cases(eager_varlen, case):
    check_varlen_case(subject_of(eager_varlen()), case, torch.float32)


def test_features_of_other_suites_are_unknown(eager_varlen):
    with pytest.raises(ValueError, match=r"unknown features \['rotary'\], accepted: .*seqused"):
        subject_of(eager_varlen(), unsupported={"rotary"})
