"""Every Python example of the pages under docs/ runs, each in processes of its own."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.attention

ROOT = Path(__file__).parents[1]
PAGES = sorted(ROOT.glob("docs/**/*.md"))
READMES = [ROOT / "README.md", *sorted(ROOT.glob("packages/*/README.md"))]
# What some examples are about, and the suite itself does without.
OTHERS_SOFTWARE = {"deepspeed", "diffusers", "ring_flash_attn", "transformers", "yunchang"}


def read_examples(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


EXAMPLES = {
    f"{page.relative_to(ROOT / 'docs').as_posix()}-{number}": example
    for page in PAGES
    for number, example in enumerate(read_examples(page), 1)
}


def others_software(example):
    """Return which of it an example imports."""
    modules = set()
    for node in ast.walk(ast.parse(example)):
        if isinstance(node, ast.Import):
            modules |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add(node.module.partition(".")[0])
    return sorted(modules & OTHERS_SOFTWARE)


def why_not(example):
    """Return what this environment lacks, or has too much of, for an example."""
    missing = [name for name in others_software(example) if importlib.util.find_spec(name) is None]
    if missing:
        return f"needs {', '.join(missing)}"
    if "flash_attn_shim" in example and importlib.util.find_spec("flash_attn") is not None:
        return "flash-attn is really installed"
    if "integrations.sdpa" in example and not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        return "torch before 2.11"
    return None


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if others_software(example) else pytest.mark.self_contained)
        for name, example in EXAMPLES.items()
    ],
)
def test_the_examples_run(name, tmp_path):
    if reason := why_not(EXAMPLES[name]):
        pytest.skip(reason)
    script = tmp_path / "this.py"
    script.write_text(EXAMPLES[name], encoding="utf-8")
    command = [sys.executable, "-W", "ignore"]
    if "# torchrun --nproc-per-node 2 this.py" in EXAMPLES[name]:
        devices = torch.cuda.device_count() or 2
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(min(devices, 2))]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(script)], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_example_is_overlooked(page):
    """Those of the READMEs are run by tests beside them, which count them."""
    languages = re.findall(r"^\s*(?:```|~~~)(\S+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert len([x for x in languages if x.startswith("py")]) == len(read_examples(page))


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page}: {target}"


BENCHMARKS = [
    line.partition("#")[0].strip()
    for page in [*PAGES, *READMES]
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
    if "fap-bench " in line or "fap_testing.bench " in line
]


@pytest.mark.parametrize("command", BENCHMARKS)
def test_the_benchmark_commands_are_understood(command):
    """Measuring takes a GPU and minutes: commands and options are read here, but nothing is measured."""
    typer = pytest.importorskip("typer")
    from fap_testing.bench.cli import app

    name, *arguments = shlex.split(re.split("fap-bench|fap_testing.bench", command)[1])
    typer.main.get_command(app).commands[name].make_context(name, arguments)
