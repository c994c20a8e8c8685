"""What is raised for arguments that are no tensors.

flash-attn asserts what it asks of them, so code written for it may catch AssertionError. To everybody else a
wrong type is a TypeError and a wrong value a ValueError. These are both.
"""

from __future__ import annotations

__all__ = ["WrongType", "WrongValue"]


class WrongType(TypeError, AssertionError):  # noqa: N818
    """An argument of the wrong type."""


class WrongValue(ValueError, AssertionError):  # noqa: N818
    """An argument of a value that is not accepted."""
