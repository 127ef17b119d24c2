"""Checks of single arguments. Each message names the argument, its value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..spec.expressions import Dtype
from ..spec.fields import Field

# Kernels count columns in 32 bits. The margin keeps a tile that begins below the limit from overflowing.
MAX_COLUMNS = 2**31 - 2**16
MAX_BATCH = 2**31 - 2**16

INT_DTYPES = (torch.int32, torch.int64)


def dtype_name(dtype: torch.dtype) -> str:
    """ "int32" for torch.int32."""
    return str(dtype).removeprefix("torch.")


def torch_dtypes(names: Sequence[str]) -> list[torch.dtype]:
    """[torch.int32] for ["int32"]."""
    return [getattr(torch, name) for name in names]


def check_tensor(
    name: str,
    value: Any,
    *,
    dim: int,
    dtypes: Sequence[torch.dtype],
    device: torch.device | None = None,
    remedy: str = "",
) -> Tensor:
    """Checks an argument's type, layout, dtype, rank and device; a table also for unit inner stride and separate rows.

    Args:
        remedy: what to do about a wrong dtype, if it isn't to convert the tensor.

    Raises:
        ArgumentError: it doesn't fit.
    """
    if not isinstance(value, Tensor):
        raise ArgumentError(f"{name} is a {type(value).__name__}; it must be a torch.Tensor.")
    if value.layout is not torch.strided:
        raise ArgumentError(f"{name} has layout {value.layout}; it must be a strided tensor.")
    if value.is_nested:
        raise ArgumentError(f"{name} is a nested tensor; it must be a strided tensor with one shape.")
    if value.dtype not in dtypes:
        allowed = " or ".join(dtype_name(d) for d in dtypes)
        remedy = remedy or f"Pass it converted, by .to({dtypes[0]})."
        raise ArgumentError(f"{name} has dtype {dtype_name(value.dtype)}; allowed: {allowed}. {remedy}")
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
                f"{name} has strides {value.stride()}; the inner stride must be 1 (the elements of a row are "
                "consecutive). Call .contiguous(), or transpose it back."
            )
        if rows > 1 and value.stride(0) < columns:
            raise ArgumentError(
                f"{name} has strides {value.stride()} and {columns} columns; the row stride must be {columns} or "
                "more, so that rows don't overlap. An expanded tensor can't be used."
            )
        if columns > MAX_COLUMNS:
            raise ArgumentError(f"{name} has {columns} columns; allowed: up to {MAX_COLUMNS}.")
    return value


def check_destination(
    name: str, value: Any, *, dim: int, dtypes: Sequence[torch.dtype], device: torch.device | None, remedy: str = ""
) -> Tensor:
    """check_tensor for a tensor that will be written; a vector must be contiguous.

    Raises:
        ArgumentError: it can't be written to.
    """
    remedy = remedy or f"Allocate it with dtype={dtypes[0]}."
    tensor = check_tensor(name, value, dim=dim, dtypes=dtypes, device=device, remedy=remedy)
    if dim == 1 and tensor.numel() > 1 and tensor.stride(0) != 1:
        raise ArgumentError(f"{name} has stride {tensor.stride(0)}; it must be 1 (contiguous).")
    return tensor


def check_declared(name: str, value: Any, field: Field, device: torch.device | None) -> Tensor:
    """Checks a declared field's destination: a vector or table may have any strides, a vector of own rows be [bs, W].

    If the other tensors are on a GPU, it may also be in pinned host memory, which has the same address on the device.

    Raises:
        ArgumentError: it can't be written to.
    """
    if device is not None and device.type == "cuda" and isinstance(value, Tensor) and value.device.type == "cpu":
        if not value.is_pinned():
            raise ArgumentError(
                f"{name} is on cpu; it must be on {device}, where the other tensors are, or in pinned memory. Move it "
                "with .to(), or allocate it with pin_memory=True."
            )
        device = value.device
    (dtype,) = dtypes = torch_dtypes(field.dtypes)
    if (
        field.kind not in ("vector", "table")
        or not isinstance(value, Tensor)
        or value.dtype != dtype
        or value.dim() not in (field.dim, 2)
    ):
        given = dtype_name(value.dtype) if isinstance(value, Tensor) else ""
        declare = f"Declare dtype={given!r}, or allocate" if given in get_args(Dtype) else "Allocate"
        remedy = f"{declare} it with dtype={dtype}."
        return check_destination(name, value, dim=field.dim, dtypes=dtypes, device=device, remedy=remedy)
    flat = value.as_strided((1,), (1,)) if value.numel() else value.new_empty(0)
    check_tensor(name, flat, dim=1, dtypes=dtypes, device=device)
    if field.kind == "vector" and value.dim() == 2 and value.shape[1] != field.own_rows:
        raise ArgumentError(
            f"{name} has shape {tuple(value.shape)}; it must have one dimension, or be [bs, W] with W the rows that "
            f"the declaration has, which are {field.own_rows}. Declare rows={value.shape[1]}, or flatten it."
        )
    reach = 0  # elements that the dimensions so far span
    for stride, size in sorted((s, n) for s, n in zip(value.stride(), value.shape, strict=True) if n > 1):
        if stride <= reach:
            raise ArgumentError(
                f"{name} has strides {value.stride()} and shape {tuple(value.shape)}; its elements must not share "
                "memory. An expanded tensor can't be used."
            )
        reach += stride * (size - 1)
    return value


def check_int(name: str, value: Any, low: int, high: int | None, why: str = "") -> int:
    """Checks that a number is a Python int within bounds. Tensors are refused: they would be read from the device.

    Args:
        low, high: the bounds, both inclusive; high None for no upper bound.
        why: the end of the message, after the bounds.

    Raises:
        ArgumentError: it isn't an int, or is out of bounds.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentError(f"{name} is {value!r} ({type(value).__name__}); it must be a Python int.")
    if value < low or (high is not None and value > high):
        allowed = f"{low} or more" if high is None else f"{low} to {high}" if low < high else str(low)
        raise ArgumentError(f"{name} is {value}; allowed: {allowed}{why}.")
    return value
