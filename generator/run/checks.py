"""Checks of tensors before anything is written. Each refusal names the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError

# Columns are 32-bit in the kernels, with room for a tile beyond the last one.
MAX_COLUMNS = 2**31 - 2**16
MAX_BATCH = 2**31 - 2**16

INT_DTYPES = (torch.int32, torch.int64)


def dtype_name(dtype: torch.dtype) -> str:
    """ "int32" for torch.int32."""
    return str(dtype).removeprefix("torch.")


def check_tensor(
    name: str, value: Any, *, dim: int, dtypes: Sequence[torch.dtype], device: torch.device | None = None
) -> Tensor:
    """A strided tensor of the rank, dtype and device asked for; tables have unit inner stride and separate rows.

    Raises:
        ArgumentError: it isn't.
    """
    if not isinstance(value, Tensor):
        raise ArgumentError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor.")
    if value.layout is not torch.strided:
        raise ArgumentError(f"{name} has layout {value.layout}; it must be a strided tensor.")
    if value.dtype not in dtypes:
        allowed = " or ".join(dtype_name(d) for d in dtypes)
        raise ArgumentError(f"{name} has dtype {dtype_name(value.dtype)}; allowed: {allowed}.")
    if value.dim() != dim:
        raise ArgumentError(f"{name} has shape {tuple(value.shape)}; it must have {dim} dimension{'s'[: dim > 1]}.")
    if device is not None and value.device != device:
        raise ArgumentError(
            f"{name} is on {value.device}; it must be on {device}, where the other tensors are. Move it with .to()."
        )
    if value.device.type not in ("cuda", "cpu"):
        raise ArgumentError(f"{name} is on {value.device}; allowed devices: cuda, cpu.")
    if dim == 2:
        rows, columns = value.shape
        if columns > 1 and value.stride(1) != 1:
            raise ArgumentError(
                f"{name} has strides {value.stride()}; the inner stride must be 1 (the elements of a row side by "
                "side). Call .contiguous(), or transpose it back."
            )
        if rows > 1 and value.stride(0) < columns:
            raise ArgumentError(
                f"{name} has strides {value.stride()} and {columns} columns; the row stride must be {columns} or "
                "more, so that rows don't overlap. An expanded tensor can't be used."
            )
        if columns > MAX_COLUMNS:
            raise ArgumentError(f"{name} has {columns} columns; allowed: up to {MAX_COLUMNS}.")
    return value


def check_destination(name: str, value: Any, *, dim: int, device: torch.device | None) -> Tensor:
    """check_tensor for an int32 tensor that will be written; vectors are contiguous.

    Raises:
        ArgumentError: it can't be written to.
    """
    tensor = check_tensor(name, value, dim=dim, dtypes=(torch.int32,), device=device)
    if dim == 1 and tensor.numel() > 1 and tensor.stride(0) != 1:
        raise ArgumentError(f"{name} has stride {tensor.stride(0)}; it must be 1 (contiguous).")
    return tensor


def check_int(name: str, value: Any, low: int, high: int | None, why: str = "") -> int:
    """A plain integer within bounds (a tensor would have to be read back from the device).

    Raises:
        ArgumentError: it isn't.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentError(f"{name} is {value!r} ({type(value).__name__}); it must be a Python int.")
    if value < low or (high is not None and value > high):
        allowed = f"{low} or more" if high is None else f"{low} to {high}" if low < high else str(low)
        raise ArgumentError(f"{name} is {value}; allowed: {allowed}{why}.")
    return value


@dataclass(frozen=True)
class Region:
    """The memory of one tensor.

    Attributes:
        name: for messages.
        start, end: bytes, end exclusive; equal for an empty tensor.
        row_bytes, row_stride: bytes of a row and from row to row; one row if row_stride is 0.
    """

    name: str
    start: int
    end: int
    row_bytes: int
    row_stride: int

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Region:
        """The region of a tensor with non-negative strides and unit inner stride.

        Raises:
            ArgumentError: it has no memory, as a FakeTensor or another subclass that only stands for a tensor.
        """
        try:
            start, size = tensor.data_ptr(), tensor.element_size()
        except RuntimeError:
            start, size = 0, 0
        if tensor.numel() == 0:
            return cls(name, start, start, 0, 0)
        if start == 0:
            raise ArgumentError(
                f"{name} is a {type(tensor).__name__} without memory that a kernel could read; pass a tensor with data."
            )
        last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        rows = tensor.dim() == 2 and tensor.shape[0] > 1
        return cls(
            name,
            start,
            start + (last + 1) * size,
            (tensor.shape[-1] if rows else last + 1) * size,
            tensor.stride(0) * size if rows else 0,
        )

    def overlaps(self, other: Region) -> bool:
        """Whether the two share a byte. Column slices of one table with one row stride are told apart exactly."""
        if self.start == self.end or other.start == other.end:
            return False
        if self.end <= other.start or other.end <= self.start:
            return False
        stride = self.row_stride
        if stride and stride == other.row_stride:
            shift = (other.start - self.start) % stride
            return shift < self.row_bytes or shift + other.row_bytes > stride
        return True


def check_disjoint(
    regions: Iterable[Region],
    advice: str = "destinations must be separate, or exactly the same tensor in several backends. "
    "Allocate it separately.",
) -> None:
    """Every two regions are disjoint.

    Args:
        regions: in any order.
        advice: what is allowed and what to do, for the message.

    Raises:
        ArgumentError: two of them overlap; names both.
    """
    open_regions: list[Region] = []
    for region in sorted(regions, key=lambda r: (r.start, r.end)):
        open_regions = [other for other in open_regions if other.end > region.start]
        for other in open_regions:
            if region.overlaps(other):
                raise ArgumentError(f"{region.name} overlaps {other.name} in memory; {advice}")
        open_regions.append(region)
