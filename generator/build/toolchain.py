"""Finds the compilers of a build, checks whether they fit each other, and reads their versions. Needs no variables.

Nothing runs at import. The first search starts a few short programs. Its result is cached for the process, and a
binary's answer also for later processes (see programs.answer).
"""

from __future__ import annotations

import functools
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..errors import ToolchainError
from ..variables import ARCHITECTURE_VARIABLE
from . import environment, host, programs, toolkit
from .architectures import (
    DEFAULT_ARCHITECTURES,
    architectures,
    current_architectures,
    gencode_flags,
)
from .host import HostCompiler, find_host_compiler
from .toolkit import CudaToolkit, find_toolkit

__all__ = [
    "ARCHITECTURE_VARIABLE",
    "DEFAULT_ARCHITECTURES",
    "CudaToolkit",
    "HostCompiler",
    "ToolchainError",
    "Tools",
    "architectures",
    "check_pair",
    "current_architectures",
    "describe",
    "find_host_compiler",
    "find_ninja",
    "find_toolkit",
    "find_tools",
    "gencode_flags",
    "preflight_cuda",
    "reset",
]

NOT_USABLE = "not usable"
"""The value of a row of describe() that failed."""

T = TypeVar("T")


@dataclass(frozen=True)
class Tools:
    """The compilers of one target.

    Attributes:
        compiler: the host compiler.
        toolkit: the CUDA toolkit, None for the CPU target.
    """

    compiler: HostCompiler
    toolkit: CudaToolkit | None

    def versions(self) -> dict[str, str]:
        """The compilers' versions for the key, without paths."""
        versions = {"host_compiler": " ".join((self.compiler.version, *self.compiler.flags))}
        if self.toolkit is not None:
            versions["nvcc"] = self.toolkit.version
            versions["nvcc_build"] = self.toolkit.build
        return versions


def find_tools(target: str) -> Tools:
    """The compilers for a target, "cuda" or "cpu". A build checks whether they fit each other.

    Raises:
        ToolchainError: one is missing.
    """
    cuda = find_toolkit() if target == "cuda" else None
    return Tools(find_host_compiler(), cuda)


def find_ninja() -> Path:
    """ninja, see host.find_ninja.

    Raises:
        ToolchainError: there is none that runs.
    """
    return host.find_ninja()[0]


def preflight_cuda() -> tuple[CudaToolkit, HostCompiler, Path]:
    """The tools of a CUDA build: a toolkit, a host compiler that fits it, and ninja. Raises ToolchainError."""
    cuda, compiler, ninja = find_toolkit(), find_host_compiler(), find_ninja()
    check_pair(cuda, compiler)
    return cuda, compiler, ninja


def check_pair(cuda: CudaToolkit, compiler: HostCompiler) -> None:
    """Checks the host compiler against the limit in the toolkit's own header.

    Compilers that are neither GCC nor Clang aren't checked here.

    Raises:
        ToolchainError: nvcc would refuse this compiler.
    """
    try:
        header = (cuda.include / "crt" / "host_config.h").read_text(errors="replace")
    except OSError as error:
        raise ToolchainError(f"nvcc's compiler limits can't be read: {error}. Reinstall CUDA.") from error
    if clang := re.search(r"\bclang version (\d+)", compiler.version):
        major, program = int(clang[1]), "clang++"
        limit = re.search(r"unsupported clang version! clang version must be less than (\d+)", header)
        newest = int(limit[1]) - 1 if limit else None
    elif gcc := re.search(r"\)\s+(\d+)\.\d", compiler.version):
        major, program = int(gcc[1]), "g++"
        limit = re.search(r"#\s*if\s+__GNUC__\s*>\s*(\d+)", header)
        newest = int(limit[1]) if limit else None
    else:
        return
    if newest is None or major <= newest:
        return
    names = [f"{program}-{number}" for number in range(newest, 8, -1)]
    name = next((n for n in names if shutil.which(n, path=environment.search_path())), None)
    choice = f"set CXX={name}, which is on PATH" if name else f"install one, then set CXX, as in CXX={names[0]}"
    raise ToolchainError(
        f"nvcc {cuda.version} ({cuda.nvcc}) accepts {program} up to version {newest}, but the host"
        f" compiler {compiler.path} ({compiler.origin}) is version {major}: {choice}."
    )


def describe(device: int | None = None) -> list[tuple[str, str, str]]:
    """Rows of (tool, value, where it came from). A failure is the row (tool, NOT_USABLE, error text)."""
    rows: list[tuple[str, str, str]] = []

    def add(tool: str, find: Callable[[], T], show: Callable[[T], tuple[str, str]]) -> T | None:
        try:
            found = find()
        except ToolchainError as error:
            rows.append((tool, NOT_USABLE, str(error)))
            return None
        rows.append((tool, *show(found)))
        return found

    def targets() -> tuple[str, ...]:
        names = architectures(device)
        gencode_flags(names, cuda)
        return names

    cuda = add("CUDA toolkit", find_toolkit, lambda t: (f"{t.home} ({t.version})", t.origin))
    compiler = add("host compiler", find_host_compiler, lambda c: (f"{c.path} {c.version}", c.origin))
    if cuda and compiler:
        check, header = functools.partial(check_pair, cuda, compiler), cuda.include / "crt/host_config.h"
        add("nvcc with host compiler", check, lambda _: ("fits", f"limits in {header}"))
    add("ninja", host.find_ninja, lambda found: (str(found[0]), found[1]))
    source = "default" if device is None else f"CUDA device {device}, or the default if no GPU is visible"
    if ARCHITECTURE_VARIABLE.read():
        source = f"{ARCHITECTURE_VARIABLE} in the environment"
    add("architectures", targets, lambda names: (", ".join(names), source))
    return rows


def reset() -> None:
    """Forgets every result of this process, so that the next call searches again."""
    for module in (host, toolkit, programs):
        module.reset()
