"""How Sphinx builds the documentation: `nox -s docs`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fap_api

ROOT = Path(__file__).parents[1]

project = "FlashAttention-Plus"
author = "The FlashAttention-Plus authors"
copyright = author  # noqa: A001 - Sphinx's name
version = release = fap_api.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
myst_heading_anchors = 3
autodoc_typehints = "none"  # docstrings say what a tensor holds
autodoc_member_order = "bysource"
napoleon_use_ivar = True
napoleon_custom_sections = [("Results", "params_style")]


def setup(app: Any) -> None:
    """Have pages and docstrings pass through the functions below, docstrings before napoleon reads them."""
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", name_results, priority=100)


def read_page(_app: Any, page: str, source: list[str]) -> None:
    """Show a package's README as its page, and lead links between files of the repository to pages."""
    if page.startswith("packages/"):
        source[0] = (ROOT / page / "README.md").read_text(encoding="utf-8")
    folder = (ROOT / page if page.startswith("packages/") else ROOT / "docs" / Path(page).parent).resolve()

    def relink(link: re.Match[str]) -> str:
        text, target, anchor = link.groups()
        if "://" in target or not target:
            return link[0]
        path = (folder / target).resolve().relative_to(ROOT)
        if path.name == "README.md":
            place = f"packages/{path.parts[1]}.md" if path.parts[0] == "packages" else "index.md"
        elif path.parts[0] == "docs":
            place = path.relative_to("docs").as_posix()
        else:
            return f"{text} (`{path}`)"
        return f"[{text}](/{place}{anchor or ''})"

    source[0] = re.sub(r"\[([^\]]+)\]\(([^)#\s]*)(#[^)\s]*)?\)", relink, source[0])


def name_results(_app: Any, _what: str, _name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Read "Returns:" as a list of names, as "Args:" is, where it is one."""
    for i, line in enumerate(lines[:-1]):
        if line.strip() == "Returns:" and re.match(r" +[\w, ]+: ", lines[i + 1]):
            lines[i] = line.replace("Returns:", "Results:")
