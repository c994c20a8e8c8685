"""Whether a package is installed, looked up once for each state of the import path."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

__all__ = ["importable"]

_answers: dict[str, tuple[object, bool]] = {}


def importable(name: str) -> bool:
    """Tell whether a top-level module could be imported, without importing it.

    A search takes 100 us. Its answer holds until something that it depends on has changed: the import path, a
    folder on it, or who searches. So a package that is installed while the program runs is seen.
    """
    if name in sys.modules:
        return True
    state = (*sys.meta_path, None, *sys.path, *map(_last_change, sys.path))
    known = _answers.get(name)
    if known is None or known[0] != state:
        known = _answers[name] = (state, find_spec(name) is not None)
    return known[1]


def _last_change(folder: str) -> int:
    """The time of a folder's last change in nanoseconds, 0 where there is none."""
    try:
        return os.stat(folder or os.curdir).st_mtime_ns  # noqa: PTH116 - half the time of Path.stat
    except OSError:
        return 0
