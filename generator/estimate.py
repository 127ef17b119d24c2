"""What a refresh moves, and about how long it takes: bytes over what was measured, and a floor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .config import KernelConfig
from .errors import ArgumentError
from .fields import FIELDS

_BYTES = {"int32": 4, "int64": 8}


@dataclass(frozen=True)
class Device:
    """What was measured of a device.

    Attributes:
        name: the device.
        floor_us: microseconds of a refresh that moves next to nothing.
        bytes_per_us: bytes, read and written together, that a large refresh moves in a microsecond above the floor.
    """

    name: str
    floor_us: float
    bytes_per_us: float


# From the timings in tests/gpu/evidence.json, calls in a CUDA graph: the floor is "1 x 4k" (39,376 bytes in 2.39 us),
# the ceiling "128 x 32k" (51,404,064 bytes in 18.81 us, of which 2.39 are the floor).
H200 = Device("NVIDIA H200", floor_us=2.39, bytes_per_us=51_404_064 / (18.81 - 2.39))


@dataclass(frozen=True)
class Written:
    """What a refresh writes of one field.

    Attributes:
        field: its name.
        shape: what is written of it, rows or rows x columns; the columns of a table are the mean of the rows.
        tensors: how many different tensors hold it.
        bytes: written in all of them.
    """

    field: str
    shape: tuple[float, ...]
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Traffic:
    """What a refresh moves: what it writes of each field, and the bytes that it reads."""

    written: tuple[Written, ...]
    bytes_read: int

    @property
    def bytes_written(self) -> int:
        """Bytes written to all backends."""
        return sum(field.bytes for field in self.written)

    def microseconds(self, device: Device = H200) -> float:
        """An estimate of the time on a device: the floor, and the bytes at the rate of a large refresh.

        Within 20 % of what was measured where the rate decides or nothing does; in between the truth is a little more.
        """
        return device.floor_us + (self.bytes_written + self.bytes_read) / device.bytes_per_us


def traffic(config: KernelConfig, lengths: Sequence[int], width: int | None = None) -> Traffic:
    """What one refresh moves: lengths, rows and tables read once, everything written to every backend.

    Args:
        config: the kernel.
        lengths: tokens of each request.
        width: columns of page_indices, at most; None is the longest length.

    Raises:
        ArgumentError: a number is negative.
    """
    width = max(lengths, default=0) if width is None else width
    if width < 0 or min(lengths, default=0) < 0:
        raise ArgumentError("A length or width is negative; give 0 or more.")
    copies = config.operation == "copy"
    columns = [min(length, width) if config.extent == "live" else width for length in lengths]
    pages = [-(-count // config.page_size) for count in columns]
    rows = len(lengths)
    written = []
    read = 0
    for name in config.fields:
        kind, tensors = FIELDS[name].kind, config.destinations(name)
        shape: tuple[float, ...]
        if kind == "table":
            counts = columns if name == "page_indices" else pages
            elements, shape = sum(counts), (rows, sum(counts) / rows if rows else 0)
        else:
            elements = rows + (kind == "cumulative")
            shape = (elements,)
        written.append(Written(name, shape, tensors, 4 * elements * tensors))
        read += 4 * elements if copies else 0
    if not copies:
        if config.needs_lengths:
            read += rows * _BYTES[config.seq_lens_dtype]
        if config.tables:
            # A page's number comes from its first token, which page_indices' tokens include.
            tokens = sum(columns if "page_indices" in config.fields else pages)
            read += rows * _BYTES[config.req_pool_indices_dtype] + tokens * _BYTES[config.req_to_token_dtype]
    return Traffic(tuple(written), read)
