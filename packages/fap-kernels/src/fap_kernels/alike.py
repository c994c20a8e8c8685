"""Recognise at once that a call's tensors are like those of an earlier call.

To read from Python what there is to know of a tensor takes a microsecond and more. What compiled graphs check
their tensors with does it in one call of C++; it belongs to PyTorch's compiler, and may not be there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["PLAIN", "Alike"]

_ALIGNMENT = 16
PLAIN = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))
"""Classes of which a tensor, or what stands for none, is nothing but that."""


class Alike:
    """Whether tensors agree with earlier ones in everything but address and values.

    That is: which of them are there, class, dtype, device, shape, strides, ``requires_grad``, and what the
    dispatcher would do for them in this thread, such as under ``torch.inference_mode()``. All begin at
    multiples of 16 bytes. A False may be wrong, a True is not.
    """

    __slots__ = ("_guards", "_types")

    def __init__(self, tensors: Sequence[torch.Tensor | None]) -> None:
        """Remember tensors, and keep none alive. Unless they are plain ones, nothing is like them."""
        self._types = tuple(map(type, tensors))
        self._guards: Callable[..., bool] | None = None
        if not PLAIN.issuperset(self._types):
            return
        present = [x for x in tensors if x is not None]
        try:
            plain = not any(x.is_nested or x.data_ptr() % _ALIGNMENT for x in present)
        except RuntimeError:  # Sparse tensors and those that a transform wraps have no address.
            return
        guards: Any = getattr(getattr(torch._C, "_dynamo", None), "guards", None)
        if plain and hasattr(guards, "TensorGuards"):
            no_sizes_left_open = {"dynamic_dims_sizes": None, "dynamic_dims_strides": None}
            self._guards = guards.TensorGuards(*present, **no_sizes_left_open).check

    def match(self, tensors: Sequence[torch.Tensor | None]) -> bool:
        """Tell whether these are like the remembered ones."""
        if self._guards is None or tuple(map(type, tensors)) != self._types:
            return False
        present = [x for x in tensors if x is not None]
        try:
            for x in present:
                # Sizes of a nested tensor are an error, which the C++ does not survive.
                if x.is_nested or x.data_ptr() % _ALIGNMENT:
                    return False
        except RuntimeError:  # as in __init__
            return False
        return self._guards(*present)
