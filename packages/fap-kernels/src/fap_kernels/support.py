"""What these kernels run, and what they do not: told before anything is launched."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from .installed import importable

if TYPE_CHECKING:
    from .problem import AttentionProblem

__all__ = ["require_supported", "require_supported_tensor", "tensor_reasons", "unsupported_reasons"]


# Their tanh of a small argument has the absolute error of float32 at 1, which the logits have times softcap.
LARGEST_SOFTCAP = 1000.0


def unsupported_reasons(problem: AttentionProblem) -> list[str]:
    """Every reason why the Triton kernels cannot run ``problem``; an empty list says that they can.

    Triton is imported only where the answer depends on it.
    """
    reasons = []
    if problem.paged and problem.needs_grad:
        reasons.append("keys and values in pages (block_table) have no gradients")
    if problem.softcap > LARGEST_SOFTCAP:
        reasons.append(
            f"softcap must be at most {LARGEST_SOFTCAP}, since its rounding error grows with it, "
            f"got {problem.softcap}"
        )
    return tensor_reasons(problem.dtype, problem.device) + reasons


def tensor_reasons(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Every reason why no kernel can run on tensors of ``dtype`` on ``device``."""
    reasons = []
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"dtype must be float16, bfloat16 or float32, got {dtype}")
    if not importable("triton"):
        return [*reasons, "Triton is not installed: pip install triton"]
    if device.type == "cuda":
        reasons += _device_reasons(device)
    elif device.type == "cpu" and _interpreter_requested():
        reasons += _interpreter_reasons(dtype)
    else:
        reasons.append(
            f"tensors must be on a CUDA or ROCm device, got {device} "
            "(on the CPU the kernels run in Triton's interpreter "
            "if TRITON_INTERPRET=1 is set before they are imported)"
        )
    return reasons


def require_supported(problem: AttentionProblem) -> None:
    """Raise a RuntimeError with every reason if the kernels cannot run ``problem``."""
    reasons = unsupported_reasons(problem)
    if reasons:
        raise RuntimeError("fap-kernels cannot run this call: " + "; ".join(reasons))


def require_supported_tensor(x: torch.Tensor) -> None:
    """Raise a RuntimeError with every reason if the kernels cannot run on ``x``, whatever they do with it."""
    reasons = tensor_reasons(x.dtype, x.device)
    if reasons:
        raise RuntimeError("fap-kernels cannot run this call: " + "; ".join(reasons))


def _device_reasons(device: torch.device) -> list[str]:
    if torch.version.hip is not None:
        return []
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return []
    return [f"NVIDIA GPUs must have compute capability 8.0 or higher, got {capability[0]}.{capability[1]}"]


def _interpreter_requested() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "on", "yes", "y"}


def _interpreter_reasons(dtype: torch.dtype) -> list[str]:
    from .target import interpreting

    if not interpreting():
        return ["TRITON_INTERPRET=1 was set after the kernels were imported; set it before"]
    if dtype == torch.bfloat16:
        return ["Triton's interpreter computes bfloat16 wrongly; use float32 or float16 on the CPU"]
    return []
