"""The host's tools: the C++ compiler, and ninja, which runs the compilers."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .programs import LAUNCHERS, Rejected, answer, first, locate, version_of


@dataclass(frozen=True)
class HostCompiler:
    """A C++ compiler that answers ``--version``.

    Attributes:
        path: absolute path, symbolic links not resolved.
        version: first line of ``--version`` without the program's name; keys contain it.
        origin: where it was found, and which environment variable was skipped because its value doesn't work.
        flags: the words of $CXX after the compiler's name, such as ("--sysroot=/x",).
    """

    path: Path
    version: str
    origin: str
    flags: tuple[str, ...] = ()


def find_host_compiler() -> HostCompiler:
    """The C++ compiler: $CXX, else c++, g++ or clang++ on PATH or beside the interpreter.

    A launcher in $CXX ("ccache g++") is dropped. A $CXX that doesn't run is skipped, and ``origin`` says so.

    Raises:
        ToolchainError: there is none.
    """
    return _compiler(os.environ.get("CXX", "").strip(), os.environ.get("PATH"))


def find_ninja() -> tuple[Path, str]:
    """ninja and where it was found: the ninja package's, else the one beside the interpreter, else the one on PATH.

    Raises:
        ToolchainError: there is none that runs.
    """
    return _ninja(os.environ.get("PATH"))


def reset() -> None:
    """Forgets every result, so that the next call searches again."""
    _compiler.cache_clear()
    _ninja.cache_clear()


@functools.cache
def _compiler(command: str, path: str | None) -> HostCompiler:
    places = [(f"{name} on PATH", name) for name in ("c++", "g++", "clang++")]
    if command:
        places.insert(0, (f"CXX={command!r} in the environment", command))
    return first(
        "A host C++ compiler",
        [(place, functools.partial(_probe, words)) for place, words in places],
        "Install GCC (the package g++) or set CXX to a compiler.",
    )


def _probe(command: str, origin: str) -> HostCompiler:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise Rejected(f"it can't be read: {error}") from None
    while words and Path(words[0]).name in LAUNCHERS:
        del words[0]
    if not words:
        raise Rejected("it names no compiler")
    program = locate(words[0])
    # GCC prints the name that it was called by; c++ and g++ are the same compiler.
    version = re.sub(r"^\S+ (?=\(.*\) \d)", "", answer(program, version_of).splitlines()[0])
    return HostCompiler(program, version, origin, tuple(words[1:]))


@functools.cache
def _ninja(path: str | None) -> tuple[Path, str]:
    candidates: list[tuple[str, Callable[[str], tuple[Path, str]]]] = [
        ("the ninja package", lambda origin: (_answering(_of_the_package()), origin)),
        ("beside the interpreter", lambda origin: (_answering(str(Path(sys.executable).parent / "ninja")), origin)),
        ("PATH", lambda origin: (_answering("ninja"), origin)),
    ]
    return first("ninja", candidates, "Run `pip install ninja`.")


def _of_the_package() -> str:
    # From its list of files: importing a module named ninja would run it, and it may be another package.
    try:
        files = importlib.metadata.files("ninja") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise Rejected(str(error)) from None
    for file in files:
        if file.name == "ninja" and (program := Path(str(file.locate()))).is_file():
            return str(program)
    raise Rejected("the installed package named ninja holds no such program")


def _answering(name: str) -> Path:
    program = locate(name)
    version_of(program)
    return program
