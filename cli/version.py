"""onelaunch --version: the version, and those of the toolchain."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

import onelaunch
from onelaunch.build import toolchain


def lines() -> Iterator[str]:
    """The version of onelaunch, then one line per tool; for an unusable tool, the reason."""
    yield f"onelaunch {onelaunch.__version__}"
    rows = [("python", platform.python_version(), ""), ("torch", metadata.version("torch"), "")]
    for tool, value, origin in [*rows, *toolchain.describe()]:
        reason = f": {origin.splitlines()[0]}" if value == toolchain.NOT_USABLE else ""
        yield f"{tool:23}  {value}{reason}"
