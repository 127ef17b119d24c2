"""The values of formulas in one configuration, computed with PyTorch: tests compare emitted code with them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .arithmetic import evaluate
from .expressions import Constant, Dtype, LookUp, substitute
from .fields import Field, Packed
from .vectors import formulas_mode, known_names

if TYPE_CHECKING:
    # Only for annotations: tensors come with the methods that are used.
    from torch import Tensor

    from .config import KernelConfig


@dataclass(frozen=True)
class _Given:
    """The inputs of one backend's refresh, for an evaluation."""

    config: KernelConfig
    of_request: dict[str, Tensor]
    counts: Tensor
    pool_row: Tensor
    tables: Mapping[str, Tensor]

    def of(self, field: Field) -> tuple[dict[str, Tensor], Tensor]:
        """The inputs of a field's elements, and their rows of sources."""
        if field.per == "request":
            return {**self.of_request, "rows": self.counts}, self.pool_row
        repeats = self.counts if field.own_rows is None else self.counts * 0 + field.own_rows
        given = {**self.of_request, "rows": repeats}
        values = {name: tensor.repeat_interleave(repeats) for name, tensor in given.items()}
        before = (repeats.cumsum(0) - repeats).repeat_interleave(repeats)
        values["row"] = values["rows"].new_ones(before.shape).cumsum(0) - 1 - before
        return values, self.pool_row.repeat_interleave(repeats)

    def evaluate(self, field: Field, columns: bool = False, column: Tensor | None = None) -> Tensor:
        """The values of a field's formula, or of its columns; with ``column`` at each of these, in a last dimension."""
        config, (values, rows) = self.config, self.of(field)
        node = config.scope.substituted(field.name, formulas_mode(config, field.own_rows), columns)
        known = {n: Constant(n, value) for n, value in config.scope.constants}
        node = substitute(node, known_names(config, field.own_rows) | known)
        if column is not None:
            values = {name: tensor[:, None] for name, tensor in values.items()} | {"column": column[None]}
            rows = rows[:, None].expand(-1, column.numel())
        dtype: Dtype = field.dtype
        if columns:
            declared = field.declaration
            dtype = config.dtype(declared.at) if isinstance(declared, Packed) else "int32"
        wide = {n: t.long() if dtype == "int64" else t.int() for n, t in values.items()}
        return evaluate(node, wide, lambda found, places: _look_up(self.tables, found, places, rows))


def _given(
    config: KernelConfig,
    seq_lens: Tensor,
    extend_seq_lens: Tensor | None,
    step: int,
    inputs: Mapping[str, Tensor],
    tables: Mapping[str, Tensor],
    req_pool_indices: Tensor | None,
) -> _Given:
    base_len = seq_lens.int()
    counts = base_len.new_full(base_len.shape, 1 if config.mode == "decode" else config.next_n)
    if config.variable_rows and extend_seq_lens is not None:
        counts = extend_seq_lens.int().clamp(min=0)
    offset = base_len.new_full(base_len.shape, config.length_offsets[step % len(config.length_offsets)])
    request = base_len.new_ones(base_len.shape).cumsum(0) - 1
    given = {"base_len": base_len, "offset": offset, "seq_len": base_len + offset, "request": request}
    given |= {"step": base_len.new_full(base_len.shape, step), **inputs}
    return _Given(config, given, counts, base_len if req_pool_indices is None else req_pool_indices.long(), tables)


def evaluate_columns(
    config: KernelConfig,
    name: str,
    width: int,
    seq_lens: Tensor,
    extend_seq_lens: Tensor | None = None,
    step: int = 0,
    *,
    inputs: Mapping[str, Tensor] = {},
    tables: Mapping[str, Tensor] = {},
    req_pool_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The values of a table or packed field for one backend, by its formula.

    Args:
        width: the columns to evaluate.
        The others as in evaluate_vectors.

    Returns:
        The elements [rows, width], and how many of them each row has, of which there may be more than ``width``.
    """
    given = _given(config, seq_lens, extend_seq_lens, step, inputs, tables, req_pool_indices)
    field = config.field(name)
    columns = given.evaluate(field, columns=True)
    elements = given.evaluate(field, column=columns.new_ones(width).cumsum(0) - 1)
    return elements, columns


def evaluate_vectors(
    config: KernelConfig,
    seq_lens: Tensor,
    extend_seq_lens: Tensor | None = None,
    step: int = 0,
    *,
    inputs: Mapping[str, Tensor] = {},
    tables: Mapping[str, Tensor] = {},
    req_pool_indices: Tensor | None = None,
) -> dict[str, Tensor]:
    """The values of a configuration's vectors and running sums for one backend, by their formulas, with PyTorch.

    Args:
        config: its vectors, mode, offsets and settings.
        seq_lens: int32 or int64 [bs].
        extend_seq_lens: int32 or int64 [bs], the rows of each request, for a configuration with variable rows.
        step: the backend, from 0 on.
        inputs: the declared inputs, int32 or int64 [bs].
        tables: what look-ups read: req_to_token as "token", the declared sources and maps by name.
        req_pool_indices: int32 or int64 [bs], the rows of look-ups that don't say which.

    Returns:
        By field, a tensor of its dtype with one element per request or row; running sums have one more.
    """
    given = _given(config, seq_lens, extend_seq_lens, step, inputs, tables, req_pool_indices)
    values: dict[str, Tensor] = {}
    for name in config.vectors:
        field = config.field(name)
        tensor = given.evaluate(field)
        if field.kind == "running_sum":
            sums = tensor.new_zeros(tensor.numel() + 1)
            sums[1:] = tensor.cumsum(0, dtype=tensor.dtype)
            tensor = sums
        values[name] = tensor.bool() if field.dtype == "bool" else tensor
    return values


def _look_up(tables: Mapping[str, Tensor], found: LookUp, places: Sequence[Tensor], rows: Tensor) -> Tensor:
    """The elements that a look-up yields."""
    table = tables[found.source]
    if table.dim() == 2 and len(places) == 1:
        places = [rows, *places]
    places = [place.long().expand(rows.shape) for place in places]
    inside = rows == rows
    for place, length in zip(places, table.shape, strict=True):
        inside = inside & (place >= 0) & (place < length)
    read = table[tuple(place[inside] for place in places)]
    values = read.new_full(rows.shape, 0).long()
    values[inside] = read.long()
    return values.where(inside, values.new_full((), found.missing))
