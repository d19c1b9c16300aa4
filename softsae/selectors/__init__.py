"""Selection rules, each one file on the contract."""

from __future__ import annotations

import dataclasses
import importlib

from softsae.architectures import ARCHITECTURES, Section
from softsae.config import AutoencoderConfig
from softsae.selectors.contract import Selection, Selector


def of(architecture: str) -> type[Selector]:
    """The rule of an architecture."""
    rule = ARCHITECTURES[architecture][1]
    if not isinstance(rule, str):
        return rule
    module, name = rule.split(":")
    return getattr(importlib.import_module(module), name)


def register(name: str, section: type[Section], selector: type[Selector]):
    """Make AutoencoderConfig(architecture=name, options=section(...)) select by a rule of your own.

    Args:
        name: what configurations and checkpoints call it.
        section: a dataclass derived from `Section`, the options of the rule; its fields have defaults and
            are of types that JSON can hold. The rule finds them in `config.section`.
        selector: the rule, derived from `Selector`.

    A checkpoint holds the name and the options, not the code: what registers it has to be imported before
    such a checkpoint is loaded, on the command line by --plugin.

    Raises:
        TypeError: a section or selector that is derived from another class.
        ValueError: the name is built in, registered already, or the name of a field of AutoencoderConfig.
    """
    for what, given, base in (("section", section, Section), ("selector", selector, Selector)):
        if not (isinstance(given, type) and issubclass(given, base)):
            raise TypeError(f"{what}={given!r} must be a class derived from softsae.{base.__name__}")
    if not dataclasses.is_dataclass(section):
        raise TypeError(f"section={section!r} must be a dataclass")
    try:
        section()
    except TypeError as error:
        raise TypeError(f"section={section!r} must have a default for every field: {error}") from error
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name={name!r} must be an identifier")
    if name in ARCHITECTURES:
        rule = of(name)
        raise ValueError(f"name={name!r} is taken by {rule.__module__}.{rule.__qualname__}")
    if name in {field.name for field in dataclasses.fields(AutoencoderConfig)}:
        raise ValueError(f"name={name!r} is a field of AutoencoderConfig")
    ARCHITECTURES[name] = section, selector


__all__ = ["Selection", "Selector", "of", "register"]
