from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.testing import assert_close

from fap_nn import FlashAttention
from fap_testing.reference import attention_reference

SETTINGS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window_size": (3, 1)},
    "alibi per head": {"alibi_slopes": [0.5, 0.25, 0.125, 0.3]},
    "alibi per sequence": {"alibi_slopes": torch.rand(2, 4)},
    "softcap, causal": {"causal": True, "softcap": 2.0},
}


def make_qkv(seqlen_q=7, seqlen_k=9, heads=4, heads_kv=2, head_dim=8, dtype=torch.float64):
    q = torch.randn(2, seqlen_q, heads, head_dim, dtype=dtype, requires_grad=True)
    k = torch.randn(2, seqlen_k, heads_kv, head_dim, dtype=dtype, requires_grad=True)
    v = torch.randn(2, seqlen_k, heads_kv, head_dim, dtype=dtype, requires_grad=True)
    return q, k, v


@pytest.mark.smoke
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_equals_the_oracle(settings):
    qkv = make_qkv()
    module = FlashAttention(4, 8, **settings)
    expected_settings = {**settings, "alibi_slopes": module.alibi_slopes}

    out, expected = module(*qkv), attention_reference(*qkv, **expected_settings).out

    assert_close(out, expected)
    dout = torch.randn_like(out)
    assert_close(torch.autograd.grad(out, qkv, dout), torch.autograd.grad(expected, qkv, dout))


def test_dropout_only_in_training():
    q, k, _ = make_qkv(seqlen_q=64, seqlen_k=512, dtype=torch.float32)
    v = torch.ones_like(k)
    module = FlashAttention(4, 8, dropout=0.25)

    dropped = module(q, k, v)
    assert not torch.equal(dropped, module(q, k, v)), "two training passes must drop different weights"
    assert_close(dropped.mean().item(), 1.0, atol=0.02, rtol=0.0)

    assert_close(module.eval()(q, k, v), torch.ones_like(q))


def test_a_query_without_keys_gives_zero():
    q, k, v = make_qkv(seqlen_q=5, seqlen_k=3)
    out = FlashAttention(4, 8, causal=True)(q, k, v)
    assert torch.equal(out[:, :2], torch.zeros_like(out[:, :2]))
    assert out[:, 2:].abs().min() > 0


def test_slopes_follow_the_device_and_keep_their_dtype():
    slopes = torch.tensor([0.3, 0.7])
    module = FlashAttention(2, 8, alibi_slopes=slopes)
    for converted in (module.to(torch.bfloat16), module.half(), module.double()):
        assert torch.equal(converted.alibi_slopes, slopes)
    assert module.to("meta").alibi_slopes.is_meta


def test_slopes_survive_the_meta_device():
    with torch.device("meta"):
        module = FlashAttention(2, 8, alibi_slopes=[0.3, 0.7])
    assert module.alibi_slopes.is_meta
    module.to_empty(device="cpu").reset_parameters()
    assert torch.equal(module.alibi_slopes, torch.tensor([0.3, 0.7]))


def test_slopes_are_configuration_not_state():
    assert FlashAttention(2, 8, alibi_slopes=[0.3, 0.7]).state_dict() == {}


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_compute_the_same(copy_of):
    qkv = make_qkv()
    module = FlashAttention(4, 8, causal=True, window_size=(4, 0), alibi_slopes=[0.1, 0.2, 0.3, 0.4])
    assert torch.equal(copy_of(module)(*qkv), module(*qkv))


def test_repr_names_what_was_set():
    text = repr(FlashAttention(4, 8, causal=True, alibi_slopes=[0.1, 0.2, 0.3, 0.4]))
    assert text == "FlashAttention(num_heads=4, head_dim=8, causal=True, alibi_slopes=(4,))"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"head_dim": 0}, "head_dim must be 1 to 256, got 0"),
        ({"head_dim": 257}, "head_dim must be 1 to 256, got 257"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        ({"window_size": 64}, r"window_size must be two integers \(left, right\), got 64"),
        ({"alibi_slopes": [0.1]}, r"alibi_slopes must have shape .* = \(4,\) or .*, got \(1,\)"),
        ({"alibi_slopes": torch.rand(4, device="meta")}, "alibi_slopes must hold values"),
    ],
)
def test_wrong_construction_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FlashAttention(**{"num_heads": 4, "head_dim": 8, **arguments})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"heads": 8}, "q must have this module's num_heads 4 at dimension 2, got shape"),
        ({"head_dim": 16}, "q must have shape .* head_dim 8, got"),
        ({"heads_kv": 3}, "must divide"),
    ],
)
def test_wrong_shapes_are_refused(sizes, message):
    with pytest.raises(RuntimeError, match=message):
        FlashAttention(4, 8)(*make_qkv(**sizes))


def test_wrong_rank_is_refused():
    q, k, v = make_qkv()
    with pytest.raises(RuntimeError, match="k must have shape"):
        FlashAttention(4, 8)(q, k[0], v)
