"""PyTorch's flash operators on our back ends, through PyTorch's own dispatcher and autograd formulas."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch.nn.attention
import torch.nn.functional as F
from counted import counted_passes

from fap_api.backends.torch_ import TorchBackend
from fap_api.integrations import sdpa

ATEN = torch.ops.aten
HAS_REGISTRY = hasattr(torch.nn.attention, "register_flash_attention_impl")
has_registry = pytest.mark.skipif(not HAS_REGISTRY, reason="torch before 2.11")


@pytest.fixture
def calls():
    """The passes that the torch back end ran, in order."""
    with counted_passes(TorchBackend) as ran:
        yield ran


@pytest.fixture
def on_cpu(calls):
    """Override the operators for CPU tensors, for which PyTorch has none of its own."""
    if not HAS_REGISTRY:
        pytest.skip("torch before 2.11")
    handle = sdpa._activate("CPU")
    yield calls
    handle.remove()


def draw(heads=4, heads_k=2, seqlen_q=7, seqlen_k=7, dtype=torch.float32, bshd=True):
    """Return q, k and v in SDPA's layout, in memory as (b, s, h, d) or as (b, h, s, d)."""
    tensors = []
    for count, seqlen in ((heads, seqlen_q), (heads_k, seqlen_k), (heads_k, seqlen_k)):
        shape = (2, seqlen, count, 8) if bshd else (2, count, seqlen, 8)
        x = torch.randn(shape, dtype=dtype)
        tensors.append((x.transpose(1, 2) if bshd else x).requires_grad_())
    return tensors


def math(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def assert_same_gradients(out, right, tensors):
    dout = torch.randn_like(out)
    for dx, expected in zip(
        torch.autograd.grad(out, tensors, dout), torch.autograd.grad(right, tensors, dout), strict=True
    ):
        torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("bshd", [True, False])
@pytest.mark.parametrize("is_causal", [False, True])
def test_sdpa_operator_forward_and_backward(on_cpu, is_causal, bshd):
    q, k, v = draw(bshd=bshd)
    out, lse, cum_q, cum_k, max_q, max_k, *_ = ATEN._scaled_dot_product_flash_attention(
        q, k, v, 0.0, is_causal, scale=0.3
    )
    right = math(q, k, v, is_causal=is_causal, scale=0.3)
    torch.testing.assert_close(out, right)
    assert (out.stride(), cum_q, cum_k, max_q, max_k) == (q.stride(), None, None, 7, 7)
    assert (lse.shape, lse.dtype) == ((2, 4, 7), torch.float32)
    scores = 0.3 * q.detach() @ k.detach().repeat_interleave(2, dim=1).mT
    if is_causal:
        scores = scores.masked_fill(torch.ones(7, 7, dtype=torch.bool).triu(1), -torch.inf)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    assert_same_gradients(out, right, (q, k, v))
    assert on_cpu == ["forward", "backward"]


def test_causal_with_other_lengths_is_aligned_bottom_right_as_the_built_in_operator(on_cpu):
    q, k, v = draw(seqlen_q=3, seqlen_k=7)
    out = ATEN._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    mask = torch.ones(3, 7, dtype=torch.bool).tril(4)
    torch.testing.assert_close(out, math(q, k, v, attn_mask=mask))


def test_dropout_repeats_its_mask_in_the_backward(on_cpu):
    q, k, v = draw(heads_k=4, seqlen_q=32, seqlen_k=32)
    torch.manual_seed(3)
    out, _, _, _, _, _, seed, unused, _ = ATEN._scaled_dot_product_flash_attention(q, k, v, 0.5)
    torch.manual_seed(3)
    # The output for v = 1 is each row's kept weight: not 1 with dropout, and linear in v.
    ones = torch.ones_like(v)
    kept = ATEN._scaled_dot_product_flash_attention(q, k, ones, 0.5)[0]
    assert not torch.allclose(kept, torch.ones_like(kept))
    assert (seed.dtype, seed.shape, unused.dtype) == (torch.uint64, (2,), torch.uint64)
    # With the same mask forward and backward, <dv, v> = <dout, out>.
    dout = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, dout)
    torch.testing.assert_close((dv * v).sum(), (dout * out).sum(), rtol=1e-4, atol=1e-4)


def test_rocm_keeps_seed_and_offset_as_two_scalars(on_cpu, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    q, k, v = draw(heads_k=4)
    out, *_, seed, offset, _ = ATEN._scaled_dot_product_flash_attention(q, k, v, 0.5)
    assert [(x.dtype, x.dim()) for x in (seed, offset)] == [(torch.int64, 0)] * 2
    dout = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, v, dout)
    torch.testing.assert_close((dv * v).sum(), (dout * out).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [(2, 1), (None, 3), (-1, 0), (4, -1)])
def test_dense_operator_with_a_window(on_cpu, window):
    left, right = window
    tensors = draw(seqlen_k=9)
    q, k, v = (x.transpose(1, 2) for x in tensors)
    out = ATEN._flash_attention_forward(
        q, k, v, None, None, 7, 9, 0.0, False, False, window_size_left=left, window_size_right=right
    )[0].transpose(1, 2)
    offset = torch.arange(9)[None] - torch.arange(7)[:, None] - 2
    visible = torch.ones(7, 9, dtype=torch.bool)
    if left is not None and left >= 0:
        visible &= offset >= -left
    if right is not None and right >= 0:
        visible &= offset <= right
    expected = math(*tensors, attn_mask=visible)
    torch.testing.assert_close(out, expected)
    assert_same_gradients(out, expected, tensors)


def takes(operator, argument):
    """Whether an operator of this PyTorch has an argument, or is there at all without one being named."""
    if not hasattr(ATEN, operator):
        return False
    return any(argument in (None, x.name) for x in getattr(ATEN, operator).default._schema.arguments)


@pytest.mark.skipif(
    not takes("_flash_attention_forward_no_dropout_inplace", None), reason="an operator of later releases"
)
def test_inplace_operator_writes_its_output(on_cpu):
    q, k, v = (x.detach().transpose(1, 2) for x in draw())
    out = torch.empty_like(q)
    lse = ATEN._flash_attention_forward_no_dropout_inplace(out, q, k, v, None, None, 7, 7, 0.0, True, False)
    expected = ATEN._flash_attention_forward(q, k, v, None, None, 7, 7, 0.0, True, False)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])


def test_deterministic_algorithms_ask_for_deterministic_gradients(on_cpu, monkeypatch):
    asked = []
    backward = TorchBackend.backward

    def spy(self, *arguments):
        asked.append(arguments[-1])
        return backward(self, *arguments)

    monkeypatch.setattr(TorchBackend, "backward", spy)
    for enabled in (False, True):
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda enabled=enabled: enabled)
        q, k, v = draw()
        ATEN._scaled_dot_product_flash_attention(q, k, v)[0].sum().backward()
    assert asked == [False, True]


def test_alibi_is_applied_and_refused_where_pytorch_would_lose_its_gradient(on_cpu):
    q, k, v = (x.transpose(1, 2) for x in draw(heads_k=4))
    arguments = (q, k, v, None, None, 7, 7, 0.0, False, False)
    slopes = torch.rand(4)
    with pytest.raises(RuntimeError, match="alibi_slopes must be None where a gradient is needed"):
        ATEN._flash_attention_forward(*arguments, alibi_slopes=slopes)
    with torch.no_grad():
        out = ATEN._flash_attention_forward(*arguments, alibi_slopes=slopes)[0]
    distance = (torch.arange(7)[:, None] - torch.arange(7)[None]).abs()
    bias = -slopes[:, None, None] * distance
    expected = math(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias)
    torch.testing.assert_close(out.transpose(1, 2), expected)


def test_what_is_not_known_is_refused():
    q, k, v = (x.transpose(1, 2) for x in draw())
    arguments = (q, k, v, None, None, 7, 7, 0.0, False)
    with pytest.raises(RuntimeError, match="return_debug_mask must be False on FAP's kernels, got True"):
        sdpa._flash_attention_forward(*arguments, True)
    with pytest.raises(RuntimeError, match=r"sink must be None on FAP's kernels, got a tensor \(4,\)"):
        sdpa._flash_attention_forward(*arguments, False, sink=torch.ones(4))
    with pytest.raises(RuntimeError, match="num_splits must be None on FAP's kernels, got 4"):
        sdpa._flash_attention_forward(*arguments, False, num_splits=4)
    with pytest.raises(RuntimeError, match="seqused_k must be None on FAP's kernels"):
        sdpa._flash_attention_forward(*arguments, False, seqused_k=torch.ones(2))
    with pytest.raises(RuntimeError, match="cum_seq_k must be given beside cum_seq_q"):
        sdpa._flash_attention_forward(q[0], k[0], v[0], torch.arange(3), None, *arguments[5:], False)
    assert sdpa._flash_attention_forward(*arguments, False, num_splits=1, sink=None)[0].shape == q.shape


BOUNDS_Q, BOUNDS_K = (
    torch.tensor([0, 3, 3, 8], dtype=torch.int32),
    torch.tensor([0, 4, 6, 11], dtype=torch.int32),
)


def draw_packed():
    return [torch.randn(total, heads, 8).requires_grad_() for total, heads in ((8, 4), (11, 2), (11, 2))]


def attend_one_by_one(q, k, v, **options):
    """Attend within each packed sequence, causal aligned bottom-right."""
    outs = []
    for b in range(3):
        rows, columns = slice(*BOUNDS_Q[b : b + 2].tolist()), slice(*BOUNDS_K[b : b + 2].tolist())
        qkv = [x.transpose(0, 1)[None] for x in (q[rows], k[columns], v[columns])]
        seqlen_q, seqlen_k = qkv[0].shape[2], qkv[1].shape[2]
        mask = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril(seqlen_k - seqlen_q)
        outs.append(math(*qkv, attn_mask=mask, **options)[0].transpose(0, 1))
    return torch.cat(outs)


def test_packed_operator_forward_and_backward(on_cpu, monkeypatch):
    ran = []
    for name in ("varlen_forward", "varlen_backward"):
        method = getattr(TorchBackend, name)

        def spy(self, *arguments, _method=method, _name=name):
            ran.append(_name)
            return _method(self, *arguments)

        monkeypatch.setattr(TorchBackend, name, spy)
    tensors = draw_packed()
    out, lse, *_ = ATEN._flash_attention_forward(
        *tensors, BOUNDS_Q, BOUNDS_K, 5, 5, 0.0, True, False, scale=0.3
    )
    assert (lse.shape, lse.dtype) == ((4, 8), torch.float32)
    expected = attend_one_by_one(*tensors, scale=0.3)
    torch.testing.assert_close(out, expected)
    assert_same_gradients(out, expected, tensors)
    assert ran == ["varlen_forward", "varlen_backward"]


def test_varlen_attn(on_cpu):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen.varlen_attn).parameters.keys():
        pytest.skip("an earlier form of varlen_attn")
    q, k, v = draw_packed()
    out = varlen.varlen_attn(q, k, v, BOUNDS_Q, BOUNDS_K, 5, 5, window_size=(-1, 0), enable_gqa=True)
    expected = attend_one_by_one(q, k, v)
    torch.testing.assert_close(out, expected)
    assert_same_gradients(out, expected, (q, k, v))


@pytest.mark.skipif(not takes("_flash_attention_forward", "block_table"), reason="pages of later releases")
def test_keys_in_pages_and_in_use(on_cpu):
    q, k, v = (x.detach() for x in draw_packed())
    pages = torch.zeros(2, 5, 16, 2, 8)
    table = torch.tensor([[3], [0], [2]], dtype=torch.int32)
    used = BOUNDS_K.diff()
    for b, length in enumerate(used.tolist()):
        for side, x in zip(pages, (k, v), strict=True):
            side[table[b, 0], :length] = x[BOUNDS_K[b] : BOUNDS_K[b + 1]]
    got = ATEN._flash_attention_forward(
        q, *pages, BOUNDS_Q, None, 5, 16, 0.0, True, False, seqused_k=used, block_table=table
    )[0]
    torch.testing.assert_close(got, attend_one_by_one(q, k, v))


def cuda_kernels():
    names = ("_flash_attention_forward", "_scaled_dot_product_flash_attention_backward")
    return [torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA") for name in names]


@has_registry
@pytest.mark.skipif(any(cuda_kernels()), reason="counts on a PyTorch built without CUDA")
def test_nothing_changes_before_activation_and_after_restoring():
    from torch.nn import attention

    before = cuda_kernels()
    sdpa.register()
    assert "FAP" in attention.list_flash_attention_impls()
    assert cuda_kernels() == before == [False, False]
    attention.activate_flash_attention_impl("FAP")
    assert cuda_kernels() == [True, True]
    attention.restore_flash_attention_impl()
    assert cuda_kernels() == before


@has_registry
@pytest.mark.skipif(any(cuda_kernels()), reason="counts on a PyTorch built without CUDA")
def test_unregistering_restores_and_makes_the_name_unknown():
    from torch.nn import attention

    before = attention.list_flash_attention_impls()
    sdpa.register()
    attention.activate_flash_attention_impl("FAP")
    sdpa.unregister()
    assert cuda_kernels() == [False, False]
    assert attention.current_flash_attention_impl() is None
    assert attention.list_flash_attention_impls() == [name for name in before if name != "FAP"]
    with pytest.raises(ValueError, match="Unknown flash attention impl 'FAP'"):
        attention.activate_flash_attention_impl("FAP")
    sdpa.unregister()


@has_registry
def test_unregistering_leaves_another_active_implementation(monkeypatch):
    from torch.nn import attention

    sdpa.register()
    restored = []
    monkeypatch.setattr(attention, "current_flash_attention_impl", lambda: "FA4")
    monkeypatch.setattr(attention, "restore_flash_attention_impl", lambda: restored.append(1))
    sdpa.unregister()
    assert not restored
    assert "FAP" not in attention.list_flash_attention_impls()


@pytest.mark.parametrize("call", [sdpa.register, sdpa.unregister])
def test_an_older_pytorch_is_an_error(monkeypatch, call):
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl", raising=False)
    with pytest.raises(RuntimeError, match=r"releases from 2\.11 on do, got"):
        call()
