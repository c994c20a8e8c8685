"""Whether PyTorch's dispatcher has anything to do for a call.

The operators are there for torch.compile, for autograd, and for all that looks on as a program runs:
profiles, FLOP counters, selective checkpoints, tensor subclasses. To go through one takes as much host time
as all else of a repeated call. Where none of these is at work, the function behind it is called directly.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.autograd.forward_ad as forward_ad

from fap_kernels.alike import PLAIN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["call", "call_backward", "unobserved"]


def call(
    operator: Callable[..., Any],
    function: Callable[..., Any],
    tensors: Sequence[torch.Tensor | None],
    arguments: Sequence[Any],
) -> Any:
    """Return ``operator(*arguments)`` for a call that records no gradient, by the shortest way.

    Args:
        operator: an operator.
        function: what it runs.
        tensors: every tensor among the arguments.
        arguments: those of both.
    """
    # Autograd would find nothing to record in the operator, and too much in the steps of a back end.
    with torch._C._AutoDispatchBelowAutograd():
        return (function if unobserved(tensors) else operator)(*arguments)


def call_backward(
    operator: Callable[..., Any],
    function: Callable[..., Any],
    tensors: Sequence[torch.Tensor | None],
    arguments: Sequence[Any],
) -> Any:
    """Return ``operator(*arguments)`` within a backward pass, by the shortest way.

    What is compiled, and what is to be differentiated once more, which the operator refuses, goes through it.
    """
    if not torch.compiler.is_compiling() and not torch.is_grad_enabled() and unobserved(tensors):
        return function(*arguments)
    return operator(*arguments)


def unobserved(tensors: Sequence[torch.Tensor | None]) -> bool:
    """Tell whether these are plain tensors, with values in memory, in a thread in which nothing looks on.

    What observes a whole process from outside, without a profiler in this thread, sees kernels alone.
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or not PLAIN.issuperset(map(type, tensors))
    ):
        return False
    for x in tensors:  # noqa: SIM110 - a generator takes longer
        # A negative view, the imaginary part of a conjugate, is negated by the dispatcher.
        if x is not None and (x.is_neg() or not (x.is_cuda or x.is_cpu)):
            return False
    return True
