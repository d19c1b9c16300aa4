"""Selection rules, each one file on the contract."""

from __future__ import annotations

import importlib

from softsae.architectures import ARCHITECTURES
from softsae.selectors.contract import Selection, Selector


def of(architecture: str) -> type[Selector]:
    """The rule of an architecture."""
    module, name = ARCHITECTURES[architecture][1].split(":")
    return getattr(importlib.import_module(module), name)


__all__ = ["Selection", "Selector", "of"]
