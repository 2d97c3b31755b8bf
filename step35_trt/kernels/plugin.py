"""Plugins are folders of sources beside the package; this loads their Python files as modules."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING

from step35_trt.kernels import interpreter
from step35_trt.resources import DATA

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

PACKAGE = "step35_plugins"
ROOT = DATA / "plugins"


def load(plugin: str, module: str, root: Path = ROOT) -> ModuleType:
    """`{root}/{plugin}/{module}.py` as the module `step35_plugins.{plugin}.{module}`.

    Files of a plugin import each other relatively. A process takes all its plugins from one root.

    Raises:
        ModuleNotFoundError: there is no such file.
    """
    for name, folder in ((PACKAGE, root), (f"{PACKAGE}.{plugin}", root / plugin)):
        if name not in sys.modules:
            spec = importlib.util.spec_from_loader(name, None, is_package=True)
            assert spec is not None
            package = importlib.util.module_from_spec(spec)
            package.__path__ = [str(folder)]
            sys.modules[name] = package
    if interpreter.wanted():
        interpreter.repair()
    return importlib.import_module(f"{PACKAGE}.{plugin}.{module}")
