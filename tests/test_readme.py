"""The front page says what is true: its example runs, and its commands are the ones CI runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.smoke
def test_the_example_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})


def test_the_test_command_is_the_one_ci_runs():
    (set_up, _) = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    demo, tests = set_up.splitlines()
    assert demo == "pip install nox && nox -s demo"
    assert tests.removeprefix("nox ") in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_links_lead_somewhere():
    for readme in [ROOT / "README.md", *ROOT.glob("packages/*/README.md")]:
        for target in re.findall(r"\]\(([^)#]+)", readme.read_text(encoding="utf-8")):
            assert "://" in target or (readme.parent / target).exists(), f"{readme}: {target}"
