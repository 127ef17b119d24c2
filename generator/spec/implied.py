"""What the settings of a configuration imply, in the terms that templates and the host ask for.

These hold while a configuration is made, too, before what it doesn't use is taken out: parts.py asks them what is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .fields import FIELDS
from .vectors import settings_of


class Implied:
    """The derived properties of a KernelConfig."""

    if TYPE_CHECKING:
        operation: str
        mode: str
        num_backends: int
        fields: tuple[str, ...]
        distinct: tuple[tuple[str, int], ...]
        target: str

        def __getattr__(self, name: str) -> Any: ...

    @property
    def copies(self) -> bool:
        """Whether it copies fields that were computed before."""
        return self.operation == "copy"

    @property
    def tables(self) -> tuple[str, ...]:
        """The fields that are gathered from req_to_token."""
        return tuple(name for name in self.fields if FIELDS[name].kind in ("table", "indices"))

    @property
    def gathers(self) -> bool:
        """Whether the kernel reads req_to_token."""
        return not self.copies and bool(self.tables)

    @property
    def paged_tables(self) -> tuple[str, ...]:
        """The tables whose columns are pages, or pools of pages."""
        return tuple(name for name in self.tables if name not in ("page_indices", "kv_indices"))

    @property
    def vectors(self) -> tuple[str, ...]:
        """The fields that have one element a request, or one more (running sums)."""
        return tuple(name for name in self.fields if FIELDS[name].kind in ("vector", "running_sum"))

    @property
    def schedules(self) -> tuple[str, ...]:
        """The schedules that blocks of their own compute, by the field that they are named after."""
        return tuple(name for name in self.fields if FIELDS[name].kind == "schedule")

    @property
    def row_fields(self) -> tuple[str, ...]:
        """The fields whose rows are not requests but the rows that a request has several of."""
        return tuple(name for name in self.fields if self.mode != "decode" and FIELDS[name].per == "row")

    @property
    def live(self) -> bool:
        """Whether what is gathered ends where a request's length does."""
        return self.gathers and ("kv_indices" in self.fields or self.extent == "live")

    @property
    def needs_lengths(self) -> bool:
        """Whether the kernel reads seq_lens."""
        return not self.copies and (bool(self.vectors or self.schedules) or self.live)

    @property
    def variable_rows(self) -> bool:
        """Whether each call says how many rows each request has."""
        several = not self.copies and self.mode == "draft_extend" and bool(self.row_fields)
        return several and self.extend == "variable"

    @property
    def counts_rows(self) -> bool:
        """Whether the kernel depends on next_n."""
        if self.copies or self.mode == "decode" or self.variable_rows:
            return False
        return self.mode == "target_verify" or bool(self.row_fields) or self.has_mqa_schedule

    @property
    def equal_rows(self) -> bool:
        """Whether every row of every table is written equally far, whatever the lengths, by a kernel that gathers."""
        if not self.gathers or "kv_indices" in self.fields or self.variable_rows:
            return False
        return self.extent == "full" or self.page_fill is not None

    def uses(self, setting: str) -> bool:
        """Whether one of the fields depends on a setting that formulas may name."""
        return not self.copies and any(setting in settings_of(name) for name in self.fields)

    @property
    def uses_topk(self) -> bool:
        """Whether the kernel depends on index_topk."""
        return self.uses("index_topk")

    @property
    def uses_pools(self) -> bool:
        """Whether the kernel depends on index_kpool."""
        return self.uses("index_kpool")

    @property
    def added_lengths(self) -> tuple[int, ...]:
        """What the backends' lengths are longer than seq_lens by: one number for all of them, or one each."""
        verified = self.next_n if self.mode == "target_verify" else 0
        return tuple(offset + verified for offset in self.seqlen_offsets or (0,))

    @property
    def has_mqa_schedule(self) -> bool:
        """Whether it computes DeepGEMM's schedule."""
        return "paged_mqa_schedule_metadata" in self.fields

    @property
    def schedules_rows(self) -> bool:
        """Whether the items of DeepGEMM's schedule are rows, and not requests."""
        return self.has_mqa_schedule and self.mode != "decode" and self.schedule_per == "row"

    @property
    def atoms_of_next_n(self) -> int:
        """Query atoms of each item of DeepGEMM's schedule that follow from the rows of a request."""
        return 1 if self.schedules_rows else (int(self.next_n) + 1) // 2

    @property
    def atoms(self) -> int:
        """Query atoms of each item of DeepGEMM's schedule."""
        return self.schedule_atoms or self.atoms_of_next_n

    @property
    def warp_size(self) -> int:
        """Threads that exchange registers: 32 on a GPU; 1 where one thread runs a whole block."""
        return 32 if self.target == "cuda" else 1

    @property
    def tile_columns(self) -> int:
        """Columns of a tile, one warp's share of a row."""
        return self.warp_size * 4 * int(self.unroll)

    @property
    def tile_alignment(self) -> int:
        """Words at whose multiples in the destination tiles begin, where stores are of 16 bytes."""
        return min(32, self.tile_columns)

    def destinations(self, field: str) -> int:
        """How many different tensors the backends have for a field."""
        return dict(self.distinct).get(field, self.num_backends)
