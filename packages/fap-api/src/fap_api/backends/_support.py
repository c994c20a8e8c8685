"""Small things that several back ends need."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

__all__ = ["constant_in_graphs", "padded_head_dim", "unit_last_stride"]

_Function = TypeVar("_Function", bound="Callable[..., object]")


def unit_last_stride(x: torch.Tensor) -> torch.Tensor:
    """Return ``x``, copied if its last stride is not 1."""
    return x if x.stride(-1) == 1 else x.contiguous()


def padded_head_dim(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Return ``x`` with a unit last stride and its last dimension filled up with zeros to ``head_dim``."""
    missing = head_dim - x.shape[-1]
    if missing == 0:
        return unit_last_stride(x)
    from torch.nn.functional import pad

    return pad(x, (0, missing))


def constant_in_graphs(function: _Function) -> _Function:
    """Have torch.compile call ``function`` while tracing and keep the result.

    What torch.compiler.assume_constant_result does, without importing the compiler when fap_api is imported.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
