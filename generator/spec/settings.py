"""Parses settings that a user wrote as ``key=value,…``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ConfigError
from .config import SETTINGS, KernelConfig
from .values import check_setting

# The settings that a user declares fields with: tables by name.
DECLARED = ("declare", "inputs", "constants", "sources", "maps")


def parse_settings(text: str, base: KernelConfig | None = None, declared: Mapping[str, Any] = {}) -> KernelConfig:
    """Reads ``key=value,…`` over a base configuration (the defaults if None); fields are joined by ``+``.

    ``declare`` is JSON. ``declared`` are further settings of DECLARED, as values.

    Raises:
        ConfigError: a part isn't ``key=value``, a key is unknown or given twice, or a value isn't allowed.
    """
    settings: dict[str, Any] = {}
    for part in filter(None, (piece.strip() for piece in _parts(text))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ConfigError(f"the setting {part!r} is not of the form key=value, for example num_backends=3.")
        check_setting(name, SETTINGS)
        if name in settings:
            raise ConfigError(f"the setting {part!r} gives {name} a second time; give each key once.")
        settings[name] = SETTINGS[name].metadata["value"].read(name, value)
    return (base or KernelConfig()).replace(**settings, **declared)


def _parts(text: str) -> Iterator[str]:
    """The text between the commas, but for those within braces: JSON and its formulas have some of their own."""
    depth = start = 0
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and depth == 0:
            yield text[start:index]
            start = index + 1
    yield text[start:]
