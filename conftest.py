"""For the tests of all packages: which of them a process can run."""

from __future__ import annotations

import dataclasses
import functools
import gc
import os

import pytest


def pytest_configure() -> None:
    """Make Triton's interpreter faster where it runs the kernels of this process."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        try:
            from triton.runtime import interpreter
        except ImportError:  # the kernels are tested where Triton is
            return
        _patch_the_language_once_a_launch(interpreter)
        _omit_assertions_that_are_off(interpreter.interpreter_builder)


def _patch_the_language_once_a_launch(interpreter) -> None:
    """Spare the interpreter what takes it a third of the time: to look through its language again and again.

    It puts its own functions in place of those of triton.language at the start of a launch, and again at
    every call of a device function, where nothing is left to replace.
    """
    language, patch, launch = interpreter.tl, interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    @functools.cache
    def modules_of(fn) -> frozenset[str]:
        modules = {"language": language, "core": language.core}
        seen = list(fn.__globals__.values())
        return frozenset(name for name, module in modules.items() if any(x is module for x in seen))

    def patch_what_is_not(fn):
        if modules_of(fn) and modules_of(fn) <= patched:
            return None
        patched.update(modules_of(fn))
        return patch(fn)

    def launch_afresh(*arguments, **options):
        patched.clear()
        try:
            return launch(*arguments, **options)
        finally:
            patched.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_what_is_not, launch_afresh


def _omit_assertions_that_are_off(builder) -> None:
    """Spare it another third: to compute sums and products again for an assertion that it then leaves out.

    Whether a number overflows is asserted by `device_assert`, which does nothing unless `debug` is on.
    """
    if not builder.options.debug:
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def pytest_collection_finish() -> None:
    """Keep every garbage collection to come from looking through modules and tests, which stay anyway."""
    gc.collect()
    gc.freeze()


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
