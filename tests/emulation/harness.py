"""Compiles an emitted kernel for host threads, runs it under a sanitizer, and compares it with the reference.

``build`` turns source text into a program, ``run`` launches it on shapes of cases.py, with the tensors and expectations
of checker.py, and says how it went; ``launch`` does both. The prelude (``include/cuda_runtime.h``) says
how the program runs a CUDA thread.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from cases import Shape
from filelock import FileLock
from onelaunch import KernelConfig
from torch import Tensor

from .jobs import Job, numbers

HERE = Path(__file__).parent
COMPILER = "g++"
FLAGS = [
    "-std=c++17",
    "-O0",  # optimizing would cost more compile time than it saves run time
    "-fno-omit-frame-pointer",
    "-fno-strict-aliasing",  # int4 accesses to int32 memory are fine for a device compiler
]
SANITIZERS: dict[str, list[str]] = {
    "none": [],
    "thread": ["-fsanitize=thread"],
    # AddressSanitizer checks variables in a custom section, as the shared ones are, only if the section is named.
    "address": ["-fsanitize=address", "-fsanitize-sections=emulated_shared"],
    "undefined": ["-fsanitize=undefined", "-fno-sanitize-recover=all"],
}
SANITIZERS["address+undefined"] = SANITIZERS["address"] + SANITIZERS["undefined"]
OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:atexit_sleep_ms=0",
    "ASAN_OPTIONS": "exitcode=67:detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "exitcode=68:print_stacktrace=1",
}
MAX_COPIES = 33  # as in copies.h
RUN_SECONDS = 1800  # ThreadSanitizer takes up to half a minute, and several times that on a busy machine


class CompileError(Exception):
    """The compiler or linker refused the source; the message is its log."""


# ---- building --------------------------------------------------------------------------------------------------------
def build(source: str, sanitizer: str, directory: Path, *, copies: int, lines: bool = False) -> Path:
    """The program for an emitted source, built once for all processes that share ``directory``.

    Args:
        source: the emitted CUDA.
        sanitizer: a key of SANITIZERS.
        copies: how many blocks of a grid may run concurrently, up to MAX_COPIES. ``__shared__`` variables are
            static, so each of them runs on its own copy of the object file, with its symbols renamed.
        lines: let reports name source lines, which takes 1.5 times the compile time.

    Raises:
        CompileError: the source doesn't compile.
    """
    symbol = re.findall(r"^int (\w+)_launch\(", source, re.MULTILINE)
    if len(symbol) != 1:
        raise CompileError(f"expected one launch function in the source, found {symbol}")
    flags = [*FLAGS, *SANITIZERS[sanitizer], *(["-g1"] if lines else [])]
    digest = _digest(source, *flags, str(copies))
    program = directory / f"emulation-{digest}"
    with FileLock(directory / f"{digest}.lock"):
        if program.exists():
            return program
        driver, prelude = _driver(directory), _prelude(directory, flags)
        with tempfile.TemporaryDirectory(dir=directory) as name:
            folder = Path(name)
            (folder / "kernel.cu").write_text(source, encoding="utf-8")
            _tool([COMPILER, "-x", "c++", *flags, f"-I{prelude}", "-c", "kernel.cu", "-o", "kernel.o"], folder)
            objects = []
            for k in range(copies):
                objects.append(f"kernel_{k}.o")
                renames = [f"--redefine-sym={symbol[0]}_{f}=emulated_{f}_{k}" for f in ("launch", "prepare", "error")]
                section = f"--rename-section=emulated_shared=emulated_shared_{k}"
                _tool(["objcopy", *renames, section, "kernel.o", objects[-1]], folder)
            _tool([COMPILER, *flags, *_linker(), str(driver), *objects, "-o", "program"], folder)
            os.replace(folder / "program", program)
    return program


def _driver(directory: Path) -> Path:
    """The driver's object file, the same for every kernel and sanitizer."""
    digest = _digest()
    compiled = directory / f"driver-{digest}.o"
    with FileLock(directory / f"driver-{digest}.lock"):
        if not compiled.exists():
            partial = compiled.with_suffix(".partial")
            flags = ["-std=c++17", "-O2", "-g1", "-Wall", "-Wextra"]
            _tool(
                [COMPILER, *flags, f"-I{HERE / 'include'}", "-c", str(HERE / "driver.cpp"), "-o", str(partial)],
                directory,
            )
            os.replace(partial, compiled)
    return compiled


def _prelude(directory: Path, flags: list[str]) -> Path:
    """A folder with the precompiled prelude: headers take most of a small kernel's compile time."""
    digest = _digest(*flags)
    folder = directory / f"prelude-{digest}"
    with FileLock(directory / f"prelude-{digest}.lock"):
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            partial.mkdir(exist_ok=True)
            shutil.copy(HERE / "include" / "cuda_runtime.h", partial)
            # Included, since #pragma once in a main file causes a warning.
            (partial / "whole.h").write_text("#include <cuda_runtime.h>\n", encoding="utf-8")
            output = ["-o", str(partial / "cuda_runtime.h.gch")]
            _tool([COMPILER, "-x", "c++-header", *flags, f"-I{HERE / 'include'}", "whole.h", *output], partial)
            os.replace(partial, folder)
    return folder


def _digest(*parts: str) -> str:
    content = hashlib.sha256(_compiler_version().encode())
    for path in sorted((*HERE.glob("include/*.h"), *HERE.glob("*.h"), *HERE.glob("*.cpp"))):
        content.update(path.read_bytes())
    for part in parts:
        content.update(part.encode() + b"\0")
    return content.hexdigest()[:24]


@functools.cache
def _compiler_version() -> str:
    return subprocess.run([COMPILER, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def _linker() -> list[str]:
    """The faster of binutils' linkers, where there are two."""
    return ["-fuse-ld=gold"] if shutil.which("ld.gold") else []


def _tool(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


@functools.cache
def missing_runtime(sanitizer: str) -> str | None:
    """Why programs can't be built or run with a sanitizer here, None if they can."""
    if shutil.which(COMPILER) is None or shutil.which("objcopy") is None:
        return f"{COMPILER} and objcopy are needed"
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "nothing.cpp"
        source.write_text("int main() {}\n")
        command = [COMPILER, *SANITIZERS[sanitizer], str(source), "-o", str(source.with_suffix(""))]
        built = subprocess.run(command, capture_output=True, text=True)
        if built.returncode != 0:
            return f"{COMPILER} has no runtime for {sanitizer}: {built.stderr[-200:]}"
        ran = subprocess.run([*_prefix(), str(source.with_suffix(""))], capture_output=True, text=True)
        return None if ran.returncode == 0 else f"the {sanitizer} runtime doesn't start: {ran.stderr[-200:]}"


@functools.cache
def _prefix() -> list[str]:
    """Older sanitizer runtimes need certain addresses free, which strong address randomization doesn't guarantee."""
    command = ["setarch", "--addr-no-randomize"]
    if shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
        return command
    return []


# ---- running ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Outcome:
    """How a run went.

    Attributes:
        caught: None if all is well; else what detected it: "mismatch" (the comparison with the reference), "thread",
            "address", "undefined" (that sanitizer), "emulation" (the prelude's own checks), "crash", "hang".
        text: the report.
    """

    caught: str | None
    text: str


def run(
    program: Path,
    config: KernelConfig,
    shapes: Iterable[Shape],
    *,
    launches: Sequence[tuple[int, int]] = ((1, 1), (2, 64)),
    seconds: int = RUN_SECONDS,
) -> Outcome:
    """Launches a program on shapes, in one process, and compares all destinations with the reference.

    Args:
        program: from ``build``.
        launches: (seed of the block and thread order, how many blocks may run concurrently); each shape is launched
            once for each.
    """
    chains = [_chain(shape) for shape in shapes]
    hashes: list[Tensor | None] = [None] * len(chains)
    outcome = Outcome(None, "")
    for turn in range(max(map(len, chains), default=0)):
        jobs = {i: Job(config, c[turn], launches, hashes[i]) for i, c in enumerate(chains) if turn < len(c)}
        outcome = _run(program, list(jobs.values()), seconds)
        if outcome.caught is not None:
            return outcome
        for i, job in jobs.items():
            hashes[i] = job.hashes.tensor if config.hashes_tiles else None
    return outcome


def _chain(shape: Shape) -> list[Shape]:
    """A shape, preceded by those that are launched before it on the same memory."""
    return [*([] if shape.before is None else _chain(shape.before)), shape]


def _run(program: Path, jobs: Sequence[Job], seconds: int) -> Outcome:
    """run() of jobs whose memory has its initial content."""
    with tempfile.TemporaryDirectory() as name:
        job, results = Path(name) / "job", Path(name) / "results"
        job.write_bytes(numbers(len(jobs)) + b"".join(j.encode() for j in jobs))
        try:
            done = subprocess.run(
                [*_prefix(), str(program), str(job), str(results)],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds,
                env={**os.environ, **OPTIONS},
            )
        except subprocess.TimeoutExpired as error:
            return Outcome("hang", f"{seconds} seconds\n{(error.stderr or b'').decode(errors='replace')}")
        if done.returncode != 0 or "Sanitizer" in done.stderr:
            return Outcome(_complaint(done), done.stderr)
        data = memoryview(results.read_bytes())
    for j in jobs:
        difference, taken = j.compare(data)
        if difference is not None:
            return Outcome("mismatch", difference)
        data = data[taken:]
    assert not data, "the driver wrote more than was requested"
    return Outcome(None, done.stderr)


def _complaint(done: subprocess.CompletedProcess[str]) -> str:
    for text, name in (
        ("emulation error:", "emulation"),
        ("WARNING: ThreadSanitizer: data race", "thread"),
        ("ERROR: AddressSanitizer", "address"),
        (": runtime error: ", "undefined"),
    ):
        if text in done.stderr:
            return name
    return "crash"


def own_blocks(config: KernelConfig) -> int:
    """The number of blocks for lengths and schedules: one each, or one for each backend where backends differ."""
    return config.sets + sum(1 if config.once(name) else config.sets for name in config.schedules)


def launch(
    source: str,
    config: KernelConfig,
    sanitizer: str,
    shapes: tuple[Shape, ...],
    directory: Path,
    launches: tuple[tuple[int, int], ...] = ((1, 1), (2, 64)),
    lines: bool = False,
) -> Outcome:
    """Builds and runs, by default with the blocks one after the other, then with all of them concurrently."""
    reason = missing_runtime(sanitizer)
    if reason is not None:
        pytest.skip(reason)
    each = own_blocks(config)
    # With equal rows the grid has as many table blocks as it needs: a few concurrent ones are enough.
    concurrent = 6 if config.equal_rows else config.blocks_per_sm * max((shape.sm_count for shape in shapes), default=1)
    copies = min(each + 2 * concurrent, MAX_COPIES)
    program = build(source, sanitizer, directory, copies=copies, lines=lines)
    return run(program, config, shapes, launches=launches)
