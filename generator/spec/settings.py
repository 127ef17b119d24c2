"""Parses settings that a user wrote as ``key=value,…``."""

from __future__ import annotations

from typing import Any

from ..errors import ConfigError
from .config import SETTINGS, KernelConfig
from .values import check_one_of


def parse_settings(text: str, base: KernelConfig | None = None) -> KernelConfig:
    """Parses ``key=value,…`` and applies it to a base configuration (None: the defaults). Fields are joined by ``+``.

    Raises:
        ConfigError: a part isn't ``key=value``, a key is unknown or given twice, or a value isn't allowed.
    """
    settings: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ConfigError(f"the setting {part!r} is not of the form key=value, for example num_backends=3.")
        check_one_of("the setting's key", name, tuple(SETTINGS))
        if name in settings:
            raise ConfigError(f"the setting {part!r} gives {name} a second time; give each key once.")
        settings[name] = SETTINGS[name].metadata["value"].read(name, value)
    return (base or KernelConfig()).replace(**settings)
