"""KernelConfig: what one kernel is specialized to. Immutable, validated, printable, hashable.

Nothing here spells C++: the emitted spellings appear only where the templates are rendered.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from ..errors import ConfigError
from .fields import FIELDS

Operation = Literal["precompute_and_broadcast", "copy"]
Mode = Literal["decode", "target_verify", "draft_extend"]
Extend = Literal["uniform", "variable"]
IntDtype = Literal["int32", "int64"]
Extent = Literal["live", "full"]
Remainder = Literal["last", "first"]
SchedulePer = Literal["request", "row"]
FlashMLAOrder = Literal["2026", "2025"]
Target = Literal["cuda", "cpu"]

# Part of every key: raise it when a key's ingredients change meaning.
SCHEMA_VERSION = 1

# A kernel's parameters may take 32,764 bytes on sm_70 and later (CUDA 12.1+), the parameter block is 64-bit words.
MAX_PARAM_WORDS = 32_764 // 8

# Beyond any speculation, and small enough that a length and what is added to it meet in 32 bits.
MAX_NEXT_N = 2**15
MAX_SEQLEN_OFFSET = 2**15
# More than any GPU has multiprocessors: a block keeps where every part begins.
MAX_SM_PARTS = 512

_LENGTHS_TOPK = ("nsa_cache_seqlens", "nsa_cu_seqlens_k")
_POOLED = ("pooled_cache_seqlens", "pooled_real_page_table")
# Facts that leave no trace at their neutral value, in the key neither: configurations without them keep their kernels.
_SILENT = (
    "next_n",
    "extend",
    "extend_seq_lens_dtype",
    "seqlen_offsets",
    "index_kpool",
    "page_fill",
    "checked",
    "schedule_remainder",
    "schedule_per",
    "schedule_atoms",
    "flashmla_order",
)


@dataclass(frozen=True, kw_only=True)
class KernelConfig:
    """The facts that one emitted kernel is specialized to.

    Batch size, lengths, widths, strides and pointers aren't among them: those are arguments, so one kernel serves
    every captured batch size. A fact that the chosen fields don't need is set to its neutral value on
    construction (``page_size`` to 1 without ``real_page_table``, and so on), so that two configurations that would
    emit the same CUDA are equal.

    Attributes:
        operation: "precompute_and_broadcast" computes the fields from the lengths and the token table and writes
            them to every backend; "copy" copies fields that were computed before to every backend.
        mode: the forward mode: "decode", "target_verify" or "draft_extend". In the last two a request has several rows;
            a copy knows "decode" and, for both of them, "target_verify".
        next_n: n, the rows that each request has in target_verify and in a uniform draft_extend, 1 or more.
        extend: in draft_extend, "uniform" for next_n rows a request, "variable" for lengths that each call gives.
        num_backends: N, the number of backends one launch refreshes, 1 or more.
        fields: names from FIELDS, in any order, without repeats.
        distinct: (field, count) for each field whose N destinations are fewer than N different tensors, because
            backends share them. Shared memory is written once.
        seq_lens_dtype, req_pool_indices_dtype, req_to_token_dtype, extend_seq_lens_dtype: "int32" or "int64".
        seqlen_offsets: what each backend adds to every length, one number a backend from 0 to 32768. Offsets that are
            all equal become one number, and none where that is 0.
        index_topk: T, the clamp of nsa_cache_seqlens, 0 or more.
        index_kpool: k, tokens a pool: only complete pools are clamped by index_topk, and pooled_* fields count pools.
        page_size: P, tokens a page of real_page_table, 1 or more.
        page_fill: -1 writes -1 to the columns of real_page_table that aren't live, up to the table's width; None leaves
            them alone. For a real_page_table that is the only table, of extent live.
        extent: "live" writes the columns below a request's length, "full" every column below max_len.
        vector_bytes: width of the table stores: 16 where all destinations of a row have one 16-byte phase, else 4.
        target: "cuda", or "cpu" for the same kernel built by the host compiler.
        threads: threads a block, a power of two from 32 to 1024 (1 on the CPU target).
        unroll: 16-byte accesses a thread has in flight, 1 to 8.
        blocks_per_sm: blocks launched for each multiprocessor, at most, 1 to 32; twice as many in copies, and without
            effect where all rows are equally long (extent full, page_fill) and have as many blocks as they need.
        checked: the kernel checks what it reads (rows of the pool, lengths) and records the first violation.
        schedule_remainder: which multiprocessors get one split more in paged_mqa_schedule_metadata, "last" (DeepGEMM
            from 2026-06 on) or "first" (before).
        schedule_per: what DeepGEMM's lengths are in target_verify and draft_extend: "request" for [bs, n], of which
            only the last column counts (cache_seqlens), "row" for [R, 1] (seqlens_expanded).
        schedule_atoms: query atoms of each request in that schedule; 0 for as many as next_n asks for, ceil(n / 2).
        flashmla_order: the order of the fields in a row of flashmla_metadata, "2026" or "2025".

    Raises:
        ConfigError: a fact is outside what is allowed.
    """

    operation: Operation = "precompute_and_broadcast"
    mode: Mode = "decode"
    num_backends: int = 1
    fields: tuple[str, ...] = (
        "cache_seqlens",
        "cu_seqlens_k",
        "page_indices",
        "nsa_cache_seqlens",
        "nsa_cu_seqlens_k",
        "real_page_table",
    )
    distinct: tuple[tuple[str, int], ...] = ()
    seq_lens_dtype: IntDtype = "int64"
    req_pool_indices_dtype: IntDtype = "int64"
    req_to_token_dtype: IntDtype = "int32"
    index_topk: int = 2048
    page_size: int = 64
    extent: Extent = "live"
    vector_bytes: Literal[4, 16] = 16
    target: Target = "cuda"
    threads: int = 256
    unroll: int = 2
    blocks_per_sm: int = 4
    next_n: int = 1
    extend: Extend = "uniform"
    extend_seq_lens_dtype: IntDtype = "int64"
    seqlen_offsets: tuple[int, ...] = ()
    index_kpool: int = 1
    page_fill: Literal[-1] | None = None
    checked: bool = False
    schedule_remainder: Remainder = "last"
    schedule_per: SchedulePer = "request"
    schedule_atoms: int = 0
    flashmla_order: FlashMLAOrder = "2026"

    def __post_init__(self) -> None:
        for name, choices in (
            ("operation", get_args(Operation)),
            ("mode", get_args(Mode)),
            ("seq_lens_dtype", get_args(IntDtype)),
            ("req_pool_indices_dtype", get_args(IntDtype)),
            ("req_to_token_dtype", get_args(IntDtype)),
            ("extent", get_args(Extent)),
            ("vector_bytes", (4, 16)),
            ("target", get_args(Target)),
            ("extend", get_args(Extend)),
            ("extend_seq_lens_dtype", get_args(IntDtype)),
            ("page_fill", (None, -1)),
            ("checked", (False, True)),
            ("schedule_remainder", get_args(Remainder)),
            ("schedule_per", get_args(SchedulePer)),
            ("flashmla_order", get_args(FlashMLAOrder)),
        ):
            _one_of(name, getattr(self, name), choices)
        for name, low, high in (
            ("num_backends", 1, None),
            ("index_topk", 0, 2**31 - 1),
            ("page_size", 1, 2**31 - 1),
            ("threads", 1, 1024),
            ("unroll", 1, 8),
            ("blocks_per_sm", 1, 32),
            ("next_n", 1, MAX_NEXT_N),
            ("index_kpool", 1, 2**31 - 1),
            ("schedule_atoms", 0, MAX_NEXT_N),
        ):
            _integer(name, getattr(self, name), low, high)
        if self.target == "cuda" and (self.threads < 32 or self.threads & (self.threads - 1)):
            raise ConfigError(
                f"threads is {self.threads}; on the cuda target it must be a power of two from 32 to 1024: "
                "a block is made of whole warps."
            )
        self._check_fields()
        self._check_combinations()
        self._check_offsets()
        self._neutralize()
        self._check_fill()
        if self.param_words > MAX_PARAM_WORDS:
            raise ConfigError(
                f"num_backends is {self.num_backends} with {len(self.fields)} fields, which needs "
                f"{8 * self.param_words} bytes of kernel parameters; CUDA allows {8 * MAX_PARAM_WORDS}. "
                "Refresh the backends in several plans."
            )

    def _check_fields(self) -> None:
        fields = self.fields
        if isinstance(fields, str) or not isinstance(fields, Iterable):
            raise ConfigError(f"fields is {fields!r}; it must be a tuple of names from {', '.join(FIELDS)}.")
        fields = tuple(fields)
        for name in fields:
            _one_of("fields", name, tuple(FIELDS))
        if len(set(fields)) != len(fields):
            raise ConfigError(f"fields is {fields!r}; name each field once.")
        if not fields:
            raise ConfigError(f"fields is empty; name at least one of {', '.join(FIELDS)}.")
        if self.operation == "precompute_and_broadcast" and self.page_size == 1:
            if "real_page_table" in fields and "page_indices" not in fields:
                raise ConfigError(
                    "fields has real_page_table without page_indices and page_size is 1; with pages of one token "
                    "the two are the same table: ask for page_indices instead."
                )
            fields = tuple(name for name in fields if name != "real_page_table")
        _set(self, "fields", tuple(name for name in FIELDS if name in fields))
        distinct = dict(self.distinct)
        for name, count in distinct.items():
            _one_of("distinct", name, self.fields)
            _integer(f"distinct[{name}]", count, 1, self.num_backends)
        _set(
            self,
            "distinct",
            tuple(
                (name, distinct[name])
                for name in self.fields
                if distinct.get(name, self.num_backends) < self.num_backends
            ),
        )

    def _check_combinations(self) -> None:
        derived = [name for name in self.fields if FIELDS[name].kind in ("schedule", "splits", "indices")]
        if self.operation == "copy" and derived:
            raise ConfigError(
                f"fields has {derived[0]} and operation is 'copy'; schedules and kv_indices are computed by each "
                "refresh, and not copied. Leave them out of the destinations."
            )
        tables = [name for name in self.fields if FIELDS[name].kind == "table"]
        if "kv_indices" in self.fields and tables:
            raise ConfigError(
                f"fields has kv_indices and {tables[0]}; a kernel writes either tables or indices. Bind them to two "
                "plans."
            )
        if "num_splits" in self.fields and "flashmla_metadata" not in self.fields:
            raise ConfigError(
                "fields has num_splits without flashmla_metadata, whose rows say how many parts there are; name both."
            )
        if "paged_mqa_schedule_metadata" in self.fields and self.mode == "draft_extend" and self.extend == "variable":
            if self.schedule_per == "row":
                raise ConfigError(
                    "fields has paged_mqa_schedule_metadata, schedule_per is 'row' and extend is 'variable'; a "
                    "schedule of rows is defined for next_n rows a request. Set extend='uniform'."
                )
            if self.schedule_atoms == 0:
                raise ConfigError(
                    "fields has paged_mqa_schedule_metadata, schedule_atoms is 0 and extend is 'variable'; the atoms "
                    "follow from next_n rows a request only. Give their number."
                )

    def _check_offsets(self) -> None:
        offsets = self.seqlen_offsets
        if isinstance(offsets, str) or not isinstance(offsets, Iterable):
            raise ConfigError(f"seqlen_offsets is {offsets!r}; it must be a tuple with one whole number a backend.")
        offsets = tuple(offsets)
        for index, offset in enumerate(offsets):
            _integer(f"seqlen_offsets[{index}]", offset, 0, MAX_SEQLEN_OFFSET)
        if len(offsets) not in (0, 1, self.num_backends):
            raise ConfigError(
                f"seqlen_offsets has {len(offsets)} numbers and num_backends is {self.num_backends}; give one a "
                "backend, one for all, or none."
            )
        if len(set(offsets)) == 1:
            offsets = offsets[:1] if offsets[0] else ()
        _set(self, "seqlen_offsets", offsets)

    def _check_fill(self) -> None:
        if self.page_fill is not None and (self.tables != ("real_page_table",) or self.extent != "live"):
            raise ConfigError(
                f"page_fill is {self.page_fill} with the tables {', '.join(self.tables) or 'none'} and extent "
                f"{self.extent!r}; it fills a real_page_table that is the only table, of extent 'live'. Leave it None."
            )

    def _neutralize(self) -> None:
        copies = self.operation == "copy"
        if copies and self.mode != "decode":
            # All that a copy sees of a mode is whether the rows are a number of their own.
            _set(self, "mode", "target_verify")
        if copies and self.extent == "live":
            # A copy has no lengths to go by: it copies what the precomputed buffers hold.
            _set(self, "extent", "full")
        if copies or not self.needs_lengths:
            _set(self, "seq_lens_dtype", "int64")
        if copies or not self.tables:
            _set(self, "req_pool_indices_dtype", "int64")
            _set(self, "req_to_token_dtype", "int32")
        if copies or not any(name in self.fields for name in _LENGTHS_TOPK):
            _set(self, "index_topk", 0)
        scheduled = "paged_mqa_schedule_metadata" in self.fields
        if not scheduled:
            _set(self, "schedule_remainder", "last")
        if not scheduled or self.mode == "decode":
            _set(self, "schedule_per", "request")
        if not scheduled or self.schedule_per == "row":
            _set(self, "schedule_atoms", 0)
        if "flashmla_metadata" not in self.fields:
            _set(self, "flashmla_order", "2026")
        if copies or not (scheduled or any(name in self.fields for name in (*_LENGTHS_TOPK, *_POOLED))):
            _set(self, "index_kpool", 1)
        if copies or not self.paged_tables:
            _set(self, "page_size", 1)
        if not self.tables:
            _set(self, "extent", "full")
            _set(self, "vector_bytes", 4)
            _set(self, "unroll", 1)
            _set(self, "blocks_per_sm", 1)
        elif not copies and "page_indices" not in self.fields:
            if "kv_indices" in self.fields:
                _set(self, "extent", "live")  # there are no columns that aren't live
            # Page numbers are picked one word in page_size: there is no 16-byte run to move.
            _set(self, "vector_bytes", 4)
        if not (self.mode == "draft_extend" and self.row_fields):
            _set(self, "extend", "uniform")
        if self.extend == "uniform":
            _set(self, "extend_seq_lens_dtype", "int64")
        if copies or self.mode == "decode" or self.extend == "variable":
            _set(self, "next_n", 1)
        if self.mode == "draft_extend" and not self.row_fields and not scheduled:
            _set(self, "next_n", 1)
        if scheduled and self.schedule_atoms == self._atoms_of_next_n:
            _set(self, "schedule_atoms", 0)
        if not self.needs_lengths:
            _set(self, "seqlen_offsets", ())
        elif len(self.seqlen_offsets) > 1:
            for name, count in self.distinct:
                if FIELDS[name].kind != "table" or count > 1:
                    raise ConfigError(
                        f"distinct[{name}] is {count} and seqlen_offsets is {self.seqlen_offsets}; backends whose "
                        "lengths differ share a table that all of them have, or nothing."
                    )
        if copies:
            _set(self, "page_fill", None)
            _set(self, "checked", False)
        if self.equal_rows:
            _set(self, "blocks_per_sm", 1)
        if self.target == "cpu":
            _set(self, "threads", 1)
            _set(self, "blocks_per_sm", 1)

    @property
    def equal_rows(self) -> bool:
        """Whether every row of every table is written equally far, whatever the lengths, by a kernel that gathers."""
        gathers = self.operation != "copy" and bool(self.tables) and "kv_indices" not in self.fields
        return gathers and self.extend != "variable" and (self.extent == "full" or self.page_fill is not None)

    @property
    def tables(self) -> tuple[str, ...]:
        """The fields that are gathered from req_to_token."""
        return tuple(name for name in self.fields if FIELDS[name].kind in ("table", "indices"))

    @property
    def vectors(self) -> tuple[str, ...]:
        """The fields that have one element a request, or one more (running sums)."""
        return tuple(name for name in self.fields if FIELDS[name].kind in ("lengths", "cumulative"))

    @property
    def schedules(self) -> tuple[str, ...]:
        """The schedules that blocks of their own compute, by the field that they are named after."""
        return tuple(name for name in self.fields if FIELDS[name].kind == "schedule")

    @property
    def atoms(self) -> int:
        """Query atoms of each item of DeepGEMM's schedule."""
        return self.schedule_atoms or self._atoms_of_next_n

    @property
    def _atoms_of_next_n(self) -> int:
        return 1 if self.schedule_per == "row" else (self.next_n + 1) // 2

    @property
    def row_fields(self) -> tuple[str, ...]:
        """The fields whose rows are not requests but the rows that a request has several of."""
        return tuple(name for name in self.fields if self.mode != "decode" and FIELDS[name].per == "row")

    @property
    def paged_tables(self) -> tuple[str, ...]:
        """The tables whose columns are pages, or pools of pages."""
        return tuple(name for name in self.tables if name not in ("page_indices", "kv_indices"))

    @property
    def needs_lengths(self) -> bool:
        """Whether the kernel reads seq_lens."""
        return self.operation != "copy" and (bool(self.vectors or self.schedules) or self.extent == "live")

    @property
    def warp_size(self) -> int:
        """Threads that exchange registers: 32 on a GPU; 1 where one thread runs a whole block."""
        return 32 if self.target == "cuda" else 1

    @property
    def tile_columns(self) -> int:
        """Columns of a tile, one warp's share of a row."""
        return self.warp_size * 4 * self.unroll

    @property
    def tile_alignment(self) -> int:
        """Words at whose multiples in the destination tiles begin, where stores are of 16 bytes."""
        return min(32, self.tile_columns)

    def destinations(self, field: str) -> int:
        """How many different tensors the backends have for a field."""
        return dict(self.distinct).get(field, self.num_backends)

    @property
    def param_words(self) -> int:
        """64-bit words in the kernel's parameter block (see layout.py)."""
        from .layout import param_words

        return len(param_words(self))

    def to_dict(self) -> dict[str, Any]:
        """The facts as plain JSON values, in declaration order."""
        facts = dataclasses.asdict(self)
        facts["fields"] = list(self.fields)
        facts["distinct"] = dict(self.distinct)
        facts["seqlen_offsets"] = list(self.seqlen_offsets)
        return facts

    def told_facts(self) -> dict[str, Any]:
        """to_dict without the facts that are neutral and leave no trace then."""
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return {
            name: value
            for name, value in self.to_dict().items()
            if name not in _SILENT or getattr(self, name) != defaults[name]
        }

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> KernelConfig:
        """The inverse of to_dict; unknown names are refused.

        Raises:
            ConfigError: a name isn't a fact, or a value is outside what is allowed.
        """
        known = [f.name for f in dataclasses.fields(cls)]
        for name in facts:
            _one_of("the fact's name", name, tuple(known))
        values = dict(facts)
        if "fields" in values and not isinstance(values["fields"], str):
            values["fields"] = tuple(values["fields"])
        if "distinct" in values:
            values["distinct"] = tuple(dict(values["distinct"]).items())
        if isinstance(values.get("seqlen_offsets"), list):
            values["seqlen_offsets"] = tuple(values["seqlen_offsets"])
        return cls(**values)

    @cached_property
    def key(self) -> str:
        """sha256 (hex) of the schema version and the facts. Symbols carry its first 16 digits.

        The key of a build, which also covers source, flags, architectures and compilers, is the store's.
        """
        text = json.dumps({"schema": SCHEMA_VERSION, **self.told_facts()}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def symbol(self) -> str:
        """The stem of every exported name: onelaunch_<operation>_<mode>_n<N>_<16 digits of the key>."""
        verb = "copy" if self.operation == "copy" else "broadcast"
        return f"onelaunch_{verb}_{self.mode}_n{self.num_backends}_{self.key[:16]}"

    def replace(self, **changes: Any) -> KernelConfig:
        """A copy with some facts changed, validated again."""
        return dataclasses.replace(self, **changes)

    def settings(self) -> str:
        """The facts that differ from the defaults as ``key=value,…``, the form that ``--set`` reads."""
        parts = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value == f.default:
                continue
            if f.name == "fields":
                value = "+".join(value)
            elif f.name == "distinct":
                value = "+".join(f"{name}:{count}" for name, count in value)
            elif f.name == "seqlen_offsets":
                value = "+".join(map(str, value))
            elif f.name == "checked":
                value = "true"
            parts.append(f"{f.name}={value}")
        return ",".join(parts)


def parse_settings(text: str, base: KernelConfig | None = None) -> KernelConfig:
    """Reads ``key=value,…`` over a base configuration (the defaults if None); fields are joined by ``+``.

    Raises:
        ConfigError: a part isn't ``key=value``, a key is unknown, or a value doesn't fit.
    """
    base = base or KernelConfig()
    facts: dict[str, Any] = {}
    defaults = {f.name: f.default for f in dataclasses.fields(KernelConfig)}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ConfigError(f"the setting {part!r} is not of the form key=value, for example num_backends=3.")
        _one_of("the setting's key", name, tuple(defaults))
        if name == "fields":
            facts[name] = tuple(value.split("+"))
        elif name == "distinct":
            pairs = [pair.partition(":") for pair in value.split("+")]
            facts[name] = tuple((field, _parse_int(name, count)) for field, _, count in pairs)
        elif name == "seqlen_offsets":
            facts[name] = tuple(_parse_int(name, number) for number in value.split("+"))
        elif name == "checked":
            _one_of(name, value, ("true", "false"))
            facts[name] = value == "true"
        elif isinstance(defaults[name], int) or name == "page_fill":
            facts[name] = _parse_int(name, value)
        else:
            facts[name] = value
    return base.replace(**facts)


def _parse_int(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} is {text!r}; it must be a whole number.") from None


def _set(config: KernelConfig, name: str, value: object) -> None:
    object.__setattr__(config, name, value)


def _one_of(name: str, value: object, choices: tuple[object, ...]) -> None:
    if not any(value == choice and type(value) is type(choice) for choice in choices):
        hint = ""
        if isinstance(value, str):
            near = difflib.get_close_matches(value, [c for c in choices if isinstance(c, str)], n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(map(repr, choices))}.{hint}")


def _integer(name: str, value: object, low: int, high: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number.")
    if value < low or (high is not None and value > high):
        allowed = f"{low} or more" if high is None else f"{low} to {high}"
        raise ConfigError(f"{name} is {value}; allowed: {allowed}.")


_WITH_EXPANDED = (*KernelConfig().fields, "seqlens_expanded")

PRESETS: dict[str, KernelConfig] = {
    "nsa-decode-1": KernelConfig(),
    "nsa-decode-2": KernelConfig(num_backends=2),
    "nsa-decode-3": KernelConfig(num_backends=3),
    "nsa-decode-7": KernelConfig(num_backends=7),
    "nsa-decode-64": KernelConfig(num_backends=64),
    "nsa-decode-3-full": KernelConfig(num_backends=3, extent="full"),
    "nsa-decode-3-page1": KernelConfig(num_backends=3, page_size=1),
    "nsa-decode-3-page16": KernelConfig(num_backends=3, page_size=16),
    "nsa-decode-3-unaligned": KernelConfig(num_backends=3, vector_bytes=4),
    "nsa-decode-3-int32": KernelConfig(num_backends=3, seq_lens_dtype="int32", req_pool_indices_dtype="int32"),
    "nsa-decode-3-int64": KernelConfig(num_backends=3, req_to_token_dtype="int64"),
    "nsa-decode-3-pages-only": KernelConfig(
        num_backends=3,
        fields=("cache_seqlens", "cu_seqlens_k", "nsa_cache_seqlens", "nsa_cu_seqlens_k", "real_page_table"),
    ),
    "nsa-decode-3-lengths-only": KernelConfig(
        num_backends=3, fields=("cache_seqlens", "cu_seqlens_k", "nsa_cache_seqlens", "nsa_cu_seqlens_k")
    ),
    "nsa-precompute": KernelConfig(extent="full"),
    "nsa-copy-1": KernelConfig(operation="copy"),
    "nsa-copy-3": KernelConfig(operation="copy", num_backends=3),
    "nsa-copy-3-rows": KernelConfig(operation="copy", num_backends=3, mode="target_verify", fields=_WITH_EXPANDED),
    "nsa-target-verify-3": KernelConfig(num_backends=3, mode="target_verify", next_n=4, fields=_WITH_EXPANDED),
    "nsa-draft-extend-3": KernelConfig(num_backends=3, mode="draft_extend", next_n=4, fields=_WITH_EXPANDED),
    "nsa-draft-extend-3-variable": KernelConfig(
        num_backends=3, mode="draft_extend", extend="variable", fields=_WITH_EXPANDED
    ),
    "nsa-decode-3-kpool": KernelConfig(
        num_backends=3, index_kpool=4, fields=(*KernelConfig().fields, "pooled_cache_seqlens", "pooled_real_page_table")
    ),
    "nsa-decode-3-checked": KernelConfig(num_backends=3, checked=True),
    "fa3-decode-3": KernelConfig(
        num_backends=3, fields=("cache_seqlens", "cu_seqlens_k", "real_page_table"), seqlen_offsets=(1, 2, 3)
    ),
    "trtllm-mha-decode-3": KernelConfig(
        num_backends=3,
        fields=("cache_seqlens", "cu_seqlens_k", "real_page_table"),
        seqlen_offsets=(1, 2, 3),
        page_size=32,
    ),
    "flashmla-decode-3": KernelConfig(num_backends=3, fields=("cache_seqlens", "real_page_table"), page_fill=-1),
    "nsa-decode-3-schedule": KernelConfig(
        num_backends=3, fields=(*KernelConfig().fields, "paged_mqa_schedule_metadata")
    ),
    "nsa-target-verify-3-schedule": KernelConfig(
        num_backends=3,
        mode="target_verify",
        next_n=4,
        schedule_per="row",
        fields=(*_WITH_EXPANDED, "paged_mqa_schedule_metadata"),
    ),
    "flashmla-dense-decode-3": KernelConfig(
        num_backends=3,
        fields=("cache_seqlens", "real_page_table", "flashmla_metadata", "num_splits"),
        page_fill=-1,
    ),
    "vllm-decode-3": KernelConfig(
        num_backends=3,
        fields=("cache_seqlens", "page_indices"),
        seq_lens_dtype="int32",
        seqlen_offsets=(1, 2, 3),
        extent="full",
    ),
    "flashinfer-decode-3": KernelConfig(num_backends=3, fields=("kv_indptr", "kv_indices"), seqlen_offsets=(1, 2, 3)),
}
"""The configurations that ship: their CUDA is in generated/, and each is compiled and run by the tests."""


def preset(name: str) -> KernelConfig:
    """A shipped configuration by name.

    Raises:
        ConfigError: there is no preset of that name.
    """
    _one_of("the preset's name", name, tuple(PRESETS))
    return PRESETS[name]
