"""From the options of a sweep to its members: every variant at every k and every learning rate.

A variant is an architecture with options of its own. Where its L0 is not set by k, the weights of its
penalty take the place of the k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from softsae.architectures import ARCHITECTURES, options_field
from softsae.checks import nearest_choice
from softsae.config import AutoencoderConfig, RunConfig, TrainConfig
from softsae.keys import unknown
from softsae.options import SweepOptions

LETTERS = {"k": "k", "l1_weight": "w"}  # in a name, before the value that sets L0


class Member(NamedTuple):
    """config: what is trained. variant: whose line on the frontier it is on. group: what differs from it
    in nothing but the learning rate has the same."""

    config: RunConfig
    variant: str
    group: str


class Variant(NamedTuple):
    """name: its own or the architecture's. changes, train: what differs from the shared options."""

    name: str
    named: bool
    architecture: str
    changes: dict[str, Any]
    train: dict[str, Any]

    @property
    def dial(self) -> str:
        return ARCHITECTURES[self.architecture][0].dial

    @property
    def has_dial(self) -> bool:
        """Whether it says itself what sets its L0."""
        holder = self.changes if self.dial == "k" else self.changes.get(options_field(self.architecture), {})
        return self.dial in holder

    def at(self, value: float | None) -> dict[str, Any]:
        """Its changes with the dial at a value, None for where it is."""
        if value is None:
            return self.changes
        if self.dial == "k":
            return {**self.changes, "k": value}
        name = options_field(self.architecture)
        return {**self.changes, name: {**self.changes.get(name, {}), self.dial: value}}


def members(options: SweepOptions, train: TrainConfig) -> dict[str, Member]:
    """The members by name, such as softsae-k32, topk-k32-lr0.001 or relu-w0.1.

    Args:
        options: of softsae sweep.
        train: the shared training options; `options` may say others in a variant.

    Raises ValueError, which names the option, for one that is unknown, wrong or of no use to any
    member, and for two members of one name.
    """
    variants = variants_of(options)
    check_shared(options, variants, train)
    dials = {"k": listed(options.k), "l1_weight": listed(options.l1_weight)}
    rates = listed(options.lr)
    found: dict[str, Member] = {}
    for variant in variants:
        own = overlay(train, variant.train, f"{variant.name}.train")
        for value in [None] if variant.has_dial else dials.get(variant.dial) or [None]:
            config = autoencoder(options.autoencoder, variant, value)
            group = variant.name
            if not (variant.named and variant.has_dial):
                group += f"-{LETTERS.get(variant.dial, variant.dial)}{dial_of(config):g}"
            for lr in [own.lr] if "lr" in variant.train else rates or [own.lr]:
                name = f"{group}-lr{lr:g}" if len(rates) > 1 and "lr" not in variant.train else group
                if name in found:
                    raise ValueError(f"two autoencoders of the sweep are called {name!r}; give one a name")
                found[name] = Member(RunConfig(config, dataclasses.replace(own, lr=lr)), variant.name, group)
    return found


def variants_of(options: SweepOptions) -> list[Variant]:
    """Those of --architectures, then those of `autoencoders`."""
    found = [Variant(name, False, name, {"architecture": name}, {}) for name in listed(options.architectures)]
    known = [f.name for f in dataclasses.fields(AutoencoderConfig)] + ["name", "train"]
    for number, entry in enumerate(options.autoencoders):
        where = f"autoencoders[{number}]"
        if "architecture" not in entry:
            raise ValueError(f"{where}={entry!r} needs an architecture")
        check_names(where, entry, known)
        for name in ("train", options_field(entry["architecture"])):
            if not isinstance(entry.get(name, {}), Mapping):
                raise ValueError(f"{where}: {name}={entry[name]!r} must be options by name")
        rest = {name: value for name, value in entry.items() if name not in ("name", "train")}
        name = entry.get("name", entry["architecture"])
        found.append(Variant(name, "name" in entry, entry["architecture"], rest, entry.get("train", {})))
    if not found:
        raise ValueError("--architectures is needed, or a list of autoencoders in a --config file")
    for variant in found:
        nearest_choice("architectures", variant.architecture, ARCHITECTURES)
    return found


def check_shared(options: SweepOptions, variants: list[Variant], train: TrainConfig) -> None:
    """Raises ValueError for what is given twice, or is of no use to any variant."""
    shared, architectures = options.autoencoder, [variant.architecture for variant in variants]
    if shared.architecture != AutoencoderConfig.architecture:
        raise ValueError(f"autoencoder.architecture={shared.architecture!r}: use --architectures")
    held = [options_field(architecture) for architecture in architectures]
    for name in (*shared.sections(), "options"):
        default = None if name == "options" else ARCHITECTURES[name][0]()
        if name not in held and getattr(shared, name) != default:
            raise ValueError(
                f"autoencoder.{name}: options are given, but the architectures are {', '.join(architectures)}"
            )
    if options.k and shared.k != AutoencoderConfig.k:
        raise ValueError(f"k={options.k} and autoencoder.k={shared.k:g}: give one of them")
    if options.lr and train.lr is not None:
        raise ValueError(f"lr={options.lr} and train.lr={train.lr:g}: give one of them")
    turned = {variant.dial for variant in variants if not variant.has_dial}
    for dial in LETTERS:
        if getattr(options, dial) and dial not in turned:
            given = f"{dial}={getattr(options, dial)}"
            raise ValueError(f"{given} does not set the L0 of any of {', '.join(architectures)}")


def autoencoder(shared: AutoencoderConfig, variant: Variant, value: float | None) -> AutoencoderConfig:
    """The shared options, those of other architectures left out, with the variant's."""
    names = [f.name for f in dataclasses.fields(AutoencoderConfig)]
    others = {*shared.sections(), "options"} - {options_field(variant.architecture)}
    base = {name: getattr(shared, name) for name in names if name not in others}
    changes = dict(variant.at(value))
    for name, new in changes.items():
        if name in others:
            raise ValueError(f"{variant.name}: {name} is given, the architecture is {variant.architecture!r}")
        if dataclasses.is_dataclass(base.get(name)):
            changes[name] = overlay(base[name], new, f"{variant.name}.{name}")
        elif isinstance(base.get(name), dict):  # options of a registered architecture
            changes[name] = {**base[name], **new}
    try:
        return AutoencoderConfig(**{**base, **changes})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{variant.name}: {error}") from None


def dial_of(config: AutoencoderConfig) -> float:
    """The value of what sets the L0 of an autoencoder."""
    return config.k if config.section.dial == "k" else getattr(config.section, config.section.dial)


def overlay(config, changes: Mapping[str, Any], where: str):
    """A copy of a dataclass with other values, sections within it likewise."""
    if not isinstance(changes, Mapping):
        raise ValueError(f"{where}={changes!r} must be options by name")
    known = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    check_names(where, changes, known)
    made = {
        name: overlay(known[name], new, f"{where}.{name}") if dataclasses.is_dataclass(known[name]) else new
        for name, new in changes.items()
    }
    try:
        return dataclasses.replace(config, **made)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def check_names(where: str, given: Iterable[str], known: Iterable[str]):
    """Raises ValueError, with the nearest one, for a name that is no option."""
    keys = {f"{where}.{name}": False for name in known}
    for name in given:
        if f"{where}.{name}" not in keys:
            raise ValueError(unknown(f"{where}.{name}", keys))


def listed(value) -> list:
    """An option that is one value or several."""
    return list(value) if isinstance(value, (list, tuple)) else [value]
