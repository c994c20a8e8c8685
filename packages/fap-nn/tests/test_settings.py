"""Settings and arguments of the wrong type: refused by name when a module is made, or called."""

from __future__ import annotations

import pytest
import torch

from fap_nn import FlashAttention, FlashMHA, KVCache

ATTENTION = {"num_heads": 4, "head_dim": 8}
MHA = {"embed_dim": 24, "num_heads": 4}
CACHE = {"batch": 2, "max_seqlen": 40, "num_heads_kv": 2, "head_dim": 8}


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        *[(FlashAttention, name, value) for name in ATTENTION for value in (4.0, "4", True)],
        *[(FlashAttention, name, "x") for name in ("dropout", "softcap", "softmax_scale")],
        *[(FlashAttention, name, value) for name in ("causal", "deterministic") for value in (None, "no", 1)],
        *[(FlashAttention, "window_size", value) for value in ((1.0, 2), (True, 2), "ab", torch.ones(2))],
        *[(FlashMHA, name, 4.0) for name in (*MHA, "num_heads_kv", "rotary_emb_dim")],
        *[(FlashMHA, name, "no") for name in ("bias", "cross_attn", "batch_first", "causal")],
        *[(KVCache, name, value) for name in (*CACHE, "page_size") for value in (16.0, "16")],
    ],
)
def test_settings_of_another_type_are_refused(make, name, value):
    right = {FlashAttention: ATTENTION, FlashMHA: MHA, KVCache: CACHE}[make]
    with pytest.raises(TypeError, match=f"^{name} must be .*got"):
        make(**right | {name: value})


@pytest.mark.parametrize("window", [(3, 0), [3, 0], torch.tensor([3, 0]), (torch.tensor(3), 0)])
def test_a_window_may_be_any_two_integers(window):
    q = torch.randn(1, 9, 4, 8)
    out = FlashAttention(**ATTENTION, window_size=window)(q, q, q)
    assert torch.equal(out, FlashAttention(**ATTENTION, window_size=(3, 0))(q, q, q))


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("k", lambda: FlashAttention(**ATTENTION)(torch.zeros(1, 2, 4, 8), None, torch.zeros(1, 2, 4, 8))),
        ("x", lambda: FlashMHA(**MHA)([1.0])),
        ("x_kv", lambda: FlashMHA(**MHA, cross_attn=True)(torch.zeros(1, 2, 24), [1.0])),
        ("key_padding_mask", lambda: FlashMHA(**MHA)(torch.zeros(1, 2, 24), key_padding_mask=[True, True])),
    ],
)
def test_what_is_no_tensor(name, call):
    with pytest.raises(TypeError, match=f"^{name} must be a torch.Tensor, got"):
        call()
