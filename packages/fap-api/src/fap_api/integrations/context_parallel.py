"""Attention over sequences that several devices hold in parts: ``context_parallel_attention``.

Each device holds its part of every sequence. A late causal query sees more keys than an early one, so the
parts are cut for equal work: of 2n chunks, device r of n holds the r-th from the front and the r-th from the
back. :func:`shard_sequence` cuts that way whatever has a sequence dimension:

    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    ids, positions = shard_sequence(ids, mesh), shard_sequence(torch.arange(seqlen), mesh, dim=0)
    q, k, v = ...  # from this device's ids, rotated by its positions
    out = context_parallel_attention(q, k, v, mesh=mesh, method="ring", causal=True)

Two methods give the same result. "ring" passes keys and values around (Liu et al., "Ring Attention with
Blockwise Transformers", 2023), "ulysses" trades parts of the sequence for parts of the heads and back (Jacobs
et al., "DeepSpeed Ulysses", 2023).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from fap_api.integrations import _ring, _ulysses

__all__ = ["context_parallel_attention", "shard_sequence", "unshard_sequence"]

_METHODS = {"ring": _ring.attention, "ulysses": _ulysses.attention}


def context_parallel_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mesh: DeviceMesh,
    method: str = "ring",
    causal: bool = False,
    softmax_scale: float | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """Attend from this device's part of the queries to the whole of the keys, with gradients.

    Every device of the mesh calls this with parts of the same size, cut by :func:`shard_sequence`; without
    ``causal``, any equal parts will do.

    Args:
        q: ``(batch, seqlen / n, nheads, headdim)``.
        k, v: ``(batch, seqlen / n, nheads_k, headdim)``; nheads_k divides nheads.
        mesh: one-dimensional, of n devices.
        method: "ring" works with any heads. "ulysses" needs n to divide nheads, and nheads_k to be divisible
            by n or to divide it.
        causal: hide later keys; as one device would with the whole sequence.
        softmax_scale, deterministic: as for :func:`fap_api.flash_attn_func`.

    Returns:
        ``(batch, seqlen / n, nheads, headdim)`` in q's dtype: this device's part of the output. Partial
        results are merged in float32 by their log-sum-exp.

    Raises:
        ValueError: an unknown method; a mesh of several dimensions; parts or heads that cannot be divided so.
        TypeError: mesh is no DeviceMesh.
        RuntimeError: as for :func:`fap_api.flash_attn_func`.
    """
    if method not in _METHODS:
        raise ValueError(f"method must be 'ring' or 'ulysses', got {method!r}")
    group = _group(mesh)
    if causal and q.shape[1] % 2 and group.size() > 1:
        raise ValueError(
            f"q must be two chunks of equal length, as shard_sequence cuts them, where causal is True, got "
            f"{q.shape[1]} tokens"
        )
    if not q.shape[1] == k.shape[1] == v.shape[1]:
        raise ValueError(
            f"q, k and v must be parts of the same sequence, got {q.shape[1]}, {k.shape[1]} and {v.shape[1]} "
            "tokens"
        )
    q, k, v = _autocast(q, k, v)
    return _METHODS[method](q, k, v, group, causal, softmax_scale, deterministic)


def shard_sequence(x: torch.Tensor, mesh: DeviceMesh, dim: int = 1) -> torch.Tensor:
    """Return this device's part of ``x``: of 2n chunks along ``dim``, the r-th from either end.

    Raises:
        ValueError: the length is no multiple of 2n; a mesh of several dimensions.
        TypeError: mesh is no DeviceMesh.
    """
    group = _group(mesh)
    n, r = group.size(), group.rank()
    if x.shape[dim] % (2 * n):
        raise ValueError(
            f"x must have a multiple of {2 * n} tokens (twice the mesh's devices) along dim {dim}, got "
            f"{x.shape[dim]}"
        )
    chunks = x.chunk(2 * n, dim)
    return torch.cat((chunks[r], chunks[2 * n - 1 - r]), dim)


def unshard_sequence(x: torch.Tensor, mesh: DeviceMesh, dim: int = 1) -> torch.Tensor:
    """Gather what :func:`shard_sequence` cut, on every device; no gradient passes."""
    group = _group(mesh)
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, x.detach().contiguous(), group=group)
    heads, tails = zip(*(part.chunk(2, dim) for part in parts), strict=True)
    return torch.cat((*heads, *reversed(tails)), dim)


def _group(mesh: DeviceMesh) -> dist.ProcessGroup:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            f"mesh must be a DeviceMesh, as init_device_mesh returns, got {type(mesh).__name__}; a process "
            "group becomes one by DeviceMesh.from_group"
        )
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, got {mesh.ndim}: {mesh}; accepted: a part of it, mesh['cp']"
        )
    return mesh.get_group()


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Cast before anything is sent, so that no device sends more than it must."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
