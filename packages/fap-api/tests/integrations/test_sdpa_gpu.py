"""After activation PyTorch's attention runs on our kernels: every claim is held to a count of their calls."""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention
import torch.nn.functional as F
from counted import counted_passes
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fap_api.backends.triton import TritonBackend
from fap_api.integrations import sdpa

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="torch before 2.11"
    ),
]


@pytest.fixture
def calls():
    """The passes that the triton back end ran since activation, in order."""
    from torch.nn import attention

    sdpa.register()
    attention.activate_flash_attention_impl("FAP")
    with counted_passes(TritonBackend) as ran:
        yield ran
    attention.restore_flash_attention_impl()


def draw(heads=8, heads_k=8, seqlen_q=200, seqlen_k=200, head_dim=64):
    tensors = []
    for count, seqlen in ((heads, seqlen_q), (heads_k, seqlen_k), (heads_k, seqlen_k)):
        x = torch.randn(2, seqlen, count, head_dim, dtype=torch.bfloat16, device="cuda")
        tensors.append(x.transpose(1, 2).requires_grad_())
    return tensors


def math(q, k, v, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(*(x.float() for x in (q, k, v)), **options)


def assert_close(x, right):
    torch.testing.assert_close(x.float(), right.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.2}], ids=str)
@pytest.mark.parametrize("heads_k", [8, 2])
@pytest.mark.parametrize("head_dim", [64, 36])
def test_scaled_dot_product_attention(calls, head_dim, heads_k, options):
    q, k, v = draw(heads_k=heads_k, head_dim=head_dim)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, enable_gqa=heads_k != 8, **options)
    right = math(q, k, v, enable_gqa=True, **options)
    assert_close(out, right)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    for dx, expected in zip(gradients, torch.autograd.grad(right, (q, k, v), dout.float()), strict=True):
        assert_close(dx, expected)
    assert calls == ["forward", "backward"]


def test_without_asking_for_flash_it_is_taken_too_where_pytorch_prefers_it(calls):
    q, k, v = draw()
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH], set_priority=True):
        F.scaled_dot_product_attention(q, k, v)
        assert calls == ["forward"]
        F.scaled_dot_product_attention(q.float(), k.float(), v.float())
        assert calls == ["forward"]


def test_causal_of_other_lengths_stays_top_left(calls):
    q, k, v = draw(seqlen_q=50)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mask = torch.ones(50, 200, dtype=torch.bool, device="cuda").tril()
    assert_close(out, math(q, k, v, attn_mask=mask))


def test_lower_right_bias_runs_here(calls):
    from torch.nn.attention.bias import causal_lower_right

    q, k, v = draw(seqlen_q=50)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(50, 200))
    mask = torch.ones(50, 200, dtype=torch.bool, device="cuda").tril(150)
    assert_close(out, math(q, k, v, attn_mask=mask))
    assert calls == ["forward"]


def test_dropout_repeats_its_mask_in_the_backward(calls):
    q, k, v = draw()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        whole = F.scaled_dot_product_attention(q, k, v)
    assert not torch.allclose(out, whole)
    dout = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, dout)
    product, expected = (dv.double() * v).sum(), (dout.double() * out).sum()
    torch.testing.assert_close(product, expected, rtol=2e-2, atol=2.0)
    assert calls == ["forward", "forward", "backward"]


def test_varlen_attn(calls):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    bounds = torch.tensor([0, 100, 100, 300], dtype=torch.int32, device="cuda")
    q, k, v = (
        torch.randn(300, 8, 64, dtype=torch.bfloat16, device="cuda", requires_grad=True) for _ in range(3)
    )
    out = varlen.varlen_attn(q, k, v, bounds, bounds, 200, 200)
    right = torch.cat(
        [
            math(*(x[rows].transpose(0, 1) for x in (q, k, v))).transpose(0, 1)
            for rows in (slice(100), slice(100, 300))
        ]
    )
    assert_close(out, right)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    for dx, expected in zip(gradients, torch.autograd.grad(right, (q, k, v), dout.float()), strict=True):
        assert_close(dx, expected)
    assert calls == ["varlen_forward", "varlen_backward"]


def test_jagged_nested_tensors(calls):
    offsets = torch.tensor([0, 50, 170], device="cuda")
    packed = [torch.randn(170, 4, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
    q, k, v = (torch.nested.nested_tensor_from_jagged(x, offsets).transpose(1, 2) for x in packed)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(q, k, v)
    for got, rows in zip(out.transpose(1, 2).unbind(), (slice(50), slice(50, 170)), strict=True):
        assert_close(got.transpose(0, 1), math(*(x[rows].transpose(0, 1) for x in packed)))
    assert calls == ["varlen_forward"]


def test_multihead_attention(calls):
    module = nn.MultiheadAttention(256, 4, batch_first=True, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 100, 256, device="cuda", dtype=torch.bfloat16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out, _ = module(x, x, x, need_weights=False)
        out.sum().backward()
    with sdpa_kernel(SDPBackend.MATH):
        right, _ = module(x, x, x, need_weights=False)
    assert_close(out, right)
    assert module.in_proj_weight.grad is not None
    assert calls == ["forward", "backward"]


@pytest.mark.parametrize("bshd", [True, False])
@pytest.mark.filterwarnings("default")
def test_compiled(calls, bshd):
    def loss(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).float().square().sum()

    q, k, v = draw()
    if not bshd:
        q, k, v = (x.detach().contiguous().requires_grad_() for x in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v), (q, k, v))
        expected = torch.autograd.grad(loss(q, k, v), (q, k, v))
    for dx, right in zip(got, expected, strict=True):
        assert_close(dx, right)
    assert calls == ["forward", "backward"] * 2


def test_restoring_brings_the_built_in_kernels_back(calls):
    from torch.nn import attention

    q, k, v = draw()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        ours = F.scaled_dot_product_attention(q, k, v)
        attention.restore_flash_attention_impl()
        theirs = F.scaled_dot_product_attention(q, k, v)
        assert_close(ours, theirs)
        assert calls == ["forward"]
        attention.activate_flash_attention_impl("FAP")
        F.scaled_dot_product_attention(q, k, v)
    assert calls == ["forward", "forward"]
