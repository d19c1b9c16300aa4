"""Modules of the user's own, imported because the command line names them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path


def import_plugin(plugin: str):
    """Import a module by its name or, once in a process, a .py file under the name of its stem.

    Raises ImportError, and ValueError for a file whose stem is the name of another module.
    """
    if not plugin.endswith(".py"):
        try:
            importlib.import_module(plugin)
        except ModuleNotFoundError as error:
            raise ImportError(f"--plugin {plugin!r}: {error}; a file is given with its .py") from error
        return
    path = Path(plugin).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"--plugin {plugin!r} does not exist")
    loaded = sys.modules.get(path.stem)
    if loaded is not None:
        if getattr(loaded, "__file__", None) == str(path):
            return
        raise ValueError(f"--plugin {plugin!r}: a module {path.stem!r} is there already")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
