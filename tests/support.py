"""Shared by the tests: token pools, poisoned destinations with guard zones, the comparison, ptxas reports."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from onelaunch import FIELDS, Field, KernelConfig, MetadataBuffers, render
from onelaunch.build import compile as compiler
from onelaunch.build import toolchain
from onelaunch.spec import reference
from torch import Tensor

# Fills words that must not be written; no token, length or sum of a test has this value.
POISON = -559038737
POISON_BYTE = 0xA5  # in a destination of bool: neither of its values
# Poisoned words on either side of a tensor; a multiple of four, so that an offset alone decides the 16-byte phase.
GUARD = 32

# Why a test is skipped; gpu/two_devices.json has all that are.
ONE_DEVICE = "needs two CUDA devices"

# The fields whose shape follows from the batch. Schedules and kv_indices have separate tests.
ALL_FIELDS = tuple(name for name, field in FIELDS.items() if field.kind in ("vector", "running_sum", "table"))
SIX_FIELDS = (
    "cache_seqlens",
    "cu_seqlens_k",
    "page_indices",
    "nsa_cache_seqlens",
    "nsa_cu_seqlens_k",
    "real_page_table",
)
SEVEN_FIELDS = (*SIX_FIELDS, "seqlens_expanded")
TABLES = ("page_indices", "real_page_table")
DTYPES = (torch.int32, torch.int64)


# ------------------------------------------------------------------------------------------------ destinations


class Everything(MetadataBuffers):
    """Buffers of standard fields and of declared ones."""

    def __init__(self, declared: Mapping[str, Field], **tensors: Tensor) -> None:
        super().__init__()
        self._declared = declared
        for name, tensor in tensors.items():
            setattr(self, name, tensor)

    def items(self) -> Iterator[tuple[Field, Tensor]]:
        yield from super().items()
        for name, field in self._declared.items():
            if hasattr(self, name):
                yield field, getattr(self, name)


@dataclass(eq=False)
class Poisoned:
    """One backend's destinations, each in the middle of a larger poisoned allocation.

    Attributes:
        buffers: the destinations.
        storages: by field, the whole allocation, [elements] of its dtype.
    """

    buffers: MetadataBuffers
    storages: dict[str, Tensor]


def poisoned(shape: Sequence[int], dtype: torch.dtype, device: Any = "cpu") -> Tensor:
    """A tensor full of poison; for bool a byte that is neither value."""
    if dtype == torch.bool:
        return torch.full(tuple(shape), POISON_BYTE, dtype=torch.uint8, device=device).view(torch.bool)
    return torch.full(tuple(shape), POISON, dtype=dtype, device=device)


def guarded(
    *shape: int,
    row_stride: int | None = None,
    offset: int = 0,
    dtype: torch.dtype = torch.int32,
    device: Any = "cpu",
) -> tuple[Tensor, Tensor]:
    """A poisoned tensor and the allocation around it.

    Args:
        row_stride: elements from row to row of a table, or from element to element; None is dense.
        offset: elements that the tensor begins past a 16-byte boundary, 0 to 3.
    """
    strides = (row_stride or shape[1], 1) if len(shape) == 2 else (row_stride or 1,)
    words = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) + 1 if min(shape) > 0 else 0
    storage = poisoned((GUARD + offset + words + GUARD,), dtype, device)
    assert storage.data_ptr() % 16 == 0
    return storage.as_strided(shape, strides, GUARD + offset), storage


def row_stride(width: int, kind: str) -> int:
    """A stride for rows of this width, with unused words at the end: "aligned" to 16 bytes, or "odd"."""
    stride = width + 5
    return -(-stride // 4) * 4 if kind == "aligned" else stride | 1


def page_columns(columns: int, page_size: int) -> int:
    """Columns of real_page_table."""
    return -(-columns // page_size)


def destination(
    fields: Iterable[str],
    rows: int,
    columns: int,
    page_size: int,
    *,
    strides: str = "aligned",
    extra_stride: int = 0,
    offset: int = 0,
    device: Any = "cpu",
    requests: int | None = None,
    index_kpool: int = 1,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Poisoned:
    """One backend with room for ``rows`` rows, ``requests`` requests (as many if None) and ``columns`` tokens.

    ``shapes`` are those of schedules and indices. With page_size 1, real_page_table is page_indices itself, as engines
    have it.
    """
    tensors: dict[str, Tensor] = {}
    storages: dict[str, Tensor] = {}
    for name in FIELDS:
        if name not in fields:
            continue
        kind = FIELDS[name].kind
        height = rows if requests is None or FIELDS[name].per == "row" else requests
        if name == "real_page_table" and page_size == 1:
            tensors[name], storages[name] = tensors["page_indices"], storages["page_indices"]
        elif kind == "table":
            tokens = {"page_indices": 1, "real_page_table": page_size}.get(name, page_size * index_kpool)
            width = page_columns(columns, tokens)
            stride = row_stride(width, strides) + extra_stride
            tensors[name], storages[name] = guarded(height, width, row_stride=stride, offset=offset, device=device)
        elif kind in ("schedule", "packed"):
            shape = (shapes or {})[name]
            tensors[name], storages[name] = guarded(*shape, offset=offset, device=device)
        else:
            count = height + FIELDS[name].extra
            tensors[name], storages[name] = guarded(count, offset=offset, device=device)
    return Poisoned(MetadataBuffers(**tensors), storages)


def buffers_of(backends: Sequence[Poisoned]) -> list[MetadataBuffers]:
    return [backend.buffers for backend in backends]


def plain_copy(buffers: MetadataBuffers) -> MetadataBuffers:
    """Dense copies on the CPU, for the reference to write to."""
    return MetadataBuffers(**{field.name: tensor.cpu().clone() for field, tensor in buffers.items()})


# ------------------------------------------------------------------------------------------------ comparison


def expected_refresh(
    backends: Sequence[Poisoned],
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    *,
    extend_seq_lens: Tensor | None = None,
    **facts: Any,
) -> MetadataBuffers:
    """The results of reference.refresh on poisoned destinations with the first backend's shapes."""
    wanted = MetadataBuffers(
        **{f.name: torch.full(t.shape, POISON, dtype=t.dtype) for f, t in backends[0].buffers.items()}
    )
    extends = None if extend_seq_lens is None else extend_seq_lens.cpu()
    reference.refresh(
        [wanted], seq_lens.cpu(), req_pool_indices.cpu(), req_to_token.cpu(), extend_seq_lens=extends, **facts
    )
    if wanted.page_indices is not None and facts["page_size"] == 1 and wanted.real_page_table is not None:
        wanted.real_page_table = wanted.page_indices
    return wanted


def assert_same(backends: Sequence[Poisoned], expected: MetadataBuffers | Sequence[MetadataBuffers]) -> None:
    """Checks every word of every backend's allocations: the destinations, and the poison around them.

    A failure names the backend, the field, the first bad index, the actual and the expected value.
    """
    for index, backend in enumerate(backends):
        wanted = expected if isinstance(expected, MetadataBuffers) else expected[index]
        for field, tensor in backend.buffers.items():
            want = getattr(wanted, field.name)
            got_all = backend.storages[field.name]
            want_all = poisoned(got_all.shape, got_all.dtype, got_all.device)
            view = want_all.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            assert want is not None, f"the expected results have no {field.name}"
            assert want.shape == view.shape, f"{field.name}: {tuple(view.shape)}, expected {tuple(want.shape)}"
            if got_all.dtype == torch.bool:  # the poison is neither value's byte
                got_all, want_all = got_all.view(torch.uint8), want_all.view(torch.uint8)
                view, want = view.view(torch.uint8), want.view(torch.uint8)
            view.copy_(want)
            if torch.equal(got_all, want_all):
                continue
            bad = (got_all != want_all).nonzero()
            word = int(bad[0])
            got, right = int(got_all[word]), int(want_all[word])
            raise AssertionError(
                f"backend {index}: {field.name}{_place(word, tensor)} is {_word(got)}, expected {_word(right)}; "
                f"{len(bad)} of {got_all.numel()} words differ"
            )


def assert_untouched(backends: Iterable[Poisoned]) -> None:
    """Checks that nothing was written."""
    for index, backend in enumerate(backends):
        for name, storage in backend.storages.items():
            bad = (storage != POISON).nonzero()
            assert len(bad) == 0, f"backend {index}: word {int(bad[0])} of {name}'s memory was written"


def _word(value: int) -> str:
    return "untouched" if value == POISON else str(value)


def _place(word: int, tensor: Tensor) -> str:
    """The position of a word of the allocation, relative to the tensor."""
    at = word - tensor.storage_offset()
    if tensor.dim() == 1:
        return f"[{at}]" if 0 <= at < tensor.numel() else f": word {at} relative to its start, outside of it,"
    row, column = divmod(at, tensor.stride(0))
    inside = 0 <= row < tensor.shape[0] and column < tensor.shape[1]
    return f"[{row}, {column}]" if inside else f": row {row}, column {column}, outside of it,"


def poison(backends: Iterable[Poisoned]) -> None:
    """Restores the poison, as if nothing had been written."""
    for backend in backends:
        for storage in backend.storages.values():
            if storage.dtype == torch.bool:
                storage.view(torch.uint8).fill_(POISON_BYTE)
            else:
                storage.fill_(POISON)


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A call in a CUDA graph, as an engine captures it; nothing has run yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


# ------------------------------------------------------------------------------------------------ inputs


def token_pool(
    rows: int,
    width: int,
    *,
    dtype: torch.dtype = torch.int32,
    strides: str = "aligned",
    offset: int = 0,
    device: Any = "cpu",
    seed: int = 0,
) -> Tensor:
    """A req_to_token of random tokens: some negative (padding), in int64 some beyond int32."""
    random_numbers = torch.Generator().manual_seed(seed)
    stride = row_stride(width, strides)
    storage = torch.randint(-200, 2**31 - 1, (offset + rows * stride + 8,), generator=random_numbers)
    small = torch.randint(0, 4, storage.shape, generator=random_numbers) == 0
    storage = torch.where(small, storage % 400 - 200, storage)
    if dtype == torch.int64:
        wide = torch.randint(0, 8, storage.shape, generator=random_numbers) == 0
        storage = torch.where(wide, storage + 3 * 2**32, storage)
    return storage.to(dtype).to(device).as_strided((rows, width), (stride, 1), offset)


def lengths(bs: int, width: int, page_size: int, seed: int = 0) -> list[int]:
    """Edge-case lengths, then random ones, in random order."""
    edges = [0, 1, page_size - 1, page_size, page_size + 1, width - 1, width, width + 1, 3 * width, 2 * page_size]
    numbers = random.Random(f"{bs}.{width}.{page_size}.{seed}")
    some = [edges[i % len(edges)] if i % 3 else numbers.randint(0, width + 20) for i in range(bs)]
    numbers.shuffle(some)
    return some


def vector(values: Sequence[int], dtype: torch.dtype, device: Any = "cpu", layout: str = "plain") -> Tensor:
    """A 1-D input: "plain" (dense), or "strided" with other numbers between the elements."""
    if layout == "plain":
        return torch.tensor(values, dtype=dtype, device=device)
    spread = torch.full((2 * len(values) + 1,), 7_777, dtype=dtype, device=device)
    spread[1::2] = torch.tensor(values, dtype=dtype, device=device)
    return spread[1::2]


def pool_rows(bs: int, rows: int, seed: int = 0) -> list[int]:
    """Rows of the pool, the padding row 0 among them; they repeat if the batch is larger than the pool."""
    numbers = random.Random(f"{bs}.{rows}.{seed}")
    some = [i % rows for i in range(bs)]
    numbers.shuffle(some)
    return some


# ------------------------------------------------------------------------------------------------ compilers


def ptxas_reports(
    configs: Sequence[KernelConfig], shared: Path, archs: Sequence[str] = ("90a",)
) -> tuple[dict[str, dict[str, dict[str, int]]], Path]:
    """ptxas's report on kernels compiled with the product's flags and with warnings as errors.

    They are compiled as one source, each in its own namespace: headers take most of a small kernel's compile time.

    Returns:
        by symbol and architecture registers, and bytes of stack, spill_stores, spill_loads and local memory; and the
        object file. It is compiled once for all processes that share the folder ``shared``.
    """
    source = together([render(config) for config in configs])
    folder = shared / f"ptxas-{hashlib.sha256(source.encode()).hexdigest()[:16]}-{'-'.join(archs)}"
    saved, module = folder / "report.json", folder / "kernels.o"
    with FileLock(f"{folder}.lock"):
        if not saved.exists():
            folder.mkdir(exist_ok=True)
            module.with_suffix(".cu").write_text(source, encoding="utf-8")
            reports = _ptxas_reports([config.symbol for config in configs], module, archs)
            saved.write_text(json.dumps(reports), encoding="utf-8")
        return json.loads(saved.read_text(encoding="utf-8")), module


def together(sources: Sequence[str]) -> str:
    """One source made of several: the headers of all, then each source in a namespace."""
    includes = dict.fromkeys(line for source in sources for line in re.findall(r"^#include .*\n", source, re.MULTILINE))
    bodies = [re.sub(r"^#include .*\n", "", source, flags=re.MULTILINE) for source in sources]
    return "".join(includes) + "".join(f"namespace kernel_{i} {{\n{body}}}\n" for i, body in enumerate(bodies))


def _ptxas_reports(symbols: Sequence[str], module: Path, archs: Sequence[str]) -> dict[str, dict[str, dict[str, int]]]:
    toolkit, compiler_found, _ = toolchain.preflight_cuda()
    command: list[str | Path] = [
        toolkit.nvcc,
        "-c",
        module.with_suffix(".cu"),
        "-o",
        module,
        "-ccbin",
        compiler_found.path,
        *compiler.CUDA_FLAGS,
        *toolchain.gencode_flags(archs, toolkit),
        "-Werror=all-warnings",
        "-Xcompiler=-Wall,-Wextra,-Werror",
        "-Xptxas=-v,-warn-spills,-warn-lmem-usage",
        "--threads=2",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    text = done.stdout + done.stderr
    assert done.returncode == 0, text
    assert "warning" not in text.lower(), text
    _, *parts = re.split(r"Compiling entry function '(\w+)' for 'sm_(\w+)'", text)
    reports: dict[str, dict[str, dict[str, int]]] = {symbol: {} for symbol in symbols}
    for function, arch, report in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        (symbol,) = (symbol for symbol in symbols if symbol in function)
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
        registers = re.search(r"Used (\d+) registers", report)
        assert frame is not None, text
        assert registers is not None, text
        assert arch not in reports[symbol], text
        local = re.search(r"(\d+) bytes lmem", report)
        reports[symbol][arch] = {
            "registers": int(registers[1]),
            "stack": int(frame[1]),
            "spill_stores": int(frame[2]),
            "spill_loads": int(frame[3]),
            "local": int(local[1]) if local else 0,
        }
    assert all(report.keys() == set(archs) for report in reports.values()), text
    return reports
