"""The back ends by name, in the order in which they are explained."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fap_api.backends.cuda import CudaBackend
from fap_api.backends.flag_gems import FlagGemsBackend
from fap_api.backends.torch_ import TorchBackend
from fap_api.backends.triton import TritonBackend

if TYPE_CHECKING:
    from fap_api.backends.base import Backend

__all__ = ["BACKENDS", "get_backend"]

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (TritonBackend(), FlagGemsBackend(), CudaBackend(), TorchBackend())
}


def get_backend(name: str) -> Backend:
    """Return the back end called ``name``.

    Raises:
        ValueError: there is none of that name.
    """
    try:
        return BACKENDS[name]
    except KeyError:
        accepted = ", ".join(repr(known) for known in BACKENDS)
        raise ValueError(f"backend must be one of {accepted}, got {name!r}") from None
