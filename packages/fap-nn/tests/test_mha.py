from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from fap_nn import FlashMHA
from fap_testing.reference import attention_reference
from fap_testing.reference_rotary import rotary_reference

EMBED, HEADS = 24, 4
PADDED = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1, 1],  # no padding
        [1, 1, 1, 1, 0, 0, 0],  # at the right
        [0, 0, 1, 1, 1, 1, 1],  # at the left
        [1, 0, 1, 1, 0, 1, 0],  # in between, as many real tokens as the second
        [0, 0, 0, 0, 0, 0, 0],  # nothing else
    ],
    dtype=torch.bool,
)
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "gqa, no bias": {"num_heads_kv": 2, "bias": False},
    "mqa, window": {"num_heads_kv": 1, "window_size": (2, 0)},
    "softcap, scale": {"softcap": 1.5, "softmax_scale": 0.7},
    "rotary, causal": {"rotary_emb_dim": 4, "causal": True},
    "rotary interleaved": {"rotary_emb_dim": 6, "rotary_emb_interleaved": True, "rotary_emb_base": 50.0},
    "alibi, causal": {"alibi_slopes": [0.1, 0.2, 0.3, 0.4], "causal": True},
}
every_feature = pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)


def make(*, dtype=torch.float64, **options):
    return FlashMHA(EMBED, HEADS, dtype=dtype, **options)


def tokens(*shape, dtype=torch.float64):
    return torch.randn(*shape, EMBED, dtype=dtype, requires_grad=True)


def written_out(module, x, *, bias=True, num_heads_kv=HEADS, **features):
    """Multi-head self-attention from the module's weights and the oracle."""
    rotary = [features.pop(name) for name in list(features) if name.startswith("rotary")]
    sizes = [EMBED, num_heads_kv * EMBED // HEADS, num_heads_kv * EMBED // HEADS]
    weights = module.Wqkv.weight.split(sizes)
    biases = module.Wqkv.bias.split(sizes) if bias else (None, None, None)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (-1, EMBED // HEADS)) for w, b in zip(weights, biases, strict=True)
    )
    if rotary:
        cos, sin, *_ = module.rotary_emb.tables(x.shape[1])
        q, k = (rotary_reference(t, cos, sin, interleaved=module.rotary_emb.interleaved) for t in (q, k))
    features["alibi_slopes"] = module.inner_attn.alibi_slopes
    return module.out_proj(attention_reference(q, k, v, **features).out.flatten(-2))


@pytest.mark.smoke
@every_feature
def test_equals_the_oracle_between_projections(features):
    module, x = make(**features), tokens(2, 7)
    out, expected = module(x), written_out(module, x, **features)

    assert_close(out, expected)
    inputs = [x, *module.parameters()]
    dout = torch.randn_like(out)
    assert_close(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout))


@every_feature
@pytest.mark.parametrize("batch_first", [True, False])
def test_padding_is_as_if_it_were_not_there(features, batch_first):
    module, x = make(batch_first=batch_first, **features), tokens(*PADDED.shape)
    poisoned = torch.where(PADDED[:, :, None], x, torch.nan)
    layout = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))

    out = layout(module(layout(poisoned), key_padding_mask=PADDED))

    expected = torch.zeros_like(out)
    for row, mask in enumerate(PADDED):
        if mask.any():
            expected[row, mask] = layout(module(layout(x[row : row + 1, mask])))[0]
    assert_close(out, expected)
    inputs = [x, *module.parameters()]
    dout = torch.randn_like(out)
    assert_close(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout))


@pytest.mark.parametrize("causal", [False, True])
def test_padding_in_cross_attention(causal):
    module = make(cross_attn=True, causal=causal, num_heads_kv=2)
    x, x_kv = tokens(5, 4), tokens(*PADDED.shape)
    poisoned = torch.where(PADDED[:, :, None], x_kv, torch.nan)

    out = module(x, poisoned, key_padding_mask=PADDED)

    expected = torch.cat([module(x[i : i + 1], x_kv[i : i + 1, mask]) for i, mask in enumerate(PADDED)])
    assert_close(out, expected)
    inputs = [x, x_kv, *module.parameters()]
    dout = torch.randn_like(out)
    assert_close(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout))


@pytest.mark.smoke
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_from_torch_self_attention(causal, bias, batch_first):
    theirs = torch.nn.MultiheadAttention(
        EMBED, HEADS, bias=bias, batch_first=batch_first, dtype=torch.float64
    )
    ours = FlashMHA.from_torch(theirs, causal=causal)
    x = tokens(7, 7)
    hidden = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None

    expected, _ = theirs(x, x, x, attn_mask=hidden, need_weights=False)
    out = ours(x)

    assert_close(out, expected)
    dout = torch.randn_like(out)
    assert_close(torch.autograd.grad(out, x, dout), torch.autograd.grad(expected, x, dout))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_from_torch_cross_attention(bias, batch_first):
    theirs = torch.nn.MultiheadAttention(
        EMBED, HEADS, bias=bias, batch_first=batch_first, dtype=torch.float64
    )
    ours = FlashMHA.from_torch(theirs, cross_attn=True)
    x, x_kv = (tokens(5, 4), tokens(5, 7)) if batch_first else (tokens(4, 5), tokens(7, 5))
    mask = PADDED.clone()
    mask[-1, 0] = True  # without any key, nn.MultiheadAttention gives NaN

    expected, _ = theirs(x, x_kv, x_kv, key_padding_mask=~mask, need_weights=False)

    assert_close(ours(x, x_kv, key_padding_mask=mask), expected)


def test_from_torch_with_padding_equals_at_the_real_tokens():
    theirs = torch.nn.MultiheadAttention(EMBED, HEADS, batch_first=True, dtype=torch.float64)
    x, mask = tokens(*PADDED.shape)[:-1], PADDED[:-1]

    expected, _ = theirs(x, x, x, key_padding_mask=~mask, need_weights=False)

    assert_close(FlashMHA.from_torch(theirs)(x, key_padding_mask=mask)[mask], expected[mask])


def test_from_torch_takes_over_settings_and_copies_weights():
    theirs = torch.nn.MultiheadAttention(EMBED, HEADS, dropout=0.2, dtype=torch.bfloat16).eval()
    ours = FlashMHA.from_torch(theirs)
    assert (ours.inner_attn.dropout, ours.training, ours.batch_first) == (0.2, False, False)
    assert ours.Wqkv.weight.dtype == torch.bfloat16
    with torch.no_grad():
        theirs.in_proj_weight.zero_()
    assert ours.Wqkv.weight.abs().max() > 0


@pytest.mark.parametrize(
    "refused", [{"kdim": 12}, {"vdim": 12}, {"add_bias_kv": True}, {"add_zero_attn": True}]
)
def test_from_torch_refuses_what_it_cannot_express(refused):
    theirs = torch.nn.MultiheadAttention(EMBED, HEADS, **refused)
    with pytest.raises(ValueError, match=f"got one with .*{next(iter(refused))}"):
        FlashMHA.from_torch(theirs)


def test_from_torch_refuses_other_modules():
    with pytest.raises(TypeError, match=r"mha must be a torch.nn.MultiheadAttention, got Linear"):
        FlashMHA.from_torch(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["Wqkv.weight", "Wqkv.bias", "out_proj.weight", "out_proj.bias"]),
        ({"bias": False, "rotary_emb_dim": 6}, ["Wqkv.weight", "out_proj.weight"]),
        ({"cross_attn": True, "bias": False}, ["Wq.weight", "Wkv.weight", "out_proj.weight"]),
        ({"bias": False, "alibi_slopes": [0.1] * HEADS}, ["Wqkv.weight", "out_proj.weight"]),
    ],
)
def test_state_dict_names(options, names):
    assert list(make(**options).state_dict()) == names


def test_copies_compute_the_same():
    module, x = make(rotary_emb_dim=6, causal=True), tokens(2, 5)
    loaded = make(rotary_emb_dim=6, causal=True)
    assert not torch.equal(loaded(x), module(x))
    loaded.load_state_dict(module.state_dict())
    for twin in (loaded, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))


def test_meta_device_then_reset():
    options = {"rotary_emb_dim": 6, "alibi_slopes": [0.1, 0.2, 0.3, 0.4]}
    with torch.device("meta"):
        module = make(**options)
    on_meta = make(**options, device="meta")
    for lazy in (module, on_meta):
        assert all(t.is_meta for t in [*lazy.parameters(), *lazy.buffers()])
        lazy.to_empty(device="cpu")
        for tensor in [*lazy.parameters(), *lazy.buffers()]:
            tensor.data.fill_(torch.nan)
        torch.manual_seed(1)
        lazy.reset_parameters()
    torch.manual_seed(1)
    eager, x = make(**options), tokens(2, 5)
    assert torch.equal(module(x), eager(x))
    assert torch.equal(on_meta(x), eager(x))


def test_dropout_only_in_training():
    module, x = make(dropout=0.5), tokens(2, 9)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@every_feature
def test_compiles_without_graph_break(features):
    module, x = make(dtype=torch.float32, **features), tokens(2, 7, dtype=torch.float32)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)

    out, expected = compiled(x), module(x)

    assert_close(out, expected)
    inputs = [x, *module.parameters()]
    dout = torch.randn_like(out)
    assert_close(torch.autograd.grad(out, inputs, dout), torch.autograd.grad(expected, inputs, dout))


@pytest.mark.parametrize("mask", [None, PADDED])
def test_autocast(mask):
    options = {"causal": True, "rotary_emb_dim": 6, "alibi_slopes": [0.3, 0.1, 0.2, 0.7]}
    module, x = make(dtype=torch.float32, **options), tokens(5, 7, dtype=torch.float32)
    expected = module(x, key_padding_mask=mask)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x, key_padding_mask=mask)
    assert out.dtype == torch.bfloat16
    assert_close(out.float(), expected, atol=0.03, rtol=0.03)
    out.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"embed_dim": 25}, "embed_dim must be a positive multiple of num_heads, got 25 and 4"),
        ({"num_heads": 0}, "embed_dim must be a positive multiple of num_heads, got 24 and 0"),
        ({"num_heads_kv": 3}, "num_heads_kv must divide num_heads, got 3 and 4"),
        ({"embed_dim": 2048}, "head_dim must be 1 to 256, got 512"),
        ({"dropout": 1.5}, "dropout must be in"),
        ({"rotary_emb_dim": 8}, "rotary_emb_dim must be at most head_dim 6, got 8"),
        ({"rotary_emb_dim": 3}, "rotary dim must be even"),
        ({"rotary_emb_dim": 4, "cross_attn": True}, "rotary_emb_dim must be 0 with cross_attn"),
        ({"alibi_slopes": torch.rand(2, HEADS)}, r"alibi_slopes must have shape \(num_heads,\) = \(4,\)"),
    ],
)
def test_wrong_construction_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FlashMHA(**{"embed_dim": EMBED, "num_heads": HEADS, **options})


@pytest.mark.parametrize(
    ("cross", "arguments", "message"),
    [
        (False, {"x": torch.zeros(7, EMBED)}, r"x must have shape \(batch, seqlen, embed_dim\)"),
        (False, {"x": torch.zeros(5, 7, 8)}, r"x must have shape .* embed_dim 24, got \(5, 7, 8\)"),
        (False, {"x_kv": torch.zeros(5, 7, EMBED)}, "x_kv must be None"),
        (True, {}, "x_kv must be given"),
        (True, {"x_kv": torch.zeros(5, 7, 8)}, "x_kv must have shape"),
        (True, {"x_kv": torch.zeros(4, 7, EMBED)}, "x_kv must have x's batch size 5 at dimension 0"),
        (False, {"key_padding_mask": PADDED.long()}, "key_padding_mask must be bool, True for real tokens"),
        (
            False,
            {"key_padding_mask": PADDED[:, :6]},
            r"key_padding_mask must have shape .* = \(5, 7\), got \(5, 6\)",
        ),
        (
            False,
            {"key_padding_mask": PADDED.to("meta")},
            "key_padding_mask must be on the input's device cpu",
        ),
    ],
)
def test_wrong_inputs_are_refused(cross, arguments, message):
    module = FlashMHA(EMBED, HEADS, cross_attn=cross)
    with pytest.raises(RuntimeError, match=message):
        module(**{"x": torch.zeros(5, 7, EMBED), **arguments})


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
def test_on_a_gpu(mask):
    options = {"causal": True, "num_heads_kv": 2, "rotary_emb_dim": 32, "alibi_slopes": [0.3, 0.1, 0.2, 0.7]}
    module, x = (
        FlashMHA(256, HEADS, dtype=torch.float64, **options),
        torch.randn(5, 7, 256, dtype=torch.float64),
    )
    expected = module(x, key_padding_mask=mask)
    dout = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, module.parameters(), dout)

    module.to("cuda", torch.bfloat16)
    out = module(x.to("cuda", torch.bfloat16), key_padding_mask=None if mask is None else mask.cuda())
    gradients = torch.autograd.grad(out, module.parameters(), dout.to(out))

    assert_close(out.cpu().double(), expected, atol=0.02, rtol=0.02)
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert_close(ours.cpu().double(), theirs, atol=0.02 * theirs.abs().max().item(), rtol=0.02)
