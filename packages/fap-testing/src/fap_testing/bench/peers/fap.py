"""FlashAttention-Plus as users call it: fap_api's functions, fap_nn's module. Inputs as they come."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, ClassVar

from fap_testing.bench.peers.base import EVERY_DTYPE, AutogradCalls, KernelCalls, Peer, first_of, import_error
from fap_testing.bench.peers.fap_kernels import mask_options, packing_of, tile_sizes
from fap_testing.bench.varlen import Varlen

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    import torch
    from typing_extensions import Self

    from fap_testing.bench.decode import Decode
    from fap_testing.bench.peers.base import Calls
    from fap_testing.bench.prefill import Prefill
    from fap_testing.bench.problem import Direction, Problem, Tensors

__all__ = ["FapApi", "FapModule"]


class FapApi(Peer):
    """fap_api's functions, on one back end.

    Args:
        backend: a name of ``fap_api.available_backends()``, or "auto" for fap_api's own choice.
    """

    name = "fap"
    ours = True
    kinds: ClassVar[tuple[str, ...]] = ("prefill", "varlen", "decode")
    distribution = "fap-api"
    module = "fap_api"
    install = "pip install fap-api"
    devices = ("cuda", "cpu")
    dtypes = EVERY_DTYPE
    compiles = True
    functions: ClassVar[dict[str, str]] = {
        "prefill": "flash_attn_func",
        "varlen": "flash_attn_varlen_func",
        "decode": "flash_attn_with_kvcache",
    }

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend
        self.name = f"{type(self).name}:{backend}"

    @classmethod
    def variants(cls, backends: Sequence[str]) -> list[Self]:
        """Return one for each back end."""
        return [cls(backend) for backend in backends]

    def absent(self, device: str, kind: str) -> str | None:
        """Return why the package, the function or the back end is not to be had on this machine."""
        missing = super().absent(device, kind)
        if missing is not None:
            return missing
        api = importlib.import_module("fap_api")
        if not hasattr(api, self.functions[kind]):
            return f"fap_api here has no {self.functions[kind]}"
        available = tuple(api.available_backends())
        if self.backend == "auto" or self.backend in available:
            return None
        return f"fap_api's back ends here are {', '.join(available)}, got {self.backend!r}"

    def configuration(self, problem: Problem, tensors: Tensors, direction: Direction) -> str | None:
        """Return the back end that the call takes, and the tile sizes where that is Triton."""
        api = importlib.import_module("fap_api")
        inputs = (tensors.q.detach().requires_grad_(direction != "fwd"), *tensors[1:3])
        options = mask_options(problem)
        if isinstance(problem, Varlen):
            explained = api.explain_varlen(*inputs, *packing_of(problem, tensors), **options)
        elif problem.kind == "decode":
            cache = {"cache_seqlens": tensors.cache_seqlens, "block_table": tensors.block_table}
            explained = api.explain_with_kvcache(*inputs, **cache, **options)
        else:
            explained = api.explain(*inputs, **options)
        tiles = tile_sizes(problem, tensors, direction) if explained.backend == "triton" else None
        return f"{explained.backend}: {tiles}" if tiles else f"{explained.backend}"

    def scope(self) -> AbstractContextManager[Any]:
        """Choose the back end."""
        chosen: AbstractContextManager[Any] = importlib.import_module("fap_api").use_backend(
            None if self.backend == "auto" else self.backend
        )
        return chosen

    def prefill(self, problem: Prefill, tensors: Tensors) -> Calls:
        """Return calls of flash_attn_func."""
        attention = importlib.import_module("fap_api").flash_attn_func
        options = mask_options(problem)
        return AutogradCalls(lambda q, k, v: first_of(attention(q, k, v, **options)), tensors)

    def varlen(self, problem: Varlen, tensors: Tensors) -> Calls:
        """Return calls of flash_attn_varlen_func."""
        attention = importlib.import_module("fap_api").flash_attn_varlen_func
        lengths, options = packing_of(problem, tensors), mask_options(problem)
        return AutogradCalls(lambda q, k, v: first_of(attention(q, k, v, *lengths, **options)), tensors)

    def decode(self, problem: Decode, tensors: Tensors) -> Calls:
        """Return calls of flash_attn_with_kvcache."""
        attention = importlib.import_module("fap_api").flash_attn_with_kvcache
        options = {**mask_options(problem), "block_table": tensors.block_table}
        lengths = tensors.cache_seqlens
        return KernelCalls(lambda: (first_of(attention(*tensors[:3], cache_seqlens=lengths, **options)),))


class FapModule(FapApi):
    """fap_nn.FlashAttention, for what a module adds to a call on the host."""

    name = "fap-nn"
    kinds: ClassVar[tuple[str, ...]] = ("prefill",)
    distribution = "fap-nn"
    commands = ("overhead",)

    def absent(self, device: str, kind: str) -> str | None:
        """Return why fap-nn or the back end is not to be had on this machine."""
        return super().absent(device, kind) or import_error("fap_nn", "pip install fap-nn")

    def prefill(self, problem: Prefill, tensors: Tensors) -> Calls:
        """Return calls of the module."""
        module = importlib.import_module("fap_nn").FlashAttention(
            problem.nheads, problem.head_dim, **mask_options(problem)
        )

        def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = module(q, k, v)
            return out

        return AutogradCalls(function, tensors)
