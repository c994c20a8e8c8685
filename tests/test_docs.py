"""Every Python example of the pages under docs/ runs; those of one page run one after the other."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
import torch.nn.attention

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    page.relative_to(ROOT / "docs").as_posix()
    for page in ROOT.glob("docs/integrations/*.md")
    if "```python" in page.read_text(encoding="utf-8")
)
CANNOT_RUN = {
    "integrations/flash_attn.md": importlib.util.find_spec("flash_attn") is not None,
    "integrations/diffusers.md": importlib.util.find_spec("diffusers") is None,
    "integrations/ring_and_ulysses.md": importlib.util.find_spec("ring_flash_attn") is None,
    "integrations/transformers.md": importlib.util.find_spec("transformers") is None,
    "integrations/sdpa.md": not hasattr(torch.nn.attention, "register_flash_attention_impl"),
}
# What torchrun would set.
ONE_PROCESS = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "0",
}


@pytest.mark.filterwarnings("ignore:transformers has been imported before")
@pytest.mark.parametrize("page", PAGES)
def test_the_examples_run(page, monkeypatch):
    if CANNOT_RUN.get(page):
        pytest.skip("it says what this environment lacks")
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for name, value in ONE_PROCESS.items():
        monkeypatch.setenv(name, value)
    examples = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    assert examples
    exec(compile(examples, page, "exec"), {})


def test_links_lead_somewhere():
    for page in ROOT.glob("docs/**/*.md"):
        for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
            assert "://" in target or (page.parent / target).exists(), f"{page}: {target}"
