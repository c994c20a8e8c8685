"""A package is looked up once, and again when it may have come or gone."""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

import pytest

from fap_kernels import installed
from fap_kernels.installed import importable

if TYPE_CHECKING:
    from pathlib import Path

NAME = "fap_package_of_nobody"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder on the import path, last changed long ago."""
    monkeypatch.setattr(installed, "_answers", {})
    monkeypatch.syspath_prepend(str(tmp_path))
    os.utime(tmp_path, (1, 1))
    return tmp_path


def test_a_package_that_comes_and_goes_is_seen(folder: Path) -> None:
    assert not importable(NAME)
    module = folder / f"{NAME}.py"
    module.touch()
    importlib.invalidate_caches()
    assert importable(NAME)
    module.unlink()
    os.utime(folder, (2, 2))
    importlib.invalidate_caches()
    assert not importable(NAME)
    assert NAME not in sys.modules


def test_a_path_that_comes_is_searched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "further").mkdir()
    (folder / "further" / f"{NAME}.py").touch()
    assert not importable(NAME)
    monkeypatch.setattr(sys, "path", [*sys.path, str(folder / "further")])
    assert importable(NAME)


def test_nothing_is_searched_for_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    searched: list[str] = []
    monkeypatch.setattr(installed, "find_spec", searched.append)
    assert not importable(NAME)
    assert not importable(NAME)
    assert searched == [NAME]
