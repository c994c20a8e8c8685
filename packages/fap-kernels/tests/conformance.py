"""One case through the three public functions, every tensor held to its bound."""

from __future__ import annotations

import pytest
import torch

from fap_kernels import attention_backward, attention_forward, attention_probabilities
from fap_kernels.config import TileConfig
from fap_kernels.forward import launch
from fap_testing.cases import Case
from fap_testing.expectation import expect
from fap_testing.inputs import CaseInputs, make_inputs
from fap_testing.inputs_varlen import VarlenInputs


def check_case(case: Case, dtype: torch.dtype, device: str) -> None:
    """Run a case on poisoned memory: every result must be right and the poison untouched."""
    inputs = make_inputs(case, dtype=dtype, device=device)
    out, softmax_lse, weights, dq, dk, dv = run(inputs)
    kept = ~torch.signbit(weights[:, :, : case.seqlen_q, : case.seqlen_k])
    expected = expect(inputs, keep_mask=kept if case.dropout_p > 0.0 else None)
    expected.check(out=out, softmax_lse=softmax_lse, dq=dq, dk=dk, dv=dv)
    check_weights(case, weights, softmax_lse)
    inputs.assert_untouched()


def run(inputs: CaseInputs, rng_state: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Return out, softmax_lse, weights, dq, dk, dv."""
    options = inputs.options
    out, softmax_lse, rng_state = attention_forward(
        inputs.q, inputs.k, inputs.v, rng_state=rng_state, **options
    )
    weights = attention_probabilities(inputs.q, inputs.k, softmax_lse, rng_state=rng_state, **options)
    gradients = attention_backward(
        inputs.dout, inputs.q, inputs.k, inputs.v, out, softmax_lse,
        dlse=inputs.dlse, rng_state=rng_state, deterministic=True, **options,
    )  # fmt: skip
    return out, softmax_lse, weights, *gradients


def check_weights(case: Case, weights: torch.Tensor, softmax_lse: torch.Tensor) -> None:
    """Rows sum to 1, or to 0 without keys; the padding is +0."""
    assert weights.shape[2] % 128 == weights.shape[3] % 128 == 0
    padding = weights.clone()
    padding[:, :, : case.seqlen_q, : case.seqlen_k] = 0
    assert padding.count_nonzero() == 0, "weights beyond the lengths must be 0"
    assert not torch.signbit(padding).any(), "weights beyond the lengths must not count as dropped"
    sums = weights[:, :, : case.seqlen_q, : case.seqlen_k].abs().sum(-1, dtype=torch.float32)
    torch.testing.assert_close(sums, torch.where(softmax_lse == torch.inf, 0.0, 1.0), atol=2e-2, rtol=0.0)


def keep_masks(inputs: VarlenInputs, rng_state: torch.Tensor) -> torch.Tensor:
    """The masks of all sequences, which are those of a dense call with as many batch entries."""
    batch = len(inputs.cu_seqlens_q) - 1
    q, k = (
        torch.zeros(
            batch, inputs.lengths[f"max_seqlen_{side}"], *x.shape[-2:], dtype=x.dtype, device=x.device
        )
        for side, x in (("q", inputs.q), ("k", inputs.k))
    )
    lse = torch.zeros(batch, q.shape[2], q.shape[1], device=q.device)
    dropout_p = inputs.case.options["dropout_p"]
    with pytest.MonkeyPatch.context() as patch:
        if q.device.type == "cpu":  # interpreted, it takes as long as it has programs
            patch.setattr(launch, "PROBABILITIES", TileConfig(128, 128, 4, 1))
        return ~torch.signbit(attention_probabilities(q, k, lse, dropout_p=dropout_p, rng_state=rng_state))
