"""The oracle agrees with hand computation, with PyTorch's own attention, and with finite differences."""

from __future__ import annotations

import math

import pytest
import torch

from fap_testing.cases import Case, select
from fap_testing.inputs import make_inputs, make_keep_mask
from fap_testing.reference import (
    attention_baseline,
    attention_baseline_gradients,
    attention_reference,
    attention_reference_gradients,
    visible_keys,
)

SMALL = [case for case in select("quick") if case.seqlen_q * case.seqlen_k <= 33 * 50 and case.head_dim <= 16]


def column(*values):
    """One head of width 1: (1, len(values), 1, 1)."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1)


def test_two_keys_by_hand():
    # Weights 1/4 and 3/4, denominator 1 + 3.
    result = attention_reference(column(1.0), column(0.0, math.log(3.0)), column(0.0, 8.0), softmax_scale=1.0)
    assert result.out.item() == pytest.approx(6.0)
    assert result.softmax_lse.item() == pytest.approx(math.log(4.0))
    assert result.probabilities.flatten().tolist() == pytest.approx([0.25, 0.75])


def test_alibi_by_hand():
    # The last query sits at the last key: distances 2, 1, 0, so weights 1/4, 1/2, 1 with slope ln 2.
    slopes = torch.tensor([math.log(2.0)])
    result = attention_reference(
        column(0.0), column(0.0, 0.0, 0.0), column(7.0, 14.0, 28.0), alibi_slopes=slopes
    )
    assert result.probabilities.flatten().tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7], rel=1e-6)
    assert result.out.item() == pytest.approx(1 + 4 + 16, rel=1e-6)
    assert result.softmax_lse.item() == pytest.approx(math.log(1.75), rel=1e-6)


def test_softcap_comes_before_alibi_by_hand():
    # Capped score 2 * tanh(inf) = 2, then bias -3 for the far key.
    q, k = column(1e6), column(1.0, 1.0)
    result = attention_reference(q, k, column(0.0, 0.0), softcap=2.0, alibi_slopes=torch.tensor([3.0]))
    assert result.softmax_lse.item() == pytest.approx(math.log(math.exp(2.0) + math.exp(-1.0)))


def test_dropout_by_hand():
    keep = torch.tensor([True, False, True, False]).reshape(1, 1, 1, 4)
    result = attention_reference(
        column(0.0), column(0.0, 0.0, 0.0, 0.0), column(1.0, 2.0, 4.0, 8.0), dropout_p=0.75, keep_mask=keep
    )
    assert result.out.item() == pytest.approx((1.0 + 4.0) / 4 / 0.25)
    assert result.softmax_lse.item() == pytest.approx(math.log(4.0))
    assert result.probabilities.flatten().tolist() == [0.25] * 4


@pytest.mark.parametrize(
    ("lengths", "causal", "window", "expected"),
    [
        ((3, 3), True, (-1, -1), ["100", "110", "111"]),
        ((2, 4), True, (-1, -1), ["1110", "1111"]),
        ((4, 2), True, (-1, -1), ["00", "00", "10", "11"]),
        ((3, 3), False, (0, 1), ["110", "011", "001"]),
        ((3, 3), True, (1, 7), ["100", "110", "011"]),
        ((4, 2), False, (-1, 1), ["00", "10", "11", "11"]),
        # Upstream takes a right bound of 2 >= seqlen_k for none, and a missing one beside a left bound for 2.
        ((6, 2), False, (-1, 2), ["00", "00", "10", "11", "11", "11"]),
        ((6, 2), False, (1, -1), ["11", "11", "11", "11", "11", "11"]),
        ((2, 4), False, (1, -1), ["0111", "0011"]),
        ((2, 3), False, (-7, -9), ["111", "111"]),
        ((2, 0), False, (-1, -1), ["", ""]),
    ],
)
def test_visible_keys_by_hand(lengths, causal, window, expected):
    mask = visible_keys(*lengths, causal=causal, window_size=window)
    assert ["".join(str(int(x)) for x in row) for row in mask] == expected


def explicit_bias(case, slopes):
    """The mask and the ALiBi bias, element by element from the contract's sentences."""
    bias = torch.zeros(case.batch, case.nheads, case.seqlen_q, case.seqlen_k, dtype=torch.float64)
    left, right = case.window_size[0], 0 if case.causal else case.window_size[1]
    for i in range(case.seqlen_q):
        for j in range(case.seqlen_k):
            position = i + case.seqlen_k - case.seqlen_q
            if (left >= 0 and j < position - left) or (right >= 0 and j > position + right):
                bias[:, :, i, j] = -math.inf
            elif slopes is not None:
                bias[:, :, i, j] = -slopes.double().expand(case.batch, case.nheads) * abs(position - j)
    return bias


@pytest.mark.parametrize("case", [c for c in SMALL if not c.softcap and not c.dropout_p], ids=str)
def test_it_agrees_with_pytorchs_attention(case):
    inputs = make_inputs(case, dtype=torch.float64, poison=False)
    bias = explicit_bias(case, inputs.alibi_slopes)
    keyless = (
        bias.isinf().all(-1)[..., None] if case.seqlen_k else torch.ones(*bias.shape[:3], 1, dtype=torch.bool)
    )
    leaves = inputs.leaves()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in leaves),
            attn_mask=bias.masked_fill(keyless, 0.0),
            scale=case.softmax_scale,
            enable_gqa=True,
        )
    out = out.masked_fill(keyless, 0.0).transpose(1, 2)
    ours = attention_reference_gradients(inputs.q, inputs.k, inputs.v, inputs.dout, **inputs.options)
    torch.testing.assert_close(ours.out, out.detach(), rtol=1e-9, atol=1e-10)
    gradients = torch.autograd.grad(out, leaves, inputs.dout)
    for x, y in zip((ours.dq, ours.dk, ours.dv), gradients, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", [c for c in SMALL if c.head_dim <= 16], ids=str)
def test_probabilities_lse_and_out_belong_together(case):
    inputs = make_inputs(case, poison=False)
    options = {**inputs.options, "dropout_p": 0.0}
    out, lse, p = attention_reference(inputs.q, inputs.k, inputs.v, **options)
    keyless = lse.isinf()
    assert keyless.any() == (case.has_keyless_rows and case.batch > 0)
    assert (lse[keyless] > 0).all()
    assert out.transpose(1, 2)[keyless].count_nonzero() == 0
    torch.testing.assert_close(p.sum(-1), (~keyless).double())
    value = inputs.v.double().transpose(1, 2).repeat_interleave(case.nheads // case.nheads_k, dim=1)
    torch.testing.assert_close((p @ value).transpose(1, 2), out)


GRADCHECKED = {
    "gqa": Case(name="gqa", seqlen_q=3, seqlen_k=5, nheads=4, nheads_k=2, head_dim=3, causal=True),
    "keyless": Case(name="keyless", seqlen_q=5, seqlen_k=3, head_dim=2, window_size=(1, 0)),
    "scores": Case(
        name="scores", seqlen_q=3, seqlen_k=4, head_dim=2, softcap=1.5, alibi="head", softmax_scale=-0.8
    ),
    "dropout": Case(name="dropout", batch=2, seqlen_q=3, seqlen_k=4, head_dim=2, dropout_p=0.4),
}


@pytest.mark.parametrize("case", GRADCHECKED.values(), ids=str)
def test_gradients_of_out_and_lse_pass_gradcheck(case):
    inputs = make_inputs(case, dtype=torch.float64, poison=False)
    keep_mask = make_keep_mask(case)

    def out_and_finite_lse(q, k, v):
        out, lse, _ = attention_reference(q, k, v, **inputs.options, keep_mask=keep_mask)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(out_and_finite_lse, inputs.leaves())


def test_the_lse_gradient_is_right_by_finite_differences():
    case = Case(
        name="lse", seqlen_q=5, seqlen_k=3, nheads=2, nheads_k=1, head_dim=3, causal=True, alibi="head"
    )
    inputs = make_inputs(case, dtype=torch.float64, poison=False)
    analytic = attention_reference_gradients(
        inputs.q, inputs.k, inputs.v, None, inputs.dlse, **inputs.options
    )
    assert analytic.dv.count_nonzero() == 0
    assert not any(x.requires_grad for x in analytic)
    assert analytic.dq.transpose(1, 2)[analytic.softmax_lse.isinf()].count_nonzero() == 0

    def loss(q, k):
        lse = attention_reference(q, k, inputs.v, **inputs.options).softmax_lse
        return (lse.masked_fill(lse.isinf(), 0.0) * inputs.dlse).sum().item()

    step = 1e-6
    for index in [(0, 4, 1, 2), (0, 3, 0, 0), (0, 0, 0, 0)]:
        nudge = torch.zeros_like(inputs.q)
        nudge[index] = step
        slope = (loss(inputs.q + nudge, inputs.k) - loss(inputs.q - nudge, inputs.k)) / (2 * step)
        assert analytic.dq[index].item() == pytest.approx(slope, abs=1e-7)
    nudge = torch.zeros_like(inputs.k)
    nudge[0, 1, 0, 1] = step
    slope = (loss(inputs.q, inputs.k + nudge) - loss(inputs.q, inputs.k - nudge)) / (2 * step)
    assert analytic.dk[0, 1, 0, 1].item() == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_baseline_keeps_the_dtype_but_for_the_lse(dtype):
    case = Case(name="baseline", causal=True, alibi="head", softcap=3.0)
    inputs = make_inputs(case, dtype=dtype)
    arguments = (inputs.q, inputs.k, inputs.v)
    result = attention_baseline(*arguments, **inputs.options)
    assert (result.out.dtype, result.softmax_lse.dtype) == (dtype, torch.float32)
    gradients = attention_baseline_gradients(*arguments, inputs.dout, inputs.dlse, **inputs.options)
    assert {x.dtype for x in (gradients.out, gradients.dq, gradients.dk, gradients.dv)} == {dtype}
    oracle = attention_reference_gradients(*arguments, inputs.dout, inputs.dlse, **inputs.options)
    error = (gradients.dq.double() - oracle.dq).abs().max()
    assert 0.0 < error < 30 * torch.finfo(dtype).eps
    assert (gradients.softmax_lse - oracle.softmax_lse).abs().max() < 1e-5


def test_the_oracle_is_in_float64_and_differentiable():
    case = Case(name="dtype")
    leaves = make_inputs(case, dtype=torch.bfloat16).leaves()
    result = attention_reference(*leaves)
    assert {x.dtype for x in result} == {torch.float64}
    (result.out.sum() + result.softmax_lse.sum()).backward()
    assert all(x.grad is not None and x.grad.dtype == torch.bfloat16 for x in leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alibi_slopes": torch.ones(3)}, r"alibi_slopes must have shape .*got \(3,\)"),
        ({"dropout_p": 0.5}, "dropout_p > 0 and keep_mask go together"),
        ({"keep_mask": torch.ones(1, 2, 4, 4, dtype=torch.bool)}, "dropout_p > 0 and keep_mask go together"),
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"dropout_p": 0.5, "keep_mask": torch.ones(4, 4)}, "keep_mask must be bool of shape"),
        ({"q": torch.ones(1, 4, 2)}, "q must be .*got shape"),
        ({"k": torch.ones(1, 5, 2, 4)}, "k and v must have one shape"),
        ({"q": torch.ones(2, 4, 2, 4)}, "q and k must agree in batch and head_dim"),
        ({"q": torch.ones(1, 4, 3, 4)}, "k's heads must divide q's heads, got 2 and 3"),
    ],
)
def test_mistakes_are_refused(change, message):
    arguments = {name: torch.ones(1, 4, 2, 4) for name in "qkv"} | change
    q, k, v = (arguments.pop(name) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        attention_reference(q, k, v, **arguments)


def test_gradients_need_a_gradient_of_something():
    x = torch.ones(1, 4, 2, 4)
    with pytest.raises(ValueError, match="dout and dlse are both None"):
        attention_reference_gradients(x, x, x, None)
    with pytest.raises(ValueError, match=r"dlse must have shape \(1, 2, 4\), got \(1, 4, 2\)"):
        attention_reference_gradients(x, x, x, None, torch.ones(1, 4, 2))
