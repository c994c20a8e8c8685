"""Every test starts from the automatic choice of a back end, whatever the environment or a test before it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fap_api
from fap_api import _call, _kvcache_call
from fap_api.backends import select
from fap_api.backends.torch_ import TorchBackend


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


@pytest.fixture
def interpreted(monkeypatch):
    """A function that runs a program on a CPU, its kernels in Triton's interpreter."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return lambda program, **names: exec(compile(program, "<interpreted>", "exec"), names)


@pytest.fixture
def check_selective_checkpointing(monkeypatch):
    """A function that checks that attention, marked to be saved, does not run twice."""

    def check(operator, method, attention, draw):
        """Of ``attention``, ``operator`` is the forward pass, which the back end has as ``method``."""
        runs = []
        forward = getattr(TorchBackend, method)
        monkeypatch.setattr(
            TorchBackend, method, lambda self, *arguments: runs.append(1) or forward(self, *arguments)
        )

        def save_attention(ctx, called, *args, **kwargs):
            ours = called is operator
            return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

        def block(q, k, v):
            return attention(q.sin(), k, v).cos()

        gradients = []
        selective = {"context_fn": partial(create_selective_checkpoint_contexts, save_attention)}
        for options, expected in (({}, 2), (selective, 1)):
            torch.manual_seed(0)
            tensors = draw()
            runs.clear()
            loss = checkpoint(block, *tensors, use_reentrant=False, **options).sum()
            gradients.append(torch.autograd.grad(loss, tensors))
            assert len(runs) == expected
        for recomputed, saved in zip(*gradients, strict=True):
            assert torch.equal(recomputed, saved)

    return check


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch.cuda.is_available() is False"))
