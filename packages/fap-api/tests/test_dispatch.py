"""A call goes past PyTorch's dispatcher only where nobody would see the difference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fap_api import (
    _dispatch,
    _kvcache_ops,
    _ops,
    _varlen_ops,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    use_backend,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BOUNDS = torch.tensor([0, 3, 7], dtype=torch.int32)


def dense(x: torch.Tensor) -> torch.Tensor:
    out: Any = flash_attn_func(x, x, x, causal=True)
    return out


def packed(x: torch.Tensor) -> torch.Tensor:
    out: Any = flash_attn_varlen_func(x[0], x[0], x[0], BOUNDS, BOUNDS, 4, 4)
    return out


def cached(x: torch.Tensor) -> torch.Tensor:
    out: Any = flash_attn_with_kvcache(x, x.clone(), x.clone(), cache_seqlens=5)
    return out


def appended(x: torch.Tensor) -> torch.Tensor:
    cache = x.new_zeros(1, 14, 2, 16)
    out: Any = flash_attn_with_kvcache(x, cache, cache.clone(), x, x, cache_seqlens=5)
    return out


CALLS = {
    "attention_forward": (dense, _ops, "attention_forward"),
    "attention_varlen_forward": (packed, _varlen_ops, "attention_varlen_forward"),
    "kvcache_attention": (cached, _kvcache_ops, "kvcache_attention"),
    "kvcache_append_attention": (appended, _kvcache_ops, "kvcache_append_attention"),
}
calls = pytest.mark.parametrize("name", CALLS)


class Subclass(torch.Tensor):
    """One of somebody's own."""


class Looking(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(function.name())
        return function(*args, **(kwargs or {}))


class Listening(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def on_torch() -> Iterator[None]:
    with use_backend("torch"):
        yield


def draw() -> torch.Tensor:
    return torch.randn(1, 7, 2, 16)


@calls
def test_a_plain_call_goes_to_the_back_end(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the result that its operator has."""
    call, module, attribute = CALLS[name]
    x = draw()
    with Looking():
        expected = call(x)
    monkeypatch.setattr(module, attribute, None)
    assert torch.equal(call(x), expected)


@calls
def test_modes_and_profiles_see_the_operator(name: str) -> None:
    call = CALLS[name][0]
    x = draw()
    with Looking() as looking:
        call(x)
    assert f"fap::{name}" in looking.seen
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call(x)
    assert f"fap::{name}" in {event.key for event in profile.key_averages()}


RECORDED = [name for name in CALLS if name.startswith("attention")]


@pytest.mark.parametrize("name", RECORDED)
def test_a_recorded_call_and_its_backward_go_to_the_back_end(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the gradients that the operators have, which modes and profiles see."""
    call, module, attribute = CALLS[name]
    x = draw().requires_grad_()
    with Looking() as looking:
        (expected,) = torch.autograd.grad(call(x).square().sum(), x)
    backward = name.replace("forward", "backward")
    assert {f"fap::{name}", f"fap::{backward}"} <= set(looking.seen)
    with torch.no_grad():
        assert not call(x).requires_grad
    monkeypatch.setattr(module, attribute, None)
    monkeypatch.setattr(module, backward, None)
    (gradient,) = torch.autograd.grad(call(x).square().sum(), x)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("name", RECORDED)
def test_a_second_derivative_is_refused(name: str) -> None:
    x = draw().requires_grad_()
    (gradient,) = torch.autograd.grad(CALLS[name][0](x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        gradient.sum().backward()


SCOPES: dict[str, Callable[[], Any]] = {
    "dispatch mode": Looking,
    "function mode": Listening,
    "profiler": lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
    "forward mode": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("name", SCOPES)
def test_whoever_looks_on_is_noticed(name: str) -> None:
    x = draw()
    assert _dispatch.unobserved((x, None))
    with SCOPES[name]():
        assert not _dispatch.unobserved((x, None))
    assert _dispatch.unobserved((x, None))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
def test_transforms_and_traces_are_noticed() -> None:
    answers: list[bool] = []

    def ask(x: torch.Tensor) -> torch.Tensor:
        answers.append(_dispatch.unobserved((draw_outside,)))
        return x * 2

    draw_outside = draw()
    torch.func.vmap(ask)(draw())
    torch.func.grad(lambda x: ask(x).sum())(draw())
    torch.jit.trace(ask, draw(), check_trace=False)
    assert answers == [False] * 3


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(draw().as_subclass(Subclass), id="subclass"),
        pytest.param(torch.empty(1, 7, 2, 16, device="meta"), id="meta"),
        pytest.param(torch.randn(1, 7, 2, 16, dtype=torch.complex64).conj().imag, id="negative view"),
    ],
)
def test_tensors_that_are_more_than_memory_are_noticed(x: torch.Tensor) -> None:
    assert not _dispatch.unobserved((draw(), x))
    assert _dispatch.unobserved((draw(), torch.nn.Parameter(draw())))


def test_a_negative_view_is_attended_to_by_its_values() -> None:
    x = torch.randn(1, 7, 2, 16, dtype=torch.complex64).conj().imag
    assert x.is_neg()
    assert torch.equal(dense(x), dense(x.resolve_neg()))
