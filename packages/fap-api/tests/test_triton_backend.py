"""fap-kernels behind the API: in Triton's interpreter on a CPU, and on a GPU with graphs."""

from __future__ import annotations

import pytest
import torch

import fap_api

INTERPRETED = """
import torch
import fap_api

def run(backend, dtype, options):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, h, 24, dtype=dtype) for n, h in ((19, 4), (37, 2), (37, 2)))
    for x in (q, k, v):
        x.requires_grad_()
    # A last stride that is not 1, which has to be copied.
    k_strided = k.transpose(1, 3).contiguous().transpose(1, 3)
    with fap_api.use_backend(backend):
        assert fap_api.explain(q, k, v, **options).backend == backend
        out, lse, s_dmask = fap_api.flash_attn_func(q, k_strided, v, **options, return_attn_probs=True)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), torch.ones_like(lse)))
    return out, lse, s_dmask, *gradients

def check(dtype, **options):
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    for mine, right in zip(run("triton", dtype, options), run("torch", dtype, options), strict=True):
        torch.testing.assert_close(mine, right, **tolerance)
        if options.get("dropout_p"):
            assert mine.shape != right.shape or mine.dim() != 4 or mine.shape[-1] != 128 or torch.equal(
                torch.signbit(mine), torch.signbit(right)
            )

slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
assert fap_api.explain(*(torch.randn(1, 4, 1, 8) for _ in range(3))).backend == "triton"
check(torch.float32, causal=True, alibi_slopes=slopes)
check(torch.float32, dropout_p=0.3, softcap=2.0, softmax_scale=0.3)
check(torch.float16, window_size=(5, 3))
"""


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run there")
def test_the_interpreter_agrees_with_torch_down_to_the_dropout_mask(interpreted):
    interpreted(INTERPRETED)


def draw(seqlen=200, heads=(4, 2), dtype=torch.float16):
    q = torch.randn(2, seqlen, heads[0], 64, device="cuda", dtype=dtype)
    k, v = (torch.randn(2, seqlen, heads[1], 64, device="cuda", dtype=dtype) for _ in range(2))
    return tuple(x.requires_grad_() for x in (q, k, v))


@pytest.mark.gpu
class TestOnGpu:
    def test_it_is_the_first_choice(self):
        explanation = fap_api.explain(*draw())
        assert explanation.backend == "triton"
        assert explanation.reasons["triton"] == ()

    def test_a_graph_replays_forward_and_backward(self):
        q, k, v = draw()
        dout = torch.randn_like(q)

        def step():
            out, lse, _ = fap_api.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
            return out, lse, *torch.autograd.grad((out, lse), (q, k, v), (dout, torch.ones_like(lse)))

        graph, results = capture(step)
        with torch.no_grad():
            for x in (q, k, v):
                x.copy_(torch.randn_like(x))
        graph.replay()
        for mine, right in zip(results, step(), strict=True):
            assert torch.equal(mine, right)

    def test_every_replay_draws_another_dropout_mask(self):
        q, k, v = draw()

        def step():
            out, _, s_dmask = fap_api.flash_attn_func(q, k, v, 0.3, return_attn_probs=True)
            return out, s_dmask, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

        graph, results = capture(step)
        masks = []
        for _ in range(3):
            graph.replay()
            masks.append(torch.signbit(results[1][:, :, :200, :200]).clone())
        assert not torch.equal(masks[0], masks[1])
        assert not torch.equal(masks[1], masks[2])
        assert abs(masks[2].float().mean().item() - 0.3) < 0.01
        # The backward of the same replay uses the same mask: dv = P_dropped^T dout.
        weights = torch.where(masks[2], 0.0, results[1][:, :, :200, :200].abs().float()) / 0.7
        dv = weights.sum(dim=2).view(2, 2, 2, 200).sum(dim=2)
        torch.testing.assert_close(results[4].float().mean(dim=-1), dv.transpose(1, 2), rtol=2e-2, atol=2e-2)

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
    def test_nothing_waits_for_the_device(self):
        q, k, v = draw()
        fap_api.flash_attn_func(q, k, v, 0.1, causal=True).sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = fap_api.flash_attn_func(q, k, v, 0.1, causal=True)
            out.sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_the_dropout_mask_is_that_of_the_torch_back_end(self):
        masks = []
        for backend in ("triton", "torch"):
            torch.manual_seed(5)
            q, k, v = draw()
            with fap_api.use_backend(backend):
                masks.append(torch.signbit(fap_api.flash_attn_func(q, k, v, 0.3, return_attn_probs=True)[2]))
        assert torch.equal(*masks)

    def test_float64_falls_back_with_a_warning(self, caplog):
        q, k, v = draw(seqlen=20, dtype=torch.float64)
        with caplog.at_level("WARNING", logger="fap_api"):
            fap_api.flash_attn_func(q, k, v)
        assert "float64" in caplog.text


def capture(step):
    """Warm a step up, capture it, and return the graph and its outputs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Without their autograd graph, whose nodes belong to the capturing stream.
        results = [x.detach() for x in step()]
    return graph, results
