"""The keys of configuration files: which there are, and what a misspelt one was meant to be.

A key is the path of an option, `autoencoder.jumprelu.bandwidth`. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml


def keys_of(options: type, prefix: str = "") -> dict[str, bool]:
    """Every key of a dataclass of options, and whether it is a section, that is, a dataclass itself."""
    found = {}
    for name, kind in section_types(options).items():
        found[prefix + name] = kind is not None
        if kind is not None:
            found |= keys_of(kind, f"{prefix}{name}.")
    return found


def section_types(options: type) -> dict[str, type | None]:
    """Every field of a dataclass, and the dataclass that it holds or may hold, if any.

    None for a field that may hold a dict as well: its keys are not known here.
    """
    kinds, found = get_type_hints(options), {}
    for field in dataclasses.fields(options):
        kind = kinds[field.name]
        either = get_args(kind) if get_origin(kind) in (Union, UnionType) else [kind]
        free = any((get_origin(one) or one) is dict for one in either)
        found[field.name] = None if free else next(filter(dataclasses.is_dataclass, either), None)
    return found


def check_keys(options: type, values: Any, where: str) -> None:
    """Raises ValueError for a key of `values`, as YAML gives it, that is not an option.

    Args:
        where: the file's name, for the message.
    """
    known = keys_of(options)

    def check(values: Any, path: str):
        if not isinstance(values, dict):
            raise ValueError(f"{where}: {path or 'it'} must hold options by name, not {values!r}")
        for name, value in values.items():
            key = f"{path}.{name}" if path else str(name)
            if key not in known:
                raise ValueError(f"{where}: {unknown(key, known)}")
            if known[key] and value is not None:
                check(value, key)

    check(values, "")


def unknown(key: str, known: dict[str, bool], dashes: str = "") -> str:
    """That a key is not an option, and which one is near: in its last part first, then as a whole."""
    leaf = key.rpartition(".")[2]
    leaves: dict[str, list[str]] = {}
    for name in known:
        leaves.setdefault(name.rpartition(".")[2], []).append(name)
    near = difflib.get_close_matches(leaf, leaves, 1, 0.7)
    meant = ""
    if near:
        nearest = max(leaves[near[0]], key=lambda name: difflib.SequenceMatcher(None, name, key).ratio())
        meant = f"; did you mean {dashes}{nearest}?"
    return f"{dashes}{key} is not an option{meant}"


def read_yaml(file) -> Any:
    """What a YAML file holds; ValueError, with its name, for one that cannot be read."""
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a YAML file: {' '.join(str(error).split())}") from None


def build(options: type, values: dict, where: str):
    """A dataclass of options from nested values by key; ValueError names the file and the key."""
    check_keys(options, values, where)

    def made(kind: type, values: dict):
        held = section_types(kind)
        given = {
            name: made(held[name], value) if held[name] and value is not None else value
            for name, value in values.items()
        }
        return kind(**given)

    try:
        return made(options, values)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from None
