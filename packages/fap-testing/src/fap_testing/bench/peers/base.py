"""What a measured implementation of attention looks like to the bench."""

from __future__ import annotations

import importlib
import importlib.metadata
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from fap_testing.bench.decode import Decode
from fap_testing.bench.prefill import Prefill
from fap_testing.bench.varlen import Varlen

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

    from fap_testing.bench.problem import Direction, Problem, Tensors

__all__ = [
    "EVERY_DTYPE",
    "AutogradCalls",
    "Calls",
    "Gradients",
    "KernelCalls",
    "Peer",
    "first_of",
    "import_error",
]

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
EVERY_DTYPE = ("bf16", "fp16", "fp32")


class Calls(Protocol):
    """One prepared problem: calls without arguments, to be timed. Results have the shapes of q, k and v."""

    def forward(self) -> torch.Tensor:
        """Return out, without anything kept for a backward pass by autograd."""
        ...

    def recorded(self) -> torch.Tensor:
        """Return out with the graph that autograd records."""
        ...

    def backward(self) -> Gradients:
        """Return dq, dk and dv; the forward pass they need runs on the first call only."""
        ...

    def both(self) -> tuple[torch.Tensor, Gradients]:
        """Run a forward pass and its backward pass."""
        ...


class Peer:
    """One implementation of attention. A subclass names itself and says how it is called.

    It overrides some of :meth:`prefill`, :meth:`varlen` and :meth:`decode`, and names them in ``kinds``.

    Attributes:
        name: unique, what ``--peers`` takes.
        ours: whether it is a part of FlashAttention-Plus, and so what the others are compared with.
        kinds: the kinds of problem it runs, as in ``Problem.kind``.
        distribution: the installed distribution whose version is recorded, or "".
        module: what must be importable, or "".
        install: how to get the module.
        devices: the types of device it runs on.
        dtypes: what it takes, as in ``fap_testing.bench.problem.DTYPES``.
        directions: what it has.
        commands: the only subcommands that measure it without being asked to; empty for all.
        compiles: whether its first call of a kind takes seconds of compiling, which other processes can do
            beforehand for this one.
    """

    name: str
    ours: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("prefill",)
    distribution: ClassVar[str] = ""
    module: ClassVar[str] = ""
    install: ClassVar[str] = ""
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[str, ...]] = ("bf16", "fp16")
    directions: ClassVar[tuple[Direction, ...]] = ("fwd", "bwd", "both", "fwd+grad")
    commands: ClassVar[tuple[str, ...]] = ()
    compiles: ClassVar[bool] = False

    @classmethod
    def variants(cls, backends: Sequence[str]) -> list[Self]:  # noqa: ARG003 - for those that have some
        """Return what one name of ``--peers`` stands for: one peer, or one for each back end of fap_api."""
        return [cls()]

    def absent(self, device: str, kind: str) -> str | None:
        """Return why it cannot run such calls on this machine at all, or None. Imports what it needs."""
        if device not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, and this run is on {device}"
        if kind not in self.kinds:
            return f"it is measured for {', '.join(self.kinds)}, not for {kind}"
        return import_error(self.module, self.install) if self.module else None

    def unsupported_reasons(self, problem: Problem, direction: Direction) -> list[str]:
        """Return what it lacks for this call."""
        reasons = []
        if problem.dtype not in self.dtypes:
            reasons.append(f"it takes {', '.join(self.dtypes)}, got {problem.dtype}")
        if direction not in self.directions:
            lacking = "graph of its own" if direction == "fwd+grad" else "backward"
            reasons.append(f"it has no {lacking}")
        return reasons

    def version(self) -> str | None:
        """Return the version of what is measured, or None where nothing tells."""
        try:
            return importlib.metadata.version(self.distribution) if self.distribution else None
        except importlib.metadata.PackageNotFoundError:
            return None

    def configuration(self, problem: Problem, tensors: Tensors, direction: Direction) -> str | None:  # noqa: ARG002
        """Return how it would run this call, tile sizes and the like, or None where it does not say."""
        return None

    def scope(self) -> AbstractContextManager[Any]:
        """Return what every call must run inside of; entering it is not timed."""
        return nullcontext()

    def prepare(self, problem: Problem, tensors: Tensors) -> Calls:
        """Return the calls that are timed. Runs inside :meth:`scope`.

        Raises:
            TypeError: the problem is of a kind that nothing here knows.
        """
        if isinstance(problem, Prefill):
            return self.prefill(problem, tensors)
        if isinstance(problem, Varlen):
            return self.varlen(problem, tensors)
        if isinstance(problem, Decode):
            return self.decode(problem, tensors)
        raise TypeError(f"problem must be a Prefill, Varlen or Decode, got {type(problem).__name__}")

    def prefill(self, problem: Prefill, tensors: Tensors) -> Calls:
        """Return calls over a dense batch."""
        raise NotImplementedError(f"{type(self).__name__} runs {', '.join(self.kinds)}")

    def varlen(self, problem: Varlen, tensors: Tensors) -> Calls:
        """Return calls over packed sequences."""
        raise NotImplementedError(f"{type(self).__name__} runs {', '.join(self.kinds)}")

    def decode(self, problem: Decode, tensors: Tensors) -> Calls:
        """Return calls over a cache."""
        raise NotImplementedError(f"{type(self).__name__} runs {', '.join(self.kinds)}")


class AutogradCalls:
    """Calls of a differentiable function of q, k and v that returns out."""

    def __init__(
        self, function: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor], tensors: Tensors
    ) -> None:
        self._function = function
        self._inputs = (tensors.q, tensors.k, tensors.v)
        self._dout = tensors.dout
        q, k, v = (x.detach().requires_grad_() for x in self._inputs)
        self._leaves = (q, k, v)
        self._out: torch.Tensor | None = None

    def forward(self) -> torch.Tensor:
        """Return out, without a graph."""
        with torch.no_grad():
            return self._function(*self._inputs)

    def recorded(self) -> torch.Tensor:
        """Return out, with a graph."""
        return self._function(*self._leaves)

    def backward(self) -> Gradients:
        """Return the gradients through a graph that is kept."""
        if self._out is None:
            self._out = self._function(*self._leaves)
        dq, dk, dv = torch.autograd.grad(self._out, self._leaves, self._dout, retain_graph=True)
        return dq, dk, dv

    def both(self) -> tuple[torch.Tensor, Gradients]:
        """Build a graph and run it backwards."""
        out = self._function(*self._leaves)
        dq, dk, dv = torch.autograd.grad(out, self._leaves, self._dout)
        return out.detach(), (dq, dk, dv)


class KernelCalls:
    """Calls of a forward and a backward function without autograd around them.

    Args:
        forward: returns out first, and then whatever the backward pass wants.
        backward: takes what forward returned, and returns dq, dk and dv.
    """

    def __init__(
        self,
        forward: Callable[[], tuple[Any, ...]],
        backward: Callable[[tuple[Any, ...]], Gradients] | None = None,
    ) -> None:
        self._forward = forward
        self._backward = backward
        self._saved: tuple[Any, ...] | None = None

    def forward(self) -> torch.Tensor:
        """Return out."""
        out: torch.Tensor = self._forward()[0]
        return out

    def recorded(self) -> torch.Tensor:
        """Refuse: there is no graph."""
        raise NotImplementedError("these calls record no graph, accepted: directions fwd, bwd and both")

    def backward(self) -> Gradients:
        """Return the gradients from a forward pass that is kept."""
        if self._saved is None:
            self._saved = self._forward()
        return self._run_backward(self._saved)

    def both(self) -> tuple[torch.Tensor, Gradients]:
        """Run one after the other."""
        saved = self._forward()
        return saved[0], self._run_backward(saved)

    def _run_backward(self, saved: tuple[Any, ...]) -> Gradients:
        if self._backward is None:
            raise NotImplementedError("these calls have no backward, accepted: direction fwd")
        return self._backward(saved)


def first_of(result: Any) -> torch.Tensor:
    """Return out, from a function that in some releases returns the LSE beside it."""
    out: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return out


def import_error(module: str, install: str) -> str | None:
    """Import a module, and return why that failed and what to do, or None."""
    try:
        importlib.import_module(module)
    except Exception as error:  # noqa: BLE001 - a broken binary extension raises anything
        first = (str(error).strip().splitlines() or [""])[0]
        return f"importing {module} failed ({type(error).__name__}: {first}); {install}"
    return None
