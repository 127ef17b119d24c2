"""The arguments of a plan's run(): their checks, and the words of the kernel's parameters that a call sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..spec.config import KernelConfig
from .checks import INT_DTYPES, check_int, check_tensor
from .destinations import Destinations
from .memory import Region

# The number of a call's first declared input among the arguments of Plan._check.
FIRST_INPUT = 5


class Arguments:
    """What a plan's run() takes.

    Args:
        destinations, config: of the plan.
        columns: the columns that fit.
        max_len: the columns that a call without max_len writes; None is ``columns``.

    Attributes:
        capacity: the largest batch that fits the destinations.
        input_names: the declared inputs, in the order of the kernel's parameters.
    """

    def __init__(self, destinations: Destinations, config: KernelConfig, columns: int, max_len: int | None) -> None:
        self._config, self._device = config, destinations.device
        self._spans = [(region.start, region.end, region) for region in destinations.regions]  # for a quick test
        (self.capacity, self._narrowest), rows = destinations.requests, destinations.rows
        if rows.capacity // config.next_n < self.capacity and config.extend == "uniform":
            self.capacity, self._narrowest = rows.capacity // config.next_n, rows.name
        self._padded, self._narrowest_padded = destinations.padded(config.next_n)
        self._columns, self._max_len = columns, columns if max_len is None else max_len
        self._seq_lens_dtype = getattr(torch, config.seq_lens_dtype)
        self._pool_dtype = getattr(torch, config.req_pool_indices_dtype)
        self._extend_dtype = getattr(torch, config.extend_seq_lens_dtype)
        self._reads_lengths = config.needs_lengths
        self._reads_rows, self._gathers = config.reads_rows, bool(config.tables)
        self._inputs = [(name, getattr(torch, dtype)) for name, dtype in config.inputs]
        self.input_names = tuple(name for name, _ in self._inputs)
        self._pads, self._has_padding = config.pads, config.padding_len is not None
        self._variable = config.extend == "variable"
        self._has_rows = config.mode != "draft_extend" or bool(config.row_fields or config.names_rows)

    def values(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The declared inputs in the order of the kernel's parameters."""
        for name in inputs:
            if name not in self.input_names:
                raise ArgumentError(
                    f"run() got {name!r}, which no formula of the plan reads; the declared inputs that are read are "
                    f"{', '.join(self.input_names) or 'none'}."
                )
        return [inputs[name] for name in self.input_names if name in inputs]

    def words(
        self,
        exact: int,
        seq_lens: Tensor,
        req_pool_indices: Tensor,
        extend_seq_lens: Tensor | None,
        max_len: int | None,
        captured_size: int | None = None,
        *values: Tensor,
    ) -> list[int]:
        """Checks a call; returns the words that it sets.

        Args:
            exact: see Plan.exact.
            values: the declared inputs, as values() orders them.
            The others as in Plan.run.

        Raises:
            ArgumentError: an argument doesn't fit.
        """
        inputs = [("seq_lens", seq_lens, self._seq_lens_dtype, self._reads_lengths)]
        if extend_seq_lens is not None:
            if not self._variable and self._has_rows:
                raise ArgumentError(
                    f"extend_seq_lens is a {type(extend_seq_lens).__name__}; the plan's requests have "
                    f"{self._config.next_n} rows each in {self._config.mode}, so it must be None. Bind with "
                    "mode='draft_extend' and extend='variable'."
                )
            inputs.append(("extend_seq_lens", extend_seq_lens, self._extend_dtype, self._variable))
        elif self._variable:
            raise ArgumentError(
                "extend_seq_lens is None; a plan with variable extend lengths needs one element per request. "
                "Bind with extend='uniform' for next_n rows per request."
            )
        inputs.append(("req_pool_indices", req_pool_indices, self._pool_dtype, self._reads_rows))
        if len(values) != len(self._inputs):
            raise ArgumentError(
                f"run() got {len(values)} declared inputs and needs {len(self._inputs)}: "
                f"{', '.join(self.input_names)}. Pass each by its name."
            )
        inputs += [(name, value, dtype, True) for (name, dtype), value in zip(self._inputs, values, strict=True)]
        for name, tensor, dtype, read in inputs:
            dtypes = (dtype,) if read else INT_DTYPES
            check_tensor(name, tensor, dim=1, dtypes=dtypes, device=self._device, remedy=_rebind(name, tensor, dtype))
            region = Region.of(name, tensor)
            start, end = region.start, region.end
            for first, last, destination in self._spans:
                if start < last and first < end and region.overlaps(destination):
                    raise ArgumentError(
                        f"{name} overlaps {destination.name} in memory; the kernel would read memory that it writes. "
                        "Pass a copy (.to(torch.int32) returns the same tensor if it is int32 already)."
                    )
        batch_size = exact or seq_lens.numel()
        for name, tensor, _, _ in inputs:
            if exact and tensor.numel() < exact:
                raise ArgumentError(
                    f"{name} has {tensor.numel()} elements; the plan is for {exact} requests. Pass as many or "
                    "more, of which the first ones count."
                )
            if not exact and tensor.numel() != batch_size:
                raise ArgumentError(
                    f"{name} has {tensor.numel()} elements and seq_lens has {batch_size}; "
                    "they must have the same number."
                )
        if batch_size > self.capacity:
            rows = f" of {self._config.next_n} rows each" if self._config.next_n > 1 else ""
            raise ArgumentError(
                f"seq_lens has {batch_size} requests{rows}; {self._narrowest} has room for {self.capacity}. "
                "Bind larger buffers."
            )
        columns = self._max_len
        if max_len is not None:
            columns = check_int("max_len", max_len, 0, self._columns, ", the width of the narrowest table")
        # In the order of layout.call_words.
        words = [word for _, tensor, _, read in inputs if read for word in (tensor.data_ptr(), tensor.stride(0))]
        size = batch_size if captured_size is None else self._captured(captured_size, batch_size)
        if self._has_padding:
            words += [size, batch_size]
        elif self._pads:
            words += [batch_size, size]
        else:
            words.append(batch_size)
        return [*words, columns] if self._gathers else words

    def _captured(self, captured_size: int, batch_size: int) -> int:
        if not self._pads and not self._has_padding:
            raise ArgumentError(
                f"captured_size is {captured_size!r}; no field of the plan has a pad, and it wasn't bound with "
                "padding_len: leave it None."
            )
        # With padding_len every field is written up to it, else those that have a pad.
        limit, narrowest = self._padded, self._narrowest_padded
        if self._has_padding:
            limit, narrowest = self.capacity, self._narrowest or "the destinations"
        why = f", from the batch to what {narrowest} has room for"
        return check_int("captured_size", captured_size, batch_size, limit, why)

    def followed(self, views: Sequence[int]) -> tuple[list[int], list[int], int]:
        """What BoundKernel.follow takes: the inputs' arguments, the first and last addresses of what is written, and
        the number of arguments. For ``views`` see Plan.follow_addresses.
        """
        reads = (self._reads_lengths, self._reads_rows, self._variable)
        declared = list(views) or [FIRST_INPUT + i for i in range(len(self._inputs))]
        # In the order of layout.call_words; run() has its arguments in another one.
        inputs = [index for index in (0, 2, 1) if reads[index]] + declared
        edges = [edge for start, end, _ in self._spans for edge in (start, end)]
        return inputs, edges, max([FIRST_INPUT, *(index + 1 for index in declared)])


def _rebind(name: str, tensor: Any, dtype: torch.dtype) -> str:
    """What to do about an input of another dtype than was bound: the argument of bind() to set, or a conversion."""
    convert = f"{name}.to({dtype})"
    if not isinstance(tensor, Tensor) or tensor.dtype not in INT_DTYPES:
        return f"Pass {convert}."
    own = name in ("seq_lens", "req_pool_indices", "extend_seq_lens")
    setting = f"{name}_dtype={tensor.dtype}" if own else f"inputs={{{name!r}: {tensor.dtype}}}"
    return f"Bind with {setting}, or pass {convert}."
