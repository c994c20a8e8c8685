"""What the four packages may import and depend on, proven from the wheels that users install."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAY_IMPORT = {
    "fap_kernels": set(),
    "fap_api": {"fap_kernels"},
    "fap_nn": {"fap_api"},
    "fap_testing": set(),
}
each_package = pytest.mark.parametrize("package", MAY_IMPORT)


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """Build the four wheels and return the folder of each one's unpacked content by package."""
    folder = tmp_path_factory.mktemp("wheels")
    unpacked = {}
    for package in MAY_IMPORT:
        source = ROOT / "packages" / package.replace("_", "-")
        command = [
            sys.executable,
            "-m",
            "hatchling",
            "build",
            "--target",
            "wheel",
            "--directory",
            str(folder),
        ]
        subprocess.run(command, cwd=source, check=True, capture_output=True)
        (wheel,) = folder.glob(f"{package}-*.whl")
        unpacked[package] = folder / package
        zipfile.ZipFile(wheel).extractall(unpacked[package])
    return unpacked


def read_metadata(wheel):
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    return message_from_string(metadata.read_text(encoding="utf-8"))


def requirements(wheel, *, extras):
    """Return requirement strings by normalised distribution name."""
    found = read_metadata(wheel).get_all("Requires-Dist") or []
    wanted = [text for text in found if extras or "extra ==" not in text]
    return {re.match(r"[\w.-]+", text)[0].lower().replace("-", "_"): text for text in wanted}


def imported_roots(wheel, *, for_types):
    """Return the top-level name of every import of every module, with or without those for type checkers."""
    roots = set()
    for module in wheel.rglob("*.py"):
        tree = ast.parse(module.read_text(encoding="utf-8"))
        guarded = [
            node
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ]
        never_run = {inner for node in guarded for inner in ast.walk(node)}
        for node in ast.walk(tree):
            if node in never_run and not for_types:
                continue
            if isinstance(node, ast.Import):
                roots |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                roots.add(node.module.split(".")[0])
    return roots


@each_package
def test_siblings_are_imported_downwards_only(wheels, package):
    siblings = imported_roots(wheels[package], for_types=True) & MAY_IMPORT.keys()
    assert siblings - {package} <= MAY_IMPORT[package]


@each_package
def test_whatever_is_imported_is_declared(wheels, package):
    declared = requirements(wheels[package], extras=True).keys()
    outside = imported_roots(wheels[package], for_types=False) - sys.stdlib_module_names - {package}
    assert outside <= declared, f"declare or do not import {outside - declared}"


@each_package
def test_siblings_are_pinned_to_the_same_version(wheels, package):
    version = read_metadata(wheels[package])["Version"]
    assert {read_metadata(wheel)["Version"] for wheel in wheels.values()} == {version}
    required = requirements(wheels[package], extras=True)
    siblings = {name: text for name, text in required.items() if name.startswith("fap_")}
    assert siblings == {name: f"{name.replace('_', '-')}=={version}" for name in MAY_IMPORT[package]}


def test_kernels_need_torch_and_triton_alone(wheels):
    assert requirements(wheels["fap_kernels"], extras=True).keys() == {"torch", "triton"}


@each_package
def test_wheel_is_licensed_and_typed(wheels, package):
    wheel = wheels[package]
    assert read_metadata(wheel)["License-Expression"] == "BSD-3-Clause"
    (licence,) = wheel.glob("*.dist-info/licenses/LICENSE")
    assert licence.read_text(encoding="utf-8") == (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert (wheel / package / "py.typed").exists()


IMPORT_AND_WATCH = """
import os, sys
import torch

folders, package = sys.argv[1].split(os.pathsep), sys.argv[2]
sys.path[:0] = folders
reads = []

class Watched(type(os.environ)):
    def __getitem__(self, key):
        frame = sys._getframe(1)
        while frame.f_code.co_filename == os.__file__ or "_collections_abc" in frame.f_code.co_filename:
            frame = frame.f_back
        if any(frame.f_code.co_filename.startswith(folder) for folder in folders):
            reads.append(key)
        return super().__getitem__(key)

os.environ.__class__ = Watched
before = set(sys.modules)
module = __import__(package)
assert any(module.__file__.startswith(folder) for folder in folders), module.__file__
new = {name.split(".")[0] for name in set(sys.modules) - before}
assert not reads, f"reads {reads} from the environment"
assert not new & {"triton", "flag_gems", "flash_attn", "transformers"}, new
assert not torch.cuda.is_initialized()
print(*sorted(name for name in new if name.startswith("fap_")))
"""


@each_package
def test_importing_does_nothing_else(wheels, package):
    """No output, no look at the environment, no accelerator, no heavy module, no sibling but those below."""
    below = [package]
    for name in below:
        below += sorted(MAY_IMPORT[name])
    folders = os.pathsep.join(str(wheels[name]) for name in below)
    command = [sys.executable, "-W", "ignore", "-c", IMPORT_AND_WATCH, folders, package]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert package in done.stdout.split()
    assert set(done.stdout.split()) <= set(below)


def test_only_triton_functions_go_without_types(wheels):
    """mypy does not look into unannotated functions of kernel modules: Triton or Gluon must compile them."""
    for module in (wheels["fap_kernels"] / "fap_kernels").rglob("*.py"):
        for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            is_kernel = any(
                ast.unparse(decorator).startswith(("triton.jit", "gluon.jit"))
                for decorator in node.decorator_list
            )
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            untyped = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert is_kernel or (node.returns and not untyped), f"{module.name}: annotate {node.name}"
