"""The error bound lets honest rounding pass and nothing else, and its messages say what to look at."""

from __future__ import annotations

import math

import pytest
import torch

from fap_testing.cases import Case, find
from fap_testing.expectation import expect
from fap_testing.inputs import make_inputs, make_keep_mask
from fap_testing.tolerances import assert_close_to_oracle, error_bound

ORACLE = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64).reshape(1, 41)


def check(actual, oracle=ORACLE, baseline=None, **options):
    assert_close_to_oracle(
        actual, oracle, oracle.float() if baseline is None else baseline, name="out", **options
    )


def test_up_to_twice_the_baselines_error_passes_and_more_fails():
    baseline = ORACLE + 1e-2
    check(ORACLE - 1.9e-2, baseline=baseline, atol=0.0)
    with pytest.raises(AssertionError, match=r"max error 2.100e-02, allowed 2.000e-02"):
        check(ORACLE - 2.1e-2, baseline=baseline, atol=0.0)


def test_the_rms_error_is_bounded_too():
    baseline = ORACLE.clone()
    baseline[0, 0] += 1e-2
    check(baseline, baseline=baseline, atol=0.0)
    with pytest.raises(AssertionError, match=r"rms error 1.000e-02"):
        check(ORACLE + 1e-2, baseline=baseline, atol=0.0)


def test_a_message_says_what_where_and_how_wrong():
    actual = ORACLE.float().clone()
    actual[0, 3] = 7.0
    with pytest.raises(AssertionError) as failure:
        check(actual, case="some_case")
    message = str(failure.value)
    assert "out of case some_case" in message
    assert "torch.float32, shape (1, 41)" in message
    assert "worst at (0, 3): got 7, oracle -1.7, PyTorch -1.7" in message
    assert "max error 8.700e+00, allowed 2" in message
    assert "1 of 41 elements" in message


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_stray_infinities_never_pass(bad):
    actual = ORACLE.float().clone()
    actual[0, 5] = bad
    with pytest.raises(
        AssertionError, match=r"1 of 41 elements that are NaN, or infinite .*first at \(0, 5\)"
    ):
        check(actual, factor=1e9, atol=1e9)


def test_nan_does_not_pass_even_where_the_baseline_has_it():
    with pytest.raises(AssertionError, match="NaN"):
        check(torch.full((1, 41), math.nan), baseline=torch.full((1, 41), math.nan))


def test_infinities_must_match_in_place_and_sign():
    oracle = ORACLE.clone()
    oracle[0, 2] = math.inf
    check(oracle.float(), oracle=oracle)
    for wrong in (-math.inf, 3e38, math.nan):
        actual = oracle.float().clone()
        actual[0, 2] = wrong
        with pytest.raises(AssertionError, match=r"first at \(0, 2\).*oracle inf"):
            check(actual, oracle=oracle)


def test_a_wrong_shape_fails():
    with pytest.raises(AssertionError, match=r"has shape \(41,\), expected \(1, 41\)"):
        check(ORACLE[0])


def test_a_baseline_that_overflows_bounds_nothing():
    with pytest.raises(ValueError, match=r"the baseline in torch.float16 is not finite"):
        error_bound(ORACLE * 1e5, (ORACLE * 1e5).half(), dtype=torch.float16)


def test_empty_tensors_pass():
    empty = torch.empty(0, 3, dtype=torch.float64)
    check(empty.float(), oracle=empty)


@pytest.mark.parametrize(
    ("dtype", "magnitude", "atol"),
    [
        (torch.float64, 1.0, 1e-12),
        (torch.float32, 0.1, 1e-5),
        (torch.float32, 30.0, 3e-4),
        (torch.bfloat16, 0.0, 1e-5),
        (torch.bfloat16, 2.0, 2.0**-6),
        (torch.float16, 2.0, 2.0**-9),
    ],
)
def test_the_stated_atol(dtype, magnitude, atol):
    oracle = torch.full((3,), magnitude, dtype=torch.float64)
    assert error_bound(oracle, oracle, dtype=dtype).atol == pytest.approx(atol)


def test_an_expectation_checks_any_of_the_results_and_refuses_other_names():
    inputs = make_inputs(find("lengths_70x13_causal"))
    expected = expect(inputs)
    results = {name: x.float() for name, x in expected.oracle._asdict().items()}
    expected.check(**results)
    for name, x in results.items():
        with pytest.raises(AssertionError, match=f"{name} of case lengths_70x13_causal"):
            expected.check(**{name: x + 0.1})
    with pytest.raises(TypeError, match="check takes any of out, softmax_lse, dq, dk, dv, got lse"):
        expected.check(lse=results["softmax_lse"])
    with pytest.raises(TypeError, match="got nothing"):
        expected.check()


def test_gradients_may_read_out_as_it_is_stored():
    """One key under dropout: dq is delta's rounding error alone, which only eager PyTorch avoids."""
    case = Case(name="stored_out", seqlen_q=19, seqlen_k=1, head_dim=47, nheads=1, nheads_k=1, dropout_p=0.79)
    inputs, keep_mask = make_inputs(case, dtype=torch.bfloat16), make_keep_mask(case)
    expected = expect(inputs, keep_mask=keep_mask, use_dlse=False)
    assert expected.oracle.dq.abs().max() < 1e-12
    stored = expected.oracle.out.bfloat16().double()
    weight = (keep_mask / (1 - case.dropout_p)).double()[0, 0]
    reads_dp = (inputs.dout.double() * inputs.v.double()).sum(-1)[0] * weight
    delta = (inputs.dout.double() * stored).sum(-1)[0]
    dq = ((reads_dp - delta) / 47**0.5)[None, :, :, None] * inputs.k.double()
    assert dq.abs().max() > 1e-3
    expected.check(dq=dq.bfloat16())
    with pytest.raises(AssertionError, match="dq of case stored_out"):
        expected.check(dq=(100 * dq).bfloat16())
    assert not expect(make_inputs(case), keep_mask=keep_mask).allowance


def test_a_lucky_baseline_does_not_decide():
    """A single element that the baseline happens to hit would leave no room for honest rounding."""
    inputs = make_inputs(
        Case(name="lucky", seqlen_q=1, seqlen_k=13, nheads=1, nheads_k=1, head_dim=1), dtype=torch.bfloat16
    )
    few, many = (
        expect(inputs),
        expect(make_inputs(Case(name="many", nheads=1, nheads_k=1), dtype=torch.bfloat16)),
    )
    assert few.allowance["out"] > 0.0
    assert many.allowance["out"] < 1e-2
    with pytest.raises(AssertionError, match="out of case lucky"):
        few.check(out=few.oracle.out.bfloat16() * 1.1)


def test_an_extra_allowance_adds_to_the_atol():
    assert error_bound(ORACLE, ORACLE, dtype=torch.float32, atol=0.5, extra_atol=0.25).atol == 0.75


def test_rows_without_keys_must_be_exact_zeros():
    inputs = make_inputs(find("lengths_70x13_causal"))
    expected = expect(inputs)
    out = expected.oracle.out.float()
    out[0, 0, 0, 0] = 1e-9
    with pytest.raises(AssertionError, match=r"out of case .* must be exactly 0 in rows without keys"):
        expected.check(out=out)
