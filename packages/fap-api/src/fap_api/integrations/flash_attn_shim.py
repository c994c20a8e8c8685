"""The name flash_attn, for software that imports it: ``install()`` and ``uninstall()``.

    import fap_api.integrations.flash_attn_shim

    fap_api.integrations.flash_attn_shim.install()
    from flash_attn import flash_attn_func   # ours

It holds in this process only. ``importlib.metadata``, where libraries look before they import, is told too.
transformers looks once, so install before it is imported; ``attn_implementation="flash_attention_2"`` then
runs here unmodified.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from importlib.machinery import ModuleSpec
from importlib.metadata import Distribution, DistributionFinder
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar, NoReturn

from fap_api import _call, _kvcache_call

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

__all__ = ["VERSION", "install", "installed", "uninstall"]

# From 2.8.4 on, TransformerEngine does not import flash-attn's binary extension by its own name.
VERSION = "2.8.4"

# Where each module's names come from.
_SOURCES = {
    "flash_attn.flash_attn_interface": "fap_api.integrations._flash_attn_interface",
    "flash_attn.bert_padding": "fap_api.padding",
    "flash_attn.layers.rotary": "fap_api.rotary",
}
_PACKAGES = ("flash_attn", "flash_attn.layers")
_MARK = "__fap_shim__"

# What install(replace=True) has put aside.
_hidden: dict[str, ModuleType] = {}


def install(*, replace: bool = False) -> None:
    """Put modules called ``flash_attn`` into this process, backed by fap_api.

    They are ``flash_attn``, ``flash_attn.flash_attn_interface``, ``flash_attn.bert_padding``,
    ``flash_attn.layers`` and ``flash_attn.layers.rotary``. Installing twice does nothing. The back end
    ``cuda``, which is the original package, cannot run meanwhile.

    Args:
        replace: hide an installed flash-attn until :func:`uninstall`. What has imported it keeps it.

    Raises:
        RuntimeError: flash-attn is installed, and ``replace`` is False.
    """
    if installed():
        return
    spec = find_spec("flash_attn")
    if spec is not None and not replace:
        raise RuntimeError(
            f"replace must be True to hide the installed flash_attn ({spec.origin or spec.loader}), got "
            "False; without it call fap_api's functions by their own names"
        )
    if "transformers" in sys.modules:
        warnings.warn(
            "transformers has been imported before flash_attn_shim.install() and remembers which packages it "
            "found; import it afterwards for attn_implementation='flash_attention_2'",
            stacklevel=2,
        )
    for name in [name for name in sys.modules if name.split(".")[0] == "flash_attn"]:
        _hidden[name] = sys.modules.pop(name)
    sys.modules.update(_modules())
    sys.meta_path.insert(0, _Finder())
    _forget_choices()


def uninstall() -> None:
    """Take the modules out of this process and bring back what they hid. What imported them keeps them."""
    if not installed():
        return
    for name in (*_PACKAGES, *_SOURCES):
        sys.modules.pop(name, None)
    sys.modules.update(_hidden)
    _hidden.clear()
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
    _forget_choices()


def installed() -> bool:
    """Tell whether the name flash_attn is this module's at present."""
    return hasattr(sys.modules.get("flash_attn"), _MARK)


def _forget_choices() -> None:
    """Have every call ask anew whether the back end ``cuda`` can run it."""
    _call._plans.clear()
    _kvcache_call._plans.clear()


def _modules() -> dict[str, ModuleType]:
    """Make the modules, filled and linked to one another."""
    modules = {name: ModuleType(name, "Backed by fap_api.") for name in (*_PACKAGES, *_SOURCES)}
    for name, module in modules.items():
        module.__spec__ = ModuleSpec(name, None, origin="fap_api", is_package=name in _PACKAGES)
        module.__package__ = name if name in _PACKAGES else name.rpartition(".")[0]
        setattr(module, _MARK, True)
        if name in _PACKAGES:
            module.__path__ = []
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(modules[parent], leaf, module)
        source = importlib.import_module(_SOURCES[name]) if name in _SOURCES else None
        for public in source.__all__ if source else ():
            setattr(module, public, getattr(source, public))
    top, interface = modules["flash_attn"], modules["flash_attn.flash_attn_interface"]
    top.__dict__["__version__"] = VERSION
    for public in vars(interface):
        if public.startswith("flash_attn_"):
            setattr(top, public, getattr(interface, public))
    return modules


class _Finder(DistributionFinder):
    """Finds the metadata of a distribution called flash-attn, and no modules."""

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008 - as its base
    ) -> Iterable[Distribution]:
        if context.name is None or re.sub(r"[-_.]+", "-", context.name).lower() == "flash-attn":
            yield _FlashAttn()

    def find_spec(self, *_: object) -> None:
        """Leave modules to sys.modules."""


class _FlashAttn(Distribution):
    _TEXTS: ClassVar[dict[str, str]] = {
        "METADATA": f"Metadata-Version: 2.1\nName: flash-attn\nVersion: {VERSION}\nSummary: fap_api's\n",
        "top_level.txt": "flash_attn\n",
    }

    def read_text(self, filename: str | os.PathLike[str]) -> str | None:
        return self._TEXTS.get(str(filename))

    def locate_file(self, path: str | os.PathLike[str]) -> NoReturn:
        raise FileNotFoundError(f"{path}: flash-attn is installed in this process only, without files")
