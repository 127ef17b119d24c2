"""The exceptions of onelaunch, one class per kind of fault.

A message names the argument, its value, what is allowed and what to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


class OnelaunchError(Exception):
    """Base class of all errors that onelaunch raises."""


class ConfigError(OnelaunchError, ValueError):
    """A configuration that no kernel can be emitted for."""


class ArgumentError(OnelaunchError, ValueError):
    """An argument that a call can't accept. Nothing was written."""


class ToolchainError(OnelaunchError, RuntimeError):
    """A compiler, linker or build tool that is missing or doesn't fit the others."""


class CompileError(OnelaunchError, RuntimeError):
    """A build that failed.

    Attributes:
        key: key of the entry that was being built.
        command: the failing compiler command, or "" if it isn't in the log.
        log: path of the full build log.
        source: path of the emitted source.
        lasting: whether another try would fail again; False if memory, disk space or time ran out.
    """

    def __init__(self, message: str, *, key: str, command: str, log: Path, source: Path, lasting: bool = True) -> None:
        super().__init__(message)
        self.key, self.command, self.log, self.source, self.lasting = key, command, log, source, lasting

    def __reduce__(self) -> tuple[Any, ...]:
        # Ranks send each other this error, and by default pickle keeps only positional arguments.
        return _compile_error, (str(self), self.key, self.command, self.log, self.source, self.lasting)


def _compile_error(message: str, key: str, command: str, log: Path, source: Path, lasting: bool) -> CompileError:
    return CompileError(message, key=key, command=command, log=log, source=source, lasting=lasting)


class StoreError(OnelaunchError, RuntimeError):
    """A cache folder or entry that can't be trusted or used."""


class JitPolicyError(OnelaunchError, RuntimeError):
    """A build or a load was needed where the policy forbids it (see onelaunch.freeze)."""


class LaunchError(OnelaunchError, RuntimeError):
    """The CUDA runtime refused a launch; the message has its error code and text."""
