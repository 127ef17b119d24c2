"""What a user declares, with the tensors that it is about: destinations of declared fields, sources, maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..spec.fields import Declaration, Packed, Table, Vector
from ..spec.scope import check_declaration
from .checks import INT_DTYPES, check_int, check_tensor, dtype_name
from .memory import Region


@dataclass(frozen=True, eq=False)
class Written:
    """A declaration and where it is written. Made by into().

    Attributes:
        declaration: what the elements hold.
        tensors: one for all backends, or one for each.
    """

    declaration: Declaration
    tensors: Tensor | Sequence[Tensor]


def into(declaration: Declaration, tensors: Tensor | Sequence[Tensor]) -> Written:
    """A declaration together with its destinations, for the ``declare`` of bind().

    Args:
        declaration: from vector(), running_sum(), table() or packed().
        tensors: of the declaration's dtype; one for all backends, or a list of one for each. A vector may have any
            stride, and one with ``rows=W`` may be [bs, W] with any two strides, as a table may.
    """
    return Written(declaration, tensors)


@dataclass(frozen=True, eq=False)
class Map:
    """A one-dimensional table that formulas look up by value, such as full_to_swa.

    Attributes:
        table: int32 or int64 [n], contiguous.
        outside: what an index below 0 or from n on yields.
    """

    table: Tensor
    outside: int = 0


class Declarations:
    """What bind() is given beside the buffers, checked as far as that needs no configuration.

    Args:
        given: declare, inputs, constants, sources and maps, as bind() takes them.
        count: the number of backends.

    Attributes:
        settings: of the configuration.
        tensors: by field, the tensor of each backend and its name in messages.

    Raises:
        ArgumentError: something isn't of the kind that it must be.
    """

    def __init__(self, given: Mapping[str, Any], count: int) -> None:
        for name, value in given.items():
            if value is not None and not isinstance(value, Mapping):
                raise ArgumentError(f"{name} is a {type(value).__name__}; it must be a dict by name, or None.")
        declare, inputs, constants, sources, maps = (value or {} for value in given.values())
        self.tensors: dict[str, list[tuple[str, Tensor]]] = {}
        declared: dict[str, Declaration] = {}
        for name, value in declare.items():
            declared[name] = value.declaration if isinstance(value, Written) else value
            if not isinstance(declared[name], Vector | Table | Packed):
                raise ArgumentError(
                    f"declare[{name!r}] is a {type(value).__name__}; it must be what onelaunch.vector, running_sum, "
                    "table or packed returns, or onelaunch.into(declaration, tensors)."
                )
            check_declaration(name, declared[name])
            if isinstance(value, Written):
                self.tensors[name] = _one_each(name, value.tensors, count)
        for name, dtype in inputs.items():
            if dtype not in INT_DTYPES:
                raise ArgumentError(f"inputs[{name!r}] is {dtype!r}; allowed: torch.int32, torch.int64.")
        self._read: dict[str, Tensor] = {}
        for name, table in sources.items():
            self._read[name] = check_tensor(f"sources[{name!r}]", table, dim=2, dtypes=INT_DTYPES)
        for name, each in maps.items():
            if not isinstance(each, Map):
                raise ArgumentError(f"maps[{name!r}] is a {type(each).__name__}; it must be an onelaunch.Map.")
            self._read[name] = check_tensor(f"maps[{name!r}].table", each.table, dim=1, dtypes=INT_DTYPES)
            if each.table.numel() > 1 and each.table.stride(0) != 1:
                raise ArgumentError(f"maps[{name!r}].table has stride {each.table.stride(0)}; it must be 1.")
            check_int(f"maps[{name!r}].outside", each.outside, -(2**63), 2**63 - 1)
        self.settings: dict[str, Any] = {
            "declare": declared,
            "inputs": {name: dtype_name(dtype) for name, dtype in inputs.items()},
            "constants": dict(constants),
            "sources": {name: dtype_name(table.dtype) for name, table in sources.items()},
            "maps": {name: (dtype_name(each.table.dtype), each.outside) for name, each in maps.items()},
        }

    def read(self) -> list[tuple[str, Tensor]]:
        """What kernels read of it, with names in messages."""
        return [(f"the source or map {name!r}", table) for name, table in self._read.items()]

    def words(self, name: str) -> list[int]:
        """The parameter words of a source or a map."""
        table = self._read[name]
        if table.dim() == 1:
            return [table.data_ptr(), table.numel()]
        return [table.data_ptr(), table.shape[0], table.stride(0), table.shape[1]]

    def check_read(self, device: torch.device, written: Sequence[Region]) -> None:
        """Checks what is looked up: on the device, and apart from what is written.

        Raises:
            ArgumentError: it isn't.
        """
        for name, table in self.read():
            if table.device != device:
                raise ArgumentError(f"{name} is on {table.device}; it must be on {device}, where the destinations are.")
            source = Region.of(name, table)
            for region in written:
                if region.overlaps(source):
                    raise ArgumentError(
                        f"{region.name} overlaps {name} in memory; the kernel would read what it is writing. Allocate "
                        "it separately, or bind it to a plan that runs later."
                    )


def _one_each(name: str, tensors: Any, count: int) -> list[tuple[str, Tensor]]:
    label = f"declare[{name!r}]"
    if isinstance(tensors, Tensor):
        return [(label, tensors)] * count
    if isinstance(tensors, str) or not isinstance(tensors, Sequence) or len(tensors) != count:
        raise ArgumentError(
            f"the tensors of {label} are a {type(tensors).__name__}; they must be one tensor for all backends, or a "
            f"list of one for each of the {count} backends."
        )
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{label}[{index}] is a {type(tensor).__name__}; it must be a torch.Tensor.")
    return [(f"{label}[{index}]", tensor) for index, tensor in enumerate(tensors)]
