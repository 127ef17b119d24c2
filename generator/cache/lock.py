"""A lock between processes that names its holder. It only saves work: correctness never depends on it.

It keeps processes that start at the same time from building the same kernel. A build is published by rename, and the
second process takes the entry that is there. So a file system without locks, a broken lock or an expired wait costs a
second build and nothing else.

It isn't filelock, for two reasons: a holder writes its name into the file for the processes that wait; and where flock
is missing, filelock uses a lock file that outlives a dead holder.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .. import log
from ..errors import StoreError
from ..variables import TIMEOUT_VARIABLE
from . import trust

DEFAULT_TIMEOUT_SECONDS = 600.0
POLL_SECONDS = 0.05
FIRST_NOTICE_SECONDS = 2.0
NOTICE_SECONDS = 5.0

# flock belongs to the open file, which a forked child shares. The child must release it, or it would hold the lock
# after its parent's death.
_held: weakref.WeakSet[Lock] = weakref.WeakSet()


class Lock:
    """A lock that this process holds, or the lack of one.

    Args:
        descriptor: the open and locked file or folder; None without a lock.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._since = time.time()
        if descriptor is not None:
            _held.add(self)

    @property
    def held(self) -> bool:
        """False without a lock: the file system has none, the wait was given up, or this is a forked child."""
        return self._descriptor is not None

    def phase(self, text: str) -> None:
        """Writes what the holder is doing, for the processes that wait."""
        if self._descriptor is None:
            return
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": self._since, "phase": text}
        data = json.dumps(holder).encode() + b"\n"
        # A full disk must not stop the holder. The old text is overwritten at once, so no reader finds the file empty.
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, data, 0)
            os.ftruncate(self._descriptor, len(data))

    def release(self, path: Path | None = None) -> None:
        """Removes the lock file, so that lock files don't pile up, and releases the lock.

        A process that waits for the removed file notices that in _is_current, and opens the new one.
        """
        if self._descriptor is not None:
            if path is not None and _is_current(self._descriptor, path):
                with contextlib.suppress(OSError):
                    path.unlink()
            self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(self._descriptor)
            self._descriptor = None


def _forked() -> None:
    for lock in list(_held):
        lock._close()


os.register_at_fork(after_in_child=_forked)


def timeout_seconds() -> float:
    """$ONELAUNCH_LOCK_TIMEOUT, else ten minutes.

    Raises:
        StoreError: the variable isn't a number of seconds.
    """
    text = TIMEOUT_VARIABLE.read()
    try:
        seconds = float(text) if text else DEFAULT_TIMEOUT_SECONDS
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise StoreError(f"{TIMEOUT_VARIABLE} is {text!r}; it must be a number of seconds, 0 or more.")
    return seconds


@contextlib.contextmanager
def hold(path: Path, what: str, done: Callable[[], bool]) -> Iterator[Lock]:
    """Holds the lock of a path, or goes on without it if it can't be had.

    While another process has it, a line on stderr names the holder every few seconds. The wait ends when the holder
    releases the lock or dies (then the operating system releases it), when ``done`` returns True, or after
    $ONELAUNCH_LOCK_TIMEOUT seconds. In the last two cases, and if the lock file can't be opened, the block runs without
    the lock (``held`` is False). Then two processes may build, each in its own staging folder; the second to publish
    takes the entry of the first.

    Args:
        path: the lock file; it is removed at the end.
        what: the end of the message "waiting for <what>".
        done: returns True when there is no more reason to wait.

    Raises:
        StoreError: $ONELAUNCH_LOCK_TIMEOUT isn't a number of seconds.
    """
    lock = Lock(_wait(path, what, done))
    lock.phase("starting")
    try:
        yield lock
    finally:
        lock.release(path)


def hold_folder(path: Path) -> Lock:
    """Locks a folder of this process, as a sign that its owner lives (see staging.py).

    Raises:
        OSError: the folder can't be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try_lock(descriptor)
    return Lock(descriptor)


def try_lock(descriptor: int) -> bool | None:
    """Locks an open file or folder, without a wait. False: another process holds it; None: there are no locks here."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_path_held(path: Path) -> bool:
    """Whether another process holds the lock of a path."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return try_lock(descriptor) is False
    finally:
        os.close(descriptor)


def remove_if_free(path: Path) -> bool:
    """Removes a lock file that no process holds, such as a killed process's; returns whether it did."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if not try_lock(descriptor) or not _is_current(descriptor, path):
            return False
        path.unlink()
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)


def _wait(path: Path, what: str, done: Callable[[], bool]) -> int | None:
    """The locked descriptor of the file, or None as hold explains."""
    limit, start, notice = timeout_seconds(), time.monotonic(), FIRST_NOTICE_SECONDS
    # Opened anew for each try, because a holder removes the file at its end.
    while (descriptor := _open(path)) is not None:
        locked = try_lock(descriptor)
        if locked and _is_current(descriptor, path):
            return descriptor
        holder = _holder(descriptor)
        os.close(descriptor)
        if locked is None:
            log.notice("the cache's file system has no locks; other processes may build the same at this time")
            return None
        if locked:
            continue
        waited = time.monotonic() - start
        if done():
            return None
        if waited >= limit:
            log.notice(
                f"gave up the wait for {what} after {waited:.0f} s ({holder}); building it here. "
                f"{TIMEOUT_VARIABLE} sets how long to wait."
            )
            return None
        if waited >= notice:
            log.notice(f"waiting for {what} since {waited:.0f} s: {holder}")
            notice = waited + NOTICE_SECONDS
        time.sleep(POLL_SECONDS)
    return None


def _open(path: Path) -> int | None:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o666 if trust.shared() else 0o600)
    except OSError:
        return None


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at its path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def _holder(descriptor: int) -> str:
    try:
        holder: Any = json.loads(os.pread(descriptor, 4096, 0).split(b"\n")[0])
        clock = time.strftime("%H:%M:%S", time.localtime(float(holder["since"])))
        return (
            f"host {holder['host']}, pid {holder['pid']}, holds it since {clock} "
            f"({time.time() - float(holder['since']):.0f} s) and is {holder['phase']}"
        )
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return "its holder didn't say who it is"
