"""Run a sample of flash-attn's own tests/test_flash_attn.py on fap_api, under the name flash_attn.

    python packages/fap-api/tests/integrations/flash_attn_suite.py PATH/test_flash_attn.py --cases 5000

It is pytest with a plugin, this module, and takes pytest's options, ``-n 8 --dist loadgroup`` of pytest-xdist
among them. It needs einops besides fap_api, and a GPU; ``--on-cpu --longest 300`` tries the same on a CPU.

That file is half a million cases, and collecting them takes a minute. So its parameters are drawn before
pytest multiplies them out: of every function some, in proportion to the square root of how many it has, with
their own ids. Triton compiles for every combination of head dimension, dtype and options; ``--combinations``
bounds how many of these each function takes part in, chosen so that the functions share them.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import random
import sys
from collections import Counter
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from torch.overrides import TorchFunctionMode

import fap_api
from fap_api.integrations import flash_attn_shim

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FunctionType, ModuleType

# Parameters that lead to another kernel, and not just to other tensors. What is missing or falsy is off.
COMPILED = (
    "d", "dtype", "causal", "local", "alibi", "dropout_p", "softcap", "paged_kv_block_size", "has_leftpad",
    "new_kv", "rotary_fraction", "rotary_interleaved",
)  # fmt: skip
# Tests of what fap_api does not have, and why.
NOT_OURS = {
    "test_flash_attn_generator_arg_must_be_none": "calls flash-attn's binary extension, which the shim lacks"
}


class Axis(NamedTuple):
    """One parametrization of a test: its names, and for each choice the values and their id."""

    names: tuple[str, ...]
    choices: list[tuple[tuple[Any, ...], str]]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flash-attn's tests")
    group.addoption("--cases", type=int, default=5000, help="how many to draw (5000); some skip themselves")
    group.addoption("--seed", default="0", help="of the draw (0)")
    group.addoption("--combinations", type=int, default=sys.maxsize, help="compiled for, at most, a function")
    group.addoption("--longest", type=int, default=sys.maxsize, help="leave out longer sequences")
    group.addoption("--backend", default="", help="of fap_api, which then must run every call")
    group.addoption("--on-cpu", action="store_true", help='have "cuda" stand for the CPU')


def pytest_configure(config: pytest.Config) -> None:
    flash_attn_shim.install(replace=True)
    if config.getoption("--on-cpu"):
        torch.cuda.get_device_capability = lambda *_: (9, 0)


def pytest_unconfigure() -> None:
    flash_attn_shim.uninstall()


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makeitem(collector: Any, name: str, obj: object) -> None:
    if isinstance(collector, pytest.Module) and not hasattr(collector.obj, "__fap_drawn__"):
        collector.obj.__fap_drawn__ = True
        draw_cases(collector.obj, collector.config)


def draw_cases(module: ModuleType, config: pytest.Config) -> None:
    """Leave each test function of a module with the cases that are drawn."""
    longest, seed = config.getoption("--longest"), config.getoption("--seed")
    tests = {name: f for name, f in vars(module).items() if name.startswith("test") and callable(f)}
    axes = {name: list(axes_of(f, longest)) for name, f in tests.items()}
    sizes = {name: math.prod(len(axis.choices) for axis in found) for name, found in axes.items()}
    for name, count in shares(sizes, config.getoption("--cases")).items():
        drawn = draw(name, axes[name], count, config.getoption("--combinations"), seed)
        parametrize(tests[name], [name for axis in axes[name] for name in axis.names], drawn)


def axes_of(test: FunctionType, longest: int) -> Iterator[Axis]:
    """Read the parametrizations of a test in pytest's order, without sequences above ``longest``."""
    for mark in getattr(test, "pytestmark", ()):
        if mark.name != "parametrize":
            continue
        names = tuple(name.strip() for name in mark.args[0].split(","))
        choices = []
        for index, value in enumerate(mark.args[1]):
            values = tuple(value) if len(names) > 1 else (value,)
            lengths = [x for name, x in zip(names, values, strict=True) if name.startswith("seqlen")]
            if max([x for x in lengths if type(x) is int], default=0) <= longest:
                ids = [_id(name, x, index) for name, x in zip(names, values, strict=True)]
                choices.append((values, "-".join(ids)))
        yield Axis(names, choices)


def _id(name: str, value: Any, index: int) -> str:
    """Name a value as pytest does."""
    plain = value is None or isinstance(value, (str, int, float, bool))
    return str(value) if plain else f"{name}{index}"


def shares(sizes: dict[str, int], cases: int) -> dict[str, int]:
    """Share out cases in proportion to the square roots of the sizes, never more than there are.

    So a function with a hundred times as many cases gets ten times as many, and small ones are run whole.
    """
    left, weights = cases, sum(map(math.sqrt, sizes.values()))
    result = {}
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        result[name] = min(size, max(1, round(left * math.sqrt(size) / weights))) if size else 0
        left, weights = left - result[name], weights - math.sqrt(size)
    return result


def draw(
    name: str, axes: Sequence[Axis], count: int, combinations: int, seed: str
) -> list[tuple[tuple[Any, ...], str]]:
    """Draw cases of one test: the values of all its parameters, and their id."""
    compiled = [axis for axis in axes if set(axis.names) & set(COMPILED)]
    others = [axis for axis in axes if axis not in compiled]
    keys = {}
    for chosen in itertools.product(*(axis.choices for axis in compiled)):
        on = dict(_switched_on(name, [axis.names for axis in compiled], [values for values, _ in chosen]))
        # The same for every test, so that those first in line are the same.
        keys[chosen] = hashlib.sha256(f"{seed} {sorted(on.items())}".encode()).digest()
    few = sorted(keys, key=keys.__getitem__)[:combinations]
    rest = math.prod(len(axis.choices) for axis in others)
    picks = random.Random(f"{seed} {name}").sample(range(len(few) * rest), min(count, len(few) * rest))
    cases = []
    for pick in sorted(picks):
        combination, place = divmod(pick, rest)
        case = dict(zip((axis.names for axis in compiled), few[combination], strict=True))
        for axis in others:
            place, index = divmod(place, len(axis.choices))
            case[axis.names] = axis.choices[index]
        chosen = [case[axis.names] for axis in axes]
        values = tuple(itertools.chain.from_iterable(values for values, _ in chosen))
        cases.append((values, "-".join(label for _, label in chosen)))
    return cases


def _switched_on(
    test: str, names: Sequence[tuple[str, ...]], values: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[str, str]]:
    """Say which options a case has, whether a parameter or the test's name tells."""
    if "causal" in test:
        yield "causal", "True"
    for name, value in zip(itertools.chain(*names), itertools.chain(*values), strict=True):
        if value:
            yield name, str(value)


def parametrize(
    test: FunctionType, names: Sequence[str], cases: Sequence[tuple[tuple[Any, ...], str]]
) -> None:
    """Give a test these cases in place of its own."""
    if not names:
        return
    values, ids = [case for case, _ in cases], [label for _, label in cases]
    mark = pytest.mark.parametrize(tuple(names), values, ids=ids).mark
    test.pytestmark = [m for m in test.pytestmark if m.name != "parametrize"] + [mark]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    grouped = config.pluginmanager.hasplugin("xdist")
    for item in items:
        if item.originalname in NOT_OURS:
            reason = NOT_OURS[item.originalname]
            item.add_marker(pytest.mark.xfail(reason=reason, raises=ImportError, strict=True))
        if grouped:  # what needs the same kernels goes to one process
            item.add_marker(pytest.mark.xdist_group(_group(item)))


def _group(item: pytest.Function) -> str:
    values = item.callspec.params if hasattr(item, "callspec") else {}
    names = [name for name in COMPILED if name in values]
    on = _switched_on(item.originalname, [tuple(names)], [tuple(values[name] for name in names)])
    layout = [word for word in ("varlen", "kvcache") if word in item.originalname]
    return " ".join([*layout, *sorted("=".join(pair) for pair in on)])


class _OnCPU(TorchFunctionMode):
    """Make on the CPU what is asked for on "cuda"."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")) == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    backend = item.config.getoption("--backend")
    with (
        fap_api.use_backend(backend) if backend else nullcontext(),
        _OnCPU() if item.config.getoption("--on-cpu") else nullcontext(),
    ):
        return (yield)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # for the other processes on this GPU


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Count the outcomes of every test function."""
    counts = Counter(
        (report.nodeid.partition("::")[2].partition("[")[0].partition("@")[0], outcome)
        for outcome, reports in terminalreporter.stats.items()
        for report in reports
        if outcome and hasattr(report, "nodeid") and hasattr(report, "when")
    )
    outcomes = sorted({outcome for _, outcome in counts})
    terminalreporter.section("outcomes by test")
    for test in sorted({test for test, _ in counts}):
        numbers = "  ".join(f"{counts[test, outcome]:5} {outcome}" for outcome in outcomes)
        terminalreporter.line(f"{test:50} {numbers}")


if __name__ == "__main__":
    # Not with this repository's settings for pytest: warnings of flash-attn's tests are its own affair.
    options = ["-p", "flash_attn_suite", "-c", os.devnull, "--rootdir=.", "--import-mode=importlib"]
    sys.exit(pytest.main([*options, *sys.argv[1:]]))
