"""The checked destinations of N backends: their fields, their tensors, and their capacity."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..spec.config import KernelConfig
from ..spec.fields import FIELDS, Field, MetadataBuffers, Per
from ..spec.parts import MAX_SEQLEN_OFFSET, MAX_SM_PARTS
from .checks import MAX_BATCH, MAX_COLUMNS, check_declared, check_destination, check_int, dtype_name, torch_dtypes
from .memory import Region, check_disjoint

# Takes the index of a backend and a field; returns the name of that destination in messages.
NameOf = Callable[[int, str], str]


def backend_field(index: int, name: str) -> str:
    """The name of a destination in the messages of bind()."""
    return f"backends[{index}].{name}"


class Room(NamedTuple):
    """The number of requests, or rows, that fit, and the name of the smallest tensor."""

    capacity: int
    name: str


class _Destination(NamedTuple):
    backend: int
    name: str
    tensor: Tensor
    region: Region

    @property
    def identity(self) -> tuple[Any, ...]:
        """A value that is equal for tensors with the same memory, shape and strides."""
        return self.region.start, self.tensor.shape, self.tensor.stride()


class Destinations:
    """The checked destinations of N backends.

    Args:
        backends: a MetadataBuffers for each backend, at least one (see check_backends); all have the same fields.
        page_size: P; if it is 1, real_page_table must be page_indices or None.
        name_of: the name of a backend's field in messages.
        mode: the forward mode; in decode a row is a request.
        declared: by declared field, its declaration, and for each backend the name in messages and the tensor.

    Attributes:
        count: N.
        fields: names of the fields that are written, in the order of FIELDS.
        tensors: by field, its different tensors. A tensor that several backends share is listed once.
        regions: the memory of all of them.
        device: the device of all of them.
        requests, rows: the numbers of requests and rows that fit.

    Raises:
        ArgumentError: a tensor can't be written to, the backends have different fields, or destinations overlap.
    """

    def __init__(
        self,
        backends: Sequence[MetadataBuffers],
        page_size: int,
        name_of: NameOf,
        mode: str = "decode",
        declared: Mapping[str, tuple[Field, Sequence[tuple[str, Tensor]]]] = {},
    ) -> None:
        self.count = len(backends)
        self._fields = FIELDS | {name: field for name, (field, _) in declared.items()}
        device: torch.device | None = None
        by_field: dict[str, dict[tuple[Any, ...], _Destination]] = {}
        room: dict[str, list[Room]] = {"request": [], "row": []}
        first: dict[str, _Destination] = {}
        for index, backend in enumerate(backends):
            given: dict[str, _Destination] = {}
            for field, tensor in backend.items():
                label = name_of(index, field.name)
                allowed = torch_dtypes(field.dtypes)
                device = check_destination(label, tensor, dim=field.dim, dtypes=allowed, device=device).device
                given[field.name] = _Destination(index, label, tensor, Region.of(label, tensor))
            # Pinned memory, which is the host's, comes last: the others say which device it is.
            for name, (field, tensors) in sorted(declared.items(), key=lambda one: one[1][1][index][1].is_cpu):
                label, tensor = tensors[index]
                checked = check_declared(label, tensor, field, device)
                device = device or checked.device
                given[name] = _Destination(index, label, tensor, Region.of(label, tensor))
            given = _without_aliases(given, page_size, mode)
            if index == 0:
                first = given
            for name in given.keys() ^ first.keys():
                has, lacks = (0, index) if name in first else (index, 0)
                raise ArgumentError(
                    f"{name_of(lacks, name)} is None but {name_of(has, name)} is a tensor; all backends must have the "
                    "same fields. Bind backends with other fields to another plan."
                )
            for name, destination in given.items():
                field, label, tensor = self._fields[name], destination.name, destination.tensor
                if field.extra and tensor.numel() == 0:
                    raise ArgumentError(f"{label} is empty; it must have shape [bs + 1], with room for the first 0.")
                if field.kind == "schedule":
                    _check_schedule(name, label, tensor)
                if field.sized_by_batch:
                    per: Per = "request" if field.own_rows is not None else field.per
                    room[per].append(Room(_held(field, tensor), label))
                if (dtype := first[name].tensor.dtype) != tensor.dtype:
                    raise ArgumentError(
                        f"{label} has dtype {dtype_name(tensor.dtype)} and {first[name].name} has {dtype_name(dtype)}; "
                        "all backends must have the same. Bind backends with other dtypes to a plan of their own."
                    )
                by_field.setdefault(name, {}).setdefault(destination.identity, destination)
        if device is None:
            raise ArgumentError("backends have no fields; give at least one tensor.")
        self.device = device
        self.fields = tuple(name for name in self._fields if name in first)
        if mode == "decode":
            room["request"] = room["row"] = room["request"] + room["row"]
        unlimited = [Room(MAX_BATCH, "")]
        self.requests, self.rows = min(room["request"] or unlimited), min(room["row"] or unlimited)
        self._different = {name: list(by_field[name].values()) for name in self.fields}
        self.tensors = {name: [d.tensor for d in different] for name, different in self._different.items()}
        self.regions = [d.region for different in self._different.values() for d in different]
        check_disjoint(self.regions)

    def padded(self, next_n: int) -> Room:
        """The number of requests that fit the fields with a pad.

        Args:
            next_n: the rows of a request; 1 in decode.
        """
        rooms = [Room(MAX_BATCH, "")]
        for name, different in self._different.items():
            field = self._fields[name]
            if field.pad is not None:
                rows = next_n if field.per == "row" and field.own_rows is None else 1
                rooms += [Room(_held(field, d.tensor) // rows, d.name) for d in different]
        return min(rooms)

    def regions_of(self, names: Sequence[str]) -> list[Region]:
        """The memory of the different tensors of some fields."""
        return [d.region for name in names for d in self._different[name]]

    def named(self) -> list[tuple[str, Tensor]]:
        """All different tensors with their names in messages."""
        return [(d.name, d.tensor) for different in self._different.values() for d in different]

    def different(self, name: str) -> list[tuple[str, int, Tensor]]:
        """The different tensors of a field, each with its name in messages and the first backend that has it."""
        return [(d.name, d.backend, d.tensor) for d in self._different[name]]

    def width(self, name: str) -> int | None:
        """The columns of a table, the same in all backends; None if they don't have the field.

        Raises:
            ArgumentError: backends differ in it.
        """
        return self._common(name, 1, "columns", "Slice them: table[:, :width].")

    def length(self, name: str) -> int | None:
        """The first dimension of a field that isn't sized by the batch, likewise."""
        what = "rows" if self._fields[name].dim == 2 else "elements"
        return self._common(name, 0, what, "Slice them: tensor[:length].")

    def _common(self, name: str, dim: int, what: str, remedy: str) -> int | None:
        different = self._different.get(name)
        if not different:
            return None
        first = different[0]
        for _, label, tensor, _ in different:
            if tensor.shape[dim] != first.tensor.shape[dim]:
                raise ArgumentError(
                    f"{label} has {tensor.shape[dim]} {what} and {first.name} has {first.tensor.shape[dim]}; all "
                    f"backends must have the same. {remedy}"
                )
        return int(first.tensor.shape[dim])

    def token_columns(self, config: KernelConfig, pool_width: int) -> int:
        """The number of tokens that fit a row of every table.

        Args:
            config: the configuration of these destinations.
            pool_width: columns of req_to_token.

        Raises:
            ArgumentError: a table of pages or pools has too few columns for the tokens of another table.
        """
        columns, limited = min(pool_width, MAX_COLUMNS), False
        for table in (name for name in config.tables if FIELDS[name].kind == "table"):
            width, tokens = self.width(table) or 0, config.tokens_per_column(table)
            if limited and width < -(-columns // tokens):
                unit = "pools" if table in config.pooled_tables else "pages"
                raise ArgumentError(
                    f"{self._different[table][0].name} has {width} columns; {columns} tokens in {unit} of {tokens} "
                    f"need {-(-columns // tokens)}. Allocate a wider table, or narrow the others."
                )
            columns, limited = min(columns, width * tokens), True
        return columns

    def same_alignment(self, name: str) -> bool:
        """Whether, for every r, row r has the same address modulo 16 in every tensor of a field."""
        tensors = self.tensors[name]
        first = tensors[0]
        if any((t.data_ptr() - first.data_ptr()) % 16 for t in tensors):
            return False
        return all((t.stride(0) - first.stride(0)) % 4 == 0 or t.shape[0] == first.shape[0] == 1 for t in tensors)

    def distinct(self) -> tuple[tuple[str, int], ...]:
        """(field, number of different tensors) for the fields that backends share: KernelConfig.distinct."""
        return tuple((name, len(t)) for name, t in self.tensors.items() if len(t) < self.count)

    def dtypes(self) -> tuple[tuple[str, str], ...]:
        """(field, dtype) for each field, for KernelConfig.dtypes."""
        return tuple((name, dtype_name(tensors[0].dtype)) for name, tensors in self.tensors.items())

    def strided(self) -> tuple[str, ...]:
        """The vectors of which a tensor has strides of its own, for KernelConfig.strided."""
        return tuple(
            name
            for name, tensors in self.tensors.items()
            if self._fields[name].kind == "vector" and any(t.stride() not in ((1,), (t.shape[-1], 1)) for t in tensors)
        )

    def words(self, name: str) -> list[int]:
        """The parameter words of a field."""
        field = self._fields[name]
        if name in self.strided() or (field.kind == "table" and name not in FIELDS):
            return [word for tensor in self.tensors[name] for word in strided_words(tensor, field.own_rows or 1)]
        if field.kind != "table":  # contiguous, so the kernel needs no stride
            return [tensor.data_ptr() for tensor in self.tensors[name]]
        return [word for tensor in self.tensors[name] for word in tensor_words(tensor)]

    def check_offsets(self, offsets: Any) -> tuple[int, ...]:
        """Checks seqlen_offsets: one number per backend, or None.

        Raises:
            ArgumentError: they don't fit, or backends with different offsets share a tensor that would differ.
        """
        checked = check_offsets(offsets, self.count)
        if len(set(checked)) > 1:
            for name, different in self._different.items():
                if name not in FIELDS or FIELDS[name].kind == "counts":
                    continue  # whether backends get the same, the configuration finds out
                if len(different) < self.count and (FIELDS[name].kind != "table" or len(different) > 1):
                    raise ArgumentError(
                        f"{different[0].name} is shared (tensors: {len(different)}, backends: {self.count}), and "
                        f"seqlen_offsets is {checked}; backends with different offsets can share only a table, "
                        "and only if all of them share it. Allocate one tensor per backend."
                    )
        return checked


def check_backends(backends: Any) -> None:
    """Checks that ``backends`` is a list of at least one MetadataBuffers.

    Raises:
        ArgumentError: it isn't.
    """
    if isinstance(backends, (MetadataBuffers, str)) or not isinstance(backends, Sequence):
        raise ArgumentError(f"backends is a {type(backends).__name__}; it must be a list of MetadataBuffers.")
    for index, backend in enumerate(backends):
        if not isinstance(backend, MetadataBuffers):
            raise ArgumentError(f"backends[{index}] is a {type(backend).__name__}; it must be a MetadataBuffers.")
    if not backends:
        raise ArgumentError("backends is empty; give the buffers of at least one backend.")


def check_offsets(offsets: Any, count: int) -> tuple[int, ...]:
    """Checks that seqlen_offsets is None, or has one number for each of ``count`` backends.

    Raises:
        ArgumentError: it is neither.
    """
    if offsets is None:
        return ()
    if isinstance(offsets, (str, Tensor)) or not isinstance(offsets, Sequence) or len(offsets) != count:
        raise ArgumentError(
            f"seqlen_offsets is {offsets!r}; it must be None, or one whole number for each of the {count} backends."
        )
    return tuple(
        check_int(f"seqlen_offsets[{index}]", offset, 0, MAX_SEQLEN_OFFSET) for index, offset in enumerate(offsets)
    )


def tensor_words(tensor: Tensor) -> list[int]:
    """The parameter words of a tensor: its address, and a table's row stride in elements."""
    return [tensor.data_ptr(), tensor.stride(0)] if tensor.dim() == 2 else [tensor.data_ptr()]


def strided_words(tensor: Tensor, rows: int) -> list[int]:
    """The parameter words of a strided vector: its address, elements from request to request and from row to row."""
    request, row = tensor.stride() if tensor.dim() == 2 else (rows * tensor.stride(0), tensor.stride(0))
    return [tensor.data_ptr(), request, row]


def _held(field: Field, tensor: Tensor) -> int:
    """The requests that a tensor has room for, or the rows if it has an element for each."""
    held: int = tensor.shape[0] if tensor.dim() == 2 else tensor.shape[0] // (field.own_rows or 1)
    return held - field.extra


def _without_aliases(given: dict[str, _Destination], page_size: int, mode: str) -> dict[str, _Destination]:
    """The fields of a backend, without those that are only another name for the same memory."""
    expanded, cache = given.get("seqlens_expanded"), given.get("cache_seqlens")
    dropped = set()
    if mode == "decode" and expanded is not None and cache is not None and expanded.identity == cache.identity:
        dropped.add("seqlens_expanded")
    real, wide = given.get("real_page_table"), given.get("page_indices")
    if page_size == 1 and real is not None:
        if wide is None or real.identity != wide.identity:
            raise ArgumentError(
                f"{real.name} is a separate tensor, but with pages of one token it is the same table as "
                "page_indices. Pass None, or the same tensor."
            )
        dropped.add("real_page_table")
    return {name: destination for name, destination in given.items() if name not in dropped}


def _check_schedule(name: str, label: str, tensor: Tensor) -> None:
    words, low, high = (2, 2, MAX_BATCH) if name == "paged_mqa_schedule_metadata" else (8, 1, MAX_SM_PARTS)
    rows = tensor.shape[0]
    if tensor.shape[1] != words or not low <= rows <= high:
        raise ArgumentError(
            f"{label} has shape {tuple(tensor.shape)}; it must be {FIELDS[name].shape}, of {low} to {high} rows."
        )
    if not tensor.is_contiguous():
        raise ArgumentError(f"{label} has strides {tensor.stride()}; a schedule must be contiguous.")
