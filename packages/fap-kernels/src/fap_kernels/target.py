"""Which chip kernels are made for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

__all__ = ["Target", "interpreting", "target_of"]


@dataclass(frozen=True, slots=True)
class Target:
    """What the configuration tables and launches need to know of a chip.

    Attributes:
        family: ``sm_80`` (Ampere and Ada, consumer Blackwell), ``sm_90`` (Hopper), ``sm_100`` (data-centre
            Blackwell), ``gfx9`` (AMD CDNA) or ``interpreter``.
        shared_memory: bytes of shared memory one program may use.
        descriptors: whether the chip fetches tiles by descriptor (TMA).
    """

    family: str
    shared_memory: int
    descriptors: bool


SM_80 = Target("sm_80", 163 * 1024, descriptors=False)
SM_86 = Target("sm_80", 99 * 1024, descriptors=False)
SM_90 = Target("sm_90", 227 * 1024, descriptors=True)
SM_100 = Target("sm_100", 227 * 1024, descriptors=True)
GFX9 = Target("gfx9", 64 * 1024, descriptors=False)
INTERPRETER = Target("interpreter", 1 << 30, descriptors=False)


def target_of(device: torch.device) -> Target:
    """The target that ``device``'s kernels are compiled for; the interpreter where it is active."""
    if interpreting():
        return INTERPRETER
    return _target_of_index(torch.cuda.current_device() if device.index is None else device.index)


@lru_cache(maxsize=None)
def _target_of_index(index: int) -> Target:
    if torch.version.hip is not None:
        return GFX9
    capability = torch.cuda.get_device_capability(index)
    if capability[0] == 9:
        return SM_90
    if capability[0] == 10:
        return SM_100
    return SM_80 if capability in {(8, 0), (8, 7)} else SM_86


@lru_cache(maxsize=None)
def interpreting() -> bool:
    """Whether Triton's interpreter runs this package's kernels: TRITON_INTERPRET=1 before they were imported."""
    from triton.runtime.jit import JITFunction

    from .forward.kernel import attention_forward_kernel

    return not isinstance(attention_forward_kernel, JITFunction)
