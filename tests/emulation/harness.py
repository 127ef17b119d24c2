"""Compiles an emitted kernel for host threads, runs it under a sanitizer, and compares it with the reference.

``build`` turns source text into a program, ``Case`` describes the tensors of a launch, ``run`` launches the program on
cases and says how it went. What one CUDA thread is in the program, the prelude (``include/cuda_runtime.h``) says.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from filelock import FileLock
from onelaunch.spec import layout, reference
from onelaunch.spec.config import KernelConfig
from onelaunch.spec.fields import FIELDS, MetadataBuffers
from torch import Tensor

HERE = Path(__file__).parent
COMPILER = "g++"
FLAGS = [
    "-std=c++17",
    "-O1",
    "-fno-omit-frame-pointer",
    "-fno-strict-aliasing",  # int4 accesses to int32 memory are fine for a device compiler
]
SANITIZERS: dict[str, list[str]] = {
    "none": [],
    "thread": ["-fsanitize=thread"],
    # Variables in a section of their own, as the shared ones are, go unchecked unless it is named.
    "address": ["-fsanitize=address", "-fsanitize-sections=emulated_shared"],
    # Its checks are made of the source as it is written. To optimize them takes the compiler longer than all the rest.
    "undefined": ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-O0"],
}
SANITIZERS["address+undefined"] = SANITIZERS["address"] + SANITIZERS["undefined"]
OPTIONS = {
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:atexit_sleep_ms=0",
    "ASAN_OPTIONS": "exitcode=67:detect_leaks=0:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "exitcode=68:print_stacktrace=1",
}
POISON = 0x5A5A5A5A
DEVICE = 3  # as in driver.cpp
RUN_SECONDS = 240


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
    for path in (HERE / "include" / "cuda_runtime.h", HERE / "driver.cpp"):
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


# ---- cases -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Case:
    """The tensors of one launch. Contents are random, drawn from ``seed``.

    Attributes:
        name: for messages.
        lengths: seq_lens, one a request.
        width: columns of req_to_token, and of a copy's precomputed page_indices.
        table_columns: columns of page_indices, ``width`` if None; real_page_table has as many as they need.
        max_len: bound on the columns, none if None.
        pool_rows: rows of req_to_token.
        token_phase, table_phase: bytes past a 16-byte boundary where req_to_token and the tables begin.
        token_pad, table_pad: elements between rows, of the first backend.
        input_stride: elements from one length or pool index to the next.
        spare_rows: rows of the destinations beyond the batch.
        sparse_stride: if set, elements from row to row of all tables, of which only the columns have memory: so that
            addresses need more than 32 bits. Must be a multiple of 4.
        extends: rows of the requests in turn, over and over, where extend lengths vary.
        bad_pool_row: what the first request has for a row of req_to_token, if set; for checked kernels.
        sm_count: multiprocessors that the launch is told of.
        num_sms, num_sm_parts: of the schedules.
        most_indices: elements of kv_indices, if the requests need as many.
        seed: of the contents.
    """

    name: str
    lengths: tuple[int, ...]
    width: int = 700
    table_columns: int | None = None
    max_len: int | None = None
    pool_rows: int = 4
    token_phase: int = 0
    table_phase: int = 0
    token_pad: int = 0
    table_pad: int = 0
    input_stride: int = 1
    spare_rows: int = 0
    sparse_stride: int | None = None
    extends: tuple[int, ...] = (2, 0, 1, 5, 0, -1)
    bad_pool_row: int | None = None
    sm_count: int = 1
    num_sms: int = 7
    num_sm_parts: int = 5
    most_indices: int = 5_000
    seed: int = 0


@dataclass
class _Buffer:
    """A tensor's memory: what it holds before and, where it is written, what it must hold after, or also may."""

    name: str
    content: Tensor  # flat, or [rows, columns] if sparse
    phase: int = 0
    expected: Tensor | None = None
    sparse_stride: int | None = None
    words: list[int] = field(default_factory=list)
    others: list[Tensor] = field(default_factory=list)

    def segments(self) -> list[tuple[int, bytes]]:
        if self.sparse_stride is None:
            return [(0, self.content.numpy().tobytes())]
        size = self.content.element_size()
        return [(r * self.sparse_stride * size, row.numpy().tobytes()) for r, row in enumerate(self.content)]

    def size(self) -> int:
        """Bytes from the first element to the last."""
        return max((offset + len(data) for offset, data in self.segments()), default=0)


class _Job:
    """One case of one configuration, as bytes for the driver and as tensors to compare with."""

    def __init__(self, config: KernelConfig, case: Case, launches: Sequence[tuple[int, int]]) -> None:
        self.config = config
        self.case = case
        self.launches = launches
        self.random = torch.Generator().manual_seed(case.seed)
        self.buffers: list[_Buffer] = []
        self.values: dict[str, list[int | _Buffer]] = {
            "batch_size": [len(case.lengths)],
            "device": [DEVICE],
            "sm_count": [case.sm_count],
        }
        width = case.width if case.table_columns is None else case.table_columns
        pages = -(-width // config.page_size)
        self.columns = {
            "page_indices": width,
            "real_page_table": pages,
            "pooled_real_page_table": -(-pages // config.index_kpool),
        }
        bs = len(case.lengths)
        self.extends = [case.extends[i % len(case.extends)] for i in range(bs)]
        # A copy's rows are any number.
        variable = config.extend == "variable" or config.operation == "copy"
        self.rows = sum(max(0, n) for n in self.extends) if variable else bs * config.next_n
        if config.mode == "decode":
            self.rows = bs
        self.values["rows"] = [self.rows]
        self.values["row_capacity"] = [self.rows + case.spare_rows]
        self.values["pool_rows"] = [case.pool_rows]
        self.values["real_page_table_width"] = [pages]
        self.values["num_sms"] = [case.num_sms]
        self.values["num_sm_parts"] = [case.num_sm_parts]
        added = max(config.seqlen_offsets, default=0) + (config.next_n if config.mode == "target_verify" else 0)
        self.tokens = [
            max(0, n) + added for n in torch.tensor(case.lengths, dtype=torch.int64).to(torch.int32).tolist()
        ]
        self.capacity = min(sum(self.tokens), case.most_indices)
        self.values["kv_indices_capacity"] = [self.capacity]
        if config.operation == "copy":
            self._copy()
        else:
            self._refresh()

    def _buffer(self, name: str, content: Tensor, phase: int = 0, sparse_stride: int | None = None) -> _Buffer:
        self.buffers.append(_Buffer(name, content, phase, None, sparse_stride))
        return self.buffers[-1]

    def _strided(self, name: str, values: Tensor) -> None:
        """A one-dimensional input, with poison between its elements."""
        step = self.case.input_stride
        content = torch.full((max(0, (values.numel() - 1) * step + 1),), POISON, dtype=values.dtype)
        content[::step] = values
        self.values[name] = [self._buffer(name, content, phase=values.element_size())]
        self.values[f"{name}_stride"] = [step]

    def _table(self, name: str, values: Tensor, pad: int, phase: int) -> tuple[_Buffer, Tensor]:
        """A table with its rows ``pad`` apart; the buffer and a view of its elements."""
        rows, columns = values.shape
        if self.case.sparse_stride is not None:
            buffer = self._buffer(name, values.clone(), phase, self.case.sparse_stride)
            return buffer, buffer.content
        stride = columns + pad
        content = torch.full((max(0, (rows - 1) * stride + columns),), POISON, dtype=values.dtype)
        view = content.as_strided((rows, columns), (stride, 1))
        view.copy_(values)
        return self._buffer(name, content, phase), view

    def _stride(self, view: Tensor) -> int:
        return self.case.sparse_stride if self.case.sparse_stride is not None else view.stride(0)

    def _tokens(self, rows: int, columns: int) -> Tensor:
        """Tokens up to 2^31, and padding below zero."""
        tokens = torch.randint(0, 2**31, (rows, columns), generator=self.random)
        padding = torch.randint(-70, 0, (rows, columns), generator=self.random)
        return torch.where(tokens % 4 == 0, padding, tokens)

    def _destinations(self) -> list[MetadataBuffers]:
        """Poisoned destinations; the views are of the expected contents."""
        config, case = self.config, self.case
        backends = [MetadataBuffers() for _ in range(config.num_backends)]
        several = config.operation != "copy" and (config.next_n > 1 or config.extend == "variable")
        for name in config.fields:
            self.values[name] = []
            rows = case.spare_rows + (self.rows if FIELDS[name].per == "row" else len(case.lengths))
            for d in range(config.destinations(name)):
                label = f"{name}[{d}]"
                if FIELDS[name].kind == "table":
                    # 16-byte stores need one phase in all destinations; else every one gets its own.
                    aligned = config.vector_bytes == 16 and (name == "page_indices" or config.operation == "copy")
                    pad = case.table_pad + (4 * d if aligned else d)
                    if aligned and several:
                        pad += -(self.columns[name] + pad) % 4
                    phase = case.table_phase if aligned else (case.table_phase + 4 * d) % 16
                    poison = torch.full((rows, self.columns[name]), POISON, dtype=torch.int32)
                    buffer, view = self._table(label, poison, pad, phase)
                    self.values[name] += [buffer, self._stride(view)]
                    buffer.expected = buffer.content.clone()
                    view = buffer.expected.as_strided(view.shape, view.stride())
                else:
                    shape: tuple[int, ...] = (rows + FIELDS[name].extra,)
                    if FIELDS[name].kind == "schedule":
                        mqa = name == "paged_mqa_schedule_metadata"
                        shape = (case.num_sms + 1, 2) if mqa else (case.num_sm_parts, 8)
                    elif FIELDS[name].kind == "indices":
                        shape = (self.capacity,)
                    poison = torch.full((math.prod(shape),), POISON, dtype=torch.int32)
                    buffer = self._buffer(label, poison, 4 * (d % 4))
                    self.values[name] += [buffer]
                    buffer.expected = buffer.content.clone()
                    view = buffer.expected.view(shape)
                for b in range(config.num_backends):
                    if min(b, config.destinations(name) - 1) == d:
                        setattr(backends[b], name, view)
        return backends

    def _refresh(self) -> None:
        config, case = self.config, self.case
        backends = self._destinations()
        seq_lens = torch.tensor(case.lengths, dtype=torch.int64).to(getattr(torch, config.seq_lens_dtype))
        if config.needs_lengths:
            self._strided("seq_lens", seq_lens)
        tokens = self._tokens(case.pool_rows, case.width)
        rows = torch.randint(0, case.pool_rows, (len(case.lengths),), generator=self.random)
        if len(case.lengths) > 0:
            rows[-1] = case.pool_rows - 1  # the row with nothing behind it
        pool = rows.to(getattr(torch, config.req_pool_indices_dtype))
        extends = torch.tensor(self.extends, dtype=torch.int64).to(getattr(torch, config.extend_seq_lens_dtype))
        if config.extend == "variable":
            self._strided("extend_seq_lens", extends)
        token_dtype = getattr(torch, config.req_to_token_dtype)
        if config.tables:
            given = pool.clone()
            if case.bad_pool_row is not None:
                given[0] = case.bad_pool_row
            self._strided("req_pool_indices", given)
            size = token_dtype.itemsize
            buffer, view = self._table(
                "req_to_token", tokens.to(token_dtype), case.token_pad, case.token_phase // size * size
            )
            self.values["req_to_token"] = [buffer]
            self.values["req_to_token_stride"] = [self._stride(view)]
            self.values["req_to_token_width"] = [case.width]
            limits = [case.width, case.max_len if case.max_len is not None else case.width]
            if "page_indices" in config.fields:
                limits.append(self.columns["page_indices"])
            elif "real_page_table" in config.fields:
                limits.append(self.columns["real_page_table"] * config.page_size)
            elif "pooled_real_page_table" in config.fields:
                limits.append(self.columns["pooled_real_page_table"] * config.page_size * config.index_kpool)
            self.values["columns"] = [min(limits)]
        offsets = config.seqlen_offsets
        reference.refresh(
            backends,
            seq_lens,
            pool,
            tokens.to(token_dtype),
            index_topk=config.index_topk,
            page_size=config.page_size,
            extent=config.extent,
            max_len=case.max_len,
            mode=config.mode,
            next_n=config.next_n,
            extend_seq_lens=extends if config.extend == "variable" else None,
            seqlen_offsets=offsets * config.num_backends if len(offsets) == 1 else offsets or None,
            index_kpool=config.index_kpool,
            page_fill=config.page_fill,
            schedule_remainder=config.schedule_remainder,
            schedule_per=config.schedule_per,
            schedule_atoms=config.schedule_atoms,
            flashmla_order=config.flashmla_order,
        )
        if config.checked:
            self._violations()

    def _violations(self) -> None:
        """The record of a checked kernel: whichever violation was first, or none. What it skips isn't written."""
        config, case = self.config, self.case
        longest = max(config.seqlen_offsets, default=0) + (config.next_n if config.mode == "target_verify" else 0)
        found = []
        for request, length in enumerate(case.lengths):
            length = int(torch.tensor(length).to(getattr(torch, config.seq_lens_dtype)))
            if config.tables and length > (most := int(self.values["columns"][0]) - longest):  # type: ignore[arg-type]
                found.append([3, request, length, most])
            if length < 0:
                found.append([2, request, length, 0])
            if config.extend == "variable" and self.extends[request] < 0:
                found.append([4, request, self.extends[request], self.values["row_capacity"][0]])
        if "kv_indices" in config.fields:
            needed = itertools.accumulate(self.tokens)
            found += [[6, r, n, self.capacity] for r, n in enumerate(needed) if n > self.capacity]
        if case.bad_pool_row is not None:
            found.append([1, 0, case.bad_pool_row, case.pool_rows])
            rows = max(0, self.extends[0]) if config.extend == "variable" else config.next_n
            for buffer in self.buffers:
                name, _, index = buffer.name.rstrip("]").partition("[")
                if buffer.expected is not None and name == "kv_indices":
                    offsets = config.seqlen_offsets
                    less = max(offsets) - offsets[int(index)] if len(offsets) > 1 else 0
                    buffer.expected[: self.tokens[0] - less] = POISON
                elif buffer.expected is not None and name in config.tables:
                    stride = self.values[name][2 * int(index) + 1]
                    assert isinstance(stride, int)
                    view = buffer.expected.as_strided((rows, self.columns[name]), (stride, 1))
                    view.fill_(POISON)
        buffer = self._buffer("violation", torch.zeros(4, dtype=torch.int64))
        self.values["violation"] = [buffer]
        # Compared as the others are, in 32-bit words.
        choices = [torch.tensor(violation, dtype=torch.int64).view(torch.int32) for violation in found or [[0] * 4]]
        buffer.expected, buffer.others = choices[0], choices[1:]

    def _copy(self) -> None:
        config, case = self.config, self.case
        backends = self._destinations()
        precomputed = MetadataBuffers()
        columns = {}
        for name in config.fields:
            rows = self.rows if FIELDS[name].per == "row" else len(case.lengths)
            if FIELDS[name].kind == "table":
                columns[name] = self.columns[name]
                if case.max_len is not None and name != "pooled_real_page_table":
                    columns[name] = min(columns[name], case.max_len)
                values = self._tokens(rows, self.columns[name]).to(torch.int32)
                buffer, view = self._table(f"from_{name}", values, case.token_pad, case.token_phase)
                self.values[f"from_{name}"] = [buffer, self._stride(view)]
                self.values[f"{name}_columns"] = [columns[name]]
            else:
                count = rows + (FIELDS[name].kind == "cumulative")
                view = torch.randint(0, 2**31, (count,), generator=self.random).to(torch.int32)
                self.values[f"from_{name}"] = [self._buffer(f"from_{name}", view, 4)]
            setattr(precomputed, name, view)
        reference.copy(
            precomputed,
            backends,
            bs=len(case.lengths),
            rows=self.rows,
            columns=columns.get("page_indices"),
            page_columns=columns.get("real_page_table"),
        )

    def encode(self) -> bytes:
        """The case in the driver's format."""
        words: list[int] = []
        for member in layout.members(self.config):
            values = self.values[member.name]
            assert len(values) == member.words, f"{member.name} takes {member.words} words, the case has {values}"
            for value in values:
                if isinstance(value, _Buffer):
                    value.words.append(len(words))
                words.append(0 if isinstance(value, _Buffer) else value)
        out = [_text(self.case.name), _numbers(len(words), *words), _numbers(len(self.launches))]
        out += [_numbers(seed, together) for seed, together in self.launches]
        out.append(_numbers(len(self.buffers)))
        for b in self.buffers:
            out.append(_text(b.name))
            out.append(_numbers(b.size(), b.phase, b.expected is not None, b.sparse_stride is not None, len(b.words)))
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
                if b.expected is None or b.expected.numel() == 0:
                    continue
                bytes_ = b.expected.numel() * b.expected.element_size()
                got = torch.frombuffer(bytearray(results[taken : taken + bytes_]), dtype=torch.int32)
                taken += bytes_
                wrong = (got != b.expected.flatten()).nonzero().flatten()
                if wrong.numel() and not any(torch.equal(got, other) for other in b.others):
                    i = int(wrong[0])
                    want = int(b.expected.flatten()[i])
                    where = f"{self.case.name}, seed {seed}, {together} blocks together: {b.name}"
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
    cases: Iterable[Case],
    *,
    launches: Sequence[tuple[int, int]] = ((1, 1), (2, 64)),
    seconds: int = RUN_SECONDS,
) -> Outcome:
    """Launches a program on cases, in one process, and compares all destinations with the reference.

    Args:
        program: from ``build``.
        launches: (seed of the block and thread order, most blocks at the same time), one launch of every case each.
    """
    jobs = [_Job(config, case, launches) for case in cases]
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
    assert not data, "the driver wrote more than was asked for"
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
