"""What PyTorch needs of the operators: schemas, fakes, autograd, compile, autocast, FLOPs, quiet imports."""

from __future__ import annotations

import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch.library import opcheck

import fap_api
from fap_api import _flops

OPERATORS = torch.ops.fap
SCORE = (0.3, 5, 0, 2.0)  # softmax_scale, window_left, window_right, softcap
each_dropout = pytest.mark.parametrize("dropout_p", [0.0, 0.3])


def draw(batch=2, seqlen_q=9, seqlen_k=11, dtype=torch.float32, device="cpu", requires_grad=True):
    q = torch.randn(batch, seqlen_q, 4, 8, dtype=dtype, device=device)
    k, v = (torch.randn(batch, seqlen_k, 2, 8, dtype=dtype, device=device) for _ in range(2))
    return tuple(x.requires_grad_(requires_grad) for x in (q, k, v))


def check_operators(dropout_p, backend, device, dtype):
    q, k, v = draw(dtype=dtype, device=device)
    slopes = torch.rand(4, device=device)
    options = (slopes, *SCORE, dropout_p)
    opcheck(OPERATORS.attention_forward.default, (q, k, v, *options, False, backend))

    q, k, v = (x.detach() for x in (q, k, v))
    out, lse, rng_state = OPERATORS.attention_forward(q, k, v, *options, False, backend)
    strided = torch.randn_like(out).transpose(1, 2).contiguous().transpose(1, 2)
    for dlse in (None, torch.randn_like(lse)):
        arguments = (strided, q, k, v, out, lse, dlse, rng_state, *options, True, backend)
        opcheck(OPERATORS.attention_backward.default, arguments)
    if dropout_p:
        opcheck(OPERATORS.attention_probabilities.default, (q, k, lse, rng_state, *options, backend))


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


def training_loss(q, k, v, slopes):
    out, lse, _ = fap_api.flash_attn_func(
        q, k, v, causal=True, window_size=(5, -1), softcap=2.0, alibi_slopes=slopes, return_attn_probs=True
    )
    return (out.float() ** 2).sum() + lse.sin().sum()


def check_compiled(compiled, device="cpu", dtype=torch.float32):
    slopes = torch.rand(4, device=device)
    for seqlen in (9, 10, 17, 33):
        q, k, v = draw(seqlen_q=seqlen, seqlen_k=seqlen + 3, device=device, dtype=dtype)
        got = torch.autograd.grad(compiled(q, k, v, slopes), (q, k, v))
        expected = torch.autograd.grad(training_loss(q, k, v, slopes), (q, k, v))
        for dx, right in zip(got, expected, strict=True):
            torch.testing.assert_close(dx, right)


@pytest.fixture
def compile_counter():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


@pytest.mark.filterwarnings("default")
class TestCompile:
    def test_whole_graph_forward_and_backward_with_two_graphs_for_all_lengths(self, compile_counter):
        check_compiled(torch.compile(training_loss, fullgraph=True, backend="aot_eager"))
        assert compile_counter["unique_graphs"] == 2

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
    def test_inductor(self, compile_counter):
        check_compiled(torch.compile(training_loss, fullgraph=True, dynamic=True))

    def test_dropout(self, compile_counter):
        def loss(q, k, v):
            return fap_api.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        q, k, v = draw(seqlen_q=40, seqlen_k=40)
        torch.manual_seed(3)
        out, _, s_dmask = compiled(q, k, v)
        torch.manual_seed(3)
        right, _, right_mask = loss(q, k, v)
        torch.testing.assert_close(out, right)
        assert torch.equal(torch.signbit(s_dmask), torch.signbit(right_mask))
        assert not torch.equal(torch.signbit(compiled(q, k, v)[2]), torch.signbit(right_mask))

    def test_packed_and_autocast(self, compile_counter):
        def attention(qkv):
            with torch.autocast("cpu", torch.bfloat16):
                return fap_api.flash_attn_qkvpacked_func(qkv, causal=True)

        qkv = torch.randn(2, 9, 3, 2, 8, requires_grad=True)
        compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
        assert compiled(qkv).dtype == torch.bfloat16
        (got,) = torch.autograd.grad(compiled(qkv).sum(), qkv)
        (expected,) = torch.autograd.grad(attention(qkv).sum(), qkv)
        assert torch.equal(got, expected)

    def test_another_back_end_is_another_graph(self, compile_counter):
        compiled = torch.compile(fap_api.flash_attn_func, fullgraph=True, backend="aot_eager")
        q, k, v = draw(requires_grad=False)
        compiled(q, k, v)
        with fap_api.use_backend("torch"):
            compiled(q, k, v)
            assert compile_counter["unique_graphs"] == 2
        # Older compilers name the error of a traced call, but do not repeat its message.
        with fap_api.use_backend("triton"), pytest.raises(Exception, match="got cpu|RuntimeError"):
            compiled(q, k, v)

    @pytest.mark.gpu
    def test_on_gpu(self, compile_counter):
        check_compiled(torch.compile(training_loss, fullgraph=True, dynamic=True), "cuda", torch.float16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_q_k_and_v_only(dtype):
    q, k, v = draw(requires_grad=False)
    slopes = torch.rand(4)
    with torch.autocast("cpu", dtype):
        out, lse, _ = fap_api.flash_attn_func(q, k, v, alibi_slopes=slopes, return_attn_probs=True)
    right = fap_api.flash_attn_func(*(x.to(dtype) for x in (q, k, v)), alibi_slopes=slopes)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert torch.equal(out, right)


def test_autocast_joins_mixed_dtypes_and_leaves_float64():
    q, k, v = draw(requires_grad=False)
    with torch.autocast("cpu", torch.bfloat16):
        assert fap_api.flash_attn_func(q.bfloat16(), k, v.half()).dtype == torch.bfloat16
        assert fap_api.flash_attn_func(q.double(), k.double(), v.double()).dtype == torch.float64


def test_gradients_against_finite_differences():
    q, k, v = draw(batch=1, seqlen_q=6, seqlen_k=4, dtype=torch.float64)
    slopes = torch.rand(4)

    def attention(q, k, v):
        # More queries than keys: two rows see no key, and their LSE is +inf whatever the inputs.
        out, lse, _ = fap_api.flash_attn_func(
            q, k, v, causal=True, softcap=1.5, alibi_slopes=slopes, return_attn_probs=True
        )
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(attention, (q, k, v))


def test_the_gradient_of_s_dmask_does_not_exist():
    q, k, v = draw()
    out, lse, s_dmask = fap_api.flash_attn_func(q, k, v, 0.2, return_attn_probs=True)
    assert out.requires_grad
    assert lse.requires_grad
    assert not s_dmask.requires_grad


def test_a_packed_gradient_is_the_stack_of_the_separate_ones():
    q, k, v = draw(seqlen_q=11)
    kv = torch.stack((k, v), dim=2).detach().requires_grad_()
    dout = torch.randn(2, 11, 4, 8)
    dq, dkv = torch.autograd.grad(fap_api.flash_attn_kvpacked_func(q, kv, causal=True), (q, kv), dout)
    expected = torch.autograd.grad(fap_api.flash_attn_func(q, k, v, causal=True), (q, k, v), dout)
    assert torch.equal(dq, expected[0])
    assert torch.equal(dkv, torch.stack(expected[1:], dim=2))


def test_meta_tensors_give_shapes():
    q, k, v = draw(requires_grad=False, device="meta", dtype=torch.float16)
    out, lse, s_dmask = fap_api.flash_attn_func(q, k, v, 0.1, return_attn_probs=True)
    assert (out.shape, out.dtype, out.device.type) == (q.shape, torch.float16, "meta")
    assert (lse.shape, lse.dtype) == ((2, 4, 9), torch.float32)
    assert s_dmask.shape == (2, 4, 128, 128)


@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (0, 0), (3, 2), (-1, 4), (6, -1), (100, 100)])
@pytest.mark.parametrize("lengths", [(7, 7), (5, 12), (12, 5), (1, 9), (9, 1), (0, 4), (4, 0)])
def test_visible_pairs_are_counted_in_closed_form(window, lengths):
    (left, right), (seqlen_q, seqlen_k) = window, lengths
    shift = seqlen_k - seqlen_q
    counted = sum(
        (left < 0 or i + shift - left <= j) and (right < 0 or j <= i + shift + right)
        for i in range(seqlen_q)
        for j in range(seqlen_k)
    )
    assert _flops.visible_pairs(seqlen_q, seqlen_k, left, right) == counted


def test_flops_are_counted_forward_and_backward():
    q, k, v = draw(seqlen_q=8, seqlen_k=8)
    unused = fap_api.flash_attn_func(q, k, v).sum()
    from torch.utils.flop_counter import FlopCounterMode

    product = 2 * 2 * 4 * 8 * (8 * 8)
    with FlopCounterMode(display=False) as backward_alone:
        unused.backward()
    assert backward_alone.get_total_flops() == 5 * product
    with FlopCounterMode(display=False) as both:
        fap_api.flash_attn_func(q, k, v).sum().backward()
    assert both.get_total_flops() == 7 * product
    with FlopCounterMode(display=False) as causal, torch.no_grad():
        fap_api.flash_attn_func(q, k, v, causal=True)
    assert causal.get_total_flops() == 2 * 2 * 2 * 4 * 8 * (8 * 9 // 2)


def test_recording_a_graph_does_not_go_through_the_schema(monkeypatch):
    def fill_defaults(*_):
        pytest.fail("each call paid for looking up defaults that the operators do not have")

    monkeypatch.setattr("torch._library.utils.fill_defaults", fill_defaults)
    q, k, v = draw()
    torch.autograd.grad(fap_api.flash_attn_func(q, k, v).sum(), (q, k, v))
    lengths = torch.tensor([0, 4, 9], dtype=torch.int32)
    packed = (q[0], k[0, :9], v[0, :9], lengths, lengths, 5, 5)
    torch.autograd.grad(fap_api.flash_attn_varlen_func(*packed).sum(), (q, k, v))


def test_an_unused_lse_costs_the_backward_nothing(monkeypatch):
    from fap_api.backends.torch_ import TorchBackend

    seen = []
    backward = TorchBackend.backward

    def spy(self, *arguments):
        seen.append(arguments[6])
        return backward(self, *arguments)

    monkeypatch.setattr(TorchBackend, "backward", spy)
    q, k, v = draw()
    fap_api.flash_attn_func(q, k, v).sum().backward()
    _, lse, _ = fap_api.flash_attn_func(q, k, v, return_attn_probs=True)
    lse.sum().backward()
    assert seen[0] is None
    assert seen[1] is not None


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_selective_checkpointing_can_save_the_second_forward(check_selective_checkpointing, dropout_p):
    check_selective_checkpointing(
        OPERATORS.attention_forward.default,
        "forward",
        partial(fap_api.flash_attn_func, dropout_p=dropout_p),
        draw,
    )


def test_s_dmask_is_computed_only_when_asked_for(monkeypatch):
    from fap_api.backends.torch_ import TorchBackend

    monkeypatch.setattr(TorchBackend, "probabilities", None)
    q, k, v = draw()
    fap_api.flash_attn_func(q, k, v, 0.5)
    assert fap_api.flash_attn_func(q, k, v, return_attn_probs=True)[2].numel() == 0


def test_import_is_quiet():
    program = (
        "import sys, os, torch\n"
        "before = set(sys.modules)\n"
        "os.environ = None\n"
        "import fap_api\n"
        "print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))\n"
        "print(torch.cuda.is_initialized())\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["['fap_api', 'fap_kernels']", "False"]
    assert run.stderr == ""
