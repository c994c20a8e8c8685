"""Mistakes in calls of the rotary functions: each is named, and nothing has been written by then."""

from __future__ import annotations

import pytest
import torch

import fap_api
from fap_api import rotary

POSITIONS, HEAD_DIM = 50, 16


def tables(rotary_dim=8, positions=POSITIONS):
    angles = torch.rand(positions, rotary_dim // 2) * 6
    return angles.cos(), angles.sin()


def draw(*shape):
    return torch.randn(*shape, HEAD_DIM)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": [1.0]}, "x must be a torch.Tensor, got list"),
        ({"x": draw(2, 12)}, r"x must have 4 dimensions .* got \(2, 12, 16\)"),
        ({"x": draw(2, 12, 3).int()}, "floating-point dtype, got torch.int32"),
        ({"x": draw(2, 12, 3).to_sparse()}, "x must be a dense tensor"),
        ({"cos": tables(18)[0], "sin": tables(18)[1]}, "rotary_dim at most the head dimension 16"),
        ({"sin": tables(6)[1]}, "cos and sin must have one shape"),
        ({"cos": tables()[0].requires_grad_()}, "cos must not require a gradient"),
        ({"seqlen_offsets": 39}, "angle for every position, got 50 rows for seqlen 12 and seqlen_offsets 39"),
        ({"seqlen_offsets": -1}, "seqlen_offsets must be at least 0, got -1"),
        ({"seqlen_offsets": 1.5}, "seqlen_offsets must be an integer .* got float: 1.5"),
        ({"seqlen_offsets": torch.tensor([0, 39])}, "50 rows and positions up to 50"),
        ({"seqlen_offsets": torch.tensor([0, -2])}, r"at least 0, got \[0, -2\]"),
        ({"seqlen_offsets": torch.tensor([0, 2**32])}, "50 rows and positions up to"),
        ({"seqlen_offsets": torch.tensor([0, -(2**32)])}, "seqlen_offsets must be at least 0"),
        ({"seqlen_offsets": torch.tensor([0, 1, 2])}, r"seqlen_offsets must have shape \(batch,\)"),
        ({"max_seqlen": 12}, "cu_seqlens and max_seqlen need each other"),
        ({"interleaved": 0.0}, "interleaved must be True or False"),
    ],
)
def test_mistakes(change, says):
    cos, sin = tables()
    call = {"x": draw(2, 12, 3), "cos": cos, "sin": sin, **change}
    with pytest.raises((RuntimeError, ValueError, TypeError), match=says):
        fap_api.apply_rotary_emb(**call)


@pytest.mark.parametrize(
    ("bounds", "max_seqlen", "says"),
    [
        ([0, 5, 3], 5, r"cu_seqlens must never fall .* got \[0, 5, 3\]"),
        ([0, 5, 99], 99, "end within x's 20 rows"),
        ([0, 5, 20], 10, "max_seqlen must be at least 15, got 10"),
    ],
)
def test_mistakes_in_packed_rows(bounds, max_seqlen, says):
    bounds = torch.tensor(bounds, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=says):
        fap_api.apply_rotary_emb(draw(20, 3), *tables(), cu_seqlens=bounds, max_seqlen=max_seqlen)


@pytest.mark.parametrize(
    ("function", "shape", "options"),
    [
        (rotary.apply_rotary_emb_qkv_, (2, 12, 2, 4), {}),
        (rotary.apply_rotary_emb_qkv_, (2, 12, 7), {"num_heads_q": 4}),
        (rotary.apply_rotary_emb_qkv_, (2, 12, 8), {}),
        (rotary.apply_rotary_emb_kv_, (2, 12, 3, 4), {}),
        (rotary.apply_rotary_emb_torch, (2, 12, 4), {}),
    ],
)
def test_packed_tensors_of_another_shape(function, shape, options):
    with pytest.raises(RuntimeError, match="must have shape"):
        function(draw(*shape), *tables(), **options)


@pytest.mark.parametrize("given", [6.7, "12", 12.0, [12], torch.tensor(12.0), torch.tensor([12, 12]), True])
def test_a_longest_sequence_that_is_no_integer(given):
    bounds = torch.tensor([0, 12], dtype=torch.int32)
    with pytest.raises(TypeError, match="^max_seqlen must be an integer, got"):
        fap_api.apply_rotary_emb(draw(12, 3), *tables(), cu_seqlens=bounds, max_seqlen=given)


def test_bounds_of_not_even_no_sequence():
    bounds = torch.empty(0, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"^cu_seqlens must have shape \(batch \+ 1,\), got shape \(0,\)"):
        fap_api.apply_rotary_emb(draw(12, 3), *tables(), cu_seqlens=bounds, max_seqlen=12)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (rotary.apply_rotary_emb_torch, "x"),
        (rotary.apply_rotary_emb_qkv_, "qkv"),
        (rotary.apply_rotary_emb_kv_, "kv"),
        (lambda x, *_: rotary.RotaryEmbedding(8)(x), "qkv"),
        (lambda x, *_: rotary.RotaryEmbedding(8)(draw(2, 12, 4), x), "kv"),
    ],
)
def test_what_is_no_tensor(function, name):
    with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got list"):
        function([1.0], *tables())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"x": draw(2, 12, 3).int()}, "^x must have a floating-point dtype, got torch.int32"),
        ({"cos": torch.ones(12, 4, dtype=torch.int64)}, "^cos must have a floating-point dtype"),
        ({"sin": torch.ones(12, 4, device="meta")}, "^sin must be on x's device cpu, got meta"),
        ({"interleaved": "no"}, "^interleaved must be True or False, got str: 'no'"),
    ],
)
def test_mistakes_in_the_torch_function(change, says):
    cos, sin = tables(positions=12)
    with pytest.raises((RuntimeError, TypeError), match=says):
        rotary.apply_rotary_emb_torch(**{"x": draw(2, 12, 3), "cos": cos, "sin": sin, **change})


@pytest.mark.parametrize("given", [4.0, "4", True])
def test_a_number_of_heads_that_is_none(given):
    with pytest.raises(TypeError, match="^num_heads_q must be an integer, got"):
        rotary.apply_rotary_emb_qkv_(draw(2, 12, 8), *tables(), num_heads_q=given)


@pytest.mark.parametrize(
    ("cos_k", "sin_k", "offset", "says"),
    [
        (*tables(positions=11), 0, "^cos_k and sin_k must have an angle for every position, got 11 rows"),
        (*tables(positions=13), torch.tensor([0, 2]), "13 rows and positions up to 13"),
        (tables()[0].double(), tables()[1], 0, "^cos_k and sin_k must have one shape and dtype"),
        (tables()[0].requires_grad_(), tables()[1], 0, "^cos_k must not require a gradient"),
        (tables()[0], [1.0], 0, "^sin_k must be a torch.Tensor, got list"),
    ],
)
def test_queries_are_left_alone_where_keys_cannot_be_rotated(cos_k, sin_k, offset, says):
    qkv = draw(2, 12, 3, 4)
    before = qkv.clone()
    with pytest.raises((RuntimeError, TypeError), match=says):
        rotary.apply_rotary_emb_qkv_(qkv, *tables(), cos_k, sin_k, seqlen_offsets=offset)
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("kv", [draw(2, 12, 3, 4), draw(2, 12, 2, 4).int(), draw(3, 12, 2, 4)])
def test_the_module_leaves_queries_alone_where_keys_cannot_be_rotated(kv):
    q = draw(2, 12, 4)
    before = q.clone()
    with pytest.raises(RuntimeError, match="^(kv|seqlen_offsets) must have"):
        rotary.RotaryEmbedding(8)(q, kv, torch.tensor([1, 2], dtype=torch.int32), max_seqlen=20)
    assert torch.equal(q, before)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_seqlen": 12.5}, TypeError, "^max_seqlen must be an integer, got float: 12.5"),
        ({"max_seqlen": -1}, ValueError, "^max_seqlen must be at least 0, got -1"),
        ({"seqlen_offset": "1"}, TypeError, "^seqlen_offset must be an integer .* got str: '1'"),
        ({"seqlen_offset": -1}, ValueError, "^seqlen_offset must be at least 0, got -1"),
    ],
)
def test_mistakes_in_calls_of_the_module(options, error, says):
    with pytest.raises(error, match=says):
        rotary.RotaryEmbedding(8)(draw(2, 12, 3, 4), **options)


@pytest.mark.parametrize(
    "settings",
    [{"dim": 8.0}, {"dim": "8"}, {"base": "x"}, {"base": None}, {"scale_base": "x"}, {"interleaved": 1}],
)
def test_settings_of_another_type_are_refused(settings):
    with pytest.raises(TypeError, match=f"^rotary {next(iter(settings))} must be .* got"):
        rotary.RotaryEmbedding(**{"dim": 8, **settings})
