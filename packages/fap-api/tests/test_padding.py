"""From padded batches to packed sequences and back: round trips, empty rows, gradients, mistakes."""

from __future__ import annotations

import pytest
import torch

import fap_api
from fap_api.padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)


def mask_of(lengths, seqlen=7):
    return torch.arange(seqlen) < torch.tensor(lengths).view(-1, 1)


LENGTHS = [[7, 7], [3, 0, 7, 1], [0, 4, 0], [0, 0], [5]]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.int32, torch.uint8])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_tokens_come_out_in_order_and_go_back(lengths, dtype):
    mask = mask_of(lengths)
    hidden = torch.randn(len(lengths), 7, 2, 3)
    x, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden, mask.to(dtype))
    assert torch.equal(x, torch.cat([row[:n] for row, n in zip(hidden, lengths, strict=True)]))
    assert torch.equal(hidden.flatten(0, 1)[indices], x)
    assert cu_seqlens.tolist() == [sum(lengths[:b]) for b in range(len(lengths) + 1)]
    assert (max_seqlen, seqused.tolist()) == (max(lengths), lengths)
    assert type(max_seqlen) is int
    assert (indices.dtype, cu_seqlens.dtype, seqused.dtype) == (torch.int64, torch.int32, torch.int32)
    padded = pad_input(x, indices, len(lengths), 7)
    assert torch.equal(padded, torch.where(mask[..., None, None], hidden, 0.0))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_gradients_go_back_to_where_tokens_came_from(lengths):
    mask = mask_of(lengths)
    hidden = torch.randn(len(lengths), 7, 3, dtype=torch.float64, requires_grad=True)
    x, indices, *_ = unpad_input(hidden, mask)
    dx = torch.randn_like(x)
    (gradient,) = torch.autograd.grad(x, hidden, dx)
    assert torch.equal(gradient[mask], dx)
    assert not gradient[~mask].any()
    packed = x.detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda y: pad_input(y, indices, len(lengths), 7), packed)


def test_a_mask_may_have_holes():
    hidden = torch.arange(10).view(2, 5)
    mask = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 1, 1, 0]])
    x, indices, cu_seqlens, max_seqlen, _ = unpad_input(hidden, mask)
    assert x.tolist() == indices.tolist() == [0, 2, 4, 7, 8]
    assert (cu_seqlens.tolist(), max_seqlen) == ([0, 3, 5], 3)


def test_unused_tokens_keep_their_room():
    used, room = mask_of([3, 0, 5]), mask_of([4, 2, 7])
    hidden = torch.randn(3, 7, 2)
    x, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden, used, room & ~used)
    assert torch.equal(x, hidden[room])
    assert (cu_seqlens.tolist(), max_seqlen, seqused.tolist()) == ([0, 4, 6, 13], 7, [3, 0, 5])
    # An overlap of the masks is no second token.
    assert torch.equal(unpad_input(hidden, used, room)[1], indices)


def test_no_batch_at_all():
    x, indices, cu_seqlens, max_seqlen, seqused = unpad_input(torch.randn(0, 7, 2), mask_of([]).view(0, 7))
    assert (x.shape, indices.shape, cu_seqlens.tolist(), max_seqlen) == ((0, 2), (0,), [0], 0)
    assert seqused.shape == (0,)
    assert pad_input(x, indices, 0, 7).shape == (0, 7, 2)


def test_rows_of_several_sequences():
    hidden = torch.randn(4, 6, 2, requires_grad=True)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 1, 0, 0, 0], [0] * 6, [0, 4, 0, 0, 0, 0]])
    x, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(hidden, lengths)
    assert torch.equal(x, torch.cat([row[:n] for row, n in zip(hidden, (5, 6, 0, 4), strict=True)]))
    assert (cu_seqlens.tolist(), max_seqlen) == ([0, 2, 5, 8, 10, 11, 15], 4)
    assert type(max_seqlen) is int
    (gradient,) = torch.autograd.grad(pad_input(x, indices, 4, 6).sum(), hidden)
    assert gradient.sum(dim=(1, 2)).tolist() == [10.0, 12.0, 0.0, 8.0]


def test_no_sequences_in_rows():
    lengths = torch.zeros(2, 3, dtype=torch.int64)
    x, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(torch.randn(2, 3, 1), lengths)
    assert (x.shape, indices.shape, cu_seqlens.tolist(), max_seqlen) == ((0, 1), (0,), [0], 0)


def test_indexing_the_first_axis():
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    indices = torch.tensor([4, 0, 2])
    assert torch.equal(index_first_axis(x, indices), x[indices])
    put = index_put_first_axis(x[:3], indices, 6)
    assert torch.equal(put[indices], x[:3])
    assert not put[[1, 3, 5]].any()
    rows, rest = index_first_axis_residual(x, indices)
    assert torch.equal(rows, x[indices])
    assert torch.equal(rest, x)
    for function in (
        lambda x: index_first_axis(x, indices),
        lambda x: index_put_first_axis(x[:3], indices, 6),
        lambda x: index_first_axis_residual(x, indices),
    ):
        assert torch.autograd.gradcheck(function, x)


def test_attention_on_unpadded_tokens_is_that_of_each_row():
    lengths = [3, 0, 7]
    q, k, v = (torch.randn(3, 7, 2, 8) for _ in range(3))
    x, indices, cu_seqlens, longest, _ = unpad_input(torch.stack((q, k, v), dim=2), mask_of(lengths))
    out = fap_api.flash_attn_varlen_qkvpacked_func(x, cu_seqlens, longest, causal=True)
    padded = pad_input(out, indices, 3, 7)
    for b, n in enumerate(lengths):
        one = slice(b, b + 1)
        right = fap_api.flash_attn_func(q[one, :n], k[one, :n], v[one, :n], causal=True)
        torch.testing.assert_close(padded[one, :n], right)
        assert not padded[b, n:].any()


HIDDEN, MASK = torch.randn(2, 4, 3), torch.ones(2, 4, dtype=torch.bool)
INDICES = torch.arange(3)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: unpad_input([1], MASK), TypeError, "hidden_states must be a torch.Tensor, got list"),
        (lambda: unpad_input(HIDDEN[0, 0], MASK), RuntimeError, r"hidden_states must have shape .*\(3,\)"),
        (lambda: unpad_input(HIDDEN, None), TypeError, "attention_mask must be a torch.Tensor, got NoneType"),
        (lambda: unpad_input(HIDDEN, MASK.float()), TypeError, "attention_mask must hold bool or integers"),
        (lambda: unpad_input(HIDDEN, MASK[:, :3]), RuntimeError, r"attention_mask .*\(2, 4\), got \(2, 3\)"),
        (lambda: unpad_input(HIDDEN, MASK.to("meta")), RuntimeError, "attention_mask .* cpu, got meta"),
        (lambda: unpad_input(HIDDEN, MASK, MASK[:1]), RuntimeError, r"unused_mask .*got \(1, 4\)"),
        (
            lambda: unpad_input_for_concatenated_sequences(HIDDEN, MASK),
            TypeError,
            "attention_mask_in_length must hold integers, got torch.bool",
        ),
        (
            lambda: unpad_input_for_concatenated_sequences(HIDDEN, MASK * 2),
            RuntimeError,
            "attention_mask_in_length must hold lengths .* at most the row's 4",
        ),
        (
            lambda: unpad_input_for_concatenated_sequences(HIDDEN, -MASK.int()),
            RuntimeError,
            "attention_mask_in_length must hold lengths of at least 0",
        ),
        (lambda: index_first_axis(HIDDEN, INDICES.int()), RuntimeError, "indices must be int64 .*int32"),
        (lambda: index_first_axis(HIDDEN, INDICES[None]), RuntimeError, r"indices must be .*\(1, 3\)"),
        (lambda: index_first_axis(torch.tensor(1.0), INDICES), RuntimeError, r"x must have shape"),
        (lambda: index_put_first_axis(HIDDEN, INDICES, 9), RuntimeError, "values must have a row for each"),
        (lambda: index_put_first_axis(HIDDEN, INDICES[:2], -1), ValueError, "first_axis_dim must be at"),
        (lambda: index_first_axis(HIDDEN, INDICES + 90), IndexError, "indices must be .* below the number"),
        (lambda: pad_input(HIDDEN[0, :3], INDICES + 90, 1, 4), IndexError, "below .* rows 4, got 9"),
        (lambda: pad_input(HIDDEN, INDICES, 1, 4), RuntimeError, "hidden_states must have a row for each"),
        (lambda: pad_input(HIDDEN, INDICES[:2], 1.5, 4), TypeError, "batch must be an integer, got float"),
        (lambda: pad_input([1], INDICES, 1, 4), TypeError, "hidden_states must be a torch.Tensor, got list"),
    ],
)  # fmt: skip
def test_mistakes_are_named(call, error, says):
    with pytest.raises(error, match=says):
        call()
