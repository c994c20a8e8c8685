"""Checks on the types of what modules are made with and called with, by name and before anything is made."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["check_flags", "check_integers", "check_numbers", "check_tensors", "check_window"]


def check_integers(**values: Any) -> None:
    """Raise a TypeError unless every value is an integer; True and False are none."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}: {value!r}")


def check_numbers(**values: Any) -> None:
    """Raise a TypeError unless every value is an integer or a float."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}: {value!r}")


def check_flags(**values: Any) -> None:
    """Raise a TypeError unless every value is True or False."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {type(value).__name__}: {value!r}")


def check_tensors(**values: Any) -> None:
    """Raise a TypeError unless every value is a tensor."""
    for name, value in values.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")


def check_window(window_size: Any) -> None:
    """Raise unless ``window_size`` has two elements, both integers.

    Raises:
        ValueError: another number of elements, or none.
        TypeError: an element that is no integer.
    """
    if not hasattr(window_size, "__len__") or len(window_size) != 2:
        raise ValueError(f"window_size must be two integers (left, right), got {window_size!r}")
    bounds = window_size.tolist() if isinstance(window_size, torch.Tensor) else window_size
    if any(isinstance(bound, bool) or not hasattr(bound, "__index__") for bound in bounds):
        raise TypeError(f"window_size must be two integers (left, right), got {window_size!r}")
