"""Every task of this repository: `nox --list` shows them, `nox -s NAME` runs one."""

from __future__ import annotations

import shutil
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.default_venv_backend = "virtualenv"  # pip chooses the build of torch that suits the machine
nox.options.reuse_venv = "yes"
nox.options.sessions = ["lint", "types", "wheels", "tests(torch=2.13.0)"]

PROJECT = nox.project.load_toml("pyproject.toml")
PACKAGES = ["fap-kernels", "fap-api", "fap-nn", "fap-testing"]
STANDALONE = ["fap-kernels", "fap-nn", "fap-testing"]
# torch releases, oldest to newest, each with the triton release it is made for.
MATRIX = {"2.8.0": "3.4.0", "2.9.1": "3.5.1", "2.11.0": "3.6.0", "2.13.0": "3.7.1", "2.15.0": "3.9.0"}
TORCH = "2.13.0"
QUIET = ["-W", "ignore:Failed to initialize NumPy"]  # torch warns of it wherever NumPy is absent


@nox.session
def demo(session: nox.Session) -> None:
    """Run causal attention, judge it by the oracle, and train a tiny model with it."""
    install_workspace(session, "demo")
    session.run("python", *QUIET, "examples/demo.py", *session.posargs)


@nox.session
@nox.parametrize("torch", list(MATRIX), ids=[f"torch={torch}" for torch in MATRIX])
def tests(session: nox.Session, torch: str) -> None:
    """Run the test suite on the CPU, kernels in Triton's interpreter; arguments after `--` go to pytest."""
    install_workspace(session, "test", torch)
    workers = ["--numprocesses=auto", "--maxprocesses=8", "--dist=worksteal"]
    pytest = ["pytest", "-m", "not gpu", *workers, *session.posargs]
    one_core_each = {"OMP_NUM_THREADS": "1"}
    no_tests_collected = 5  # where the arguments choose none of the tests for the interpreter
    interpreting = one_core_each | {"TRITON_INTERPRET": "1"}
    session.run(*pytest, env=interpreting, success_codes=[0, no_tests_collected])
    session.run(*pytest, env=one_core_each)


@nox.session
def integrations(session: nox.Session) -> None:
    """Run the tests that need other software, which the suite itself must do without."""
    install_workspace(session, "integrations")
    folder = "packages/fap-api/tests/integrations"
    files = ("test_transformers.py", "test_flash_attn_shim.py", "test_diffusers.py")
    # What needs nothing else is run by the suite.
    tests = [*(f"{folder}/{file}" for file in files), "tests/test_docs.py", "-m", "not self_contained"]
    session.run("pytest", *(session.posargs or tests), env={"OMP_NUM_THREADS": "1"})


@nox.session
@nox.parametrize("group", ["ring", "ulysses"], ids=["ring", "ulysses"])
def ring_and_ulysses(session: nox.Session, group: str) -> None:
    """Run the examples of docs/integrations/ring_and_ulysses.md: no environment holds all that they need."""
    install_workspace(session, group)
    session.run("pytest", "tests/test_docs.py", "-k", "ring_and_ulysses", env={"OMP_NUM_THREADS": "1"})


@nox.session
def gpu(session: nox.Session) -> None:
    """Run the tests that need a GPU, and fail where there is none."""
    install_workspace(session, "test")
    session.run("python", "-c", "import torch; torch.zeros(1, device='cuda')")
    session.run("pytest", "-m", "gpu", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Run ten thousand random problems on a Hopper GPU, in batches under a timeout; `-- --seed 1`: others."""
    install_workspace(session, "test")
    session.run("python", "packages/fap-kernels/tests/soak.py", *session.posargs)


@nox.session
def sanitize(session: nox.Session) -> None:
    """Run every shipped configuration under compute-sanitizer on a Hopper GPU; after `--` come its tools."""
    install_workspace(session, "test")
    session.run("python", "packages/fap-kernels/tests/sanitize.py", *session.posargs)


@nox.session
def flash_attn_suite(session: nox.Session) -> None:
    """Run a sample of flash-attn's own tests on a GPU; after `--` come their file and options to pytest."""
    install_workspace(session, "flash-attn-suite")
    session.run("python", "packages/fap-api/tests/integrations/flash_attn_suite.py", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    install_group(session, "lint")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")


@nox.session
def types(session: nox.Session) -> None:
    """Check the types of all four packages."""
    # Read, but never run: nothing needs to be compiled.
    install_group(session, "types", f"torch=={TORCH}", "--no-compile")
    session.run("mypy")


@nox.session
def docs(session: nox.Session) -> None:
    """Build the documentation and its API reference into build/docs, every warning an error."""
    install_workspace(session, "docs")
    session.run("sphinx-build", "--fail-on-warning", "--keep-going", "--quiet", "docs", "build/docs")


@nox.session
def build(session: nox.Session) -> None:
    """Build the four packages into dist/, each wheel from its own source distribution."""
    install_group(session, "build")
    shutil.rmtree("dist", ignore_errors=True)
    for package in PACKAGES:
        session.run("python", "-m", "build", "--outdir", "dist", f"packages/{package}", silent=True)


@nox.session(requires=["build"], reuse_venv=False)
@nox.parametrize("package", STANDALONE, ids=STANDALONE)
def wheels(session: nox.Session, package: str) -> None:
    """Install one package, with what it depends on, into a clean environment and use it."""
    (wheel,) = Path("dist").glob(f"{package.replace('-', '_')}-*.whl")
    # Triton's interpreter, which stands in for a GPU, computes with NumPy. Nothing else needs it.
    stand_in = ["numpy"] if package == "fap-kernels" else []
    session.install(str(wheel), f"torch=={TORCH}", *stand_in, "--find-links", "dist")
    session.run("python", *QUIET, f"tests/clean_install/use_{package.replace('-', '_')}.py")


def install_workspace(session: nox.Session, group: str, torch: str = TORCH) -> None:
    """Install the four packages editable, one dependency group, and torch with the triton made for it."""
    pins = [f"torch=={torch}", f"triton=={MATRIX[torch]}; platform_system == 'Linux'"]
    install_group(session, group, *pins, *[f"--editable=packages/{package}" for package in PACKAGES])


def install_group(session: nox.Session, group: str, *arguments: str) -> None:
    """Install one dependency group of pyproject.toml, together with the given arguments to pip."""
    session.install(*nox.project.dependency_groups(PROJECT, group), *arguments)
