"""Properties that follow from the settings of a configuration, for the templates and the host code.

They also work while a configuration is being made, before its unused settings are removed: parts.py decides by them
which settings are used.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from .cpp import user_name
from .expressions import Dtype, LookUp
from .fields import Field
from .scope import CONSTANTS, TOKEN, Scope
from .vectors import read_by, varies


class Implied:
    """The derived properties of a KernelConfig."""

    if TYPE_CHECKING:
        operation: str
        mode: str
        num_backends: int
        fields: tuple[str, ...]
        distinct: tuple[tuple[str, int], ...]
        scope: Scope
        dtypes: tuple[tuple[str, Dtype], ...]
        target: str

        def __getattr__(self, name: str) -> Any: ...

    @property
    def copies(self) -> bool:
        """Whether it copies precomputed fields."""
        return self.operation == "copy"

    @property
    def tables(self) -> tuple[str, ...]:
        """The fields that are gathered from req_to_token."""
        gathered = [name for name in self.fields if self.field(name).kind in ("table", "packed")]
        return tuple(name for name in gathered if not self.scope.declared(name))

    @property
    def computed(self) -> tuple[str, ...]:
        """The declared tables and packed fields: each element is computed by its formula."""
        return tuple(n for n in self.fields if self.field(n).kind in ("table", "packed") and self.scope.declared(n))

    @property
    def token_table(self) -> str | None:
        """The table whose columns are tokens."""
        tables = (name for name in self.tables if self.field(name).kind == "table")
        return next((name for name in tables if not self._tokens_a_column(name)), None)

    @property
    def packed(self) -> str | None:
        """The packed field of tokens."""
        return next((name for name in self.tables if self.field(name).kind == "packed"), None)

    @property
    def pooled_tables(self) -> tuple[str, ...]:
        """The tables whose columns are pools of pages."""
        return tuple(name for name in self.tables if "index_kpool" in self._tokens_a_column(name))

    def _tokens_a_column(self, name: str) -> tuple[str, ...]:
        """The settings whose product is the number of tokens that a table has a column for."""
        return tuple(setting for setting in CONSTANTS if setting in self.scope.named([name], self.mode))

    def tokens_per_column(self, table: str) -> int:
        """The number of tokens that a table has a column for: 1, a page, or a pool of pages."""
        return math.prod(int(getattr(self, setting)) for setting in self._tokens_a_column(table))

    @property
    def gathers(self) -> bool:
        """Whether the kernel reads req_to_token."""
        return not self.copies and bool(self.tables)

    @property
    def paged_tables(self) -> tuple[str, ...]:
        """The tables whose columns are pages, or pools of pages."""
        return tuple(name for name in self.tables if self._tokens_a_column(name))

    @property
    def vectors(self) -> tuple[str, ...]:
        """The fields that have one element a request, or one more (running sums)."""
        return tuple(name for name in self.fields if self.field(name).kind in ("vector", "running_sum"))

    @property
    def schedules(self) -> tuple[str, ...]:
        """The schedules and counts that blocks of their own compute, by the field that they are named after."""
        return tuple(name for name in self.fields if self.field(name).kind in ("schedule", "counts"))

    @property
    def row_fields(self) -> tuple[str, ...]:
        """The fields with one element, or table row, for each of a request's rows."""
        if self.mode == "decode":
            return ()
        return tuple(n for n in self.fields if self.field(n).per == "row" and self.field(n).own_rows is None)

    @property
    def own_row_vectors(self) -> tuple[str, ...]:
        """The vectors with a number of rows per request of their own."""
        return tuple(name for name in self.vectors if self.field(name).own_rows is not None)

    @property
    def names_rows(self) -> bool:
        """Whether a field with an element a request depends on how many rows the request has."""
        named = self.scope.named((*self.request_vectors, *self.computed), self.mode)
        return not self.copies and self.mode != "decode" and "rows" in named

    def names(self, name: str) -> bool:
        """Whether an emitted formula names something."""
        return name in self.scope.named((*self.vectors, *self.computed), self.mode)

    @property
    def look_ups(self) -> list[LookUp]:
        """The look-ups in the formulas of the vectors."""
        return [] if self.copies else read_by(self, (*self.vectors, *self.computed))

    @property
    def reads_tokens(self) -> bool:
        """Whether the kernel reads req_to_token."""
        return self.gathers or any(found.source == TOKEN for found in self.look_ups)

    @property
    def reads_rows(self) -> bool:
        """Whether the kernel reads req_pool_indices."""
        maps = dict(self.scope.maps)
        return self.gathers or any(len(f.arguments) == 1 and f.source not in maps for f in self.look_ups)

    @property
    def pads(self) -> bool:
        """Whether a run writes beyond its batch, up to the captured size that it is given."""
        return any(self.field(name).pad is not None for name in self.fields)

    @property
    def live(self) -> bool:
        """Whether only live columns are gathered: the first seq_len columns of a row."""
        return self.gathers and (self.packed is not None or self.extent == "live")

    @property
    def verified(self) -> bool:
        """Whether what is gathered is written only where it differs from what was written last."""
        return self.gathers and bool(self.writes == "verified")

    @property
    def hashes_tiles(self) -> bool:
        """Whether it keeps a hash of each tile. kv_indices, which has no rows, is compared with itself instead."""
        return self.verified and self.packed is None

    @property
    def audits(self) -> bool:
        """Whether it writes nothing, and compares what is there with what a refresh would write."""
        return not self.copies and bool(self.writes == "audit")

    @property
    def reports(self) -> bool:
        """Whether it has a record of the first violation."""
        return bool(self.checked) or self.audits

    @property
    def needs_lengths(self) -> bool:
        """Whether the kernel reads seq_lens."""
        return not self.copies and (bool(self.vectors or self.schedules or self.computed) or self.live)

    @property
    def variable_rows(self) -> bool:
        """Whether each call says how many rows each request has."""
        several = not self.copies and self.mode == "draft_extend" and bool(self.row_fields or self.names_rows)
        return several and self.extend == "variable"

    @property
    def counts_rows(self) -> bool:
        """Whether the kernel depends on next_n."""
        if self.copies or self.mode == "decode" or self.variable_rows:
            return False
        return self.mode == "target_verify" or bool(self.row_fields or self.names_rows) or self.has_mqa_schedule

    @property
    def equal_rows(self) -> bool:
        """Whether the kernel writes every row of every table up to the same column, whatever the lengths."""
        if not self.gathers or self.packed is not None or self.variable_rows:
            return False
        return self.extent == "full" or self.page_fill is not None

    @property
    def pages_alone(self) -> bool:
        """Whether the columns of a tile are pages: there are tables of pages, and none of tokens."""
        return not self.copies and bool(self.paged_tables) and self.token_table is None

    def uses(self, setting: str) -> bool:
        """Whether one of the fields depends on a setting that formulas may name."""
        return not self.copies and setting in self.scope.named(self.fields, "target_verify")

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
        if self.schedules_rows:
            return 1
        # Where tokens go through a split together, an entry counts tokens.
        return int(self.next_n) if self.schedule_split_cost else (int(self.next_n) + 1) // 2

    @property
    def atoms(self) -> int:
        """Query atoms per item of DeepGEMM's schedule."""
        return self.schedule_atoms or self.atoms_of_next_n

    @property
    def sums(self) -> tuple[str, ...]:
        """The vectors that are running sums: one element more than requests or rows, the first one 0."""
        return tuple(name for name in self.fields if self.field(name).kind == "running_sum")

    @property
    def request_vectors(self) -> tuple[str, ...]:
        """The vectors with an element for each request."""
        return tuple(n for n in self.vectors if n not in self.row_fields and self.field(n).own_rows is None)

    @property
    def row_vectors(self) -> tuple[str, ...]:
        """The vectors and running sums with one element per row."""
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
        """How the tables are written; None without tables.

        "live" writes each row up to its request's length, "equal" all rows up to the same column, "variable" requests
        with different numbers of rows; "indices" writes kv_indices, "copy" precomputed fields.
        """
        if self.operation == "copy":
            return "copy"
        if not self.tables:
            return None
        if self.packed is not None:
            return "indices"
        if self.variable_rows:
            return "variable"
        return "equal" if self.equal_rows else "live"

    @property
    def length_offsets(self) -> tuple[int, ...]:
        """The offsets that backends add to seq_lens, including next_n in target_verify: one for all, or one each."""
        verified = self.next_n if self.mode == "target_verify" else 0
        return tuple(offset + verified for offset in self.seqlen_offsets or (0,))

    @property
    def lengths_differ(self) -> bool:
        """Whether the backends see different lengths."""
        return self.needs_lengths and len(self.seqlen_offsets) > 1

    @property
    def sets(self) -> int:
        """How often vectors and schedules are computed: for each backend, or once for all."""
        steps = self.needs_lengths and self.names("step")
        return self.num_backends if self.lengths_differ or steps else 1

    def once(self, field: str) -> bool:
        """Whether a field is the same for all backends, though others aren't: the first block writes it to all."""
        formula = field in (*self.vectors, *self.computed)
        return self.sets > 1 and (not varies(self, field) if formula else self.field(field).kind == "counts")

    @property
    def split_blocks(self) -> int:
        """The blocks that Triton's attention has for each request and split."""
        return -int(-self.num_head // min(16, max(1, self.num_head // self.num_kv_head)))

    @property
    def resident_blocks(self) -> int:
        """Minimum resident blocks per SM; 0 leaves the choice to the compiler.

        This caps the registers at 64 per thread. Without it ptxas uses, or spills, a few more.
        """
        alone = self.strategy is None and self.computed
        capped = alone or self.strategy in ("live", "equal", "variable")
        return 1024 // int(self.threads) if capped else 0

    @property
    def table_blocks_per_sm(self) -> int:
        """The limit of the blocks that write tables, per SM.

        It is half of the setting for pages alone and for packed indices of several destinations. Their tiles are small
        or few: what fewer blocks save when they start is more than more of them have in flight.
        """
        several = self.packed is not None and self.destinations(self.packed) > 1
        small = self.pages_alone or (self.strategy == "indices" and several)
        return max(1, int(self.blocks_per_sm) // 2) if small else int(self.blocks_per_sm)

    @property
    def reads_ahead(self) -> bool:
        """Whether vectors read lengths a chunk ahead.

        They do beside tables of pages alone: where there are several chunks, their sums take longer than these tables.
        Declared inputs leave no registers for it.
        """
        return self.pages_alone and bool(self.sums) and not self.inputs

    @property
    def wide_tiles(self) -> int:
        """Tiles that a warp takes at once, in large tables and for long requests: 2, or 1 if it never takes more.

        If each word is written to many places, one tile keeps enough accesses in flight, and the registers are needed
        for addresses. A page takes one register.
        """
        if self.pages_alone:
            return 2 if self.strategy == "live" and not self.verified and self.unroll <= 2 else 1
        if self.strategy not in ("live", "equal") or self.token_table is None:
            return 1
        writes = self.destinations(self.token_table)
        few = self.equal_rows or (writes <= 3 and len(self.seqlen_offsets) <= 1)
        words = self.hashes_tiles and self.req_to_token_dtype == "int64"  # twice as many registers for the words
        return 2 if few and not words and self.vector_bytes == 16 and self.unroll <= 2 else 1

    @property
    def holds_page_tokens(self) -> bool:
        """Whether the tokens that begin pages are read from the registers that hold the tile (device/held_pages.cuh).

        This needs at most one page per lane, and pages of a multiple of four tokens.
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
        """The vectors that a copy copies, by the parameter with their number of elements (sums have one more)."""
        groups = {"batch_size": self.request_vectors, "rows": self.row_vectors}
        return {count: names for count, names in groups.items() if names}

    @property
    def warp_size(self) -> int:
        """Threads per warp: 32 on a GPU; 1 on the CPU target, where one thread runs a whole block."""
        return 32 if self.target == "cuda" else 1

    @property
    def tile_columns(self) -> int:
        """Columns of a tile: what one warp moves of a row. Each page is a read of its own, so few make a tile."""
        return self.warp_size * int(self.unroll) * (1 if self.pages_alone else 4)

    @property
    def tile_alignment(self) -> int:
        """With 16-byte stores, tiles begin at multiples of this many words in the destination."""
        return min(32, self.tile_columns)

    def destinations(self, field: str) -> int:
        """The number of different tensors that the backends have for a field."""
        return dict(self.distinct).get(field, self.num_backends)

    def dtype(self, field: str) -> Dtype:
        """The dtype of a field's tensors."""
        return dict(self.dtypes).get(field, self.field(field).dtype)

    def field(self, name: str) -> Field:
        """A field of the configuration: a standard one, or one that a user declared."""
        return self.scope.field(name)

    def member(self, field: str) -> str:
        """How the emitted text spells a field."""
        return user_name(field) if self.scope.declared(field) else field
