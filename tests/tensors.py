"""The tensors of a case (a configuration and a shape, see cases.py), and the reference's results.

Destinations are poisoned and lie between poisoned words; inputs have odd strides and addresses.
"""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import support
import torch
from cases import Shape
from onelaunch import FIELDS, KernelConfig, MetadataBuffers
from onelaunch.spec import reference
from onelaunch.spec.evaluation import evaluate_columns, evaluate_vectors
from onelaunch.spec.fields import Packed, Table
from support import POISON, Everything, Poisoned
from torch import Tensor

# The page size that a copy's tables are laid out for: a copy has no setting for it.
COPIED_PAGE_SIZE = 16
# Of declared tables and packed fields: of more columns than two warps compute at once.
TABLE_WIDTH, PACKED_CAPACITY = 1100, 1300


def settings_for(function: Any, config: KernelConfig) -> dict[str, Any]:
    """The settings of a configuration that a function takes as arguments of the same name."""
    given = ("declare", "inputs", "constants", "sources", "maps")  # with tensors: see Scene.bind
    names = [name for name in inspect.signature(function).parameters if hasattr(config, name) and name not in given]
    settings = {name: getattr(config, name) for name in names}
    if "seqlen_offsets" in settings:
        offsets = config.seqlen_offsets
        settings["seqlen_offsets"] = offsets * config.num_backends if len(offsets) == 1 else offsets or None
    for name, value in settings.items():
        if name.endswith("_dtype"):
            settings[name] = getattr(torch, value)
    return settings


class Tensors:
    """The tensors of one case.

    Attributes:
        config, shape, device: the case.
        rows: rows of all requests.
        capacity: elements of kv_indices.
        columns: no column from here on is written.
        widths: columns of each table.
        seq_lens, req_pool_indices, extend_seq_lens, req_to_token: the inputs; a copy reads none of them.
        destinations: by field, each distinct tensor and the allocation around it.
        backends: the same tensors by backend.
        source: what a copy reads.
        expected: the reference's results for each backend's fields, dense.
        violations: (kind, request, value, limit) of each violation that a checked kernel may report; it reports one.
    """

    def __init__(self, config: KernelConfig, shape: Shape, device: torch.device | str = "cpu") -> None:
        # The last third are padding requests, if the kernel has any.
        self.requests = len(shape.lengths)
        if config.padding_len is not None:
            self.requests -= len(shape.lengths) // 3
            padding = (config.padding_len,) * (len(shape.lengths) - self.requests)
            shape = shape.replace(lengths=(*shape.lengths[: self.requests], *padding))
        self.config, self.shape, self.device = config, shape, torch.device(device)
        self.before = None if shape.before is None else type(self)(config, shape.before, device)
        self._random = torch.Generator().manual_seed(shape.seed)
        bs = len(shape.lengths)
        self.copies = config.operation == "copy"
        extends = [shape.extends[i % len(shape.extends)] for i in range(bs)]
        # A copy takes any number of rows.
        variable = config.extend == "variable" or self.copies
        self.rows = sum(max(0, n) for n in extends) if variable else bs * config.next_n
        if config.mode == "decode":
            self.rows = bs
        self.page_size = COPIED_PAGE_SIZE if self.copies else config.page_size
        width = shape.width if shape.table_columns is None else shape.table_columns
        pages = -(-width // self.page_size)
        self.widths = {
            "page_indices": width,
            "real_page_table": pages,
            "pooled_real_page_table": -(-pages // config.index_kpool),
        }
        self._added = config.next_n if config.mode == "target_verify" else 0
        lengths = torch.tensor(shape.lengths, dtype=torch.int64).to(torch.int32).tolist()
        longest = max(config.seqlen_offsets, default=0) + self._added
        self.tokens = [max(0, n) + longest for n in lengths]
        # Empty tensors would count as one tensor that the backends share.
        self.capacity = min(max(1, sum(self.tokens)), shape.max_indices)
        if self.before is not None:
            self.capacity = self.before.capacity
        self.columns = min(self._limits())
        self._inputs(extends)
        self.declared = {name: config.field(name) for name in config.fields if config.scope.declared(name)}
        self.captured_size = bs + shape.spare_rows if config.pads else None
        if config.padding_len is not None:
            self.captured_size = bs
        self._declared_inputs()
        self.destinations = {name: self._destinations(name) for name in config.fields}
        self.backends = [self._backend(index) for index in range(config.num_backends)]
        self.source = MetadataBuffers()
        self.violations: list[tuple[str, int, int, int]] = []
        self.expected = self._copied() if self.copies else self._refreshed()

    def _limits(self) -> list[int]:
        """The bound on the columns; the first table present decides."""
        config, shape = self.config, self.shape
        limits = [shape.width, shape.width if shape.max_len is None else shape.max_len]
        tokens = {
            "page_indices": 1,
            "real_page_table": self.page_size,
            "pooled_real_page_table": self.page_size * config.index_kpool,
        }
        first = next((name for name in tokens if name in config.fields), None)
        return limits if first is None else [*limits, self.widths[first] * tokens[first]]

    def _inputs(self, extends: list[int]) -> None:
        config, shape = self.config, self.shape
        rows = torch.randint(0, shape.pool_rows, (len(shape.lengths),), generator=self._random)
        if len(rows):
            rows[-1] = shape.pool_rows - 1  # the last row, where the allocation ends
        if shape.rows is not None:
            rows = torch.tensor(shape.rows, dtype=torch.int64)
        rows[self.requests :] = 0
        self._valid_rows = rows.clone()
        if shape.bad_pool_row is not None:
            rows[0] = shape.bad_pool_row
        lengths = torch.tensor(shape.lengths, dtype=torch.int64)
        self.seq_lens = self._strided(lengths[: self.requests], config.seq_lens_dtype)
        self._all_lengths = lengths.to(getattr(torch, config.seq_lens_dtype)).to(self.device)
        self.req_pool_indices = self._strided(rows[: self.requests], config.req_pool_indices_dtype)
        self.extend_seq_lens = self._strided(torch.tensor(extends, dtype=torch.int64), config.extend_seq_lens_dtype)
        dtype = getattr(torch, config.req_to_token_dtype)
        tokens = self._tokens(shape.pool_rows, shape.width)
        tokens[list(shape.zero_rows)] = 0
        tokens[:, list(shape.rewritten)] ^= 1 << 20
        if dtype == torch.int64:
            beyond = torch.randint(0, 8, tokens.shape, generator=self._random) == 0
            tokens = torch.where(beyond, tokens + 3 * 2**32, tokens)
        self.req_to_token = self._table(
            tokens.to(dtype), shape.token_pad, shape.token_phase // dtype.itemsize * dtype.itemsize
        )[0]

    def _strided(self, values: Tensor, dtype: str) -> Tensor:
        """A one-dimensional input, with poison between its elements; of stride 0 if all of them are the same."""
        step, values = self.shape.input_stride, values.to(getattr(torch, dtype))
        if step == 0 and len(set(values.tolist())) > 1:
            step = 1
        words = max(1, (len(values) - 1) * step + 1)
        storage = torch.full((1 + words,), POISON, dtype=values.dtype, device=self.device)
        strided = storage.as_strided(values.shape, (step,), 1)
        if step == 0:
            storage[1:] = values[:1].to(self.device) if len(values) else POISON
        else:
            strided.copy_(values)
        return strided

    def _tokens(self, rows: int, columns: int) -> Tensor:
        """Tokens up to 2^31, and padding below zero."""
        tokens = torch.randint(0, 2**31 - 1, (rows, columns), generator=self._random)
        padding = torch.randint(-70, 0, (rows, columns), generator=self._random)
        return torch.where(tokens % 4 == 0, padding, tokens)

    def _table(self, values: Tensor, pad: int, phase: int) -> tuple[Tensor, Tensor]:
        """A table with its rows ``pad`` elements apart, ``phase`` bytes past a 16-byte boundary; its allocation."""
        rows, columns = values.shape
        stride = columns + pad
        words = (rows - 1) * stride + columns if rows and columns else 0
        first = support.GUARD + phase // values.element_size()
        storage = torch.full((first + words + support.GUARD,), POISON, dtype=values.dtype, device=self.device)
        table = storage.as_strided((rows, columns), (stride, 1), first)
        table.copy_(values)
        return table, storage

    def stride(self, table: Tensor) -> int:
        """Elements from row to row in the parameters of a kernel."""
        return self.shape.sparse_stride if self.shape.sparse_stride is not None else table.stride(0)

    def _destinations(self, name: str) -> list[tuple[Tensor, Tensor]]:
        config, shape, field = self.config, self.shape, self.config.field(name)
        height = shape.spare_rows + (self.rows if field.per == "row" else len(shape.lengths))
        if field.own_rows is not None:
            height = (shape.spare_rows + len(shape.lengths)) * field.own_rows
        elif config.pads and name in config.row_fields and not config.variable_rows:
            height = (shape.spare_rows + len(shape.lengths)) * config.next_n
        if self.before is not None and field.sized_by_batch:
            height = self.before.destinations[name][0][0].shape[0] - field.extra
        made = []
        for d in range(config.destinations(name)):
            if name in self.declared and field.kind == "table":
                stride = TABLE_WIDTH + 3 + d
                dtype = getattr(torch, config.dtype(name))
                made.append(
                    support.guarded(height, TABLE_WIDTH, row_stride=stride, offset=d, dtype=dtype, device=self.device)
                )
            elif field.kind == "table":
                # 16-byte stores need the same phase in all destinations; with 4-byte stores each gets a different one.
                aligned = config.vector_bytes == 16 and (name == "page_indices" or self.copies)
                stride = self.widths[name] + shape.table_pad + (4 * d if aligned else d)
                phase = shape.table_phase if aligned else (shape.table_phase + 4 * d) % 16
                poison = torch.full((height, self.widths[name]), POISON, dtype=torch.int32)
                made.append(self._table(poison, stride - self.widths[name], phase))
            else:
                dimensions = {
                    "paged_mqa_schedule_metadata": (shape.num_sms + 1, 2),
                    "flashmla_metadata": (shape.num_sm_parts, 8),
                    "kv_indices": (self.capacity,),
                }.get(name, (PACKED_CAPACITY,) if field.kind == "packed" else (height + field.extra,))
                dtype = getattr(torch, config.dtype(name))
                stride = 2 + d if name in config.strided else None
                made.append(
                    support.guarded(*dimensions, row_stride=stride, offset=d % 4, dtype=dtype, device=self.device)
                )
            if self.before is not None:
                made[-1][0].copy_(self.before.wanted(name, d))
        return made

    def _which(self, backend: int, name: str) -> int:
        """Which of a field's distinct tensors a backend has: the last ones share where there are fewer."""
        return min(backend, len(self.destinations[name]) - 1)

    def _backend(self, index: int) -> Poisoned:
        chosen = {name: made[self._which(index, name)] for name, made in self.destinations.items()}
        return Poisoned(
            Everything(self.declared, **{name: tensor for name, (tensor, _) in chosen.items()}),
            {name: storage for name, (_, storage) in chosen.items()},
        )

    def wanted(self, name: str, d: int) -> Tensor:
        """The expected content of one of a field's distinct tensors, dense."""
        d %= len(self.destinations[name])
        index = next(b for b in range(self.config.num_backends) if self._which(b, name) == d)
        wanted: Tensor = getattr(self.expected[index], name)
        return wanted

    def _poisoned(self, count: int) -> list[MetadataBuffers]:
        """Dense buffers of the destinations' content for the reference, shared by backends as the destinations are."""
        made: dict[tuple[str, int], Tensor] = {}
        backends = []
        for index in range(count):
            buffers = Everything(self.declared)
            for name, tensors in self.destinations.items():
                key = name, self._which(index, name)
                if key not in made:
                    # Its content before the launch: poison, or what the previous launch left.
                    tensor = tensors[key[1]][0]
                    made[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
                    # The poison is not a valid bool; a copy as bool would turn it into one.
                    bytes_ = torch.uint8 if tensor.dtype == torch.bool else tensor.dtype
                    made[key].view(bytes_).copy_(tensor.view(bytes_))
                setattr(buffers, name, made[key])
            backends.append(buffers)
        return backends

    def _refreshed(self) -> list[MetadataBuffers]:
        config, shape = self.config, self.shape
        settings = settings_for(reference.refresh, config)
        offsets = settings.pop("seqlen_offsets")
        # Backends whose lengths agree get the same values.
        same = len(config.seqlen_offsets) < 2 and config.sets == 1
        backends = self._poisoned(1 if same else config.num_backends)
        reference.refresh(
            backends,
            self._all_lengths,
            self._valid_rows.to(self.device),
            self.req_to_token,
            max_len=shape.max_len,
            extend_seq_lens=self.extend_seq_lens if config.extend == "variable" else None,
            seqlen_offsets=offsets and offsets[: len(backends)],
            **settings,
        )
        for step, buffers in enumerate(backends):
            self._evaluate(buffers, step)
        if config.checked:
            self._find_violations(backends)
        return backends * (config.num_backends if same else 1)

    def _declared_inputs(self) -> None:
        """The inputs of declared fields' formulas: random numbers, and maps and sources with few distinct values."""
        config, random_ = self.config, self._random
        count, padding = self.requests, len(self.shape.lengths) - self.requests
        self.inputs = {}
        self._all_inputs = {}
        for name, dtype in config.inputs:
            low = -(2**62) if dtype == "int64" else -(2**31)
            values = torch.randint(low, -low, (count,), generator=random_)
            small = torch.randint(-3, 40, (count,), generator=random_)
            self.inputs[name] = self._strided(torch.where(values % 3 == 0, small, values), dtype)
            self._all_inputs[name] = torch.cat((self.inputs[name], self.inputs[name].new_zeros(padding)))
        self.tables = {}
        for name, dtype in config.sources:
            values = torch.randint(-9, 2**31, (self.shape.pool_rows + 1, 37), generator=random_)
            self.tables[name] = self._table(values.to(getattr(torch, dtype)), 3, 4)[0]
        for name, (dtype, _) in config.maps:
            values = torch.randint(-9, 2**31, (1001,), generator=random_)
            self.tables[name] = values.to(getattr(torch, dtype)).to(self.device)

    def _evaluate(self, buffers: MetadataBuffers, step: int) -> None:
        """The values of declared fields, computed with PyTorch, followed by the padding."""
        config = self.config
        extends = self.extend_seq_lens if config.variable_rows else None
        given: dict[str, Any] = {
            "inputs": self._all_inputs,
            "tables": {"token": self.req_to_token, **self.tables},
            "req_pool_indices": self._valid_rows.to(self.device),
        }
        values = evaluate_vectors(config, self._all_lengths, extends, step, **given)
        for name, field in self.declared.items():
            tensor, declared = getattr(buffers, name), field.declaration
            if isinstance(declared, Table | Packed):
                # Negative counts move elements back, so that later ones have room.
                width = TABLE_WIDTH if isinstance(declared, Table) else 2 * PACKED_CAPACITY
                elements, counts = evaluate_columns(config, name, width, self._all_lengths, extends, step, **given)
                begins = counts.long().cumsum(0) - counts
                for row, (count, begin) in enumerate(zip(counts.tolist(), begins.tolist(), strict=True)):
                    if isinstance(declared, Table):
                        tensor[row, : max(count, 0)] = elements[row, : max(count, 0)]
                        if declared.fill is not None:
                            tensor[row, max(count, 0) :] = declared.fill
                    else:
                        stop = min(count, PACKED_CAPACITY - begin)
                        first = max(0, -begin)
                        if stop > first:
                            tensor[begin + first : begin + stop] = elements[row, first:stop]
                continue
            found = values[name]
            tensor[: found.numel()] = found
            if field.pad is not None and self.captured_size is not None:
                rows = field.own_rows or (config.next_n if name in config.row_fields else 1)
                first = found.numel() if config.padding_len is None else self.requests * rows + field.extra
                stop = self.captured_size * rows + field.extra
                tensor[first:stop] = found[first - 1].clone() if field.pad == "last" else field.pad

    def _find_violations(self, backends: list[MetadataBuffers]) -> None:
        """What a checked kernel may report. The tables of a request without a valid row stay untouched."""
        config, shape, found = self.config, self.shape, self.violations
        longest = max(config.seqlen_offsets, default=0) + self._added
        capacity = self.rows + shape.spare_rows
        for request, length in enumerate(self.seq_lens.tolist() if config.needs_lengths else []):
            if config.tables and length > self.columns - longest:
                found.append(("length", request, length, self.columns - longest))
            if length < 0:
                found.append(("negative length", request, length, 0))
        if config.extend == "variable":
            found += [("extend length", r, n, capacity) for r, n in enumerate(self.extend_seq_lens.tolist()) if n < 0]
        if "kv_indices" in config.fields:
            needed = itertools.accumulate(self.tokens)
            found += [("capacity", r, n, self.capacity) for r, n in enumerate(needed) if n > self.capacity]
        if shape.bad_pool_row is None:
            return
        found.append(("pool row", 0, shape.bad_pool_row, shape.pool_rows))
        rows = max(0, shape.extends[0]) if config.extend == "variable" else config.next_n
        for index, buffers in enumerate(backends):
            for name in config.tables:
                table = getattr(buffers, name)
                if name == "kv_indices":
                    offsets = config.seqlen_offsets
                    fewer = max(offsets) - offsets[index] if len(offsets) > 1 else 0
                    table[: self.tokens[0] - fewer] = POISON
                else:
                    table[:rows] = POISON

    def _copied(self) -> list[MetadataBuffers]:
        shape, columns = self.shape, {}
        for name in self.config.fields:
            height = self.rows if FIELDS[name].per == "row" else len(shape.lengths)
            if FIELDS[name].kind == "table":
                values = self._tokens(height, self.widths[name]).to(torch.int32)
                tensor, _ = self._table(values, shape.token_pad, shape.token_phase)
                columns[name] = self.copied_columns(name)
            else:
                count = height + (FIELDS[name].kind == "running_sum")
                tensor = torch.randint(-(2**31), 2**31, (count,), generator=self._random).to(torch.int32)
                tensor = tensor.to(self.device)
            setattr(self.source, name, tensor)
        backends = self._poisoned(1)
        reference.copy(
            self.source,
            backends,
            bs=len(shape.lengths),
            rows=self.rows,
            columns=columns.get("page_indices"),
            page_columns=columns.get("real_page_table"),
        )
        return backends * self.config.num_backends

    def copied_columns(self, name: str) -> int:
        """Columns of a table that a copy copies."""
        limit = self.shape.max_len
        if limit is None or name == "pooled_real_page_table":
            return self.widths[name]
        return min(self.widths[name], limit if name == "page_indices" else -(-limit // self.page_size))
