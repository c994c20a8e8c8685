"""Processes of test_distributed.py: ``distributed_rank.py RANK[,RANK...] WORLD_SIZE STORE cpu|cuda``."""

from __future__ import annotations

import multiprocessing
import sys
import traceback
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from counted import counted_passes
from torch.distributed.device_mesh import init_device_mesh

import fap_api
from fap_api.backends.torch_ import TorchBackend
from fap_api.backends.triton import TritonBackend
from fap_api.integrations import sdpa
from fap_api.integrations.context_parallel import (
    context_parallel_attention,
    shard_sequence,
    unshard_sequence,
)
from fap_testing.reference import attention_reference_gradients


@dataclass(frozen=True)
class Setting:
    """What the processes compute on, and tensors that are small for it."""

    device: str
    group: str
    backend: type
    dtype: torch.dtype
    seqlen: int
    headdim: int


SETTINGS = {
    "cpu": Setting("cpu", "gloo", TorchBackend, torch.float32, 16, 8),
    "cuda": Setting("cuda", "nccl", TritonBackend, torch.bfloat16, 1024, 64),
}


def assert_near(actual, expected):
    """Compare elements, or rows in bfloat16, where parts are rounded before they are added up.

    A row's error counts against its own norm or, where its elements cancel out, that of the average row.
    """
    if expected.dtype != torch.bfloat16:
        torch.testing.assert_close(actual, expected)
        return
    rows = expected.float().norm(dim=-1)
    errors = (actual.float() - expected.float()).norm(dim=-1)
    worst = (errors / rows.clamp(min=rows.mean().item())).max().item()
    assert worst < 2e-2, f"the worst row is off by {worst:.1e} of its norm"


def assert_no_worse(parts, whole, exact):
    """The parts are at most twice as far off as the whole, and their worst row three times, plus 2e-3.

    A sharp softmax has rows of gradients that all but cancel out; there two right results are as far from
    each other as each is from the exact one, so no bound on their difference is both safe and tight.
    Parts are rounded before they are added up, and rows where they cancel out show it most.
    """
    wide = exact.double()
    size = wide.norm(dim=-1)
    floor = size.clamp(min=size.mean().item())

    def off(x):
        error = x.double() - wide
        return (error.norm() / wide.norm()).item(), (error.norm(dim=-1) / floor).max().item()

    for times, got, allowed in zip((2, 3), off(parts), off(whole), strict=True):
        assert got <= times * allowed + 2e-3, f"off by {got:.1e} of its norm, and the whole by {allowed:.1e}"


def check(mesh, setting, method, causal, nheads_k, dtype):
    """Compare output and gradients of the parts with those of the whole, which every process draws alike."""
    torch.manual_seed(7)
    heads, shape = (4, nheads_k, nheads_k, 4), (2, setting.seqlen, setting.headdim)
    *whole, dout = (
        torch.randn(shape[0], shape[1], n, shape[2], dtype=dtype, device=setting.device) for n in heads
    )
    parts = [shard_sequence(x, mesh).requires_grad_() for x in whole]
    out = context_parallel_attention(*parts, mesh=mesh, method=method, causal=causal, softmax_scale=0.4)
    got = out, *torch.autograd.grad(out, parts, shard_sequence(dout, mesh))

    whole = [x.requires_grad_() for x in whole]
    right = fap_api.flash_attn_func(*whole, causal=causal, softmax_scale=0.4)
    expected = right, *torch.autograd.grad(right, whole, dout)
    exact = attention_reference_gradients(*whole, dout, causal=causal, softmax_scale=0.4)
    for name, x, y in zip(("out", "dq", "dk", "dv"), got, expected, strict=True):
        assert x.dtype == y.dtype == dtype
        if dtype == torch.bfloat16:
            assert_no_worse(unshard_sequence(x, mesh), y.detach(), getattr(exact, name))
        else:
            assert_near(unshard_sequence(x, mesh), y.detach())


def check_refusals(mesh, setting):
    x = torch.randn(2, 3, 3, 8, device=setting.device)
    with pytest.raises(ValueError, match="method must be 'ring' or 'ulysses', got 'star'"):
        context_parallel_attention(x, x, x, mesh=mesh, method="star")
    with pytest.raises(ValueError, match="two chunks of equal length.*got 3 tokens"):
        context_parallel_attention(x, x, x, mesh=mesh, causal=True)
    with pytest.raises(ValueError, match="must have a multiple of .* heads .* got 3 and 3"):
        context_parallel_attention(x, x, x, mesh=mesh, method="ulysses")
    with pytest.raises(ValueError, match="parts of the same sequence, got 3, 2 and 2 tokens"):
        context_parallel_attention(x, x[:, :2], x[:, :2], mesh=mesh)
    with pytest.raises(ValueError, match="multiple of .* tokens .* along dim 1, got 3"):
        shard_sequence(x, mesh)


def check_dtensors(mesh, setting):
    """Shards of batches and of heads give the whole's results, without a word between the processes."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.debug import CommDebugMode

    import fap_api.integrations.dtensor

    fap_api.integrations.dtensor.register()
    torch.manual_seed(7)
    seqlen, options = setting.seqlen // 2, {"dtype": setting.dtype, "device": setting.device}
    q, k, v, dout = (torch.randn(4, seqlen, heads, setting.headdim, **options) for heads in (8, 4, 4, 8))
    slopes = torch.rand(8, device=setting.device)
    first, total = seqlen - 1, 4 * seqlen
    bounds = torch.tensor([0, first, first, total], dtype=torch.int32, device=setting.device)

    def dense(q, k, v, slopes, bounds):
        return fap_api.flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes, return_attn_probs=True)[:2]

    def packed(q, k, v, slopes, bounds):
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        options = {"causal": True, "alibi_slopes": slopes, "return_attn_probs": True}
        longest = total - first
        return fap_api.flash_attn_varlen_func(q, k, v, bounds, bounds, longest, longest, **options)[:2]

    heads, batches = Shard(2), Shard(0)
    for attend, cut, out_cut, lse_cut in (
        (dense, batches, batches, batches),
        (dense, heads, heads, Shard(1)),
        (packed, heads, Shard(1), Shard(0)),
    ):
        inputs = [distribute_tensor(x, mesh, [cut]).requires_grad_() for x in (q, k, v)]
        extras = slopes, bounds
        shared = [
            distribute_tensor(slopes, mesh, [Shard(0) if cut == heads else Replicate()]),
            distribute_tensor(bounds, mesh, [Replicate()]),
        ]
        weight = distribute_tensor(dout if attend is dense else dout.flatten(0, 1), mesh, [out_cut])
        with CommDebugMode() as spoken, counted_passes(setting.backend) as ran:
            out, lse = attend(*inputs, *shared)
            loss = (out * weight).to_local().sum() + lse.to_local().sum()
            gradients = torch.autograd.grad(loss, inputs)
        assert out.placements == (out_cut,)
        assert lse.placements == (lse_cut,)
        assert spoken.get_total_counts() == 0
        assert ran == (["forward", "backward"] if attend is dense else ["varlen_forward", "varlen_backward"])

        whole = [x.clone().requires_grad_() for x in (q, k, v)]
        right, right_lse = attend(*whole, *extras)
        expected = torch.autograd.grad((right * dout.view(right.shape)).sum() + right_lse.sum(), whole)
        for x, y in zip((out, lse, *gradients), (right, right_lse, *expected), strict=True):
            assert_near(x.full_tensor(), y.detach())

    dropped = [distribute_tensor(x, mesh, [heads]) for x in (q, k, v)]
    with pytest.raises(RuntimeError) as refusal:
        fap_api.flash_attn_func(*dropped, 0.5)
    # Up to PyTorch 2.9 DTensor wraps it in an error of its own.
    shown = "".join(traceback.format_exception(refusal.value))
    assert "dropout_p must be 0.0 for DTensors, got 0.5" in shown

    # What DTensor has decided for a call, it does not find again without the rules.
    fap_api.flash_attn_func(*dropped, causal=True)
    fap_api.integrations.dtensor.unregister()
    with pytest.raises(NotImplementedError, match="fap.attention_forward"):
        fap_api.flash_attn_func(*dropped, causal=True)
    fap_api.integrations.dtensor.unregister()
    fap_api.integrations.dtensor.register()
    assert fap_api.flash_attn_func(*dropped, causal=True).placements == (heads,)


@contextmanager
def activated(device):
    """PyTorch's FlashAttention operators are ours meanwhile."""
    from torch.nn import attention

    if device == "cpu":
        handle = sdpa._activate("CPU")
        yield
        handle.remove()
    else:
        sdpa.register()
        attention.activate_flash_attention_impl(sdpa.NAME)
        yield
        sdpa.unregister()


def attend_by_torch(mesh, device, parts):
    """Causal attention as torch's context_parallel has it.

    For CPU tensors scaled_dot_product_attention never takes the FlashAttention operators, so there they are
    called by name.
    """
    from torch.distributed.tensor import DTensor, Shard
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device == "cpu":
        cut = [DTensor.from_local(x, mesh, [Shard(2)], run_check=False) for x in parts]
        return torch.ops.aten._scaled_dot_product_flash_attention(*cut, 0.0, True)[0].to_local()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)


def check_torchs_own(mesh, setting):
    """PyTorch's context_parallel attends by its FlashAttention operators, and so here where they are ours."""
    import torch.nn.attention
    from torch.distributed.tensor.experimental import context_parallel

    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        return
    torch.manual_seed(7)
    shape, options = (
        (2, 4, setting.seqlen, setting.headdim),
        {"dtype": setting.dtype, "device": setting.device},
    )
    whole = [torch.randn(shape, **options, requires_grad=True) for _ in range(3)]
    dout = torch.randn(shape, **options)
    buffers = [x.detach().clone() for x in (*whole, dout)]
    with (
        activated(setting.device),
        counted_passes(setting.backend) as ran,
        context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 4),
    ):
        parts = [x.detach().requires_grad_() for x in buffers[:3]]
        out = attend_by_torch(mesh, setting.device, parts)
        got = [unshard_sequence(x, mesh, 2) for x in (out, *torch.autograd.grad(out, parts, buffers[3]))]
    assert ran == ["forward"] * mesh.size() + ["backward"] * mesh.size()
    right = torch.nn.functional.scaled_dot_product_attention(*whole, is_causal=True)
    for x, y in zip(got, (right, *torch.autograd.grad(right, whole, dout)), strict=True):
        assert_near(x, y.detach())


def run(rank, world_size, store, setting):
    if setting.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(setting.group, init_method=f"file://{store}", rank=rank, world_size=world_size)
    mesh = init_device_mesh(setting.device, (world_size,), mesh_dim_names=("cp",))
    for method in ("ring", "ulysses"):
        for causal in (False, True):
            for nheads_k in (4, 2, 1):
                check(mesh, setting, method, causal, nheads_k, setting.dtype)
        check(mesh, setting, method, True, 2, torch.bfloat16)
    check_refusals(mesh, setting)
    if world_size == 2:
        check_dtensors(mesh, setting)
    check_torchs_own(mesh, setting)
    dist.barrier()
    dist.destroy_process_group()


def main():
    first, *others = map(int, sys.argv[1].split(","))
    arguments = int(sys.argv[2]), sys.argv[3], SETTINGS[sys.argv[4]]
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork") if others else None
    processes = [fork.Process(target=run, args=(rank, *arguments), daemon=True) for rank in others]
    for process in processes:
        process.start()
    run(first, *arguments)
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))


if __name__ == "__main__":
    main()
