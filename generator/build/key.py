"""The ingredients of a build, and their digest: its key."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..cache.manifest import key_of
from ..emit import binding, override
from ..emit import render as emission
from ..spec.config import SCHEMA_VERSION, KernelConfig
from . import compile as compiler


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a build's result.

    Attributes:
        symbol: name of the kernel; the import name of its binding is ``module``.
        source: emitted CUDA, or C++ for the CPU target.
        binding: C++ of the binding.
        archs: GPU architectures; () on the CPU target.
        flags: all flags that affect the object, see compile.flags.
        compilers: Tools.versions().
        config: KernelConfig.to_dict(); None for a kernel without a configuration.
        edited: the path of the hand-edited source; None if the templates emitted it.
    """

    symbol: str
    source: str
    binding: str
    archs: tuple[str, ...]
    flags: tuple[str, ...]
    compilers: Mapping[str, str]
    config: Mapping[str, Any] | None = None
    edited: Path | None = None

    @property
    def module(self) -> str:
        """The import name that is compiled into the binding."""
        return binding.module_name(self.symbol)

    @cached_property
    def ingredients(self) -> dict[str, Any]:
        """The contents of the key, without paths and times. The manifest has them too, for explain to compare."""
        return {
            "schema": SCHEMA_VERSION,
            **({"config": dict(self.config)} if self.config is not None else {}),
            "source": _sha256(self.source),
            **({"edited": True} if self.edited else {}),
            "binding": _sha256(self.binding),
            "flags": list(self.flags),
            "archs": list(self.archs),
            "machine": platform.machine(),
            "compilers": dict(self.compilers),
        }

    @cached_property
    def key(self) -> str:
        """64 hex digits."""
        return key_of(self.ingredients)


def recipe(
    config: KernelConfig, archs: tuple[str, ...], versions: Mapping[str, str], edit: override.Edited | None = None
) -> Recipe:
    """Renders a configuration; call it once per build.

    Args:
        archs: GPU architectures; () on the CPU target.
        versions: Tools.versions().
        edit: the hand-edited source that takes the place of the emitted one.

    Raises:
        ToolchainError: an architecture can't be read.
    """
    return Recipe(
        config.symbol,
        edit.text if edit else emission.render(config),
        binding.render_binding(config, binding.module_name(config.symbol)),
        archs,
        tuple(compiler.flags(config.target, archs)),
        versions,
        config.to_dict(),
        edit.path if edit else None,
    )


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
