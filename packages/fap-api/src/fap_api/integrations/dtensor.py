"""Rules by which DTensor runs attention on shards: tensor- and data-parallel models need no wrapper.

    import fap_api.integrations.dtensor

    fap_api.integrations.dtensor.register()
    out = fap_api.flash_attn_func(q, k, v, causal=True)  # DTensors sharded alike, by batch or by heads

Without them DTensor raises for the operators of fap_api.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fap_api import _ops, _varlen_ops

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed.tensor.placement_types import Placement

__all__ = ["register", "unregister"]

_OPERATORS = (
    _ops.attention_forward,
    _ops.attention_backward,
    _varlen_ops.attention_varlen_forward,
    _varlen_ops.attention_varlen_backward,
)
# Arguments and results that are cut as q, k and v are, and those that are cut as the log-sum-exp.
_ROWS = ("q", "k", "v", "out", "dout", "dq", "dk", "dv")
_LSES = ("softmax_lse", "dlse")


def register() -> None:
    """Teach DTensor the forward and backward operators of dense and of packed attention.

    A call runs on shards where q, k and v are sharded alike: by batch (dense attention), or by heads if the
    number of the mesh's devices divides that of the key heads. Other placements are redistributed to one of
    these, or replicated. Dropout is refused, since each device would draw a mask of its own. Plain tensors
    are unaffected.

    Raises:
        RuntimeError: PyTorch was built without torch.distributed.
    """
    _check_torch()
    from torch.distributed.tensor.experimental import register_sharding

    for operator in _OPERATORS:
        register_sharding(operator)(_rule(operator))


def unregister() -> None:
    """Have DTensor raise for these operators again, as before :func:`register`.

    PyTorch has no function that takes rules back, so this takes them out of the private tables of DTensor.
    The decisions that it has cached are found by what is in the second table, and so no longer.

    Raises:
        RuntimeError: this PyTorch keeps rules elsewhere, or was built without torch.distributed.
    """
    _check_torch()
    from torch.distributed.tensor import DTensor

    try:
        rules = DTensor._op_dispatcher.sharding_propagator
        tables: tuple[dict[Any, Any], ...] = rules.op_strategy_funcs, rules.op_to_schema_info
    except AttributeError as error:
        raise RuntimeError(
            f"torch must keep DTensor's rules where torch 2.13 does, got torch {torch.__version__}: {error}"
        ) from error
    for table in tables:
        for operator in _OPERATORS:
            table.pop(operator, None)


def _check_torch() -> None:
    if not torch.distributed.is_available():
        raise RuntimeError("torch must be built with torch.distributed for DTensor, got a build without it")


def _rule(operator: Any) -> Callable[..., list[tuple[list[Placement | None], list[Placement | None]]]]:
    """Return the function that tells, for one call, how its results and its arguments may be placed."""
    names = [argument.name for argument in operator._schema.arguments]
    results = [result.name for result in operator._schema.returns]

    def rule(*arguments: Any) -> list[tuple[list[Placement | None], list[Placement | None]]]:
        call = dict(zip(names, arguments, strict=True))
        if call["dropout_p"]:
            raise RuntimeError(
                f"dropout_p must be 0.0 for DTensors, got {call['dropout_p']}: each device would draw a mask "
                "of its own"
            )
        return [
            (
                [_place(name, call, axis) for name in results],
                # Numbers, and tensors that are not given, have no place.
                [_place(name, call, axis) if hasattr(call[name], "shape") else None for name in names],
            )
            for axis in _axes(call)
        ]

    return rule


def _axes(call: dict[str, Any]) -> list[str | None]:
    """Return along what a call may be cut: None for not at all, "batch", "heads"."""
    axes: list[str | None] = [None]
    if "cu_seqlens_q" not in call:
        axes.append("batch")
    if call["k"].shape[-2] % call["k"].mesh.size() == 0:
        axes.append("heads")
    return axes


def _place(name: str, call: dict[str, Any], axis: str | None) -> Placement:
    from torch.distributed.tensor import Replicate, Shard

    if axis is None:
        return Replicate()
    packed, batch = "cu_seqlens_q" in call, axis == "batch"
    if name in _ROWS:
        # (b, s, h, d), packed (total, h, d), keys in pages (pages, page_size, h, d).
        rows = call.get(name, call["q"])
        return Shard(0 if batch else len(rows.shape) - 2)
    if name in _LSES:
        # (b, h, s), packed (h, total).
        return Shard(0 if batch or packed else 1)
    if name == "alibi_slopes":
        # (h,) or (b, h).
        per_batch = len(call[name].shape) == 2
        if batch:
            return Shard(0) if per_batch else Replicate()
        return Shard(1 if per_batch else 0)
    return Replicate()
