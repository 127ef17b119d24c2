"""The parameter block: the 64-bit words that a kernel takes, in order.

The struct in the emitted CUDA and the integers that a plan packs both follow this list, so they can't disagree.
Every word is a pointer or a signed integer of 64 bits, so the block is a struct as well as an array of int64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from .cpp import user_name

if TYPE_CHECKING:
    from .config import KernelConfig

# A kernel's parameters may take 32,764 bytes on sm_70 and later (CUDA 12.1+). The block is 64-bit words, and a Split
# (device/live.cuh, device/equal.cuh) takes 24 bytes in front of it.
MAX_PARAM_WORDS = (32_764 - 24) // 8


Type = Literal[
    "int64",
    "lengths",
    "extends",
    "pool",
    "token",
    "from_int32",
    "from_int64",
    "to_int32",
    "to_int64",
    "to_bool",
    "table",
    "strided_int32",
    "strided_int64",
    "strided_bool",
    "source_int32",
    "source_int64",
    "map_int32",
    "map_int64",
    "violation",
    "hashes",
]
_WORDS = {"table": 2, "strided": 3, "source": 4, "map": 2}


# Members that the launch fills, whatever a plan has there, and what they hold.
SET_BY_LAUNCH = {
    "computed_blocks": "for declared tables and packed fields",
    "computed_reciprocal": "(2^32 - 1) / batch_size",
}


@dataclass(frozen=True)
class Member:
    """One member of the parameter struct.

    Attributes:
        name: its name, in the struct and in a plan.
        type: "int64"; "lengths", "extends", "pool", "token" (pointers to the inputs) and "from_<dtype>" (to a declared
            one); "to_<dtype>" (pointers to a field); "table" (a pointer to a field and its row stride in elements);
            "strided_<dtype>" (a pointer to a field, and elements from request to request and from row to row);
            "source_<dtype>" (a pointer, rows, elements from row to row, columns); "map_<dtype>" (a pointer, elements);
            "violation" (pointer to the record of a checked kernel or an audit); "hashes" (pointer to those of a
            verified kernel's tiles).
        count: array length, or None for a single member.
        per_call: whether each call sets it; the others are set once, when a plan is bound.
        comment: what it holds.
    """

    name: str
    type: Type
    count: int | None
    per_call: bool
    comment: str

    @property
    def words(self) -> int:
        """64-bit words the member takes."""
        return (self.count or 1) * _WORDS.get(self.type.split("_")[0], 1)


def members(config: KernelConfig) -> list[Member]:
    """The parameter struct's members, per-call ones first."""
    copies = config.copies
    out: list[Member] = []

    def add(name: str, type: str, comment: str, *, count: int | None = None, per_call: bool = False) -> None:
        out.append(Member(name, type, count, per_call, comment))  # type: ignore[arg-type]

    if config.needs_lengths:
        add("seq_lens", "lengths", "[batch_size]", per_call=True)
        add("seq_lens_stride", "int64", "elements", per_call=True)
    if config.extend == "variable":
        add("extend_seq_lens", "extends", "[batch_size]", per_call=True)
        add("extend_seq_lens_stride", "int64", "elements", per_call=True)
    if config.reads_rows:
        add("req_pool_indices", "pool", "[batch_size], rows of req_to_token", per_call=True)
        add("req_pool_indices_stride", "int64", "elements", per_call=True)
    for name, dtype in config.inputs:
        add(user_name(name), f"from_{dtype}", "[batch_size], declared", per_call=True)
        add(f"{user_name(name)}_stride", "int64", "elements", per_call=True)
    add("batch_size", "int64", "requests", per_call=True)
    if config.padding_len is not None:
        add("requests", "int64", "the batch's own; those from here up to batch_size are padding", per_call=True)
    elif config.pads:
        add("captured_size", "int64", "requests, padding included", per_call=True)
    if copies and config.row_fields:
        add("rows", "int64", "rows of all requests", per_call=True)
    for name in column_limits(config):
        add(name, "int64", "columns from here on are not written", per_call=True)
    # What a thread needs before it can read its first token comes first, and lies in few cache lines.
    if config.computed and not copies:
        for name, comment in SET_BY_LAUNCH.items():
            add(name, "int64", f"{comment}; set by the launch")
    if config.reads_tokens:
        add("req_to_token", "token", "[pool rows, req_to_token_width]")
        add("req_to_token_stride", "int64", "elements from row to row")
        add("req_to_token_width", "int64", "elements of a row that may be read")

    if config.hashes_tiles:
        add("tile_hashes", "hashes", "[rows, tile_hashes_stride], 0 where nothing is known")
        add("tile_hashes_stride", "int64", "tiles of a row")

    declared_tables = [name for name in config.computed if config.field(name).kind == "table"]

    def add_fields(names: Sequence[str]) -> None:
        for name in names:
            field = config.field(name)
            way = "strided" if name in config.strided or name in declared_tables else "to"
            kind = "table" if field.kind == "table" and name not in declared_tables else f"{way}_{config.dtype(name)}"
            if copies:
                add(f"from_{name}", kind, "precomputed")
            add(config.member(name), kind, field.shape_in(config.mode), count=config.destinations(name))

    add_fields([name for name in config.tables if config.field(name).kind == "table"])
    add("device", "int64", "ordinal")
    if config.tables or config.computed:
        add("sm_count", "int64", "SMs of the device")
    if config.reports:
        add("violation", "violation", "the first violation, or none")
    if config.checked and config.extend == "variable":
        add("row_capacity", "int64", "rows that fit the destinations")
    if config.reads_tokens and (config.checked or config.look_ups):
        add("pool_rows", "int64", "rows of req_to_token")
    for name, dtype in config.sources:
        add(user_name(name), f"source_{dtype}", "[rows, columns], declared")
    for name, (dtype, _) in config.maps:
        add(user_name(name), f"map_{dtype}", "[elements], declared")
    if config.page_fill is not None:
        add("filled_width", "int64", "columns")
    if "paged_mqa_schedule_metadata" in config.fields:
        add("num_sms", "int64", "SMs that DeepGEMM's schedule is for")
    if "flashmla_metadata" in config.fields:
        add("num_sm_parts", "int64", "parts of FlashMLA's schedule")
    if config.packed is not None:
        add("packed_capacity", "int64", "elements")
    for name in config.computed:
        bound = "width" if name in declared_tables else "capacity"
        add(f"{config.member(name)}_{bound}", "int64", "columns" if name in declared_tables else "elements")
    add_fields([name for name in config.fields if config.field(name).kind != "table" or name in declared_tables])
    return out


def column_limits(config: KernelConfig) -> list[str]:
    """The per-call members that bound the columns: one for all tables, or one per table in a copy."""
    if config.copies:
        return [f"{name}_columns" for name in config.tables]
    return ["columns"] if config.tables else []


def param_words(config: KernelConfig) -> list[str]:
    """The names of the 64-bit words, in order, one per word."""
    return [m.name for m in members(config) for _ in range(m.words)]


def call_words(config: KernelConfig) -> list[str]:
    """The names of the words that each call sets; they are the first of the block."""
    return [m.name for m in members(config) if m.per_call]
