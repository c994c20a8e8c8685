"""Pytest plugin: fixtures for testing attention, all prefixed ``fap_``.

It is found by itself once fap-testing is installed; where the package is only on the path, load it with
``-p fap_testing.plugin``. A suite that uses none of the fixtures and sets none of the options notices
nothing: no torch import, no marker, no skip.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest

pytest.register_assert_rewrite("fap_testing.conformance", "fap_testing.expectation", "fap_testing.tolerances")

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from fap_testing.expectation import Expectation
    from fap_testing.inputs import CaseInputs
    from fap_testing.reference import AttentionResult


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--fap-device``, ``--fap-seed`` and the ini option ``fap_gpu_marker``."""
    group = parser.getgroup("fap-testing", "attention testing (fap-testing)")
    group.addoption(
        "--fap-device",
        default=None,
        metavar="DEVICE",
        help="device of the fap_ fixtures, such as cpu or cuda:1 (default: cuda if available, else cpu)",
    )
    group.addoption(
        "--fap-seed", type=int, default=0, metavar="N", help="seed of the fap_ fixtures' inputs (default: 0)"
    )
    parser.addini(
        "fap_gpu_marker",
        "name of a marker for tests that need a GPU: registers it, and skips such tests where torch finds "
        "none (default: empty, which leaves every marker alone)",
        default="",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the GPU marker, if the suite asks for one."""
    if marker := config.getini("fap_gpu_marker"):
        config.addinivalue_line(
            "markers", f"{marker}: needs a GPU that torch can use; skipped where there is none"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip tests with the GPU marker where there is no GPU, if the suite asks for that."""
    marker = config.getini("fap_gpu_marker")
    marked = [item for item in items if marker and item.get_closest_marker(marker)]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a GPU, and torch.cuda.is_available() is False")
        for item in marked:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def fap_device(request: pytest.FixtureRequest) -> torch.device:
    """Device to test on: ``--fap-device``, else CUDA where there is one, else the CPU."""
    import torch

    chosen = request.config.getoption("--fap-device")
    return torch.device(chosen or ("cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture(scope="session")
def fap_seed(request: pytest.FixtureRequest) -> int:
    """Seed of the inputs: ``--fap-seed``."""
    return int(request.config.getoption("--fap-seed"))


@pytest.fixture(scope="session")
def fap_reference() -> Callable[..., AttentionResult]:
    """The float64 oracle, :func:`fap_testing.reference.attention_reference`."""
    from fap_testing.reference import attention_reference

    return attention_reference


@pytest.fixture(scope="session")
def fap_case_inputs(fap_device: torch.device, fap_seed: int) -> Callable[..., CaseInputs]:
    """:func:`fap_testing.inputs.make_inputs` with ``fap_device`` and ``fap_seed`` as defaults."""
    from fap_testing.inputs import make_inputs

    return partial(make_inputs, device=fap_device, seed=fap_seed)


@pytest.fixture(scope="session")
def fap_expect() -> Callable[..., Expectation]:
    """:func:`fap_testing.expectation.expect`: what a case's results must be."""
    from fap_testing.expectation import expect

    return expect


@pytest.fixture(scope="session")
def fap_assert_close() -> Callable[..., None]:
    """:func:`fap_testing.tolerances.assert_close_to_oracle`."""
    from fap_testing.tolerances import assert_close_to_oracle

    return assert_close_to_oracle
