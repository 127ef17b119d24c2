"""The parts of a configuration: settings that belong together, each declared in one line.

The declaration of a setting gives its default, the allowed values, and which configurations use it. A setting that a
configuration doesn't use is None in its part, and a part without any setting in use is None itself. So two
configurations that emit the same CUDA are equal, and a setting that is added later changes no existing key.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

from .declarations import Declarations
from .expressions import Dtype
from .fields import Declaration
from .values import AnyNames, Mapped, MaybeWhole, Offsets, OneOf, Pairs, Value, Whole

if TYPE_CHECKING:
    from .config import KernelConfig

Extend = Literal["uniform", "variable"]
IntDtype = Literal["int32", "int64"]
Extent = Literal["live", "full"]
Writes = Literal["all", "verified", "audit"]
Remainder = Literal["last", "first"]
SchedulePer = Literal["request", "row"]
FlashMLAOrder = Literal["2026", "2025"]

# Far more than any engine speculates, and so small that a length plus an offset still fits into 32 bits.
MAX_NEXT_N = 2**15
MAX_SEQLEN_OFFSET = 2**15
# More parts of FlashMLA's schedule than any GPU has SMs. One block holds an entry for each in shared memory.
MAX_SM_PARTS = 512
MAX_SPLIT_COST = 2**20
# The limit of multiprocessors, heads and splits. Below it 32-bit counts can't overflow.
MAX_CORES = 2**16

_INT_DTYPE = OneOf("int32", "int64")
_DTYPE = OneOf("int32", "int64", "bool")
_SAME_AS_DEFAULT: Any = object()


def setting(
    default: Any,
    value: Value,
    used: Callable[[KernelConfig], bool] = lambda config: True,
    unused: Any = _SAME_AS_DEFAULT,
) -> Any:
    """Declares a setting.

    Args:
        default: its value if the user gives none. Settings at their default are omitted from key and banner, so that
            adding a setting doesn't invalidate existing builds.
        value: the allowed values.
        used: whether a configuration's kernel depends on it.
        unused: the value that a configuration shows if it doesn't use the setting; by default ``default``.
    """
    unused = default if unused is _SAME_AS_DEFAULT else unused
    return dataclasses.field(default=default, metadata={"value": value, "used": used, "unused": unused})


@dataclass(frozen=True, kw_only=True)
class Part:
    """Settings that belong together. The constructor checks them.

    Raises:
        ConfigError: a setting's value isn't allowed.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = field.metadata["value"].check(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    def in_use(self, config: KernelConfig) -> Self | None:
        """The part with unused settings set to None; None if the configuration uses none of them."""
        unused = [field.name for field in dataclasses.fields(self) if not field.metadata["used"](config)]
        if len(unused) == len(dataclasses.fields(self)):
            return None
        part = copy.copy(self)
        for name in unused:
            object.__setattr__(part, name, None)
        return part


@dataclass(frozen=True, kw_only=True)
class Declared(Part):
    """What a user declares, and the dtypes and strides of fields that differ from their declarations.

    Of what is declared, a configuration keeps what its fields need.

    Attributes:
        declare: fields and terms by name: onelaunch.vector(...) and so on, or tables with kind, formula and the other
            arguments of those functions.
        inputs: by name the dtype of an input of each run, one element per request, "int32" or "int64".
        constants: by name a number that formulas name.
        sources: by name the dtype of a table that formulas look up.
        maps: by name (dtype, value outside of it) of a one-dimensional table that formulas look up.
        dtypes: (field, dtype) for each field whose destinations have another dtype than it is declared with.
        strided: the vectors whose destinations have strides of their own.
    """

    declare: tuple[tuple[str, Declaration], ...] | None = setting((), Declarations(), used=lambda c: bool(c.declare))
    inputs: tuple[tuple[str, IntDtype], ...] | None = setting(
        (), Pairs(_INT_DTYPE, "a dtype"), used=lambda c: bool(c.inputs)
    )
    constants: tuple[tuple[str, int], ...] | None = setting(
        (), Pairs(Whole(-(2**63), 2**63 - 1), "a whole number"), used=lambda c: bool(c.constants)
    )
    sources: tuple[tuple[str, IntDtype], ...] | None = setting(
        (), Pairs(_INT_DTYPE, "a dtype"), used=lambda c: bool(c.sources)
    )
    maps: tuple[tuple[str, tuple[IntDtype, int]], ...] | None = setting(
        (), Pairs(Mapped(_INT_DTYPE), "(dtype, number)"), used=lambda c: bool(c.maps)
    )
    dtypes: tuple[tuple[str, Dtype], ...] | None = setting((), Pairs(_DTYPE, "a dtype"), used=lambda c: bool(c.dtypes))
    strided: tuple[str, ...] | None = setting((), AnyNames(), used=lambda c: bool(c.strided))


@dataclass(frozen=True, kw_only=True)
class Lengths(Part):
    """The lengths that a kernel reads.

    Attributes:
        seq_lens_dtype: "int32" or "int64".
        seqlen_offsets: the number that each backend adds to every length, one per backend, 0 to 32768. Equal offsets
            become a single one, and () if that is 0.
        padding_len: the length of the padding requests that may follow a call's own requests, up to the captured size;
            their row of req_to_token is 0, and so are declared inputs. None if there are none.
    """

    seq_lens_dtype: IntDtype | None = setting("int64", _INT_DTYPE, used=lambda c: c.needs_lengths)
    seqlen_offsets: tuple[int, ...] | None = setting((), Offsets(MAX_SEQLEN_OFFSET), used=lambda c: c.needs_lengths)
    padding_len: int | None = setting(
        None, MaybeWhole(-MAX_SEQLEN_OFFSET, 2**31 - 1), used=lambda c: not c.copies and c.padding_len is not None
    )


@dataclass(frozen=True, kw_only=True)
class Rows(Part):
    """The rows that a request has in target_verify and draft_extend.

    Attributes:
        extend: in draft_extend, "uniform" for next_n rows per request, "variable" for lengths that each call gives.
        next_n: n, the rows of each request in target_verify and in a uniform draft_extend, 1 to 32768.
        extend_seq_lens_dtype: of variable extend lengths, "int32" or "int64".
    """

    extend: Extend | None = setting(
        "uniform",
        OneOf("uniform", "variable"),
        used=lambda c: not c.copies and c.mode == "draft_extend" and bool(c.row_fields or c.names_rows),
    )
    next_n: int | None = setting(1, Whole(1, MAX_NEXT_N), used=lambda c: c.counts_rows)
    extend_seq_lens_dtype: IntDtype | None = setting("int64", _INT_DTYPE, used=lambda c: c.variable_rows)


@dataclass(frozen=True, kw_only=True)
class Gather(Part):
    """How req_to_token is read.

    Attributes:
        extent: "live" writes the live columns, the first seq_len columns of a row; "full" every column below max_len.
            kv_indices has live columns only.
        req_pool_indices_dtype, req_to_token_dtype: "int32" or "int64".
        writes: "all" writes what a refresh makes; "verified" writes where that differs from what was written last, and
            little else; "audit" writes nothing, and reports the first element that isn't what a refresh makes.
    """

    extent: Extent | None = setting("live", OneOf("live", "full"), used=lambda c: c.gathers and c.packed is None)
    req_pool_indices_dtype: IntDtype | None = setting("int64", _INT_DTYPE, used=lambda c: c.reads_rows)
    req_to_token_dtype: IntDtype | None = setting("int32", _INT_DTYPE, used=lambda c: c.reads_tokens)
    writes: Writes | None = setting("all", OneOf("all", "verified", "audit"), used=lambda c: c.gathers or c.audits)


@dataclass(frozen=True, kw_only=True)
class Pages(Part):
    """Tables whose columns are pages.

    Attributes:
        page_size: P, tokens per page of real_page_table, 1 or more.
        page_fill: -1 writes -1 to the columns of real_page_table that aren't live, up to the table's width; None leaves
            them alone. Requires extent "live" and real_page_table as the only table.
    """

    page_size: int | None = setting(64, Whole(1, 2**31 - 1), used=lambda c: c.uses("page_size"), unused=1)
    page_fill: Literal[-1] | None = setting(None, OneOf(None, -1), used=lambda c: c.uses("page_size"))


@dataclass(frozen=True, kw_only=True)
class Sparse(Part):
    """The selection of sparse attention.

    Attributes:
        index_topk: T, the clamp of nsa_cache_seqlens, 0 or more.
        index_kpool: k, tokens per pool: index_topk clamps complete pools only, and pooled_* fields count pools.
    """

    index_topk: int | None = setting(2048, Whole(0, 2**31 - 1), used=lambda c: c.uses("index_topk"))
    index_kpool: int | None = setting(1, Whole(1, 2**31 - 1), used=lambda c: c.uses("index_kpool"))


@dataclass(frozen=True, kw_only=True)
class MqaSchedule(Part):
    """DeepGEMM's schedule, paged_mqa_schedule_metadata.

    Attributes:
        schedule_remainder: which SMs get one split more, "last" (DeepGEMM from 2026-06 on) or "first"
            (before).
        schedule_per: what its lengths are in target_verify and draft_extend: "request" for [bs, n], of which only the
            last column counts (cache_seqlens), "row" for [R, 1] (seqlens_expanded).
        schedule_atoms: query atoms of each request; 0 for as many as follow from next_n, ceil(n / 2).
        schedule_split_cost: units of work of a split of 256 tokens, which all of a request's tokens go through together
            (sm_100); 0 for a unit for each of the request's atoms (sm_90).
    """

    schedule_remainder: Remainder | None = setting("last", OneOf("last", "first"), used=lambda c: c.has_mqa_schedule)
    schedule_per: SchedulePer | None = setting(
        "request", OneOf("request", "row"), used=lambda c: c.has_mqa_schedule and c.mode != "decode"
    )
    schedule_atoms: int | None = setting(
        0,
        Whole(0, MAX_NEXT_N),
        used=lambda c: c.has_mqa_schedule and not c.schedules_rows and c.schedule_atoms not in (0, c.atoms_of_next_n),
    )
    schedule_split_cost: int | None = setting(0, Whole(0, MAX_SPLIT_COST), used=lambda c: c.has_mqa_schedule)


@dataclass(frozen=True, kw_only=True)
class FlashMLASchedule(Part):
    """FlashMLA's schedule, flashmla_metadata.

    Attributes:
        flashmla_order: the order of the words in a row, FlashMLA's of "2026" or "2025".
    """

    flashmla_order: FlashMLAOrder | None = setting(
        "2026", OneOf("2026", "2025"), used=lambda c: "flashmla_metadata" in c.fields
    )


@dataclass(frozen=True, kw_only=True)
class KVSplits(Part):
    """SGLang's split counts of Triton's attention, num_kv_splits, by the names of the backend's attributes.

    Attributes:
        num_head, num_kv_head: heads of queries, and of keys and values, 1 to 65,536.
        max_kv_splits: the most splits of a request, 1 to 65,536.
        device_core_count: multiprocessors, 1 to 65,536.
    """

    num_head: int | None = setting(32, Whole(1, MAX_CORES), used=lambda c: "num_kv_splits" in c.fields)
    num_kv_head: int | None = setting(8, Whole(1, MAX_CORES), used=lambda c: "num_kv_splits" in c.fields)
    max_kv_splits: int | None = setting(8, Whole(1, MAX_CORES), used=lambda c: "num_kv_splits" in c.fields)
    device_core_count: int | None = setting(132, Whole(1, MAX_CORES), used=lambda c: "num_kv_splits" in c.fields)


@dataclass(frozen=True, kw_only=True)
class Launch(Part):
    """The shape of a launch.

    Attributes:
        threads: threads per block, a power of two from 32 to 1024 (1 on the CPU target).
        unroll: 16-byte accesses that a thread has in flight, 1 to 8.
        blocks_per_sm: limit of the blocks that write tables, per SM, 1 to 32; copies have twice this limit, pages
            alone and kv_indices of several backends half of it. Unused if all rows are equally long (extent "full",
            page_fill): then every tile has its warp.
        vector_bytes: width of the table stores: 16 if a row's address modulo 16 is the same in all destinations, else
            4; an audit, which stores nothing, has 4.
    """

    threads: int | None = setting(256, Whole(1, 1024), used=lambda c: c.target == "cuda", unused=1)
    unroll: int | None = setting(2, Whole(1, 8), used=lambda c: bool(c.tables), unused=1)
    blocks_per_sm: int | None = setting(
        4, Whole(1, 32), used=lambda c: bool(c.tables) and not c.equal_rows and c.target == "cuda", unused=1
    )
    # Only page_indices and copies move 16 consecutive bytes; a table of pages takes one word of every page_size.
    vector_bytes: Literal[4, 16] | None = setting(
        16,
        OneOf(4, 16),
        used=lambda c: bool(c.tables) and not c.audits and (c.copies or c.token_table is not None),
        unused=4,
    )


# The parts by their name in a configuration, in the order in which settings are listed.
PARTS: dict[str, type[Part]] = {
    "declared": Declared,
    "lengths": Lengths,
    "rows": Rows,
    "gather": Gather,
    "pages": Pages,
    "sparse": Sparse,
    "mqa_schedule": MqaSchedule,
    "flashmla_schedule": FlashMLASchedule,
    "kv_splits": KVSplits,
    "launch": Launch,
}
