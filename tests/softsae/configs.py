"""Configurations with the fields of SoftSAE's section and of the autoencoder side by side."""

from __future__ import annotations

import dataclasses

from softsae import AutoencoderConfig, SoftSAEConfig

OF_SOFTSAE = {field.name for field in dataclasses.fields(SoftSAEConfig)}


def model(**fields) -> AutoencoderConfig:
    section = {name: value for name, value in fields.items() if name in OF_SOFTSAE}
    rest = {name: value for name, value in fields.items() if name not in OF_SOFTSAE}
    return AutoencoderConfig(**rest, **({"softsae": SoftSAEConfig(**section)} if section else {}))
