"""CopyPlan: precomputed fields bound to the destinations that they are copied to."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from ..errors import ArgumentError
from ..load.loader import Kernel
from ..spec.config import KernelConfig
from ..spec.fields import FIELDS, MetadataBuffers
from .bound import BoundKernel
from .checks import MAX_BATCH, check_destination, check_int
from .destinations import Destinations, Room, tensor_words
from .memory import HeldStorages, Region


class CopyPlan:
    """Precomputed fields bound to the destinations that they are copied to, in one launch.

    Args:
        precomputed: the source; it has every field that the destinations have.
        destinations: the checked destinations.
        keep: whether the plan keeps the memory of all tensors alive; otherwise the caller does.
        mode: the forward mode; in decode a row is a request.

    Attributes:
        config, kernel, device, launches: as in Plan.
        capacity, row_capacity: the largest numbers of requests and rows that fit the source and every destination.

    Raises:
        ArgumentError: a field of the source is missing, doesn't fit or overlaps a destination.
        ToolchainError, CompileError, JitPolicyError, StoreError: see loader.load.
    """

    def __init__(
        self, precomputed: MetadataBuffers, destinations: Destinations, keep: bool, mode: str = "decode"
    ) -> None:
        self.device = destinations.device
        self.launches = 0
        sources: dict[str, Tensor] = {}
        held: dict[str, list[Room]] = {"request": [], "row": []}
        # By table: the columns of the source, and of the destinations.
        self._widths: dict[str, tuple[int, int]] = {}
        for name in destinations.fields:
            source, label = getattr(precomputed, name), f"precomputed.{name}"
            if source is None:
                raise ArgumentError(
                    f"{label} is None but the destinations have {name}. Precompute it, or leave it out of the "
                    "destinations."
                )
            field = FIELDS[name]
            sources[name] = check_destination(
                label, source, dim=field.dim, dtypes=[destinations.tensors[name][0].dtype], device=self.device
            )
            held["request" if mode == "decode" else field.per].append(Room(source.shape[0] - field.extra, label))
            region = Region.of(label, source)
            for destination in destinations.regions:
                if region.overlaps(destination):
                    raise ArgumentError(
                        f"{destination.name} overlaps {label} in memory; a copy needs separate tensors."
                    )
            if (width := destinations.width(name) if field.kind == "table" else None) is not None:
                self._widths[name] = source.shape[1], width
        # The numbers that a call copies by default, and the largest that fit both sides.
        self._source_requests = min(held["request"], default=Room(0, "")).capacity
        self._source_rows = min(held["row"], default=Room(0, "")).capacity
        self._requests = min([destinations.requests, *held["request"]])
        self._rows = min([destinations.rows, *held["row"]])
        self.capacity, self.row_capacity = self._requests.capacity, self._rows.capacity
        vectorized = bool(self._widths) and all(destinations.same_alignment(name) for name in self._widths)
        self.config = KernelConfig.from_dict(
            {
                "operation": "copy",
                "mode": mode,
                "num_backends": destinations.count,
                "fields": destinations.fields,
                "distinct": destinations.distinct(),
                "dtypes": destinations.dtypes(),
                "vector_bytes": 16 if vectorized else 4,
                "target": self.device.type,
            }
        )
        source_words = {f"from_{name}": tensor_words(tensor) for name, tensor in sources.items()}
        destination_words = {name: destinations.words(name) for name in self.config.fields}
        self._bound = BoundKernel(self.config, self.device, {**source_words, **destination_words})
        self.kernel: Kernel = self._bound.kernel
        self._run = self._bound.run
        named = [(f"precomputed.{name}", tensor) for name, tensor in sources.items()]
        self._storages = HeldStorages([*destinations.named(), *named] if keep else [])

    def run(
        self,
        *,
        bs: int | None = None,
        max_len: int | None = None,
        page_size: int | None = None,
        rows: int | None = None,
    ) -> None:
        """Copies every field to every destination: one launch on the device's current stream.

        Args:
            bs: requests; None copies all that the precomputed fields have.
            max_len: columns of page_indices; None is the source's width.
            page_size: P, to bound real_page_table's columns at ceil(max_len / P); None copies the source's width.
            rows: rows of the fields with one element per row; None copies all that the precomputed fields have. In
                decode it is ``bs``.

        Raises:
            ArgumentError: a number doesn't fit; nothing was written.
            LaunchError: CUDA refused the launch.
        """
        try:
            self._run(self, bs, max_len, page_size, rows)
        except RuntimeError as error:
            self._refused(error)
        self.launches += 1

    def _refused(self, error: RuntimeError) -> NoReturn:
        """Raises the error of a launch that failed."""
        raise self._bound.launch_error(error) from error

    def _check(self, bs: int | None, max_len: int | None, page_size: int | None, rows: int | None) -> list[int]:
        """The words of a call. The binding calls it when the arguments differ from those of the last calls."""
        self._storages.check()
        if page_size is not None:
            check_int("real_page_size", page_size, 1, 2**31 - 1)
        bs = self._source_requests if bs is None else check_int("bs", bs, 0, None)
        if bs > self.capacity or bs > MAX_BATCH:
            raise ArgumentError(f"bs is {bs}; {self._requests.name} has room for {self.capacity}. Use larger buffers.")
        if max_len is not None:
            width, _ = self._widths.get("page_indices", (None, 0))
            check_int("max_len", max_len, 0, width, ", the width of page_indices")
        words = [bs]
        if self.config.row_fields:
            rows = self._source_rows if rows is None else check_int("rows", rows, 0, None)
            if rows > self.row_capacity or rows > MAX_BATCH:
                raise ArgumentError(
                    f"rows is {rows}; {self._rows.name} has room for {self.row_capacity}. Use larger buffers."
                )
            words.append(rows)
        for name, (columns, width) in self._widths.items():
            if max_len is not None:
                if name == "page_indices":
                    columns = max_len
                elif page_size is not None and name == "real_page_table":
                    columns = min(columns, -(-max_len // page_size))
            if columns > width:
                raise ArgumentError(
                    f"{name} has {columns} columns to copy, and a destination has {width}. "
                    "Give wider destinations, or a smaller max_len."
                )
            words.append(columns)
        return words
