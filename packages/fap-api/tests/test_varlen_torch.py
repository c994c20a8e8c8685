"""Packed sequences on the torch back end: as each alone, lengths refused that contradict each other."""

from __future__ import annotations

import pytest
import torch

import fap_api
from fap_api import _varlen_ops


def bounds(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


WHERE = (bounds(5, 0, 9), bounds(7, 3, 4), 9, 7)


def draw():
    return (torch.randn(14, n, 8) for n in (4, 2, 2))


def attention(*tensors, where=WHERE, **options):
    return fap_api.flash_attn_varlen_func(*tensors, *where, **options)


def test_each_sequence_gets_the_bits_of_a_call_of_its_own():
    q, k, v = draw()
    slopes = torch.rand(3, 4)
    out, lse, _ = attention(
        q, k, v, causal=True, alibi_slopes=slopes, window_size=(4, -1), return_attn_probs=True
    )
    for b, (rows, keys) in enumerate(((slice(0, 5), slice(0, 7)), (slice(5, 14), slice(10, 14)))):
        right, right_lse, _ = fap_api.flash_attn_func(
            q[None, rows], k[None, keys], v[None, keys], causal=True, alibi_slopes=slopes[2 * b],
            window_size=(4, -1), return_attn_probs=True,
        )  # fmt: skip
        assert torch.equal(out[rows], right[0])
        assert torch.equal(lse[:, rows], right_lse[0])


def test_the_dropout_mask_is_that_of_a_dense_call():
    q, k, v = (torch.randn(3, 20, 2, 8) for _ in range(3))
    results = []
    for dense in (True, False):
        torch.manual_seed(1)
        if dense:
            results.append(fap_api.flash_attn_func(q, k, v, 0.4, return_attn_probs=True))
        else:
            where = (bounds(20, 20, 20),) * 2 + (20, 20)
            packed = (x.flatten(0, 1) for x in (q, k, v))
            results.append(attention(*packed, where=where, dropout_p=0.4, return_attn_probs=True))
    assert torch.equal(results[0][0].flatten(0, 1), results[1][0])
    assert torch.equal(torch.signbit(results[0][2]), torch.signbit(results[1][2]))


def test_rows_behind_the_last_sequence_are_zero():
    q, k, v = (x.requires_grad_() for x in draw())
    out = attention(q, k, v, where=(bounds(5, 4), bounds(7, 3), 5, 7))
    assert not out[9:].any()
    for gradient, end in zip(torch.autograd.grad(out.sum(), (q, k, v)), (9, 10, 10), strict=True):
        assert not gradient[end:].any()


USED = torch.tensor([5, 0, 10], dtype=torch.int32)
TABLE = torch.zeros(3, 1, dtype=torch.int32)


@pytest.mark.parametrize(
    ("where", "options", "says"),
    [
        ((bounds(5, 0, 10), *WHERE[1:]), {}, "max_seqlen_q must be at least the longest .* 10, got 9"),
        ((bounds(5, 0, 10), bounds(7, 3, 4), 10, 7), {}, "cu_seqlens_q must end at q's number of rows 14"),
        ((WHERE[0], bounds(7, 3, 5), 9, 7), {}, "cu_seqlens_k must end at k's number of rows 14"),
        (
            (WHERE[0], bounds(9, -2, 7), 9, 9),
            {},
            r"cu_seqlens_k must start at 0 or later and never decrease, got \[0, 9",
        ),
        (WHERE, {"seqused_q": USED}, r"seqused_q must be 0 to each .* \[5, 0, 9\], got \[5, 0, 10\]"),
        (WHERE, {"seqused_k": -USED}, "seqused_k must be 0 to each"),
        (
            (WHERE[0], bounds(7, 3, 17), 9, 17),
            {"block_table": TABLE},
            "block_table has 1 pages of 16 keys .* 17",
        ),
        (WHERE, {"block_table": TABLE + 2}, "block_table must name some of the 2 pages"),
        (WHERE, {"block_table": TABLE - 1}, "block_table must name some of the 2 pages"),
    ],
)
def test_lengths_that_contradict_each_other(where, options, says):
    q, k, v = draw()
    if "block_table" in options:
        k, v = (torch.randn(2, 16, 2, 8) for _ in range(2))
    with pytest.raises(RuntimeError, match=says):
        attention(q, k, v, where=where, **options)


def test_pages_have_no_gradient():
    q, pages = torch.randn(14, 4, 8), torch.randn(2, 16, 2, 8)
    for leaf in (q, pages):
        leaf.requires_grad_()
        with pytest.raises(RuntimeError, match=r"block_table .* requires a gradient"):
            attention(q, pages, pages, block_table=TABLE)
        with torch.no_grad():
            attention(q, pages, pages, block_table=TABLE)
        leaf.requires_grad_(False)
    with pytest.raises(RuntimeError, match="block_table"):
        fap_api.explain_varlen(q.requires_grad_(), pages, pages, *WHERE, block_table=TABLE)


def test_pages_refuse_a_gradient_in_the_operator_too():
    q, pages = torch.randn(14, 4, 8, requires_grad=True), torch.randn(2, 16, 2, 8)
    score = (None, 0.3, -1, -1, 0.0, 0.0, False, "torch")
    out, _, _ = _varlen_ops.attention_varlen_forward(q, pages, pages, *WHERE, None, None, TABLE, *score)
    with pytest.raises(RuntimeError, match="block_table"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((torch.randn(14, 2, 8), WHERE[0], 9), RuntimeError, r"qkv must have shape \(total, 3, nheads"),
        ((torch.randn(2, 14, 3, 2, 8), WHERE[0], 9), RuntimeError, r"qkv must have shape \(total, 3, nheads"),
        ((torch.randn(14, 3, 2, 8), WHERE[0].long(), 9), RuntimeError, "cu_seqlens must have dtype int32"),
        ((torch.randn(14, 3, 2, 8), [0, 14], 14), TypeError, "cu_seqlens must be a torch.Tensor, got list"),
        ((torch.randn(14, 3, 2, 8), WHERE[0][:0], 9), RuntimeError, r"cu_seqlens must have shape .*\(0,\)"),
        ((torch.randn(14, 3, 2, 8), WHERE[0], -1), ValueError, "max_seqlen must be at least 0, got -1"),
        ((torch.randn(14, 3, 2, 8), WHERE[0], True), TypeError, "max_seqlen must be an integer, got bool"),
    ],
)
def test_mistakes_in_qkvpacked_calls_are_named_by_its_own_arguments(arguments, error, says):
    with pytest.raises(error, match=says):
        fap_api.flash_attn_varlen_qkvpacked_func(*arguments)


def test_kv_of_another_shape():
    with pytest.raises(RuntimeError, match=r"kv must have shape \(total, 2, nheads, headdim\), got \(14, 3"):
        fap_api.flash_attn_varlen_kvpacked_func(torch.randn(14, 2, 8), torch.randn(14, 3, 2, 8), *WHERE)


@pytest.mark.parametrize(
    "longest", [torch.tensor([9, 9]), torch.tensor(9.0), torch.tensor(True), torch.empty((), device="meta")]
)
def test_max_seqlen_that_is_no_number(longest):
    with pytest.raises(TypeError, match="max_seqlen_q must be an integer, got a tensor of shape"):
        attention(*draw(), where=(*WHERE[:2], longest, 7))


@pytest.mark.parametrize("spoil", [{"dropout_p": 1.5}, {"seqused_q": USED.long()}, {"block_table": TABLE}])
def test_no_mistake_is_remembered_as_right(spoil, monkeypatch):
    """Plans are kept by their arguments: a good call before or after must not let a bad one through."""
    attention(*draw())
    monkeypatch.setattr(_varlen_ops, "attention_varlen_forward", None)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError, TypeError), match=next(iter(spoil))):
            attention(*draw(), **spoil)


def test_explanations_name_the_call():
    explanation = fap_api.explain_varlen(*draw(), *WHERE, causal=True)
    assert explanation.backend == "torch"
    assert "packed sequences" in str(explanation)
