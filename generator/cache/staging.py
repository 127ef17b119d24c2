"""Private folders of processes: named after the process, locked while it lives, swept when it is gone."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from . import files, lock, trust

# It is unknown whether a process on another host lives; its folder is swept after this time.
ABANDONED_SECONDS = 24 * 3600.0
# Without locks, a process id that looks dead may belong to another container with the same host name.
_UNKNOWN_SECONDS = 600.0
_NAME = re.compile(r"(?P<host>.+)\.(?P<pid>\d+)\.[0-9a-f]{12}")
FAILED_PREFIX = "onelaunch-failed-"
_FAILED_SECONDS = 24 * 3600.0


def make(parent: Path, prefix: str = "") -> tuple[Path, lock.Lock]:
    """A new empty folder with mode 0700, and its lock, which keeps it from being swept.

    Raises:
        StoreError, OSError: see trust.private.
    """
    path = parent / f"{prefix}{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:12]}"
    try:
        trust.private(path)
        return path, lock.hold_folder(path)
    except BaseException:
        files.remove(path)
        raise


@contextlib.contextmanager
def folder(parent: Path) -> Iterator[Path]:
    """make() as a context manager; removes the folder at the end, if it is still there."""
    owner = os.getpid()
    path, held = make(parent)
    try:
        yield path
    finally:
        # A child that was forked inside the block must not remove its parent's folder.
        if os.getpid() == owner:
            held.release()
            files.remove(path)


def sweep(parent: Path, prefix: str = "") -> list[Path]:
    """Removes the folders of processes that are gone; returns them."""
    return [path for path in files.children(parent) if is_abandoned(path, prefix) and files.remove(path)]


def is_abandoned(path: Path, prefix: str = "") -> bool:
    """Whether a path is a folder that make() made, and its process is gone."""
    named = _NAME.fullmatch(path.name.removeprefix(prefix)) if path.name.startswith(prefix) else None
    if named is None or not files.is_folder(path):
        return False
    try:
        status = path.lstat()
        if status.st_uid != os.geteuid() and not trust.shared():
            return False
        age = time.time() - status.st_mtime
        if named["host"] != socket.gethostname():
            return age > ABANDONED_SECONDS
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        locked = lock.try_lock(descriptor)
    finally:
        os.close(descriptor)
    if locked is False:
        return False
    # A free lock means that the owner is dead, or hasn't locked its new folder yet.
    dead = not _is_alive(int(named["pid"]))
    return bool((dead and locked) or ((dead or locked) and age > _UNKNOWN_SECONDS))


def failed_folder() -> Path:
    """A private folder in $TMPDIR for the log of a failed build, if the cache can't be written.

    It outlives the process, because the error message names it. This user's other folders of this kind are removed
    after a day.

    Raises:
        OSError: it can't be made.
    """
    path = Path(tempfile.mkdtemp(prefix=FAILED_PREFIX))
    for other in files.children(path.parent):
        if other.name.startswith(FAILED_PREFIX):
            with contextlib.suppress(OSError):
                status = other.lstat()
                if status.st_uid == os.geteuid() and time.time() - status.st_mtime > _FAILED_SECONDS:
                    files.remove(other)
    return path


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True
