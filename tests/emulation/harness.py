"""Compiles an emitted kernel for host threads, runs it under a sanitizer, and compares it with the reference.

``build`` turns source text into a program, ``run`` launches it on shapes of cases.py, with the tensors and expectations
of checker.py, and says how it went. What one CUDA thread is in the program, the prelude (``include/cuda_runtime.h``)
says.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import checker
import torch
from cases import Shape
from filelock import FileLock
from onelaunch import KernelConfig
from onelaunch.spec import layout
from onelaunch.spec.cpp import user_name
from onelaunch.spec.violations import DIFFERS
from support import POISON, poisoned
from torch import Tensor

HERE = Path(__file__).parent
COMPILER = "g++"
FLAGS = [
    "-std=c++17",
    "-O0",  # to optimize takes the compiler longer than it saves the program
    "-fno-omit-frame-pointer",
    "-fno-strict-aliasing",  # int4 accesses to int32 memory are fine for a device compiler
]
SANITIZERS: dict[str, list[str]] = {
    "none": [],
    "thread": ["-fsanitize=thread"],
    # Variables in a section of their own, as the shared ones are, go unchecked unless it is named.
    "address": ["-fsanitize=address", "-fsanitize-sections=emulated_shared"],
    "undefined": ["-fsanitize=undefined", "-fno-sanitize-recover=all"],
}
SANITIZERS["address+undefined"] = SANITIZERS["address"] + SANITIZERS["undefined"]
OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:atexit_sleep_ms=0",
    "ASAN_OPTIONS": "exitcode=67:detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "exitcode=68:print_stacktrace=1",
}
DEVICE = 3  # as in driver.cpp
RUN_SECONDS = 1800  # ThreadSanitizer takes up to half a minute, and on a busy machine a multiple of it


class CompileError(Exception):
    """The compiler or linker refused the source; the message is its log."""


# ---- building --------------------------------------------------------------------------------------------------------
def build(source: str, sanitizer: str, directory: Path, *, copies: int, lines: bool = False) -> Path:
    """The program for an emitted source, built once for all processes that share ``directory``.

    Args:
        source: the emitted CUDA.
        sanitizer: a key of SANITIZERS.
        copies: how many blocks of a grid may run at the same time, up to 33. ``__shared__`` variables are static, so
            each of them runs on its own copy of the object file, with its symbols renamed.
        lines: let reports name lines of the source, which takes the compiler half as long again.

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
    """The driver's object file: the same for every kernel and sanitizer."""
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
    """A folder with the prelude, precompiled: most of the time of a small kernel goes into the headers."""
    digest = _digest(*flags)
    folder = directory / f"prelude-{digest}"
    with FileLock(directory / f"prelude-{digest}.lock"):
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            partial.mkdir(exist_ok=True)
            shutil.copy(HERE / "include" / "cuda_runtime.h", partial)
            # Not as the main file, in which #pragma once has a warning.
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
    """Older sanitizer runtimes want their addresses free, which strong address randomization doesn't promise."""
    command = ["setarch", "--addr-no-randomize"]
    if shutil.which("setarch") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
        return command
    return []


# ---- jobs ------------------------------------------------------------------------------------------------------------
@dataclass
class _Buffer:
    """A tensor's memory as the driver gets it: from its first element to its last, and what it must hold afterwards.

    Attributes:
        tensor: what it holds before; of a sparse one the rows, of which only the columns have memory.
        sparse_stride: elements from row to row of a sparse one.
        expected: the same range afterwards, bool as bytes; None if nothing may change.
        unknown: elements of it that may hold anything.
        kept: the kernel may write it, and what it writes is for the next launch alone.
        others: what it may hold as well.
        words: the parameter words that point to it.
    """

    name: str
    tensor: Tensor
    sparse_stride: int | None = None
    expected: Tensor | None = None
    unknown: slice | None = None
    kept: bool = False
    others: list[Tensor] = field(default_factory=list)
    words: list[int] = field(default_factory=list)

    @property
    def phase(self) -> int:
        """Bytes past a 16-byte boundary."""
        return self.tensor.data_ptr() % 16

    def segments(self) -> list[tuple[int, bytes]]:
        """Pieces of memory: offset in bytes, and content."""
        if self.sparse_stride is None:
            return [(0, _flat(self.tensor).numpy().tobytes())]
        size = self.tensor.element_size()
        return [(r * self.sparse_stride * size, row.numpy().tobytes()) for r, row in enumerate(self.tensor)]

    def size(self) -> int:
        """Bytes from the first element to the last."""
        return max((offset + len(data) for offset, data in self.segments()), default=0)


def _flat(tensor: Tensor) -> Tensor:
    """All elements of the allocation from a tensor's first to its last, the unused ones between rows included."""
    if tensor.numel() == 0:
        return tensor.flatten()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1,), (1,))


class _Job:
    """One case of one configuration, as bytes for the driver and as tensors to compare with."""

    def __init__(
        self, config: KernelConfig, shape: Shape, launches: Sequence[tuple[int, int]], hashes: Tensor | None = None
    ) -> None:
        self.shape = shape
        self.launches = launches
        self.scene = scene = checker.Scene(config, shape)
        self.config = scene.config
        self.buffers: list[_Buffer] = []
        # The words of each member of the parameter block.
        self.values: dict[str, list[int | _Buffer]] = {
            "batch_size": [len(shape.lengths)],
            "device": [DEVICE],
            "sm_count": [shape.sm_count],
            "rows": [scene.rows],
            "row_capacity": [scene.rows + shape.spare_rows],
            "pool_rows": [shape.pool_rows],
            "req_to_token_width": [shape.width],
            "filled_width": [scene.widths["real_page_table"]],
            "columns": [scene.columns],
            "num_sms": [shape.num_sms],
            "num_sm_parts": [shape.num_sm_parts],
            "packed_capacity": [scene.capacity],
            **{f"{name}_columns": [scene.copied_columns(name)] for name in scene.widths},
        }
        for name in ("seq_lens", "req_pool_indices", "extend_seq_lens"):
            tensor = getattr(scene, name)
            self.values[name] = [self._buffer(name, tensor)]
            self.values[f"{name}_stride"] = [tensor.stride(0)]
        pool, stride = self._table("req_to_token", scene.req_to_token)
        self.values["req_to_token"], self.values["req_to_token_stride"] = [pool], [stride]
        for f, tensor in scene.source.items():
            self.values[f"from_{f.name}"] = self._words(f"from_{f.name}", tensor)
        self.values["captured_size"], self.values["requests"] = [scene.captured_size or 0], [scene.requests]
        for name, tensor in scene.inputs.items():
            self.values[user_name(name)] = [self._buffer(name, tensor)]
            self.values[f"{user_name(name)}_stride"] = [tensor.stride(0)]
        for name, tensor in scene.tables.items():
            shape_of = [tensor.numel()] if tensor.dim() == 1 else [tensor.shape[0], tensor.stride(0), tensor.shape[1]]
            self.values[user_name(name)] = [self._buffer(name, tensor), *shape_of]
        for name in config.computed:
            self.values[f"{config.member(name)}_width"] = [checker.TABLE_WIDTH]
            self.values[f"{config.member(name)}_capacity"] = [checker.PACKED_CAPACITY]
        for name, tensors in scene.destinations.items():
            values = self.values[config.member(name)] = []
            for d, (tensor, _) in enumerate(tensors):
                is_table = config.field(name).kind == "table"
                words = self._words(f"{name}[{d}]", tensor, is_table and name not in scene.declared)
                if is_table and name in scene.declared:
                    words += [*tensor.stride()]
                if name in config.strided:
                    words += [tensor.stride(0) * (config.field(name).own_rows or 1), tensor.stride(0)]
                values += words
                assert isinstance(words[0], _Buffer)
                if config.audits:  # which compares with what is there
                    tensor.copy_(scene.wanted(name, d))
                else:
                    words[0].expected = self._expected(name, d, tensor)
        if config.hashes_tiles:
            tiles = (max(scene.widths.values()) + 3) // config.tile_columns + 1
            rows = min(tensor.shape[0] for name in config.tables for tensor, _ in scene.destinations[name])
            nothing = torch.zeros((rows, tiles), dtype=torch.int64)
            self.hashes = self._buffer("tile_hashes", nothing if hashes is None else hashes)
            self.hashes.kept = True
            self.values["tile_hashes"], self.values["tile_hashes_stride"] = [self.hashes], [tiles]
        if config.checked:
            # Compared as the others are, in 32-bit words.
            found = [[checker.KINDS[kind], *numbers] for kind, *numbers in scene.violations] or [[0] * 4]
            choices = [torch.tensor(violation, dtype=torch.int64).view(torch.int32) for violation in found]
            record = self._buffer("violation", torch.zeros(4, dtype=torch.int64))
            record.expected, record.others = choices[0], choices[1:]
            self.values["violation"] = [record]
        if config.audits:
            record = self._buffer("violation", torch.zeros(4, dtype=torch.int64))
            record.expected, record.unknown = self._difference().view(torch.int32), slice(2, 4)
            self.values["violation"] = [record]

    def _difference(self) -> Tensor:
        """Changes an element, if the shape says so; the record that an audit leaves, but for the address."""
        name = self.shape.wrong
        if name is None:
            return torch.zeros(4, dtype=torch.int64)
        tensor, wanted = self.scene.destinations[name][-1][0], self.scene.wanted(name, -1)
        untouched = poisoned((1,), tensor.dtype)
        if wanted.dtype == torch.bool:
            tensor, wanted, untouched = (each.view(torch.uint8) for each in (tensor, wanted, untouched))
        place = tuple((wanted != untouched).nonzero()[-1].tolist())
        expected = int(wanted[place])
        tensor[place] = found = expected ^ 1
        return torch.tensor([DIFFERS.number, 0, found, expected], dtype=torch.int64)

    def _buffer(self, name: str, tensor: Tensor, sparse_stride: int | None = None) -> _Buffer:
        self.buffers.append(_Buffer(name, tensor, sparse_stride))
        return self.buffers[-1]

    def _table(self, name: str, table: Tensor) -> tuple[_Buffer, int]:
        return self._buffer(name, table, self.shape.sparse_stride), self.scene.stride(table)

    def _words(self, name: str, tensor: Tensor, table: bool | None = None) -> list[int | _Buffer]:
        """A pointer, and the row stride of a table."""
        if tensor.dim() == 2 if table is None else table:
            return list(self._table(name, tensor))
        return [self._buffer(name, tensor)]

    def _expected(self, name: str, d: int, tensor: Tensor) -> Tensor:
        wanted = self.scene.wanted(name, d)
        if self.shape.sparse_stride is not None and tensor.dim() == 2 and name not in self.scene.declared:
            return wanted.flatten()
        around = poisoned(_flat(tensor).shape, tensor.dtype)
        if tensor.dtype == torch.bool:  # the poison is no truth value
            around, wanted = around.view(torch.uint8), wanted.view(torch.uint8)
        around.as_strided(tensor.shape, tensor.stride()).copy_(wanted)
        return around

    def encode(self) -> bytes:
        """The case in the driver's format."""
        words: list[int] = []
        used: list[_Buffer] = []
        for member in layout.members(self.config):
            values = self.values[member.name]
            assert len(values) == member.words, f"{member.name} takes {member.words} words, the case has {values}"
            for value in values:
                if isinstance(value, _Buffer):
                    value.words.append(len(words))
                    used.append(value)
                words.append(0 if isinstance(value, _Buffer) else value)
        self.buffers = list({id(buffer): buffer for buffer in used}.values())
        out = [_text(self.shape.name), _numbers(len(words), *words), _numbers(len(self.launches))]
        out += [_numbers(seed, together) for seed, together in self.launches]
        out.append(_numbers(len(self.buffers)))
        for b in self.buffers:
            out.append(_text(b.name))
            out.append(
                _numbers(b.size(), b.phase, b.expected is not None or b.kept, b.sparse_stride is not None, len(b.words))
            )
            out += [_numbers(word, 0) for word in b.words]
            segments = b.segments()
            out.append(_numbers(len(segments)))
            for offset, data in segments:
                out += [_numbers(offset, len(data)), data]
        return b"".join(out)

    def compare(self, results: memoryview) -> tuple[str | None, int]:
        """The first difference between the driver's results and what must be there, and the bytes taken."""
        taken = 0
        for seed, together in self.launches:
            for b in self.buffers:
                if b.kept:
                    content = bytearray(results[taken : taken + b.size()])
                    b.tensor = (
                        torch.frombuffer(content, dtype=torch.int64).view(b.tensor.shape) if content else b.tensor
                    )
                    taken += b.size()
                if b.expected is None or b.expected.numel() == 0:
                    continue
                size = b.expected.numel() * b.expected.element_size()
                got = torch.frombuffer(bytearray(results[taken : taken + size]), dtype=b.expected.dtype)
                taken += size
                differs = got != b.expected
                if b.unknown is not None:
                    differs[b.unknown] = False
                wrong = differs.nonzero().flatten()
                if wrong.numel() and not any(torch.equal(got, other) for other in b.others):
                    i = int(wrong[0])
                    want = int(b.expected[i])
                    where = f"{self.shape.name}, seed {seed}, {together} blocks together: {b.name}"
                    return (
                        f"{where} differs in {wrong.numel()} of {got.numel()} elements, first at element {i}: "
                        f"{int(got[i])} instead of {'poison' if want == POISON else want}",
                        taken,
                    )
        return None, taken


def _numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _text(text: str) -> bytes:
    data = text.encode()
    return _numbers(len(data)) + data


# ---- running ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Outcome:
    """How a run went.

    Attributes:
        caught: None if all is well; else who complained: "mismatch" (the comparison with the reference), "thread",
            "address", "undefined" (that sanitizer), "emulation" (the prelude's own checks), "crash", "hang".
        text: what was said.
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
        launches: (seed of the block and thread order, how many blocks may run at the same time); each shape is launched
            once for each.
    """
    chains = [_chain(shape) for shape in shapes]
    hashes: list[Tensor | None] = [None] * len(chains)
    outcome = Outcome(None, "")
    for turn in range(max(map(len, chains), default=0)):
        jobs = {i: _Job(config, c[turn], launches, hashes[i]) for i, c in enumerate(chains) if turn < len(c)}
        outcome = _run(program, list(jobs.values()), seconds)
        if outcome.caught is not None:
            return outcome
        for i, job in jobs.items():
            hashes[i] = job.hashes.tensor if config.hashes_tiles else None
    return outcome


def _chain(shape: Shape) -> list[Shape]:
    """A shape after those that are launched before it on the same memory."""
    return [*([] if shape.before is None else _chain(shape.before)), shape]


def _run(program: Path, jobs: Sequence[_Job], seconds: int) -> Outcome:
    """run() of jobs whose memory is as it must be before."""
    with tempfile.TemporaryDirectory() as name:
        job, results = Path(name) / "job", Path(name) / "results"
        job.write_bytes(_numbers(len(jobs)) + b"".join(j.encode() for j in jobs))
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
