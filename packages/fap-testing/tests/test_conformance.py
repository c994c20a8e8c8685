"""The suite passes right attention and fails wrong attention, each bug by a check that is about it."""

from __future__ import annotations

import pytest
import torch

from fap_testing.cases import Case, find, select
from fap_testing.conformance import (
    Subject,
    UnsupportedError,
    check_case,
    conformance_checks,
    run_conformance,
)

CAUGHT_BY = {
    "accepts_anything": "refuses_window_of_length_3",
    "alibi_causal_shortcut": "alibi_head_33x33_causal-float32",
    "alibi_from_top_left": "alibi_batch_head_20x45-float32",
    "alibi_sign": "alibi_head_33x33-float32",
    "always_returns_lse": "return_attn_probs-float32",
    "assumes_contiguous": "layout_qkv_packed-float32",
    "bfloat16_inside": "lengths_17x17-float32",
    "causal_keeps_right": "window_5_3_33x33_causal-float32",
    "causal_top_left": "lengths_70x13_causal-float32",
    "deterministic_gradients_off": "deterministic-float32",
    "dout_must_be_contiguous": "gradient_strides-float32",
    "dropout_fixed_seed": "dropout_mask_varies-float32",
    "dropout_not_rescaled": "dropout_0.5-float32",
    "dropout_same_in_batch": "dropout_mask_varies-float32",
    "dropout_too_little": "dropout_mask_fraction-float32",
    "dropout_unreported": "dropout_expectation-float32",
    "gqa_gradient_of_one_head": "gqa_4_2-float32",
    "gqa_interleaved": "gqa_4_2-float32",
    "gradients_off_by_a_thousandth": "lengths_17x17-float32",
    "keyless_rows_average": "lengths_70x13_causal-float32",
    "keyless_rows_nan": "lengths_70x13_causal-float32",
    "lse_after_dropout": "dropout_0.5-float32",
    "lse_base_2": "lengths_17x17-float32",
    "lse_float64": "lengths_17x17-float32",
    "lse_gradient_zero": "lse_gradient_alone-float32",
    "lse_minus_inf": "lengths_70x13_causal-float32",
    "no_maximum": "softmax_scale_10-float32",
    "random_noise": "deterministic-float32",
    "reads_past_the_end": "lengths_17x17-float32",
    "s_dmask_not_padded": "dropout_0.5-float32",
    "s_dmask_sign_swapped": "dropout_0.5-float32",
    "s_dmask_without_dropout": "lengths_17x17-float32",
    "scale_0_is_default": "softmax_scale_0-float32",
    "scale_missing": "lengths_17x17-float32",
    "scale_of_padded_head_dim": "head_dim_40-float32",
    "slopes_must_be_contiguous": "slopes_strides-float32",
    "softcap_after_alibi": "combined_window_softcap_alibi-float32",
    "softcap_ignored": "softcap_0.3-float32",
    "softcap_overflows": "softcap_1_scale_30-float32",
    "softmax_scale_ignored": "softmax_scale_3-float32",
    "window_clamped": "window_all_25_50x20-float32",
    "window_left_off_by_one": "window_5_0_33x33-float32",
    "window_right_off_by_one": "window_0_5_33x33-float32",
    "writes_inputs": "lengths_17x17-float32",
    "writes_inputs_without_gradients": "no_graph_without_gradients-float32",
    "writes_inputs_without_lse": "return_attn_probs-float32",
    "writes_past_the_end": "lengths_17x17-float32",
}


@pytest.mark.smoke
def test_right_attention_passes_every_check(eager_attention):
    report = run_conformance(eager_attention(), dtypes=(torch.float32,), repeats=3)
    report.raise_for_failures()
    assert not report.of("unsupported")
    assert len(report.of("passed")) == len(report.outcomes) > len(select("quick"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_right_attention_passes_in_16_bits(eager_attention, dtype):
    run_conformance(eager_attention(), dtypes=(dtype,), repeats=2).raise_for_failures()


@pytest.mark.parametrize("bug", CAUGHT_BY)
def test_each_bug_is_caught_by_the_check_about_it(eager_attention, bug):
    subject = Subject(attention=eager_attention(bug), dtypes=(torch.float32,), repeats=3)
    checks = {check.name: check for check in conformance_checks(subject)}
    with pytest.raises(AssertionError):
        checks[CAUGHT_BY[bug]].run()


def test_a_report_names_what_failed_and_why(eager_attention):
    report = run_conformance(
        eager_attention("lse_minus_inf"), dtypes=(torch.float32,), cases=select("quick", "window")
    )
    assert report.failures
    assert "keyless" in " ".join(
        find(o.name.removesuffix("-float32")).features.__str__() for o in report.failures
    )
    with pytest.raises(
        AssertionError, match=r"FAILED window_0_0_50x20-float32: .*softmax_lse.*-inf.*oracle inf"
    ):
        report.raise_for_failures()


def test_it_can_stop_at_the_first_failure(eager_attention):
    report = run_conformance(
        eager_attention("scale_missing"), dtypes=(torch.float32,), stop_at_first_failure=True
    )
    assert len(report.failures) == 1
    assert report.outcomes[-1].status == "failed"


def test_what_is_not_declared_has_to_work():
    def plain(q, k, v):
        raise NotImplementedError("nothing works")

    report = run_conformance(plain, dtypes=(torch.float32,), cases=select("quick", "softcap"))
    assert not report.of("unsupported")
    assert {o.name for o in report.failures} >= {
        f"{case.name}-float32" for case in select("quick", "softcap")
    }


def test_what_is_declared_and_refused_is_unsupported(eager_attention):
    def without_softcap(q, k, v, **options):
        if "softcap" in options:
            raise AssertionError("softcap is not supported")
        return eager_attention()(q, k, v, **options)

    subject = Subject(attention=without_softcap, dtypes=(torch.float32,), unsupported={"softcap"})
    with pytest.raises(UnsupportedError, match="declared unsupported: softcap; refused with AssertionError"):
        check_case(subject, find("softcap_15"), torch.float32)


def test_what_is_declared_but_silently_wrong_fails(eager_attention):
    subject = Subject(
        attention=eager_attention("softcap_ignored"), dtypes=(torch.float32,), unsupported={"softcap"}
    )
    with pytest.raises(
        AssertionError, match="declared unsupported: softcap, but the call returned a wrong result"
    ):
        check_case(subject, find("softcap_0.3"), torch.float32)


def test_what_is_declared_but_works_passes(eager_attention):
    subject = Subject(attention=eager_attention(), dtypes=(torch.float32,), unsupported={"softcap"})
    check_case(subject, find("softcap_0.3"), torch.float32)


def test_a_combination_can_be_declared(eager_attention):
    subject = Subject(
        attention=eager_attention("causal_top_left"),
        dtypes=(torch.float32,),
        unsupported={"causal+cross_lengths"},
    )
    assert subject.unsupported_in(Case(name="x", seqlen_k=5, causal=True)) == ["causal+cross_lengths"]
    assert not subject.unsupported_in(Case(name="x", causal=True))
    with pytest.raises(AssertionError, match="declared unsupported: causal\\+cross_lengths, but"):
        check_case(subject, find("lengths_13x70_causal"), torch.float32)


def test_a_subject_without_lse_and_gradients_is_checked_by_its_output_alone(eager_attention):
    calls = []

    @torch.no_grad()
    def forward_only(q, k, v, causal=False):
        calls.append(causal)
        return eager_attention()(q, k, v, causal=causal)

    subject = Subject(attention=forward_only, dtypes=(torch.float32,), unsupported={"lse", "backward"})
    check_case(subject, find("lengths_13x70_causal"), torch.float32)
    assert calls == [True]


def test_a_subject_says_what_is_wrong_with_its_description(eager_attention):
    with pytest.raises(ValueError, match=r"unknown features \['sofcap'\], accepted: .*softcap"):
        Subject(attention=eager_attention(), dtypes=(torch.float32,), unsupported={"sofcap"})
    with pytest.raises(ValueError, match="dtypes must name at least one"):
        Subject(attention=eager_attention(), dtypes=())
    with pytest.raises(ValueError, match="unsupported must be a collection"):
        Subject(attention=eager_attention(), dtypes=(torch.float32,), unsupported="softcap")
    with pytest.raises(TypeError, match="a Subject has its own options, got device"):
        run_conformance(Subject(attention=eager_attention(), dtypes=(torch.float32,)), device="cpu")


def test_the_suite_leaves_torchs_generator_alone(eager_attention):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    subject = Subject(attention=eager_attention(), dtypes=(torch.float32,))
    for check in conformance_checks(subject, cases=()):
        if "dropout" in check.name:
            check.run()
    assert torch.equal(torch.rand(3), expected)
