"""Every test starts from the automatic choice of a back end, whatever the environment or a test before it."""

from __future__ import annotations

import pytest
import torch

import fap_api
from fap_api import _call, _kvcache_call
from fap_api.backends import select


@pytest.fixture(autouse=True)
def _automatic_choice(monkeypatch):
    for variable in (select.ENVIRONMENT, "TRITON_INTERPRET"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(select, "_logged", set())
    # Packages and Triton's interpreter come and go between tests, as they never do in a program.
    _call._plans.clear()
    _kvcache_call._plans.clear()
    torch.manual_seed(0)
    # The tensors are tiny: on a busy machine, threads that wait for each other take ten times the work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    fap_api.use_backend(None)
    _call._plans.clear()
    _kvcache_call._plans.clear()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch.cuda.is_available() is False"))
