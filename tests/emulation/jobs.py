"""The cases in the driver's format: parameter words, memory contents, and the expected contents after a launch.

jobs.h reads the format.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import checker
import torch
from cases import Shape
from onelaunch import KernelConfig
from onelaunch.spec import layout
from onelaunch.spec.cpp import user_name
from onelaunch.spec.violations import DIFFERS
from support import POISON, poisoned
from tensors import PACKED_CAPACITY, TABLE_WIDTH
from torch import Tensor

DEVICE = 3  # as in driver.cpp


@dataclass
class Buffer:
    """A tensor's memory for the driver, from its first element to its last, and the expected content after a launch.

    Attributes:
        tensor: the content before; for a sparse tensor the rows, of which only the columns have memory.
        sparse_stride: elements from row to row of a sparse tensor.
        expected: the same range afterwards, bool as bytes; None if nothing may change.
        unknown: elements that may hold anything afterwards.
        kept: whether the kernel may write it for the next launch; the content isn't compared.
        others: contents that are allowed as well.
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


class Job:
    """One case of one configuration, as bytes for the driver and as tensors to compare with."""

    def __init__(
        self, config: KernelConfig, shape: Shape, launches: Sequence[tuple[int, int]], hashes: Tensor | None = None
    ) -> None:
        self.shape = shape
        self.launches = launches
        self.scene = scene = checker.Scene(config, shape)
        self.config = scene.config
        self.buffers: list[Buffer] = []
        # The words of each member of the parameter block.
        self.values: dict[str, list[int | Buffer]] = {
            "batch_size": [len(shape.lengths)],
            "device": [DEVICE],
            "sm_count": [shape.sm_count],
            **{name: [0] for name in layout.SET_BY_LAUNCH},
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
            self.values[f"{config.member(name)}_width"] = [TABLE_WIDTH]
            self.values[f"{config.member(name)}_capacity"] = [PACKED_CAPACITY]
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
                assert isinstance(words[0], Buffer)
                if config.audits:  # an audit compares with the content
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
            # Compared in 32-bit words, as the others are.
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
        """Changes an element, if the shape says so; returns the audit's record of it, without the address."""
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

    def _buffer(self, name: str, tensor: Tensor, sparse_stride: int | None = None) -> Buffer:
        self.buffers.append(Buffer(name, tensor, sparse_stride))
        return self.buffers[-1]

    def _table(self, name: str, table: Tensor) -> tuple[Buffer, int]:
        return self._buffer(name, table, self.shape.sparse_stride), self.scene.stride(table)

    def _words(self, name: str, tensor: Tensor, table: bool | None = None) -> list[int | Buffer]:
        """A pointer, and the row stride of a table."""
        if tensor.dim() == 2 if table is None else table:
            return list(self._table(name, tensor))
        return [self._buffer(name, tensor)]

    def _expected(self, name: str, d: int, tensor: Tensor) -> Tensor:
        wanted = self.scene.wanted(name, d)
        if self.shape.sparse_stride is not None and tensor.dim() == 2 and name not in self.scene.declared:
            return wanted.flatten()
        around = poisoned(_flat(tensor).shape, tensor.dtype)
        if tensor.dtype == torch.bool:  # the poison is not a valid bool
            around, wanted = around.view(torch.uint8), wanted.view(torch.uint8)
        around.as_strided(tensor.shape, tensor.stride()).copy_(wanted)
        return around

    def encode(self) -> bytes:
        """The case in the driver's format."""
        words: list[int] = []
        used: list[Buffer] = []
        for member in layout.members(self.config):
            values = self.values[member.name]
            assert len(values) == member.words, f"{member.name} takes {member.words} words, the case has {values}"
            for value in values:
                if isinstance(value, Buffer):
                    value.words.append(len(words))
                    used.append(value)
                words.append(0 if isinstance(value, Buffer) else value)
        self.buffers = list({id(buffer): buffer for buffer in used}.values())
        out = [_text(self.shape.name), numbers(len(words), *words), numbers(len(self.launches))]
        out += [numbers(seed, together) for seed, together in self.launches]
        out.append(numbers(len(self.buffers)))
        for b in self.buffers:
            out.append(_text(b.name))
            out.append(
                numbers(b.size(), b.phase, b.expected is not None or b.kept, b.sparse_stride is not None, len(b.words))
            )
            out += [numbers(word, 0) for word in b.words]
            segments = b.segments()
            out.append(numbers(len(segments)))
            for offset, data in segments:
                out += [numbers(offset, len(data)), data]
        return b"".join(out)

    def compare(self, results: memoryview) -> tuple[str | None, int]:
        """The first difference between the driver's results and the expected content, and the number of bytes read."""
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


def numbers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def _text(text: str) -> bytes:
    data = text.encode()
    return numbers(len(data)) + data
