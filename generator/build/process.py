"""Runs a build in a child process: the caller's environment never changes, and a compiler's death is an exit status."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import ToolchainError
from . import child

_running: set[int] = set()
_lock = threading.Lock()


@dataclass(frozen=True)
class Outcome:
    """How a child ended.

    Attributes:
        answer: what it answered, see child.build; {} if it ended without an answer.
        status: its exit status, negative for a signal; None if it ran out of time and was killed.
        errors: what it wrote to stderr.
    """

    answer: Mapping[str, Any]
    status: int | None
    errors: str


def run(job: Mapping[str, Any], stage: Path, environment: Mapping[str, str], timeout: float | None = None) -> Outcome:
    """Builds in a folder.

    Args:
        job: see child.build.
        stage: the working folder of the child.
        environment: all of the child's variables.
        timeout: seconds; then the child is killed with every compiler that it started. None waits for ever.

    Raises:
        ToolchainError: no process can be started.
        OSError: the folder is gone.
    """
    if not sys.executable:
        raise ToolchainError(
            f"sys.executable is {sys.executable!r}: a build runs in a Python of its own, and this process doesn't say "
            "which one that is. Build ahead of time with `onelaunch build`."
        )
    stage.stat()
    torch = sys.modules.get("torch")
    path = [str(Path(torch.__file__).parent.parent)] if torch is not None and torch.__file__ else []
    try:
        # Files in memory: no pipe can fill up, and no folder either.
        with _memory("job") as asked, _memory("answer") as answer, _memory("errors") as errors:
            asked.write(json.dumps({**job, "path": path}).encode())
            asked.seek(0)
            with _lifeline() as lifeline:
                # -P: the working folder is no place to import from.
                started = subprocess.Popen(
                    [sys.executable, "-P", os.path.abspath(child.__file__), str(lifeline)],
                    cwd=stage,
                    env=environment,
                    stdin=asked,
                    stdout=answer,
                    stderr=errors,
                    pass_fds=[lifeline],
                    start_new_session=True,
                )
                status = _wait(started, timeout)
            return Outcome(_parsed(_text(answer)), status, _text(errors))
    except OSError as error:
        raise ToolchainError(
            f"A build can't be started with {sys.executable}: {error.strerror}. Free some processes, files or memory, "
            "or build ahead of time with `onelaunch build`."
        ) from error


def kill_running() -> None:
    """Ends every build of this process, whichever thread waits for it."""
    with _lock:
        sessions = list(_running)
    for session in sessions:
        child.kill_session(session)


def _wait(started: subprocess.Popen[bytes], timeout: float | None) -> int | None:
    with _lock:
        _running.add(started.pid)
    try:
        return started.wait(timeout)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if started.returncode != 0:  # it still runs, as after Ctrl-C; or it died, and its compilers may still run
            child.kill_session(started.pid)
            started.wait()
        with _lock:
            _running.discard(started.pid)


@contextlib.contextmanager
def _lifeline() -> Iterator[int]:
    """The end of a pipe that a child reads; it is closed when this process ends, however that happens."""
    read, write = os.pipe()
    try:
        yield read
    finally:
        os.close(read)
        os.close(write)


@contextlib.contextmanager
def _memory(name: str) -> Iterator[IO[bytes]]:
    with os.fdopen(os.memfd_create(f"onelaunch-{name}"), "w+b", buffering=0) as file:
        yield file


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode("utf-8", "replace")


def _parsed(text: str) -> Mapping[str, Any]:
    try:
        answer = json.loads(text)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}
