"""Remembers, by key, sources that a compiler or linker refused: another build would fail in the same way.

Only errors of the source are remembered (CompileError.lasting). Other causes, such as a signal, a full disk or a
missing header, may be gone the next time.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from pathlib import Path

from ..errors import CompileError
from ..variables import RETRY_VARIABLE
from . import files
from .store import Store
from .trust import private, read, restrict

RECORD = "failure.json"


def folder(store: Store, key: str) -> Path:
    """The folder with a failed build's log, source and record."""
    return store.root / "failed" / key[:16]


def remember(store: Store, error: CompileError) -> None:
    """Writes the record of a lasting failure."""
    if not error.lasting:
        return
    noted = {
        "id": uuid.uuid4().hex,
        "key": error.key,
        "message": str(error),
        "command": error.command,
        "log": str(error.log),
        "source": str(error.source),
        "when": time.time(),
    }
    with contextlib.suppress(OSError):
        path = private(folder(store, error.key)) / RECORD
        files.replace(path, json.dumps(noted, indent=1) + "\n")
        restrict(path)


def forget(store: Store, key: str) -> None:
    """Removes a record, and the log and source with it, from a folder that is marked as a cache of onelaunch."""
    if os.path.lexists(folder(store, key)) and store.is_marked:
        files.remove(folder(store, key))


def recall(store: Store, key: str) -> CompileError | None:
    """The error of an earlier build of a key, or None."""
    noted = _record(store, key)
    if noted is None:
        return None
    return CompileError(
        f"{noted['message']} This build failed on {noted['when']} and is not retried until its inputs change; use "
        f"`onelaunch build --retry` or {RETRY_VARIABLE}=1.",
        key=key,
        command=noted["command"],
        log=Path(noted["log"]),
        source=Path(noted["source"]),
    )


def mark(store: Store, key: str) -> str:
    """The identity of a key's latest failure, independent of clocks; "" if there is none."""
    noted = _record(store, key)
    return "" if noted is None else noted["id"]


def _record(store: Store, key: str) -> dict[str, str] | None:
    path = folder(store, key) / RECORD
    try:
        store.check(path.parent.parent, path.parent)
        noted = json.loads(read(path))
        strings = {name: str(noted[name]) for name in ("id", "message", "command", "log", "source")}
        when = time.strftime("%Y-%m-%d at %H:%M:%S", time.localtime(float(noted["when"])))
        return {**strings, "when": when} if noted["key"] == key else None
    except (OSError, OverflowError, RecursionError, ValueError, KeyError, TypeError):
        return None


def retry_wanted() -> bool:
    """Whether $ONELAUNCH_RETRY requests that failed builds are tried again."""
    return RETRY_VARIABLE.is_on()
