"""A lock between processes that says who holds it, and that is only an optimization.

It keeps processes that ask at once from building the same thing. Correctness never depends on it: a build is published
by rename, and whoever comes second takes what is there. So a file system without locks, a lock that is broken, or a
wait that became too long cost a second build and nothing else.

This isn't filelock, because a lock that speaks writes its holder into the file that waiters read, and because where
flock is missing, filelock turns to a lock file that outlives a dead holder: the very hang that this is to prevent.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import StoreError
from . import trust

TIMEOUT_VARIABLE = "ONELAUNCH_LOCK_TIMEOUT"
DEFAULT_TIMEOUT_SECONDS = 600.0
POLL_SECONDS = 0.05
FIRST_NOTICE_SECONDS = 2.0
NOTICE_SECONDS = 5.0

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


class Lock:
    """What a builder holds; its phase is what waiters say.

    Args:
        descriptor: the open lock file; None where the file system has no locks.
    """

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor
        self._since = time.time()

    @property
    def held(self) -> bool:
        """False where the file system has no locks, or the wait for one was given up."""
        return self._descriptor is not None

    def phase(self, text: str) -> None:
        """Notes for waiters what the holder is doing."""
        if self._descriptor is None:
            return
        noted = {"host": socket.gethostname(), "pid": os.getpid(), "since": self._since, "phase": text}
        data = json.dumps(noted).encode()
        # A full disk must not stop the holder; one write over the old text, so that a reader never finds it empty.
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, data + b"\n", 0)
            os.ftruncate(self._descriptor, len(data) + 1)


def timeout_seconds() -> float:
    """$ONELAUNCH_LOCK_TIMEOUT, else ten minutes.

    Raises:
        StoreError: the variable isn't a number of seconds.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "").strip()
    try:
        seconds = float(text) if text else DEFAULT_TIMEOUT_SECONDS
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise StoreError(f"{TIMEOUT_VARIABLE} is {text!r}; it must be a number of seconds, 0 or more.")
    return seconds


@contextlib.contextmanager
def hold(path: Path, what: str, done: Callable[[], bool]) -> Iterator[Lock]:
    """Holds the lock of a path, or goes on without it where that can't be.

    While another process has it, says on stderr every few seconds who that is. The wait ends when the holder lets go
    or dies (the kernel releases a dead process's lock), when ``done`` says that its work is there, or after
    $ONELAUNCH_LOCK_TIMEOUT seconds. A wait that ends so isn't an error: the block runs without the lock (``held`` is
    False), and its caller builds for itself, in a staging folder of its own. Should the holder finish after all, the
    one that publishes second takes the entry of the first.

    Args:
        path: the lock file; it stays, since unlinking it would split waiters over two files.
        what: what is waited for, as in "waiting for <what>".
        done: whether there is no more reason to wait.

    Raises:
        StoreError: $ONELAUNCH_LOCK_TIMEOUT isn't a number of seconds.
        OSError: the lock file can't be made.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o666 if trust.shared() else 0o600)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        yield Lock(None)
        return
    try:
        got = _acquire(descriptor, what, done)
        lock = Lock(descriptor if got else None)
        lock.phase("starting")
        try:
            yield lock
        finally:
            if got:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, 0)
                    fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)


def is_held(descriptor: int) -> bool | None:
    """Whether another process holds the lock of an open file or folder; None where that can't be asked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def _acquire(descriptor: int, what: str, done: Callable[[], bool]) -> bool:
    limit = timeout_seconds()
    start = time.monotonic()
    notice = FIRST_NOTICE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                _say("the cache's file system has no locks; other processes may build the same at this time")
                return False
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EINTR):
                raise
        if done():
            return False
        waited = time.monotonic() - start
        if waited >= limit:
            _say(
                f"gave up the wait for {what} after {waited:.0f} s ({_holder(descriptor)}); building it here. "
                f"{TIMEOUT_VARIABLE} sets how long to wait."
            )
            return False
        if waited >= notice:
            _say(f"waiting for {what} since {waited:.0f} s: {_holder(descriptor)}")
            notice = waited + NOTICE_SECONDS
        time.sleep(POLL_SECONDS)


def _holder(descriptor: int) -> str:
    try:
        noted: Any = json.loads(os.pread(descriptor, 4096, 0).split(b"\n")[0])
        clock = time.strftime("%H:%M:%S", time.localtime(float(noted["since"])))
        return (
            f"host {noted['host']}, pid {noted['pid']}, holds it since {clock} "
            f"({time.time() - float(noted['since']):.0f} s) and is {noted['phase']}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        return "its holder didn't say who it is"


def _say(text: str) -> None:
    print(f"onelaunch: {text}", file=sys.stderr, flush=True)
