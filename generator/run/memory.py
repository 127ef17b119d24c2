"""The memory of tensors: regions, overlaps, and the storages that a plan keeps alive."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..errors import ArgumentError


class Region(NamedTuple):
    """The memory of one tensor.

    Attributes:
        name: the tensor's name in messages.
        start, end: byte addresses, end exclusive; equal for an empty tensor.
        row_bytes, row_stride: bytes of a row, and bytes from row to row; both 0 unless there are several rows.
    """

    name: str
    start: int
    end: int
    row_bytes: int
    row_stride: int

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Region:
        """The region of a tensor with non-negative strides.

        Raises:
            ArgumentError: the tensor has no memory (a FakeTensor, or a storage that was resized to nothing), or its
                storage was resized and no longer holds all of its elements.
        """
        if is_dynamo_compiling():
            torch._dynamo.skip_frame()  # Plan.run calls this between two graphs: nothing to compile
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
        needed, held = (tensor.storage_offset() + last + 1) * size, tensor.untyped_storage().nbytes()
        if needed > held:
            raise ArgumentError(
                f"{name} needs {needed} bytes and its storage has {held}: the storage was resized. Allocate the "
                "tensor again."
            )
        if tensor.dim() == 2 and tensor.shape[0] > 1:
            row_bytes, row_stride = tensor.shape[1] * size, tensor.stride(0) * size
            if tensor.stride(1) != 1:  # all that lies between
                row_bytes, row_stride = (last + 1) * size, 0
        elif tensor.dim() == 1 and tensor.shape[0] > 1 and tensor.stride(0) > 1:
            row_bytes, row_stride = size, tensor.stride(0) * size
        else:
            row_bytes, row_stride = (last + 1) * size, 0
        return cls(name, start, start + (last + 1) * size, row_bytes, row_stride)

    def overlaps(self, other: Region) -> bool:
        """Whether the two share a byte. Exact for column slices of one table and for strided vectors of one stride."""
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
    """Checks that no two regions overlap.

    Args:
        regions: in any order.
        advice: the end of the message, which says what is allowed and what to do.

    Raises:
        ArgumentError: two of them overlap; the message names both.
    """
    open_regions: list[Region] = []
    for region in sorted(regions, key=lambda r: (r.start, r.end)):
        open_regions = [other for other in open_regions if other.end > region.start]
        for other in open_regions:
            if region.overlaps(other):
                raise ArgumentError(f"{region.name} overlaps {other.name} in memory; {advice}")
        open_regions.append(region)


class HeldStorages:
    """The storages of bound tensors. A kernel has only addresses, so its plan keeps these alive.

    If a tensor gets another storage (``set_``, ``.data =``), the plan still has the old one. If a storage is resized in
    place, its memory moves, and PyTorch offers no way to prevent that; check() detects it.

    Args:
        tensors: the tensors by their names in messages.
    """

    def __init__(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        held = {tensor.untyped_storage().data_ptr(): (name, tensor.untyped_storage()) for name, tensor in tensors}
        self._names = [name for name, _ in held.values()]
        self._storages = [storage for _, storage in held.values()]
        self._places = self._read()

    def _read(self) -> list[tuple[int, int]]:
        """(address, bytes) of each storage. Uses map() for speed: every run() with new arguments needs it."""
        if is_dynamo_compiling():
            torch._dynamo.skip_frame()  # as in Region.of
        storage = torch.UntypedStorage
        return list(zip(map(storage.data_ptr, self._storages), map(storage.nbytes, self._storages), strict=True))

    def check(self) -> None:
        """Raises ArgumentError if a storage was resized."""
        places = self._read()
        if places == self._places:
            return
        for name, before, after in zip(self._names, self._places, places, strict=True):
            if before != after:
                raise ArgumentError(
                    f"the storage of {name} was resized after the plan was bound, from {before[1]} bytes to "
                    f"{after[1]}, so the bound memory is gone. Bind a new plan."
                )
