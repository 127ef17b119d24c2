"""Runs builds in child processes: the caller's environment never changes, and a compiler's death is an exit status."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import ToolchainError
from . import child

_idle: list[_Builder] = []
_busy: set[_Builder] = set()
_lock = threading.Lock()


@dataclass(frozen=True)
class Outcome:
    """How a build's process ended.

    Attributes:
        answer: what it answered, see child.build; {} if it ended without an answer.
        status: its exit status, negative for a signal; None if it ran out of time and was killed.
        errors: what it wrote to stdout and stderr.
    """

    answer: Mapping[str, Any]
    status: int | None
    errors: str


def run(job: Mapping[str, Any], stage: Path, environment: Mapping[str, str], timeout: float | None = None) -> Outcome:
    """Builds in a folder, in its own session.

    Args:
        job: see child.build.
        stage: the working folder of the build.
        environment: all of its variables.
        timeout: seconds after which it is killed with every compiler that it started. None is no limit.

    Raises:
        ToolchainError: no process can be started.
        OSError: the folder is gone.
    """
    stage.stat()
    torch = sys.modules.get("torch")
    path = [str(Path(torch.__file__).parent.parent)] if torch is not None and torch.__file__ else []
    message = {**job, "folder": str(stage), "environment": dict(environment), "path": path}
    while True:
        builder, fresh = _take(environment)
        try:
            outcome = builder.run(message, timeout)
        except BaseException:
            builder.end()  # Ctrl-C, say
            raise
        finally:
            with _lock:
                _busy.discard(builder)
        if outcome is not None:
            if builder.alive:
                with _lock:
                    _idle.append(builder)
            return outcome
        again = not fresh and not builder.killed  # it had just ended, after IDLE_SECONDS without a job
        outcome = builder.end()
        if not again:
            return outcome


def kill_running() -> None:
    """Kills every build of this process, whichever thread waits for it."""
    with _lock:
        busy = list(_busy)
    for builder in busy:
        builder.kill()


def _take(environment: Mapping[str, str]) -> tuple[_Builder, bool]:
    """A builder for one build, and whether it is a new one."""
    with _lock:
        fresh = not _idle
        builder = _Builder(environment) if fresh else _idle.pop()
        _busy.add(builder)
    return builder, fresh


class _Builder:
    """A child process that builds one kernel after another; see child.py."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        if not sys.executable:
            raise ToolchainError(
                f"sys.executable is {sys.executable!r}: a build runs in a Python of its own, and this process doesn't "
                "say which one that is. Build ahead of time with `onelaunch build`."
            )
        try:
            self._said: IO[bytes] = os.fdopen(os.memfd_create("onelaunch-builder"), "w+b", buffering=0)
            # -P: nothing is imported from the working folder. One thread, because it forks.
            self._process = subprocess.Popen(
                [sys.executable, "-P", os.path.abspath(child.__file__)],
                cwd="/",
                env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                bufsize=0,
                start_new_session=True,
            )
        except OSError as error:
            raise ToolchainError(
                f"A build can't be started with {sys.executable}: {error.strerror}. Free some processes, files or "
                "memory, or build ahead of time with `onelaunch build`."
            ) from error
        self._session = 0
        self._rest = b""
        self.killed = False

    @property
    def alive(self) -> bool:
        """Whether its process is alive."""
        return self._process.poll() is None

    def run(self, message: Mapping[str, Any], timeout: float | None) -> Outcome | None:
        """One build; None if the builder ended before it began."""
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            self._send(json.dumps(message).encode() + b"\n")
            started = self._line(deadline)
            if started is None:
                return None
            self._session = int(started["pid"])
            ended = self._line(deadline)
        except TimeoutError:
            return Outcome({}, None, self.end().errors)
        except OSError:  # its end of the pipe is closed
            return None
        if ended is None:
            return self.end()
        self._session = 0
        return Outcome(ended["answer"], ended["status"], ended["errors"])

    def kill(self) -> None:
        """Kills it, and its current build with every compiler."""
        self.killed = True
        self._process.kill()
        if self._session:
            child.kill_session(self._session)

    def end(self) -> Outcome:
        """kill(); returns the outcome of the killed build."""
        self.kill()
        status = self._process.wait()
        with contextlib.suppress(OSError, ValueError, TimeoutError):
            if not self._session and (started := self._line(time.monotonic())) is not None:
                self._session = int(started.get("pid", 0))
                child.kill_session(self._session)
        self._said.seek(0)
        outcome = Outcome({}, status, self._said.read().decode("utf-8", "replace"))
        self.close()
        return outcome

    def close(self) -> None:
        """Closes its stdin, so that it ends by itself."""
        for file in (self._process.stdin, self._process.stdout, self._said):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()

    def wait(self) -> None:
        """Waits for its end, after close()."""
        self._process.wait()

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        while data:
            data = data[self._process.stdin.write(data) or 0 :]

    def _line(self, deadline: float | None) -> dict[str, Any] | None:
        """The next message; None at the end of the pipe. TimeoutError after the deadline."""
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError
            part = os.read(self._process.stdout.fileno(), 1 << 20)
            if not part:
                return None
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message


def _forked() -> None:
    """In a forked child: drops the parent's builders, and a lock that another thread may have held."""
    global _lock
    _lock = threading.Lock()
    for builder in (*_idle, *_busy):
        builder.close()
        _not_ours.append(builder)
    _idle.clear()
    _busy.clear()


def _at_exit() -> None:
    while _idle:
        builder = _idle.pop()
        builder.close()
        builder.wait()


# Kept alive: the finalizer of a Popen waits for its process, which isn't a child of this one.
_not_ours: list[_Builder] = []
os.register_at_fork(after_in_child=_forked)
atexit.register(_at_exit)
