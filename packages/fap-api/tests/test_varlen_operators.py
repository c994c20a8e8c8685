"""What PyTorch needs of packed sequences: schemas, fakes, autograd, compile, autocast, FLOPs."""

from __future__ import annotations

import shutil
from functools import partial

import pytest
import torch
from torch.library import opcheck

import fap_api

OPERATORS = torch.ops.fap
SCORE = (0.3, 5, 0, 2.0)  # softmax_scale, window_left, window_right, softcap
each_dropout = pytest.mark.parametrize("dropout_p", [0.0, 0.3])
LENGTHS = ((5, 0, 9), (7, 3, 4))


def bounds(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def draw(lengths=LENGTHS, heads=(4, 2), dtype=torch.float32, device="cpu", requires_grad=True):
    q = torch.randn(sum(lengths[0]), heads[0], 8, dtype=dtype, device=device)
    k, v = (torch.randn(sum(lengths[1]), heads[1], 8, dtype=dtype, device=device) for _ in range(2))
    return tuple(x.requires_grad_(requires_grad) for x in (q, k, v))


def places(lengths=LENGTHS, device="cpu"):
    return *(bounds(x, device) for x in lengths), *(max(x) for x in lengths)


def check_operators(dropout_p, backend, device, dtype):
    q, k, v = draw(dtype=dtype, device=device)
    used = torch.tensor([4, 0, 9], dtype=torch.int32, device=device)
    where = (*places(device=device), used, None)
    options = (torch.rand(4, device=device), *SCORE, dropout_p)
    opcheck(OPERATORS.attention_varlen_forward.default, (q, k, v, *where, None, *options, False, backend))
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse, rng_state = OPERATORS.attention_varlen_forward(q, k, v, *where, None, *options, False, backend)
    strided = torch.randn_like(out).transpose(0, 1).contiguous().transpose(0, 1)
    for dlse in (None, torch.randn_like(lse)):
        arguments = (strided, q, k, v, out, lse, dlse, rng_state, *where, *options, True, backend)
        opcheck(OPERATORS.attention_varlen_backward.default, arguments)
    if dropout_p:
        tensors = (q, k, lse, rng_state)
        opcheck(OPERATORS.attention_varlen_probabilities.default, (*tensors, *where, None, *options, backend))


# From torch 2.15 on, opcheck itself looks at the .grad of tensors that are no leaves.
opcheck_warns = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


@opcheck_warns
@each_dropout
def test_opcheck(dropout_p):
    check_operators(dropout_p, "torch", "cpu", torch.float32)


@pytest.mark.gpu
@opcheck_warns
@each_dropout
def test_opcheck_on_gpu(dropout_p):
    check_operators(dropout_p, "triton", "cuda", torch.float16)


def training_loss(q, k, v, slopes, *where):
    out, lse, _ = fap_api.flash_attn_varlen_func(
        q, k, v, *where, causal=True, window_size=(5, -1), softcap=2.0, alibi_slopes=slopes,
        return_attn_probs=True,
    )  # fmt: skip
    return (out.float() ** 2).sum() + lse.sin().sum()


def check_compiled(compiled, device="cpu", dtype=torch.float32):
    slopes = torch.rand(4, device=device)
    for step in range(5):
        lengths = ((9 + step, 3, 17 * step + 1), (12 + 2 * step, 5, 20 * step + 1))
        q, k, v = draw(lengths, device=device, dtype=dtype)
        where = places(lengths, device)
        got = torch.autograd.grad(compiled(q, k, v, slopes, *where), (q, k, v))
        expected = torch.autograd.grad(training_loss(q, k, v, slopes, *where), (q, k, v))
        for dx, right in zip(got, expected, strict=True):
            torch.testing.assert_close(dx, right)


@pytest.fixture
def compile_counter():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


@pytest.fixture
def scalar_outputs():
    """Let graphs hold numbers read from tensors. At its end, monkeypatch would delete the setting."""
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        yield


@pytest.mark.filterwarnings("default")
class TestCompile:
    def test_whole_graph_forward_and_backward_with_two_graphs_for_all_lengths(self, compile_counter):
        check_compiled(torch.compile(training_loss, fullgraph=True, backend="aot_eager"))
        assert compile_counter["unique_graphs"] == 2

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
    def test_inductor(self, compile_counter):
        check_compiled(torch.compile(training_loss, fullgraph=True, dynamic=True))

    def test_packed_forms_dropout_and_autocast(self, compile_counter):
        def attention(qkv, bounds, longest):
            with torch.autocast("cpu", torch.bfloat16):
                return fap_api.flash_attn_varlen_qkvpacked_func(
                    qkv, bounds, longest, 0.4, causal=True, return_attn_probs=True
                )

        qkv = torch.randn(14, 3, 2, 8, requires_grad=True)
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        results = []
        for function in (compiled, attention):
            torch.manual_seed(3)
            out, _, s_dmask = function(qkv, bounds((5, 9)), 9)
            assert out.dtype == torch.bfloat16
            results.append((s_dmask, torch.autograd.grad(out.sum(), qkv)[0]))
        for mine, right in zip(*results, strict=True):
            assert torch.equal(mine, right)

    def test_pages(self, compile_counter):
        q, table = torch.randn(14, 2, 8), torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)
        pages = torch.randn(4, 16, 2, 8)
        where = (bounds((5, 9)), bounds((20, 32)), 9, 32)

        def attention(q, pages, *where):
            return fap_api.flash_attn_varlen_func(q, pages, pages, *where, causal=True, block_table=table)

        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, pages, *where), attention(q, pages, *where))

    def test_a_longest_length_that_the_graph_itself_computes(self, compile_counter, scalar_outputs):
        def attention(q, k, v, cu_seqlens):
            longest = cu_seqlens.diff().max()
            return fap_api.flash_attn_varlen_func(
                q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True
            )

        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        tensors = draw(((5, 9), (5, 9)))
        for lengths in ((5, 9), (13, 1)):
            got, right = (function(*tensors, bounds(lengths)) for function in (compiled, attention))
            assert torch.equal(got, right)
        got, right = (torch.autograd.grad(out.sum(), tensors) for out in (got, right))
        assert all(map(torch.equal, got, right))
        assert compile_counter["unique_graphs"] == 1

    @pytest.mark.gpu
    def test_on_gpu(self, compile_counter):
        check_compiled(torch.compile(training_loss, fullgraph=True, dynamic=True), "cuda", torch.float16)


def attention(q, k, v, **options):
    return fap_api.flash_attn_varlen_func(q, k, v, *places(device=q.device), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_q_k_and_v_only(dtype):
    tensors, slopes = draw(requires_grad=False), torch.rand(3, 4)
    with torch.autocast("cpu", dtype):
        out, lse, _ = attention(*tensors, alibi_slopes=slopes, return_attn_probs=True)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert torch.equal(out, attention(*(x.to(dtype) for x in tensors), alibi_slopes=slopes))


def test_gradients_against_finite_differences():
    lengths = ((3, 0, 4), (4, 2, 2))
    q, k, v = draw(lengths, heads=(2, 1), dtype=torch.float64)
    used = torch.tensor([2, 0, 4], dtype=torch.int32)
    slopes = torch.rand(3, 2)

    def function(q, k, v):
        # Queries without keys and rows not in use have an LSE of +inf whatever the inputs.
        out, lse, _ = fap_api.flash_attn_varlen_func(
            q,
            k,
            v,
            *places(lengths),
            causal=True,
            softcap=1.5,
            alibi_slopes=slopes,
            seqused_q=used,
            return_attn_probs=True,
        )
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(function, (q, k, v))


def test_packed_forms_give_the_same_and_one_gradient():
    lengths = ((5, 0, 9), (5, 0, 9))
    q, k, v = draw(lengths, heads=(2, 2))
    where, dout = places(lengths), torch.randn(14, 2, 8)
    used = {f"seqused_{x}": torch.tensor([3, 0, 9], dtype=torch.int32) for x in "qk"}
    right = fap_api.flash_attn_varlen_func(q, k, v, *where, causal=True, **used)
    dq, dk, dv = torch.autograd.grad(right, (q, k, v), dout)

    kv = torch.stack((k, v), dim=1).detach().requires_grad_()
    out = fap_api.flash_attn_varlen_kvpacked_func(q, kv, *where, causal=True, **used)
    assert torch.equal(out, right)
    for mine, expected in zip(
        torch.autograd.grad(out, (q, kv), dout), (dq, torch.stack((dk, dv), dim=1)), strict=True
    ):
        assert torch.equal(mine, expected)

    qkv = torch.stack((q, k, v), dim=1).detach().requires_grad_()
    out = fap_api.flash_attn_varlen_qkvpacked_func(qkv, where[0], where[2], causal=True, **used)
    assert torch.equal(out, right)
    assert torch.equal(torch.autograd.grad(out, qkv, dout)[0], torch.stack((dq, dk, dv), dim=1))


def test_meta_tensors_give_shapes():
    q, k, v = draw(requires_grad=False, device="meta", dtype=torch.float16)
    out, lse, s_dmask = attention(q, k, v, dropout_p=0.1, return_attn_probs=True)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.float16, "meta")
    assert (lse.shape, lse.dtype) == ((4, 14), torch.float32)
    assert s_dmask.shape == (3, 4, 128, 128)


def test_flops_are_counted_by_the_lengths():
    from torch.utils.flop_counter import FlopCounterMode

    pair = 2 * 4 * 8
    with FlopCounterMode(display=False) as both:
        attention(*draw()).sum().backward()
    assert both.get_total_flops() == 7 * pair * (5 * 7 + 9 * 4)
    with FlopCounterMode(display=False) as used, torch.no_grad():
        attention(*draw(), seqused_k=torch.tensor([2, 0, 4], dtype=torch.int32))
    assert used.get_total_flops() == 2 * pair * (5 * 2 + 9 * 4)
    lengths = ((8, 8), (8, 8))
    tensors, where = draw(lengths, device="meta", requires_grad=False), places(lengths, "meta")
    with FlopCounterMode(display=False) as elsewhere:
        fap_api.flash_attn_varlen_func(*tensors, *where, causal=True)
    assert elsewhere.get_total_flops() == 2 * pair * 2 * (8 * 9 // 2)


def test_a_repeated_call_is_described_once(monkeypatch):
    from fap_api import _call

    described = []
    describe = _call._describe
    monkeypatch.setattr(_call, "_describe", lambda *call: described.append(1) or describe(*call))
    for seed in range(3):
        torch.manual_seed(seed)
        attention(*draw(), causal=True)
    assert len(described) == 1
    attention(*draw(), causal=True, seqused_q=torch.tensor([1, 0, 1], dtype=torch.int32))
    assert len(described) == 2


def test_an_unused_lse_costs_the_backward_nothing(monkeypatch):
    from fap_api.backends.torch_ import TorchBackend

    seen = []
    backward = TorchBackend.varlen_backward

    def spy(self, *arguments):
        seen.append(arguments[6])
        return backward(self, *arguments)

    monkeypatch.setattr(TorchBackend, "varlen_backward", spy)
    attention(*draw()).sum().backward()
    attention(*draw(), return_attn_probs=True)[1].nan_to_num(posinf=0.0).sum().backward()
    assert seen[0] is None
    assert seen[1] is not None


def test_a_second_derivative_is_refused():
    q, k, v = draw()
    (dq,) = torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        dq.sum().backward()


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_selective_checkpointing_can_save_the_second_forward(check_selective_checkpointing, dropout_p):
    check_selective_checkpointing(
        OPERATORS.attention_varlen_forward.default,
        "varlen_forward",
        partial(attention, dropout_p=dropout_p),
        draw,
    )
