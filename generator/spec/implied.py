"""What the settings of a configuration imply, in the terms that templates and the host ask for.

These hold while a configuration is made, too, before what it doesn't use is taken out: parts.py asks them what is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .expressions import Dtype
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
        dtypes: tuple[tuple[str, Dtype], ...]
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
    def verified(self) -> bool:
        """Whether what is gathered is written only where it differs from what was written last."""
        return self.gathers and bool(self.writes == "verified")

    @property
    def hashes_tiles(self) -> bool:
        """Whether it keeps a hash of each tile. kv_indices, which has no rows, is compared with itself instead."""
        return self.verified and "kv_indices" not in self.fields

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
    def names_pools(self) -> bool:
        """Whether the emitted code names index_kpool: in formulas a pool of one token is folded away."""
        named = self.has_mqa_schedule or "pooled_real_page_table" in self.fields
        return self.uses("index_kpool") and (named or self.index_kpool > 1)

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
    def sums(self) -> tuple[str, ...]:
        """The vectors that are running sums: one element more than requests or rows, the first one 0."""
        return tuple(name for name in self.fields if FIELDS[name].kind == "running_sum")

    @property
    def request_vectors(self) -> tuple[str, ...]:
        """The vectors with an element for each request."""
        return tuple(name for name in self.vectors if name not in self.row_fields)

    @property
    def row_vectors(self) -> tuple[str, ...]:
        """The vectors with an element for each of the rows that a request has several of."""
        return tuple(name for name in self.vectors if name in self.row_fields)

    @property
    def request_sums(self) -> tuple[str, ...]:
        """The running sums over requests."""
        return tuple(name for name in self.sums if name not in self.row_fields)

    @property
    def row_sums(self) -> tuple[str, ...]:
        """The running sums over rows."""
        return tuple(name for name in self.sums if name in self.row_fields)

    @property
    def strategy(self) -> str | None:
        """How the tables are written, None where no block writes any.

        "live" writes as far as each request's length, "equal" all rows equally far, "variable" requests with a number
        of rows of their own; "indices" writes kv_indices, "copy" what was computed before.
        """
        if self.operation == "copy":
            return "copy"
        if not self.tables:
            return None
        if "kv_indices" in self.fields:
            return "indices"
        if self.variable_rows:
            return "variable"
        return "equal" if self.equal_rows else "live"

    @property
    def length_offsets(self) -> tuple[int, ...]:
        """What the backends add to seq_lens: one number for all, or one each. target_verify adds its rows."""
        verified = self.next_n if self.mode == "target_verify" else 0
        return tuple(offset + verified for offset in self.seqlen_offsets or (0,))

    @property
    def lengths_differ(self) -> bool:
        """Whether each backend has lengths of its own."""
        return self.needs_lengths and len(self.seqlen_offsets) > 1

    @property
    def resident_blocks(self) -> int:
        """Blocks that a multiprocessor has room for at least, 0 where that is the compiler's choice.

        That caps the registers: without it ptxas takes, or spills, some more for blocks that the grid doesn't have.
        """
        return 1024 // int(self.threads) if self.strategy in ("live", "equal", "variable") else 0

    @property
    def wide_tiles(self) -> int:
        """Tiles that a warp takes at once in large tables and of long requests: 2, or 1 where it never takes more.

        With more to write for each word there is enough in flight without, and the registers are needed for addresses.
        """
        if self.strategy not in ("live", "equal") or "page_indices" not in self.fields:
            return 1
        writes = self.destinations("page_indices") * self.next_n
        few = self.equal_rows or (writes <= 3 and len(self.seqlen_offsets) <= 1)
        words = self.hashes_tiles and self.req_to_token_dtype == "int64"  # twice as many registers for the words
        return 2 if few and not words and self.vector_bytes == 16 and self.unroll <= 2 else 1

    @property
    def holds_page_tokens(self) -> bool:
        """Whether the registers that hold a tile's tokens hold those that begin pages, each the same word of four.

        So it is where a tile has at most one page for each lane.
        """
        tokens = self.tile_columns * self.wide_tiles
        power = self.page_size & (self.page_size - 1) == 0
        return (
            self.wide_tiles > 1
            and bool(self.paged_tables)
            and self.req_to_token_dtype == "int32"
            and power
            and 4 <= self.page_size <= 1024
            and tokens <= self.warp_size * self.page_size
        )

    @property
    def copied_vectors(self) -> dict[str, tuple[str, ...]]:
        """The vectors that a copy copies, by the parameter that says how many elements they have (sums one more)."""
        groups = {"batch_size": self.request_vectors, "rows": self.row_vectors}
        return {count: names for count, names in groups.items() if names}

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

    def dtype(self, field: str) -> Dtype:
        """The dtype of a field's tensors."""
        return dict(self.dtypes).get(field, FIELDS[field].dtype)
