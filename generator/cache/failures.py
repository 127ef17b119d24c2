"""What didn't compile is remembered by key: compiling it again would fail again, after the same wait."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from pathlib import Path

from ..errors import CompileError
from .store import Store
from .trust import check_owner, private, read, restrict

RETRY_VARIABLE = "ONELAUNCH_RETRY"
RECORD = "failure.json"


def folder(store: Store, key: str) -> Path:
    """Where a failed build's log, source and record are."""
    return store.root / "failed" / key[:16]


def remember(store: Store, error: CompileError) -> None:
    """Writes the record of a failure that would repeat itself; others are left out (see CompileError.lasting)."""
    if not error.lasting:
        return
    noted = {
        "key": error.key,
        "message": str(error),
        "command": error.command,
        "log": str(error.log),
        "source": str(error.source),
        "when": time.time(),
    }
    with contextlib.suppress(OSError):
        path = private(folder(store, error.key)) / RECORD
        new = path.with_name(f"{RECORD}.{os.getpid()}")
        new.write_text(json.dumps(noted, indent=1) + "\n", encoding="utf-8")
        restrict(new)
        os.replace(new, path)


def forget(store: Store, key: str) -> None:
    """Removes a record, and the log and source with it."""
    if folder(store, key).exists():
        shutil.rmtree(folder(store, key), ignore_errors=True)


def recall(store: Store, key: str, since: float = 0.0) -> CompileError | None:
    """The error of an earlier build of a key, or None; with ``since``, only if it failed after that time."""
    path = folder(store, key) / RECORD
    try:
        for place in (store.root, path.parent.parent, path.parent):
            check_owner(place)
        noted = json.loads(read(path))
        when = float(noted["when"])
        if noted["key"] != key or when < since:
            return None
        return CompileError(
            f"{noted['message']} It failed so on {time.strftime('%Y-%m-%d at %H:%M:%S', time.localtime(when))}, and is "
            f"tried again only when its key changes, with `onelaunch build --retry`, or with {RETRY_VARIABLE}=1.",
            key=key,
            command=str(noted["command"]),
            log=Path(noted["log"]),
            source=Path(noted["source"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def retry_wanted() -> bool:
    """Whether $ONELAUNCH_RETRY says to compile again what failed before."""
    return os.environ.get(RETRY_VARIABLE, "") not in ("", "0")
