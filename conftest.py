"""For the tests of all packages: `gpu` skips where there is none, and the interpreter is not contagious."""

from __future__ import annotations

from pathlib import Path

import pytest

KERNEL_TESTS = Path(__file__).parent / "packages" / "fap-kernels"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where CUDA is absent; torch is imported only if a test is marked."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(autouse=True)
def _no_interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo for all other tests that fap-kernels' tests choose Triton's interpreter for the whole process."""
    if not request.node.path.is_relative_to(KERNEL_TESTS):
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
