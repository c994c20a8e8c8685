"""Which chip kernels are made for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

__all__ = ["Target", "interpreting", "processors_of", "target_of"]


@dataclass(frozen=True, slots=True)
class Target:
    """What the configuration tables and launches need to know of a chip.

    Attributes:
        family: ``sm_80`` (Ampere and Ada, consumer Blackwell), ``sm_90`` (Hopper), ``sm_100`` (data-centre
            Blackwell), ``gfx9`` (AMD CDNA) or ``interpreter``.
        shared_memory: bytes that a program of any chip of the family may use; the tables are tested to stay
            below it.
        descriptors: whether the chip fetches tiles by descriptor (TMA).
        overlap: whether a kernel may be launched before the one whose results it waits for has ended
            (programmatic dependent launch).
    """

    family: str
    shared_memory: int
    descriptors: bool
    overlap: bool = False


# A100 has 163 KB; the rest of its family (sm_86, sm_89, sm_120) has 99 KB, and one table serves them all.
SM_80 = Target("sm_80", 99 * 1024, descriptors=False)
SM_90 = Target("sm_90", 227 * 1024, descriptors=True, overlap=True)
SM_100 = Target("sm_100", 227 * 1024, descriptors=True, overlap=True)
GFX9 = Target("gfx9", 64 * 1024, descriptors=False)
INTERPRETER = Target("interpreter", 1 << 30, descriptors=False)


def target_of(device: torch.device) -> Target:
    """The target that ``device``'s kernels are compiled for; the interpreter where it is active."""
    if interpreting():
        return INTERPRETER
    return _target_of_index(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _target_of_index(index: int) -> Target:
    if torch.version.hip is not None:
        return GFX9
    capability = torch.cuda.get_device_capability(index)
    if capability[0] == 9:
        return SM_90
    if capability[0] in (10, 11):
        return SM_100
    return SM_80


def processors_of(device: torch.device) -> int:
    """How many multiprocessors run ``device``'s programs."""
    if interpreting():
        return 8  # so that short sequences are split
    return _processors_of_index(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _processors_of_index(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


@cache
def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels: TRITON_INTERPRET=1 was set before they were imported."""
    from triton.runtime.jit import JITFunction

    from .forward.kernel import attention_forward_kernel

    return not isinstance(attention_forward_kernel, JITFunction)
