"""Builds many configurations ahead of time: a few at once, each with a time limit, and one failure stops no other."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import re
import threading
import time
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..build import process
from ..build.compile import JOBS_VARIABLE
from ..errors import ConfigError, OnelaunchError
from ..spec.config import KernelConfig
from ..spec.presets import preset
from ..spec.settings import DECLARED, parse_settings
from . import loader
from .obtain import Bounds

# The memory of a builder with torch, plus the largest of nvcc's programs.
WORKER_BYTES = 3 * 2**29
# Long enough to import torch from a cold network file system, which takes minutes.
DEFAULT_TIMEOUT_SECONDS = 600.0
MAX_JOBS_OF_A_MATRIX = 100_000


@dataclass(frozen=True)
class Job:
    """One build: a configuration, and its architectures (None: as in loader.load)."""

    config: KernelConfig
    archs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Done:
    """The outcome of a job.

    Attributes:
        job: what was requested.
        key: its content key, "" if it failed.
        path: the shared object, "" if it failed.
        seconds: wall time.
        built: whether it was built now; False if the entry existed already.
        error: the error message, "" if it succeeded.
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
    """The number of simultaneous builds: at most the requested number, $MAX_JOBS, the processors, and what fits memory.

    Raises:
        ConfigError: the number, or the variable, isn't a positive whole number.
    """
    bounds = [count, len(os.sched_getaffinity(0)), max(1, _available_bytes() // WORKER_BYTES)]
    for name, text in (("--jobs", jobs), (JOBS_VARIABLE, os.environ.get(JOBS_VARIABLE) or None)):
        if text is None:
            continue
        if not re.fullmatch("[0-9]{1,9}", str(text)) or int(text) < 1:
            raise ConfigError(f"{name} is {text!r}; it must be a whole number, 1 or more.")
        # An explicit request may exceed the processors, but not the memory.
        bounds = [int(text), *bounds] if name == JOBS_VARIABLE else [int(text), bounds[0], bounds[2]]
    return max(1, min(bounds))


def build_all(
    jobs: Sequence[Job],
    at_once: int,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    report: Callable[[Done], None] = lambda done: None,
    retry: bool = False,
) -> list[Done]:
    """Builds every job into the user's cache; a job's failure doesn't stop the others.

    Args:
        at_once: simultaneous builds, see workers().
        timeout: seconds after which a build's child process is killed with every compiler that it started. The other
            builds go on, and nothing is remembered: the next build_all tries it again.
        report: called for each job as it ends.
        retry: whether to try failed builds again.

    Returns:
        How each job ended, in the order of ``jobs``.
    """
    bounds = Bounds(retry or None, timeout, jobs=1)
    ended: list[Done | None] = [None] * len(jobs)
    reporting = threading.Lock()
    stopped = threading.Event()

    def work(number: int) -> None:
        if not stopped.is_set():
            done = _build(jobs[number], bounds)
            with reporting:
                if not stopped.is_set():
                    ended[number] = done
                    report(done)

    pool = ThreadPoolExecutor(at_once)
    try:
        for future in [pool.submit(work, number) for number in range(len(jobs))]:
            future.result()
    except BaseException:
        # Ctrl-C doesn't reach the builds, which run in other sessions.
        stopped.set()
        process.kill_running()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [done for done in ended if done is not None]


def _build(job: Job, bounds: Bounds) -> Done:
    start = time.perf_counter()
    try:
        entry, built = loader.ensure(job.config, job.archs, bounds=bounds)
    except OnelaunchError as error:
        return Done(job, "", "", time.perf_counter() - start, False, str(error))
    return Done(job, entry.key, str(entry.module_path), time.perf_counter() - start, built, "")


def read_matrix(path: Path) -> list[Job]:
    """The jobs of a TOML file: tables ``[[build]]`` with ``preset``, ``set``, ``target`` and ``archs``.

    A list in ``set`` gives one build per value; several lists give all combinations. A user's declarations have tables
    of their own: ``declare``, ``inputs``, ``constants``, ``sources`` and ``maps``, like the arguments of bind().

    Raises:
        ConfigError: the file can't be read, or says something that isn't allowed.
    """
    try:
        with open(path, "rb") as file:
            tables: Any = tomllib.load(file)
    except (OSError, ValueError, RecursionError) as error:  # not TOML, not UTF-8, numbers or tables without end
        raise ConfigError(f"--config {path} can't be read: {error}. Name a TOML file of [[build]] tables.") from error
    builds = tables.get("build")
    if not isinstance(builds, list) or set(tables) != {"build"}:
        raise ConfigError(f"--config {path} must hold tables [[build]] and nothing else; it holds {', '.join(tables)}.")
    jobs: list[Job] = []
    for build in builds:
        jobs += _jobs(path, build, MAX_JOBS_OF_A_MATRIX - len(jobs))
    return jobs


def _jobs(path: Path, build: Any, limit: int) -> list[Job]:
    """The jobs of one table [[build]]."""
    where = f"--config {path}: [[build]]"
    if not isinstance(build, dict):
        raise ConfigError(f"{where} is {build!r}; it must be a table.")
    allowed = ("preset", "set", "target", "archs", *DECLARED)
    unknown = set(build) - {*allowed}
    if unknown:
        raise ConfigError(f"{where} has {', '.join(sorted(unknown))}; allowed: {', '.join(allowed)}.")
    for name, kind, example in (
        ("preset", str, '"nsa-decode-3"'),
        ("target", str, '"cpu"'),
        ("set", dict, "{ page_size = [16, 64] }"),
        ("archs", list, '["90a"]'),
        ("declare", dict, '{ positions = { formula = "base_len", dtype = "int64" } }'),
        ("inputs", dict, '{ accept_lens = "int32" }'),
        ("constants", dict, "{ max_model_len = 4096 }"),
        ("sources", dict, '{ block_table = "int32" }'),
        ("maps", dict, '{ full_to_swa = ["int64", -1] }'),
    ):
        if name in build and not isinstance(build[name], kind):
            raise ConfigError(f"{where} has {name} = {build[name]!r}; write {name} = {example}.")
    base = preset(build["preset"]) if "preset" in build else KernelConfig()
    settings: dict[str, Any] = {**build.get("set", {})}
    if "target" in build:
        settings["target"] = build["target"]
    declared = {name: build[name] for name in DECLARED if name in build}
    archs = tuple(str(arch) for arch in build["archs"]) if "archs" in build else None
    values = [value if isinstance(value, list) else [value] for value in settings.values()]
    count = math.prod(len(value) for value in values)
    if count > limit:
        raise ConfigError(f"{where} stands for {count} builds; a file may have {MAX_JOBS_OF_A_MATRIX} in all.")
    return [
        Job(
            parse_settings(
                ",".join(f"{name}={value}" for name, value in zip(settings, choice, strict=True)), base, declared
            ),
            archs,
        )
        for choice in itertools.product(*values)
    ]


def distinct(jobs: Sequence[Job]) -> list[Job]:
    """The jobs without those that repeat another."""
    return list({(job.config.key, job.archs): job for job in jobs}.values())


def _available_bytes() -> int:
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return WORKER_BYTES
