"""The exceptions of onelaunch, one class per kind of fault.

A message names the argument, its value, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class OnelaunchError(Exception):
    """Base class of all errors that onelaunch raises."""


class ConfigError(OnelaunchError, ValueError):
    """A configuration that no kernel can be emitted for. Change the setting that the message names."""


class ArgumentError(OnelaunchError, ValueError):
    """An argument that a call can't accept. Nothing was written. Pass what the message allows."""


class ToolchainError(OnelaunchError, RuntimeError):
    """A compiler or build tool is missing, or doesn't fit the others. `onelaunch doctor` says what to fix first."""


class CompileError(OnelaunchError, RuntimeError):
    """A build that failed. The message has the compiler's first error and the path of the whole log.

    What a compiler said about the source is remembered; ``onelaunch build --retry`` tries again.

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
    """A cache folder or entry that can't be trusted or used. Fix its owner or mode, or set ONELAUNCH_CACHE_DIR."""


class JitPolicyError(OnelaunchError, RuntimeError):
    """A build or a load was needed where onelaunch.freeze or ONELAUNCH_JIT forbids it. Build it ahead of time."""


class AuditError(OnelaunchError, RuntimeError):
    """An element of a destination isn't what a refresh writes there. Find who else writes that memory.

    Attributes:
        name: the destination, as messages of bind() name it, such as "backends[1].page_indices".
        backend: index of the backend in its plan; of several that share the tensor, the first.
        field: name of the field.
        row, column: index of the element; column is None where the tensor has one dimension.
        found, expected: what the element holds, and what a refresh with the audit's inputs writes; a bool as 0 or 1.
    """

    def __init__(
        self, name: str, backend: int, field: str, row: int, column: int | None, found: int, expected: int
    ) -> None:
        super().__init__(name, backend, field, row, column, found, expected)
        self.name, self.backend, self.field, self.row, self.column = name, backend, field, row, column
        self.found, self.expected = found, expected

    def __str__(self) -> str:
        place = f"{self.row}" if self.column is None else f"{self.row}, {self.column}"
        return (
            f"{self.name}[{place}] is {self.found}; a refresh with the audit's inputs writes {self.expected}. Somebody "
            "else wrote it, or no refresh with these inputs ran. Run the plan again (after forget(), with "
            "writes='verified'), and look for what else writes this memory."
        )


class LaunchError(OnelaunchError, RuntimeError):
    """The CUDA runtime refused a launch. The message has its error code and text, and whose error it may be."""


def missing(owner: str, name: str, instead: Mapping[str, str]) -> AttributeError:
    """The error of a __getattr__. For one release it says what took the place of a removed name."""
    text = f"{owner} has no attribute {name!r}"
    return AttributeError(f"{text}: it is gone since 0.2; {instead[name]}." if name in instead else text)


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """A sentence, after a space, that suggests the nearest of some names; "" if none is near."""
    # Below 0.7 "gpu" is near "cpu". Very long names would take difflib seconds.
    found = difflib.get_close_matches(name[:40], names, n=1, cutoff=0.7) if isinstance(name, str) else []
    return f" Did you mean {found[0]!r}?" if found else ""
