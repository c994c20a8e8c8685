"""Packed sequences on fap-kernels behind the API: in Triton's interpreter, and on a GPU with graphs."""

from __future__ import annotations

import pytest
import torch

import fap_api

INTERPRETED = """
import torch
import fap_api

def bounds(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)

WHERE = (bounds(9, 0, 4), bounds(20, 3, 0), 9, 20)

def run(backend, dtype, options):
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, h, 24, dtype=dtype) for n, h in ((13, 2), (23, 1), (23, 1)))
    paged = "block_table" in options
    if paged:
        k, v = (torch.randn(3, 16, 1, 24, dtype=dtype) for _ in range(2))
    for x in (q, k, v):
        x.requires_grad_(not paged)
    # A last stride that is not 1, which has to be copied.
    k_strided = k.transpose(0, -1).contiguous().transpose(0, -1)
    with fap_api.use_backend(backend):
        assert fap_api.explain_varlen(q, k, v, *WHERE, **options).backend == backend
        out, lse, s_dmask = fap_api.flash_attn_varlen_func(
            q, k_strided, v, *WHERE, **options, return_attn_probs=True
        )
    if paged:
        return out, lse, s_dmask
    dlse = torch.ones_like(lse)
    return out, lse, s_dmask, *torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), dlse))

def check(dtype, **options):
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
    mine, right = run("triton", dtype, options), run("torch", dtype, options)
    for x, y in zip(mine, right, strict=True):
        torch.testing.assert_close(x, y, **tolerance)
    assert torch.equal(torch.signbit(mine[2]), torch.signbit(right[2]))
    assert bool(mine[2].signbit().any()) == bool(options.get("dropout_p"))

used = torch.tensor([7, 0, 4], dtype=torch.int32)
table = torch.tensor([[2, 0], [1, 1], [0, 0]], dtype=torch.int32)
check(torch.float32, causal=True, alibi_slopes=torch.rand(3, 2), seqused_q=used)
check(torch.float32, dropout_p=0.3, softcap=2.0, window_size=(6, 2), softmax_scale=0.3)
check(torch.float16, block_table=table, causal=True)
"""


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run there")
def test_the_interpreter_agrees_with_torch_down_to_the_dropout_mask(interpreted):
    interpreted(INTERPRETED)


LENGTHS = [200, 0, 57, 143]


def bounds(lengths=LENGTHS):
    return torch.tensor([0, *lengths], device="cuda").cumsum(0).to(torch.int32)


def draw(total=400, dtype=torch.float16):
    q = torch.randn(total, 4, 64, device="cuda", dtype=dtype)
    k, v = (torch.randn(total, 2, 64, device="cuda", dtype=dtype) for _ in range(2))
    return tuple(x.requires_grad_() for x in (q, k, v))


@pytest.mark.gpu
class TestOnGpu:
    def test_it_is_the_first_choice(self):
        explanation = fap_api.explain_varlen(*draw(), bounds(), bounds(), 200, 200)
        assert explanation.backend == "triton"
        assert explanation.reasons["triton"] == ()

    def test_a_graph_replays_with_other_lengths(self):
        """No launch depends on a length, so a graph is right for whatever the bounds hold when it runs."""
        (q, k, v), cu_seqlens = draw(), bounds()
        dout = torch.randn_like(q)

        def step():
            out, lse, _ = fap_api.flash_attn_varlen_func(
                q, k, v, cu_seqlens, cu_seqlens, 200, 200, causal=True, return_attn_probs=True
            )
            return out, lse, *torch.autograd.grad((out, lse), (q, k, v), (dout, torch.ones_like(lse)))

        graph, results = capture(step)
        for lengths in (LENGTHS, [1, 199, 200, 0], [100, 100, 100, 100]):
            with torch.no_grad():
                for x in (q, k, v):
                    x.copy_(torch.randn_like(x))
                cu_seqlens.copy_(bounds(lengths))
            graph.replay()
            for mine, right in zip(results, step(), strict=True):
                assert torch.equal(mine, right)

    def test_every_replay_draws_another_dropout_mask(self):
        (q, k, v), cu_seqlens = draw(), bounds()

        def step():
            return fap_api.flash_attn_varlen_func(
                q, k, v, cu_seqlens, cu_seqlens, 200, 200, 0.3, return_attn_probs=True
            )[::2]

        graph, results = capture(step)
        masks = []
        for _ in range(2):
            graph.replay()
            masks.append(torch.signbit(results[1][0, :, :200, :200]).clone())
        assert not torch.equal(*masks)
        assert abs(masks[1].float().mean().item() - 0.3) < 0.01

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
    def test_nothing_waits_for_the_device(self):
        (q, k, v), cu_seqlens = draw(), bounds()
        used = torch.tensor([150, 0, 57, 1], device="cuda", dtype=torch.int32)

        def step(**options):
            out = fap_api.flash_attn_varlen_func(
                q, k, v, cu_seqlens, cu_seqlens, 200, 200, causal=True, **options
            )
            out.sum().backward()

        calls = ({}, {"dropout_p": 0.1}, {"seqused_q": used, "seqused_k": used})
        for options in calls:
            step(**options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for options in calls:
                step(**options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_other_lengths_compile_nothing(self):
        from fap_kernels.backward import dkdv, dq
        from fap_kernels.forward import kernel

        kernels = (kernel.attention_forward_kernel, dkdv.attention_dkdv_kernel, dq.attention_dq_kernel)

        def step(*lengths):
            where = (bounds(lengths), bounds(lengths), max(lengths), max(lengths))
            fap_api.flash_attn_varlen_func(*draw(sum(lengths)), *where, causal=True).sum().backward()
            return [sum(len(cache[0]) for cache in k.device_caches.values()) for k in kernels]

        compiled = step(160, 33)
        for lengths in ((64, 64, 64), (1, 199, 7), (1000,), (17,) * 20):
            assert step(*lengths) == compiled

    def test_the_dropout_mask_is_that_of_the_torch_back_end(self):
        masks = []
        for backend in ("triton", "torch"):
            torch.manual_seed(5)
            with fap_api.use_backend(backend):
                where = (bounds(), bounds(), 200, 200)
                masks.append(fap_api.flash_attn_varlen_func(*draw(), *where, 0.3, return_attn_probs=True)[2])
        assert torch.equal(*(torch.signbit(mask) for mask in masks))


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
