"""Finds and runs programs such as compilers, and caches their answers for later processes."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from ..cache.store import Store
from ..errors import StoreError, ToolchainError
from . import environment

ANSWERS_NOTE = "compilers"
"""A note in the user's cache: {program: {"path", "size", "mtime_ns", "answer"}}."""

LAUNCHERS = frozenset({"ccache", "sccache", "distcc", "icecc", "buildcache"})
_TIMEOUT_SECONDS = 60.0

T = TypeVar("T")
_new_answers: dict[str, dict[str, Any]] = {}


class Rejected(Exception):
    """A candidate can't be used; the text says why. Not raised outside of build/."""


def locate(name: str) -> Path:
    """The absolute path of a program. Links aren't resolved: clang++ and ccache depend on the name they are called by.

    Raises:
        Rejected: there is none.
    """
    found = shutil.which(name, path=environment.search_path())
    if found is None:
        raise Rejected(f"there is no program {name!r}")
    return Path(os.path.abspath(found))


def run(*command: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a short command in the clean environment.

    Raises:
        Rejected: it doesn't start, or doesn't end within a minute.
    """
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            env=environment.clean(),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Rejected(f"{command[0]} doesn't run: {error}") from error
    return done.returncode, done.stdout, done.stderr


def version_of(program: Path) -> str:
    """What a program prints to stdout for ``--version``.

    Raises:
        Rejected: it fails, or prints nothing to stdout. (A dynamic linker's message on stderr is no version.)
    """
    status, text, errors = run(program, "--version")
    if status != 0 or not text.strip():
        said = (text.strip() or errors.strip())[-200:] or "no output"
        raise Rejected(f"{program} --version ended with status {status}: {said}")
    return text.strip()


def answer(program: Path, ask: Callable[[Path], str]) -> str:
    """ask(program), or its result in an earlier process if the binary is unchanged.

    A script or a launcher runs each time, because the program behind it may have changed.
    """
    state = _state(program)
    if state is None:
        return ask(program)
    known = _new_answers.get(str(program)) or _known_answers().get(str(program))
    if known is not None and {**known, "answer": ""} == state and isinstance(known["answer"], str):
        return known["answer"]
    text = ask(program)
    _new_answers[str(program)] = {**state, "answer": text}
    return text


def save_answers() -> None:
    """Writes new answers to the user's cache folder, if it exists. Errors are ignored: programs then run again."""
    if not _new_answers:
        return
    with contextlib.suppress(OSError, StoreError):
        store = Store()
        if not store.root.is_dir():
            return
        merged = {**_known_answers(), **_new_answers}
        current = {name: known for name, known in merged.items() if _state(Path(name)) == {**known, "answer": ""}}
        store.write_note(ANSWERS_NOTE, current)
        _new_answers.clear()


def reset() -> None:
    """Forgets the answers of this process that aren't saved."""
    _new_answers.clear()


def first(what: str, candidates: Iterable[tuple[str, Callable[[str], T]]], advice: str) -> T:
    """The result of the first candidate (a place, and a probe that takes the origin) that isn't rejected.

    Raises:
        ToolchainError: all are rejected; the message lists each place with its reason.
    """
    tried: list[str] = []
    for place, probe in candidates:
        skipped = "".join(f"; skipped {line}" for line in tried if "in the environment" in line)
        try:
            return probe(place + skipped)
        except Rejected as why:
            tried.append(f"{place}: {why}")
    raise ToolchainError(f"{what} was not found. Tried:\n  " + "\n  ".join(tried) + f"\n{advice}")


def _state(program: Path) -> dict[str, Any] | None:
    """Values that differ if a binary changed; None for a script, a launcher or an unreadable file."""
    try:
        real = program.resolve()
        status = real.stat()
        with open(real, "rb") as file:
            binary = file.read(4) == b"\x7fELF"
    except OSError:
        return None
    if not binary or real.name in LAUNCHERS:
        return None
    return {"path": str(real), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "answer": ""}


def _known_answers() -> dict[str, dict[str, Any]]:
    try:
        known = Store().read_note(ANSWERS_NOTE) or {}
        return {name: dict(noted) for name, noted in known.items() if "answer" in noted}
    except (ValueError, TypeError, StoreError):
        return {}
