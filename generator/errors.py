"""One class a fault. Every message is a sentence: the argument, its value, what is allowed, what to do next."""

from __future__ import annotations

from pathlib import Path


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
    """

    def __init__(self, message: str, *, key: str, command: str, log: Path, source: Path) -> None:
        super().__init__(message)
        self.key, self.command, self.log, self.source = key, command, log, source


class StoreError(OnelaunchError, RuntimeError):
    """A cache folder or entry that can't be trusted or used."""


class JitPolicyError(OnelaunchError, RuntimeError):
    """A build or a load was needed where the policy forbids it (see onelaunch.freeze)."""


class LaunchError(OnelaunchError, RuntimeError):
    """The CUDA runtime refused a launch; the message carries its code and text."""
