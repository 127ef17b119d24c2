"""New processes with torch: a server imports torch once, and forks for each test."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import tempfile
from pathlib import Path
from typing import Any

_context: Any = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["onelaunch", "torch", "forked"])


class Child:
    """A process that runs code as `python -c` does, with torch and onelaunch imported already but no kernel loaded."""

    def __init__(self, code: str, environment: dict[str, str]) -> None:
        # Coverage would slow the server's imports, and its children don't exit in the way that coverage needs.
        measured = os.environ.pop("COVERAGE_PROCESS_CONFIG", None)
        multiprocessing.forkserver.ensure_running()
        if measured is not None:
            os.environ["COVERAGE_PROCESS_CONFIG"] = measured
        self._folder = tempfile.TemporaryDirectory()
        self._process = _context.Process(target=_run, args=(code, environment, self._folder.name))
        self._process.start()

    def finish(self) -> tuple[str, str]:
        """Waits until it succeeds; returns its stdout and stderr."""
        self._process.join()
        with self._folder:
            out, err = (Path(self._folder.name, name).read_text(encoding="utf-8") for name in ("out", "err"))
        assert self._process.exitcode == 0, err
        return out, err


def _run(code: str, environment: dict[str, str], folder: str) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT), number)
    os.environ.clear()
    os.environ.update(environment)
    exec(code, {"__name__": "__main__"})
