"""For the tests of all packages: which of them a process can run."""

from __future__ import annotations

import os

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave tests to the kind of process they are for, and skip what is marked `gpu` where there is none.

    Triton's interpreter is chosen for a whole process, before kernels are imported, so `interpreter` tests
    run in a process of their own, and no others do.
    """
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    elsewhere = [item for item in items if bool(item.get_closest_marker("interpreter")) != interpreting]
    config.hook.pytest_deselected(items=elsewhere)
    kept = set(items) - set(elsewhere)
    items[:] = [item for item in items if item in kept]

    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not for_gpu:
        return
    import torch

    if not torch.cuda.is_available():
        for item in for_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
