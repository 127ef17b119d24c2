"""KernelConfig: the settings that one kernel is specialized to. Immutable, validated, printable, hashable.

It contains no C++: emitted names and types appear only where the templates are rendered.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ..errors import ConfigError
from . import layout
from .declarations import plain
from .fields import FIELDS
from .implied import Implied
from .parts import (
    PARTS,
    Declared,
    FlashMLASchedule,
    Gather,
    KVSplits,
    Launch,
    Lengths,
    MqaSchedule,
    Pages,
    Rows,
    Sparse,
    setting,
)
from .scope import Scope
from .values import Names, OneOf, Pairs, Whole, check_one_of, check_setting, check_whole

Operation = Literal["precompute_and_broadcast", "copy"]
Target = Literal["cuda", "cpu"]

# Part of every key. Raise it when a key is computed differently, or when a setting's default or meaning changes.
SCHEMA_VERSION = 2

_DEFAULT_FIELDS = (
    "cache_seqlens",
    "cu_seqlens_k",
    "page_indices",
    "nsa_cache_seqlens",
    "nsa_cu_seqlens_k",
    "real_page_table",
)


@dataclass(frozen=True, kw_only=True, init=False, repr=False)
class KernelConfig(Implied):
    """The settings that one emitted kernel is specialized to.

    Batch size, lengths, widths, strides and pointers aren't settings but arguments, so one kernel serves every captured
    batch size.

    Settings are given and read by name, whichever part they belong to: ``KernelConfig(page_size=16).page_size``.
    Settings that the chosen fields and mode don't use are absent: without a table of pages, ``config.pages`` is None
    and ``config.page_size`` is the value that the setting declares for this case. So two configurations that emit the
    same CUDA are equal.

    Attributes:
        operation: "precompute_and_broadcast" computes the fields from the lengths and the token table and writes
            them to every backend; "copy" copies precomputed fields to every backend.
        mode: the forward mode: "decode", "target_verify" or "draft_extend". In the last two a request has several rows.
            In a copy they are the same, and "draft_extend" becomes "target_verify".
        num_backends: N, the number of backends that one launch refreshes, 1 or more.
        fields: names from FIELDS, in any order, without repeats.
        distinct: (field, count) for each field whose backends share tensors: it has count < N different tensors. A
            shared tensor is written once.
        target: "cuda", or "cpu" for the same kernel built by the host compiler.
        checked: the kernel checks what it reads (rows of the pool, lengths) and records the first violation.
        declared, lengths, rows, gather, pages, sparse, mqa_schedule, flashmla_schedule, kv_splits, launch: the other
            settings, by part (see parts.py); None where a configuration uses none of a part's settings.

    Raises:
        ConfigError: a setting is unknown, or its value isn't allowed.
    """

    operation: Operation = setting("precompute_and_broadcast", OneOf("precompute_and_broadcast", "copy"))
    mode: Literal["decode", "target_verify", "draft_extend"] = setting(
        "decode", OneOf("decode", "target_verify", "draft_extend")
    )
    num_backends: int = setting(1, Whole(1, None))
    fields: tuple[str, ...] = setting(_DEFAULT_FIELDS, Names(FIELDS))
    distinct: tuple[tuple[str, int], ...] = setting((), Pairs(Whole(-(2**31), None), "a whole number"))
    target: Target = setting("cuda", OneOf("cuda", "cpu"))
    checked: bool = setting(False, OneOf(False, True), used=lambda c: not c.copies)
    declared: Declared | None
    lengths: Lengths | None
    rows: Rows | None
    gather: Gather | None
    pages: Pages | None
    sparse: Sparse | None
    mqa_schedule: MqaSchedule | None
    flashmla_schedule: FlashMLASchedule | None
    kv_splits: KVSplits | None
    launch: Launch | None

    def __init__(self, **settings: Any) -> None:
        for name in settings:
            check_setting(name, SETTINGS)
        for part, kind in PARTS.items():
            _set(self, part, kind(**{n: settings[n] for n, of in _PART_OF.items() if of == part and n in settings}))
        given = Scope(self.declare, self.inputs, self.constants, self.sources, self.maps)
        given.check()
        allowed = {"fields": Names((*FIELDS, *sorted(dict(given.declare))))}
        for name, field in SETTINGS.items():
            if name not in _PART_OF:
                value = allowed.get(name, field.metadata["value"])
                _set(self, name, value.check(name, settings.get(name, field.default)))
        _set(self, "scope", given.canonical().of(self.fields, "target_verify"))
        self._check_fields()
        self._check_combinations()
        self._check_offsets()
        if self.copies and self.mode != "decode":
            # To a copy a mode only says whether there is a separate number of rows.
            _set(self, "mode", "target_verify")
        self._check_fill()
        for part in PARTS:
            _set(self, part, getattr(self, part).in_use(self))
        if not SETTINGS["checked"].metadata["used"](self):
            _set(self, "checked", False)
        self._check_parameters()

    def __getattr__(self, name: str) -> Any:
        """A setting of one of the parts; if the configuration doesn't use it, the declared ``unused`` value."""
        if name not in _PART_OF:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}.")
        part = self.__dict__[_PART_OF[name]]
        value = None if part is None else getattr(part, name)
        return SETTINGS[name].metadata["unused"] if value is None else value

    def __repr__(self) -> str:
        return f"KernelConfig({', '.join(f'{name}={value!r}' for name, value in self._chosen().items())})"

    def _check_fields(self) -> None:
        fields = self.fields
        if not self.copies and self.page_size == 1:
            if "real_page_table" in fields and "page_indices" not in fields:
                raise ConfigError(
                    "fields has real_page_table without page_indices and page_size is 1; with pages of one token "
                    "the two are the same table. Request page_indices instead."
                )
            _set(self, "fields", tuple(name for name in fields if name != "real_page_table"))
        distinct = dict(self.distinct)
        for name, count in distinct.items():
            check_one_of("distinct", name, self.fields)
            check_whole(f"distinct[{name}]", count, 1, self.num_backends)
        shared = [(name, distinct[name]) for name in self.fields if name in distinct]
        _set(self, "distinct", tuple((name, count) for name, count in shared if count < self.num_backends))
        strided = tuple(name for name in self.fields if name in self.strided)
        for name in self.strided:
            check_one_of("strided", name, tuple(n for n, _ in self.scope.declare if self.field(n).kind == "vector"))
        dtypes = dict(self.dtypes)
        for name, dtype in dtypes.items():
            check_one_of("dtypes", name, self.fields)
            check_one_of(f"dtypes[{name}]", dtype, self.field(name).dtypes)
        chosen = [(name, dtypes[name]) for name in self.fields if name in dtypes]
        chosen = [(name, dtype) for name, dtype in chosen if dtype != self.field(name).dtype]
        scope = {part.name: getattr(self.scope, part.name) for part in dataclasses.fields(self.scope)}
        _set(self, "declared", Declared(**scope, dtypes=tuple(chosen), strided=strided))

    def _check_combinations(self) -> None:
        if self.target == "cuda" and (self.threads < 32 or self.threads & (self.threads - 1)):
            raise ConfigError(
                f"threads is {self.threads}; on the cuda target it must be a power of two from 32 to 1024, "
                "because a block consists of whole warps."
            )
        derived = [name for name in self.fields if self.field(name).kind in ("schedule", "splits", "counts", "packed")]
        if self.copies and (self.declare or self.strided):
            raise ConfigError(
                f"fields has {self.declare[0][0]}, which is declared, and operation is 'copy'; only standard fields "
                "are copied. Compute it in each refresh: bind it to a plan."
            )
        if self.copies and derived:
            raise ConfigError(
                f"fields has {derived[0]} and operation is 'copy'; a copy can't write schedules, counts or "
                "kv_indices, which each refresh computes. Leave them out of the destinations."
            )
        if self.variable_rows and (padded := [n for n in self.row_vectors if self.field(n).pad is not None]):
            raise ConfigError(
                f"fields has {padded[0]}, which has a pad and one element per row, and extend is 'variable'; how many "
                "rows a captured graph has isn't known then. Set extend='uniform', or declare it without a pad."
            )
        if self.variable_rows and (rows := [n for n in self.computed if self.field(n).per == "row"]):
            raise ConfigError(
                f"fields has {rows[0]}, a declared table with a row per row, and extend is 'variable'; set "
                "extend='uniform', or declare it with per='request'."
            )
        if self.variable_rows and self.padding_len is not None:
            raise ConfigError(
                f"padding_len is {self.padding_len} and extend is 'variable'; how many rows a padding request has "
                "isn't known. Set extend='uniform', or padding_len=None."
            )
        tables = [name for name in self.tables if self.field(name).kind == "table"]
        if self.packed is not None and tables:
            raise ConfigError(
                f"fields has {self.packed} and {tables[0]}; a kernel writes either tables or {self.packed}. Bind them "
                "to two plans."
            )
        if "num_splits" in self.fields and "flashmla_metadata" not in self.fields:
            raise ConfigError(
                "fields has num_splits without flashmla_metadata, whose rows give the number of parts. Request both."
            )
        if "num_kv_splits" in self.fields and self.num_kv_head > self.num_head:
            raise ConfigError(
                f"num_kv_head is {self.num_kv_head} and num_head is {self.num_head}; num_kv_splits needs a query head "
                "or more for each head of keys and values. Set num_head."
            )
        if self.has_mqa_schedule and self.mode == "draft_extend" and self.extend == "variable":
            if self.schedule_per == "row":
                raise ConfigError(
                    "fields has paged_mqa_schedule_metadata, schedule_per is 'row' and extend is 'variable'; a "
                    "schedule of rows is defined for next_n rows per request. Set extend='uniform'."
                )
            if self.schedule_atoms == 0:
                raise ConfigError(
                    "fields has paged_mqa_schedule_metadata, schedule_atoms is 0 and extend is 'variable'; the atoms "
                    "follow only from a fixed next_n. Set schedule_atoms."
                )

    def _check_offsets(self) -> None:
        offsets = self.seqlen_offsets
        if len(offsets) not in (0, 1, self.num_backends):
            raise ConfigError(
                f"seqlen_offsets has {len(offsets)} numbers and num_backends is {self.num_backends}; give one per "
                "backend, one for all, or none."
            )
        if self.sets == 1:
            return
        for name, count in self.distinct:
            table = self.field(name).kind == "table" and name in self.tables
            if not self.once(name) if not table else count > 1 and self.lengths_differ:
                raise ConfigError(
                    f"distinct[{name}] is {count} and seqlen_offsets is {offsets}; backends whose "
                    "lengths differ can share only a table, and only if all of them share it."
                )

    def _check_fill(self) -> None:
        if self.page_fill is None or self.copies:
            return
        if self.tables != ("real_page_table",) or self.extent != "live":
            raise ConfigError(
                f"page_fill is {self.page_fill} with the tables {', '.join(self.tables) or 'none'} and extent "
                f"{self.extent!r}; it needs extent 'live' and real_page_table as the only table. Set page_fill to None."
            )

    def _check_parameters(self) -> None:
        if self.param_words > layout.MAX_PARAM_WORDS:
            raise ConfigError(
                f"num_backends is {self.num_backends} with {len(self.fields)} fields. That needs "
                f"{8 * self.param_words} bytes of kernel parameters; CUDA allows {8 * layout.MAX_PARAM_WORDS}. "
                "Bind the backends in several plans."
            )

    @property
    def param_words(self) -> int:
        """64-bit words in the kernel's parameter block (see layout.py)."""
        return sum(member.words for member in layout.members(self))

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON values."""
        return {name: _plain(name, getattr(self, name)) for name in SETTINGS}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> KernelConfig:
        """The inverse of to_dict. Missing settings get their defaults; unknown names are refused.

        Raises:
            ConfigError: a setting is unknown, or its value isn't allowed.
        """
        return cls(**settings)

    def shown_settings(self) -> dict[str, Any]:
        """The banner's settings, as JSON values: the configuration's own, and others that aren't at their default."""
        shown = {name: value for name, value in self._in_use() if name not in _PART_OF} | self._chosen()
        return {name: _plain(name, value) for name, value in shown.items()}

    def settings(self) -> str:
        """The settings that differ from the defaults as ``key=value,…``, the form that ``--set`` reads."""
        return ",".join(f"{n}={SETTINGS[n].metadata['value'].write(value)}" for n, value in self._chosen().items())

    def replace(self, **changes: Any) -> KernelConfig:
        """A copy with some settings changed, validated again. Settings that weren't in use get their defaults."""
        return KernelConfig(**dict(self._in_use()) | changes)

    @cached_property
    def key(self) -> str:
        """sha256 (hex) of the schema version and of the settings that differ from the defaults.

        A build has another key, which also covers source, flags, architectures and compilers: see build/key.py.
        """
        return hashlib.sha256(f"{SCHEMA_VERSION},{self.settings()}".encode()).hexdigest()

    @property
    def symbol(self) -> str:
        """The stem of every exported name: onelaunch_<operation>_<mode>_n<N>_<16 digits of the key>."""
        verb = "copy" if self.copies else "broadcast"
        return f"onelaunch_{verb}_{self.mode}_n{self.num_backends}_{self.key[:16]}"

    def _in_use(self) -> Iterator[tuple[str, Any]]:
        """The settings that the kernel depends on."""
        for name in SETTINGS:
            value = getattr(getattr(self, _PART_OF[name]), name, None) if name in _PART_OF else getattr(self, name)
            if value is not None:
                yield name, value

    def _chosen(self) -> dict[str, Any]:
        """The settings in use that differ from their defaults."""
        return {name: value for name, value in self._in_use() if value != SETTINGS[name].default}


# The part that a setting belongs to. Other settings are attributes of the configuration itself.
_PART_OF = {field.name: part for part, kind in PARTS.items() for field in dataclasses.fields(kind)}

SETTINGS: dict[str, dataclasses.Field[Any]] = {
    field.name: field
    for fields in (dataclasses.fields(KernelConfig), *map(dataclasses.fields, PARTS.values()))
    for field in fields
    if field.name not in PARTS
}
"""The declaration of every setting, by its name."""


def _plain(name: str, value: Any) -> Any:
    if name == "declare":
        return {each: plain(declaration) for each, declaration in value}
    if name in ("distinct", "dtypes", "inputs", "constants", "sources", "maps"):
        return {each: list(of) if isinstance(of, tuple) else of for each, of in value}
    return list(value) if isinstance(value, tuple) else value


def _set(config: KernelConfig, name: str, value: object) -> None:
    object.__setattr__(config, name, value)
