"""Several builds of fap_kernels in one process, so that old and new can take turns.

The package imports itself by relative names alone, so a copy that is loaded under another name is whole: it
has its own kernels, tables and caches.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from types import ModuleType

HERE = "here"


class Build(NamedTuple):
    """One build: what it is called, and the folder that holds its ``fap_kernels``; None is what is installed.

    Plain data, so that the processes that compile can load it as well.
    """

    name: str = HERE
    folder: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Build:
        """Read ``NAME=FOLDER``.

        Raises:
            ValueError: it is no name for a module, or names no folder with the package.
        """
        name, _, folder = text.partition("=")
        if not name.isidentifier() or name == HERE:
            raise ValueError(
                f"a build is NAME=FOLDER with a word other than {HERE!r} as its name, got {text!r}"
            )
        # A checkout will do as well.
        for source in (Path(folder), Path(folder) / "packages/fap-kernels/src"):
            if folder and (source / "fap_kernels/__init__.py").is_file():
                return cls(name, source.absolute())
        raise ValueError(f"{text!r} must name a folder that holds fap_kernels, or a checkout of it")

    def module(self, path: str = "") -> ModuleType:
        """Return the build's ``fap_kernels.<path>``."""
        package = "fap_kernels" if self.folder is None else f"fap_kernels_{self.name}"
        if self.folder is not None and package not in sys.modules:
            self._load(package)
        return importlib.import_module(f"{package}.{path}" if path else package)

    def _load(self, package: str) -> None:
        place = Path(self.folder or "") / "fap_kernels"
        spec = importlib.util.spec_from_file_location(
            package, place / "__init__.py", submodule_search_locations=[str(place)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{place} cannot be imported as a package")
        sys.modules[package] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
