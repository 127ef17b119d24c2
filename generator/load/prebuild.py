"""Builds many configurations ahead of time, in child processes, so that one that hangs or dies takes nothing along."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache import failures
from ..cache.trust import CACHE_VARIABLE
from ..errors import ConfigError, OnelaunchError
from ..spec.config import KernelConfig
from ..spec.presets import preset
from ..spec.settings import parse_settings
from . import loader

JOBS_VARIABLE = "MAX_JOBS"
# A worker with torch in it, and the largest of nvcc's programs.
WORKER_BYTES = 3 * 2**29
DEFAULT_TIMEOUT_SECONDS = 600.0
# Importing torch from a cold network file system takes minutes.
START_SECONDS = 600.0


@dataclass(frozen=True)
class Job:
    """One build: a configuration, and its architectures (None: as in loader.load)."""

    config: KernelConfig
    archs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Done:
    """How a job ended.

    Attributes:
        job: what was asked for.
        key: its content key, "" if it failed.
        path: the shared object, "" if it failed.
        seconds: wall time.
        built: whether it was built now; False if it was there.
        error: what went wrong, "" if nothing.
    """

    job: Job
    key: str
    path: str
    seconds: float
    built: bool
    error: str


def built_since(path: Path, before: float) -> bool:
    """Whether the entry of a shared object was made at that time (as time.time gives it) or later."""
    return path.parent.stat().st_mtime >= before


def workers(jobs: int | None, count: int) -> int:
    """How many build at once: no more than asked for, than $MAX_JOBS, than processors, and than memory allows.

    Raises:
        ConfigError: the number, or the variable, isn't a positive whole number.
    """
    most = [count, len(os.sched_getaffinity(0)), max(1, _available_bytes() // WORKER_BYTES)]
    for name, text in (("--jobs", jobs), (JOBS_VARIABLE, os.environ.get(JOBS_VARIABLE) or None)):
        if text is None:
            continue
        if not str(text).isdigit() or int(text) < 1:
            raise ConfigError(f"{name} is {text!r}; it must be a whole number, 1 or more.")
        # What is asked for explicitly may exceed the processors, but not the memory.
        most = [int(text), *most] if name == JOBS_VARIABLE else [int(text), most[0], most[2]]
    return max(1, min(most))


def build_all(
    jobs: Sequence[Job],
    at_once: int,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    report: Callable[[Done], None] = lambda done: None,
    retry: bool = False,
) -> list[Done]:
    """Builds every job into the user's cache; a job's failure doesn't stop the others.

    Args:
        at_once: workers, see workers().
        timeout: seconds a build may take; then its worker is killed with every compiler that it started. The others
            go on, and nothing is remembered: the next build_all tries it again. The start of a worker isn't counted.
        report: called for each job as it ends.
        retry: compile again what failed before.

    Returns:
        How each job ended, in the order of ``jobs``.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(jobs)):
        waiting.put(number)
    ended: dict[int, Done] = {}
    reporting = threading.Lock()
    stopped = threading.Event()
    started: list[_Worker] = []

    def work() -> None:
        with contextlib.ExitStack() as stack:
            worker: _Worker | None = None
            while not stopped.is_set():
                try:
                    number = waiting.get_nowait()
                except queue.Empty:
                    return
                if worker is None or not worker.alive:
                    worker = stack.enter_context(_Worker(retry))
                    started.append(worker)
                    if stopped.is_set():
                        return
                done = worker.build(jobs[number], timeout)
                if stopped.is_set():
                    return
                with reporting:
                    ended[number] = done
                    report(done)

    threads = [threading.Thread(target=work) for _ in range(min(at_once, len(jobs)))]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:
        # Ctrl-C: workers have sessions of their own and don't hear of it, and what they were at is swept.
        stopped.set()
        for worker in started:
            worker.kill()
        loader.default_store().sweep()
        raise
    return [ended[number] for number in range(len(jobs))]


def read_matrix(path: Path) -> list[Job]:
    """The jobs of a TOML file: tables ``[[build]]`` with ``preset``, ``set``, ``target`` and ``archs``.

    A list in ``set`` stands for one build a value, several lists for every combination.

    Raises:
        ConfigError: the file can't be read, or says something that isn't allowed.
    """
    try:
        with open(path, "rb") as file:
            tables: Any = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--config {path} can't be read: {error}.") from error
    builds = tables.get("build")
    if not isinstance(builds, list) or set(tables) != {"build"}:
        raise ConfigError(f"--config {path} must hold tables [[build]] and nothing else; it holds {', '.join(tables)}.")
    jobs: list[Job] = []
    for build in builds:
        unknown = set(build) - {"preset", "set", "target", "archs"}
        if unknown:
            raise ConfigError(
                f"--config {path}: [[build]] has {', '.join(sorted(unknown))}; allowed: preset, set, target, archs."
            )
        base = preset(build["preset"]) if "preset" in build else KernelConfig()
        facts: dict[str, Any] = {**build.get("set", {})}
        if "target" in build:
            facts["target"] = build["target"]
        values = [value if isinstance(value, list) else [value] for value in facts.values()]
        archs = tuple(str(arch) for arch in build["archs"]) if "archs" in build else None
        for choice in itertools.product(*values):
            text = ",".join(f"{name}={value}" for name, value in zip(facts, choice, strict=True))
            jobs.append(Job(parse_settings(text, base), archs))
    return jobs


def distinct(jobs: Sequence[Job]) -> list[Job]:
    """The jobs without those that repeat another."""
    return list({(job.config.key, job.archs): job for job in jobs}.values())


class _Worker:
    """A child process that builds one job after the other, in a session of its own."""

    def __init__(self, retry: bool) -> None:
        store = loader.default_store()
        environment = {**os.environ, loader.POLICY_VARIABLE: "allow", JOBS_VARIABLE: "1"}
        if store.place:
            environment[CACHE_VARIABLE] = store.place
        if retry:
            environment[failures.RETRY_VARIABLE] = "1"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "onelaunch.load.prebuild"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._said = bytearray()
        self._ready = False
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *args: object) -> None:
        self.kill()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def kill(self) -> None:
        """Ends the worker and every compiler that it started."""
        # ninja gives every command a process group of its own; what they share is the session.
        while members := _members(self._process.pid):
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._process.poll()
        self._process.wait()

    def build(self, job: Job, timeout: float) -> Done:
        began = time.perf_counter()
        assert self._process.stdin is not None
        wanted = {"config": job.config.to_dict(), "archs": job.archs}
        error = ""
        answer: dict[str, Any] = {}
        try:
            if not self._ready:
                self._ready = bool(self._line(START_SECONDS))
            began = time.perf_counter()
            self._process.stdin.write(json.dumps(wanted).encode() + b"\n")
            self._process.stdin.flush()
            answer = json.loads(self._line(timeout))
            error = str(answer.get("error", ""))
        except TimeoutError:
            self.kill()
            error = f"{job.config.symbol} wasn't built in {timeout:g} s; --timeout sets how long it may take."
            if not self._ready:
                error = f"The worker for {job.config.symbol} didn't start in {START_SECONDS:g} s."
        except (OSError, ValueError):
            self.kill()
            last = self._said.decode(errors="replace").strip().splitlines()[-1:]
            error = f"The worker that built {job.config.symbol} ended by {self._ending()}{': ' if last else ''}"
            error += "".join(last) + ". If memory ran out, build fewer at once with --jobs."
        seconds = time.perf_counter() - began
        return Done(job, answer.get("key", ""), answer.get("path", ""), seconds, bool(answer.get("built")), error)

    def _line(self, timeout: float) -> bytes:
        assert self._process.stdout is not None
        end = time.monotonic() + timeout
        line = b""
        while not line.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise TimeoutError
            part = os.read(self._process.stdout.fileno(), 65_536)
            if not part:
                raise ValueError("it ended")
            line += part
        return line

    def _listen(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._said += line
            del self._said[:-65_536]

    def _ending(self) -> str:
        status = self._process.returncode
        return f"signal {-status}" if status is not None and status < 0 else f"exit status {status}"


def _members(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name in parentheses may hold anything, so the fields are counted from its end.
            state, _, _, its_session = path.read_text(errors="replace").rpartition(")")[2].split()[:4]
            if int(its_session) == session and state not in "ZX":
                found.append(int(path.parent.name))
    return found


def _available_bytes() -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return WORKER_BYTES


def _serve(lines: Iterator[str], answer: Callable[[Mapping[str, Any]], None]) -> None:
    """What a worker does: a job a line in, how it ended a line out."""
    for line in lines:
        wanted = json.loads(line)
        try:
            config = KernelConfig.from_dict(wanted["config"])
            archs = tuple(wanted["archs"]) if wanted["archs"] else None
            before = time.time()
            kernel = loader.load(config, archs)
            answer({"key": kernel.key, "path": str(kernel.path), "built": built_since(kernel.path, before)})
        except OnelaunchError as error:
            answer({"error": str(error)})


def _main() -> None:
    # Compilers and libraries may write to stdout; the answers go where nobody else writes.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def answer(facts: Mapping[str, Any]) -> None:
        answers.write(json.dumps(facts) + "\n")
        answers.flush()

    answer({"ready": True})
    _serve(iter(sys.stdin.readline, ""), answer)


if __name__ == "__main__":
    _main()
