"""Forward, backward and weights against the float64 oracle, case by case."""

from __future__ import annotations

import pytest
import torch

from fap_kernels import attention_backward, attention_forward, attention_probabilities
from fap_testing.cases import Case, select
from fap_testing.expectation import expect
from fap_testing.inputs import CaseInputs, make_inputs

FORWARD_OPTIONS = ("softmax_scale", "causal", "window_size", "softcap", "dropout_p", "alibi_slopes")


def check_case(case: Case, dtype: torch.dtype, device: str) -> None:
    """Run a case through all three functions on poisoned memory and hold every tensor to its bound."""
    inputs = make_inputs(case, dtype=dtype, device=device)
    out, softmax_lse, rng_state = attention_forward(inputs.q, inputs.k, inputs.v, **inputs.options)
    weights = attention_probabilities(inputs.q, inputs.k, softmax_lse, rng_state=rng_state, **inputs.options)
    dq, dk, dv = attention_backward(
        inputs.dout, inputs.q, inputs.k, inputs.v, out, softmax_lse,
        dlse=inputs.dlse, rng_state=rng_state, **inputs.options,
    )  # fmt: skip
    kept = ~torch.signbit(weights[:, :, : case.seqlen_q, : case.seqlen_k])
    expected = expect(inputs, keep_mask=kept if case.dropout_p > 0.0 else None)
    expected.check(out=out, softmax_lse=softmax_lse, dq=dq, dk=dk, dv=dv)
    check_weights(inputs, weights, softmax_lse)
    inputs.assert_untouched()


def check_weights(inputs: CaseInputs, weights: torch.Tensor, softmax_lse: torch.Tensor) -> None:
    case = inputs.case
    assert weights.shape[2] % 128 == weights.shape[3] % 128 == 0
    inner = weights[:, :, : case.seqlen_q, : case.seqlen_k]
    padding = weights.clone()
    padding[:, :, : case.seqlen_q, : case.seqlen_k] = 0
    assert padding.count_nonzero() == 0, "weights beyond the sequences' lengths must be 0"
    sums = inner.abs().sum(-1, dtype=torch.float32)
    expected = torch.where(softmax_lse == torch.inf, 0.0, 1.0)
    torch.testing.assert_close(sums, expected, atol=2e-2, rtol=0.0)


# NumPy warns where a GPU's exp2 overflows to inf as the kernels intend.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.parametrize("case", select("quick"), ids=str)
def test_quick_cases_in_the_interpreter(case: Case) -> None:
    check_case(case, torch.float32, "cpu")
