"""Run a described problem: allocate, plan, launch. The public functions differ only in what they accept."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .first_call import run_all
from .support import require_supported

if TYPE_CHECKING:
    from .cache import Cache
    from .packing import Packing
    from .problem import AttentionProblem
    from .replay import Keep

__all__ = [
    "append",
    "backward",
    "cached_forward",
    "check_like",
    "check_rng_state",
    "check_vector",
    "forward",
    "probabilities",
    "unit_last_stride",
]


def forward(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    rng_state: torch.Tensor | None,
    packing: Packing | None = None,
    keep: Keep | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return out, softmax_lse and rng_state. Packed tensors come, and go, as one batch entry."""
    require_supported(problem)
    from .schedule import plan_forward_by_schedule

    rng_state = check_rng_state(problem, rng_state, draw=True)
    q, k, v = unit_last_stride(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    softmax_lse = torch.empty(_vector_shape(q), dtype=torch.float32, device=q.device)
    if packing is not None and packing.seqused_q is not None:
        # No program writes the rows that do not count.
        out.zero_()
        softmax_lse.fill_(torch.inf)
    launches, workspaces = plan_forward_by_schedule(
        problem, q, k, v, out, softmax_lse, alibi_slopes, rng_state, packing
    )
    compiled = run_all(launches, q.device)
    if keep is not None:
        made = {"out": out, "lse": softmax_lse}
        if packing is not None:
            # Made as they are returned, a repeated call's need no view.
            made = {name: x[0] for name, x in made.items()}
        keep(list(zip(launches, compiled, strict=True)), made | workspaces)
    return out, softmax_lse, rng_state


def backward(
    problem: AttentionProblem,
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dlse: torch.Tensor | None,
    alibi_slopes: torch.Tensor | None,
    rng_state: torch.Tensor | None,
    packing: Packing | None = None,
    keep: Keep | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dq, dk and dv. Packed tensors come, and go, as one batch entry."""
    require_supported(problem)
    from .backward.config import padded_rows
    from .backward.launch import BackwardInputs
    from .schedule import plan_backward_by_schedule

    rng_state = check_rng_state(problem, rng_state, draw=False)
    q, k, v, out, dout = unit_last_stride(q, k, v, out, dout)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if packing is not None:
        # No program writes the rows that do not count.
        if packing.seqused_q is not None:
            dq.zero_()
        if packing.seqused_k is not None:
            dk.zero_()
            dv.zero_()
    rows = padded_rows(q.shape[1], problem.batch if problem.packed else 0)
    shape = (q.shape[0], problem.nheads, rows)
    lse, delta = (torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2))
    inputs = BackwardInputs(q, k, v, dout, lse, delta, alibi_slopes, rng_state, packing)
    dlse = None if dlse is None else dlse.contiguous()
    launches, workspaces = plan_backward_by_schedule(
        problem, inputs, out, softmax_lse.contiguous(), dlse, dq, dk, dv
    )
    compiled = run_all(launches, q.device)
    if keep is not None:
        made = {"dq": dq, "dk": dk, "dv": dv, "lse": lse, "delta": delta, **workspaces}
        keep(list(zip(launches, compiled, strict=True)), made)
    return dq, dk, dv


def probabilities(
    problem: AttentionProblem,
    q: torch.Tensor,
    k: torch.Tensor,
    softmax_lse: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    rng_state: torch.Tensor | None,
    packing: Packing | None = None,
) -> torch.Tensor:
    """Return the attention weights. Packed tensors come as one batch entry."""
    require_supported(problem)
    from .forward.launch import PROBABILITY_TILE, plan_probabilities

    rng_state = check_rng_state(problem, rng_state, draw=False)
    q, k = unit_last_stride(q, k)
    rows, columns = (
        -(-n // PROBABILITY_TILE) * PROBABILITY_TILE for n in (problem.seqlen_q, problem.seqlen_k)
    )
    weights = torch.empty((problem.batch, problem.nheads, rows, columns), dtype=q.dtype, device=q.device)
    plan_probabilities(
        problem, q, k, softmax_lse.contiguous(), weights, alibi_slopes, rng_state, packing
    ).run(q.device)
    return weights


def cached_forward(
    problem: AttentionProblem,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    alibi_slopes: torch.Tensor | None,
    cache: Cache,
    num_splits: int,
    keep: Keep | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return out and softmax_lse of attention to a cache; ``num_splits`` 0 chooses."""
    require_supported(problem)
    from .decode.launch import few_queries, plan_decode
    from .forward.launch import plan_forward
    from .target import processors_of, target_of

    (q,) = unit_last_stride(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    softmax_lse = torch.empty(_vector_shape(q), dtype=torch.float32, device=q.device)
    target = target_of(q.device)
    tensors = (q, k_cache, v_cache, out, softmax_lse, alibi_slopes)
    if few_queries(problem):
        launches = plan_decode(problem, target, processors_of(q.device), *tensors, cache, num_splits)
    else:
        launches = [plan_forward(problem, target, *tensors, None, cache=cache)]
    compiled = run_all(launches, q.device)
    if keep is not None:
        made = {"out": out, "lse": softmax_lse}
        if few_queries(problem):
            # One share alone is the result itself.
            shares = {name: launches[0].arguments[name] for name in ("share_out", "share_lse")}
            made = made | shares if len(launches) > 1 else dict(zip(shares, made.values(), strict=True))
        keep(list(zip(launches, compiled, strict=True)), made)
    return out, softmax_lse


def append(
    problem: AttentionProblem,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: Cache,
    angles: tuple[torch.Tensor, torch.Tensor] | None,
    interleaved: bool,
    keep: Keep | None = None,
) -> None:
    """Write k, rotated by ``angles``, and v into the cache."""
    require_supported(problem)
    from .decode.launch import plan_append

    k, v = unit_last_stride(k, v)
    launch = plan_append(k_cache, v_cache, k, v, cache, angles, interleaved)
    compiled = launch.run(k.device)
    if keep is not None:
        keep([(launch, compiled)], {})


def unit_last_stride(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors, those whose last stride is not 1 copied."""
    return tuple(x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors)


def check_rng_state(
    problem: AttentionProblem, rng_state: torch.Tensor | None, *, draw: bool
) -> torch.Tensor | None:
    """The state of the dropout mask, None without dropout; where it is missing, drawn or refused."""
    if problem.dropout_p == 0.0:
        return None
    if rng_state is None:
        if not draw:
            raise ValueError("rng_state must be what the forward pass returned when dropout_p > 0, got None")
        # Drawn on the device: no synchronisation, new numbers on every replay of a CUDA graph, and
        # torch.manual_seed decides them.
        return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=problem.device)
    if tuple(rng_state.shape) != (2,) or rng_state.dtype != torch.int64 or rng_state.device != problem.device:
        raise RuntimeError(
            f"rng_state must be an int64 tensor of shape (2,) on {problem.device}, "
            f"got {rng_state.dtype} of shape {tuple(rng_state.shape)} on {rng_state.device}"
        )
    return rng_state.contiguous()


def check_like(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    """Raise a RuntimeError unless ``x`` has q's shape, dtype and device."""
    if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
        raise RuntimeError(
            f"{name} must have q's shape {tuple(q.shape)}, dtype {q.dtype} and device {q.device}, "
            f"got {tuple(x.shape)}, {x.dtype} and {x.device}"
        )


def check_vector(name: str, x: torch.Tensor, shape: tuple[int, ...], names: str, q: torch.Tensor) -> None:
    """Raise a RuntimeError unless ``x`` is float32 of ``shape``, whose sides are called ``names``."""
    if tuple(x.shape) != shape or x.dtype != torch.float32 or x.device != q.device:
        raise RuntimeError(
            f"{name} must be float32 of shape {names} = {shape} on {q.device}, "
            f"got {x.dtype} of shape {tuple(x.shape)} on {x.device}"
        )


def _vector_shape(q: torch.Tensor) -> tuple[int, int, int]:
    return q.shape[0], q.shape[2], q.shape[1]
