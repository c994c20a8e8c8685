"""FlashAttention-Plus's kernels alone, without autograd: by their own choice, and one family at a time."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar

from fap_testing.bench.peers import _schedules
from fap_testing.bench.peers.base import EVERY_DTYPE, KernelCalls, Peer
from fap_testing.bench.varlen import Varlen

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from fap_testing.bench.decode import Decode
    from fap_testing.bench.peers.base import Calls, Gradients
    from fap_testing.bench.prefill import Prefill
    from fap_testing.bench.problem import Direction, Problem, Tensors

__all__ = [
    "FapDense",
    "FapHopper",
    "FapHopperDense",
    "FapKernels",
    "FapTriton",
    "mask_options",
    "packing_of",
    "tile_sizes",
]


class FapKernels(Peer):
    """fap_kernels's functions as they choose their schedules: what a call costs below fap_api."""

    name = "fap-kernels"
    ours = True
    kinds: ClassVar[tuple[str, ...]] = ("prefill", "varlen", "decode")
    distribution = "fap-kernels"
    module = "fap_kernels"
    install = "pip install fap-kernels"
    dtypes = EVERY_DTYPE
    directions = ("fwd", "bwd", "both")
    commands: ClassVar[tuple[str, ...]] = ("overhead",)
    compiles = True
    family: ClassVar[str] = ""

    def configuration(self, problem: Problem, tensors: Tensors, direction: Direction) -> str | None:
        """Return the rows that the configuration tables hold for the call."""
        return tile_sizes(problem, tensors, direction, self.family)

    def prefill(self, problem: Prefill, tensors: Tensors) -> Calls:
        """Return calls of attention_forward and attention_backward."""
        kernels = importlib.import_module(self.module)
        q, k, v, dout = tensors[:4]
        options = mask_options(problem)

        def forward() -> tuple[Any, ...]:
            return tuple(kernels.attention_forward(q, k, v, **options))

        def backward(saved: tuple[Any, ...]) -> Gradients:
            dq, dk, dv = kernels.attention_backward(dout, q, k, v, saved[0], saved[1], **options)
            return dq, dk, dv

        return KernelCalls(forward, backward)

    def varlen(self, problem: Varlen, tensors: Tensors) -> Calls:
        """Return calls of attention_varlen_forward and attention_varlen_backward."""
        kernels = importlib.import_module(self.module)
        q, k, v, dout = tensors[:4]
        lengths = packing_of(problem, tensors)
        options = mask_options(problem)

        def forward() -> tuple[Any, ...]:
            return tuple(kernels.attention_varlen_forward(q, k, v, *lengths, **options))

        def backward(saved: tuple[Any, ...]) -> Gradients:
            out, lse = saved[:2]
            dq, dk, dv = kernels.attention_varlen_backward(dout, q, k, v, out, lse, *lengths, **options)
            return dq, dk, dv

        return KernelCalls(forward, backward)

    def decode(self, problem: Decode, tensors: Tensors) -> Calls:
        """Return calls of attention_kvcache_forward."""
        attention = importlib.import_module(self.module).attention_kvcache_forward
        q, k, v = tensors[:3]
        options = {**mask_options(problem), "block_table": tensors.block_table}
        return KernelCalls(lambda: tuple(attention(q, k, v, tensors.cache_seqlens, **options)))


class FapTriton(FapKernels):
    """The portable Triton kernels, whatever fap_kernels itself would choose."""

    name = "fap-triton"
    family = "portable"
    commands: ClassVar[tuple[str, ...]] = ("prefill", "varlen", "decode", "memory")

    def absent(self, device: str, kind: str) -> str | None:
        """Return why there are no such kernels here."""
        return super().absent(device, kind) or _schedules.missing(self.family)

    def unsupported_reasons(self, problem: Problem, direction: Direction) -> list[str]:
        """Return what this family hands back."""
        reasons = super().unsupported_reasons(problem, direction)
        return reasons + _schedules.reasons_against(self.family, problem, direction)

    def scope(self) -> AbstractContextManager[Any]:
        """Hold fap_kernels to this family."""
        return _schedules.held_to(self.family)


class FapHopper(FapTriton):
    """The Gluon kernels for sm_90 alone; what they would hand back is not measured."""

    name = "fap-hopper"
    family = "hopper"
    kinds: ClassVar[tuple[str, ...]] = ("prefill", "varlen")


class FapDense(FapTriton):
    """The portable dense kernels on packed sequences of one length: what packing costs shows beside them."""

    name = "fap-dense"
    kinds = ("varlen",)
    commands: ClassVar[tuple[str, ...]] = ("varlen",)

    def unsupported_reasons(self, problem: Problem, direction: Direction) -> list[str]:
        """Return what has no dense equal."""
        reasons = super().unsupported_reasons(problem, direction)
        if isinstance(problem, Varlen) and not problem.equal:
            reasons.append("it takes sequences of one length")
        return reasons

    def varlen(self, problem: Varlen, tensors: Tensors) -> Calls:
        """Return calls of attention_forward and attention_backward on a batch of the same rows."""
        kernels = importlib.import_module(self.module)
        q, k, v, dout = (x.unflatten(0, (problem.batch, -1)) for x in tensors[:4])
        options = mask_options(problem)

        def forward() -> tuple[Any, ...]:
            out, lse, _ = kernels.attention_forward(q, k, v, **options)
            return out.flatten(0, 1), lse

        def backward(saved: tuple[Any, ...]) -> Gradients:
            out, lse = saved[0].view(q.shape), saved[1]
            dq, dk, dv = kernels.attention_backward(dout, q, k, v, out, lse, **options)
            return dq.flatten(0, 1), dk.flatten(0, 1), dv.flatten(0, 1)

        return KernelCalls(forward, backward)


class FapHopperDense(FapDense):
    """The Gluon kernels on a batch of the same rows as packed sequences of one length."""

    name = "fap-hopper-dense"
    family = "hopper"


def mask_options(problem: Problem) -> dict[str, Any]:
    """Return the options by which flash-attn's functions, and ours, are told of the mask."""
    return {"causal": problem.causal, "window_size": problem.window_size}


def packing_of(problem: Varlen, tensors: Tensors) -> tuple[Any, ...]:
    """Return the arguments by which packed functions are told of the lengths."""
    longest = max(problem.lengths)
    return tensors.cu_seqlens, tensors.cu_seqlens, longest, longest


def tile_sizes(problem: Problem, tensors: Tensors, direction: Direction, family: str = "") -> str | None:
    """Return which rows of the kernels' tables a call on a GPU takes; None where it is on a CPU.

    Args:
        problem, tensors, direction: the call.
        family: the one that it is held to, or "" for fap_kernels's own choice.
    """
    if problem.device != "cuda":
        return None
    if problem.kind == "decode":
        return _decode_sizes(problem, tensors)
    described = _described(problem, tensors)
    choose = importlib.import_module("fap_kernels.config").choose
    target = importlib.import_module("fap_kernels.target").target_of(tensors.q.device)
    backward = importlib.import_module("fap_kernels.backward.config")
    told: list[str] = []
    tables: dict[str, Any] = {}
    if direction != "bwd":
        hopper = _schedules.hopper_configuration(problem, "forward", family)
        told += [f"forward {hopper}"] if hopper else []
        if not hopper:
            tables["forward"] = importlib.import_module("fap_kernels.forward.config").FORWARD
    if direction in ("bwd", "both"):
        hopper = _schedules.hopper_configuration(problem, "backward", family)
        told += [f"backward {hopper}"] if hopper else []
        if not hopper:
            tables |= {"dkdv": backward.DKDV, "dq": backward.DQ}
    for name, table in tables.items():
        c = choose(table, described, target)
        told.append(f"{name} {c.block_m}x{c.block_n} warps {c.num_warps} stages {c.num_stages}")
    return ", ".join(told)


def _described(problem: Problem, tensors: Tensors, **where: Any) -> Any:
    """Return the call as fap_kernels's own description."""
    if isinstance(problem, Varlen):
        packing = importlib.import_module("fap_kernels.packing").Packing
        where["packing"] = packing.describe(tensors.q, tensors.k, *packing_of(problem, tensors))
    kernels = importlib.import_module("fap_kernels")
    return kernels.AttentionProblem.describe(*tensors[:3], **where, **mask_options(problem))


def _decode_sizes(problem: Problem, tensors: Tensors) -> str:
    """Return tile sizes and splits of the launch that a call on a cache plans."""
    target = importlib.import_module("fap_kernels.target")
    launch = importlib.import_module("fap_kernels.decode.launch")
    describe = importlib.import_module("fap_kernels.cache").Cache.describe
    q, k, v = tensors[:3]
    cache = describe(q, k, tensors.cache_seqlens, block_table=tensors.block_table)
    described = _described(problem, tensors, cache=cache)
    if not launch.few_queries(described):
        return "forward over the cache, keys not split"
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1])
    chip = target.target_of(q.device), target.processors_of(q.device)
    sweep, *_ = launch.plan_decode(described, *chip, q, k, v, out, lse, None, cache)
    a = sweep.arguments
    tiles = f"{a['BLOCK_M']}x{a['BLOCK_N']} warps {sweep.num_warps} stages {a['STAGES']}"
    return f"decode {tiles} splits {a['splits']}"
