"""One class a fault. Every message is a sentence: the argument, its value, what is allowed, what to do next."""

from __future__ import annotations

from pathlib import Path
from typing import Any


class OnelaunchError(Exception):
    """Base of every error that onelaunch raises on purpose."""


class ConfigError(OnelaunchError, ValueError):
    """A configuration that no kernel can be emitted for."""


class ArgumentError(OnelaunchError, ValueError):
    """A tensor or a number that a call cannot accept. Nothing was written."""


class ToolchainError(OnelaunchError, RuntimeError):
    """A compiler, linker or build tool that is missing or doesn't fit the others."""


class CompileError(OnelaunchError, RuntimeError):
    """A build that failed.

    Attributes:
        key: key of the entry that was being built.
        command: the failing compiler command, or "" if the log doesn't hold it.
        log: path of the full build log.
        source: path of the emitted source.
        lasting: whether another try would fail again; False where memory, disk or time ran out.
    """

    def __init__(self, message: str, *, key: str, command: str, log: Path, source: Path, lasting: bool = True) -> None:
        super().__init__(message)
        self.key, self.command, self.log, self.source, self.lasting = key, command, log, source, lasting

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are pickled by their positional arguments alone, and workers send them to their parents.
        return _compile_error, (str(self), self.key, self.command, self.log, self.source, self.lasting)


def _compile_error(message: str, key: str, command: str, log: Path, source: Path, lasting: bool) -> CompileError:
    return CompileError(message, key=key, command=command, log=log, source=source, lasting=lasting)


class StoreError(OnelaunchError, RuntimeError):
    """A cache folder or entry that can't be trusted or used."""


class JitPolicyError(OnelaunchError, RuntimeError):
    """A build or a load was needed where the policy forbids it (see onelaunch.freeze)."""


class LaunchError(OnelaunchError, RuntimeError):
    """The CUDA runtime refused a launch; the message carries its code and text."""
