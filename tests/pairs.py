"""Configurations in which any two values of any two settings meet.

``SETTINGS`` lists the values of each setting: ``all_pairs`` makes configurations from it, and hypothesis draws further
ones.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cases import BATCH_SHAPES, BY_BATCH, CSR, MQA, RAGGED, SCHEDULES, SEVEN, SIX, TABLES, Shape
from onelaunch import FIELDS, KernelConfig
from onelaunch.errors import ConfigError

FIELD_SETS: tuple[tuple[str, ...], ...] = (
    *((name,) for name in ("seqlens_expanded", "nsa_cu_seqlens_k", "page_indices", "pooled_real_page_table")),
    ("cache_seqlens", "cu_seqlens_k"),
    ("cu_seqlens_k", "real_page_table"),
    TABLES,
    SIX,
    BY_BATCH,
    (MQA, "cache_seqlens"),
    ("flashmla_metadata", "num_splits", "real_page_table"),
    (*SEVEN, *SCHEDULES),
    CSR,
    ("kv_indices", "cu_seqlens_k", MQA),
)
SETTINGS: dict[str, tuple[Any, ...]] = {
    "fields": FIELD_SETS,
    "num_backends": (1, 2, 3, 8, 9, 64),
    "mode": ("decode", "target_verify", "draft_extend"),
    "extend": ("uniform", "variable"),
    "next_n": (1, 2, 5),
    "page_size": (1, 16, 64, 7, 2**30),
    "extent": ("live", "full"),
    "page_fill": (None, -1),
    "offsets": ("none", "one", "each"),
    "shared": ("nothing", "tables"),
    "vector_bytes": (16, 4),
    "unroll": (2, 1, 4),
    "seq_lens_dtype": ("int64", "int32"),
    "req_pool_indices_dtype": ("int64", "int32"),
    "req_to_token_dtype": ("int32", "int64"),
    "extend_seq_lens_dtype": ("int64", "int32"),
    "index_topk": (100, 0, 2**31 - 1),
    "index_kpool": (1, 3, 64),
    "checked": (False, True),
    "schedule_remainder": ("last", "first"),
    "schedule_per": ("request", "row"),
    "schedule_atoms": (0, 3),
    "schedule_split_cost": (0, 5),
    "flashmla_order": ("2026", "2025"),
    "max_kv_splits": (8, 1, 50),
    "writes": ("all", "verified"),
    "indices": ("int32", "int64"),
}


def allowed(chosen: Mapping[str, Any]) -> bool:
    """Whether a configuration has these settings, whatever the others are."""
    fields = chosen.get("fields")
    tables = None if fields is None else [name for name in fields if FIELDS[name].kind == "table"]
    if chosen.get("page_fill") == -1 and (
        tables not in (None, ["real_page_table"]) or chosen.get("extent") == "full" or chosen.get("page_size") == 1
    ):
        return False
    if chosen.get("page_size") == 1 and tables is not None and "real_page_table" in tables and len(tables) == 1:
        return False  # with page_size 1 it would be page_indices
    variable = chosen.get("mode") == "draft_extend" and chosen.get("extend") == "variable"
    undefined = chosen.get("schedule_per") == "row" or chosen.get("schedule_atoms") == 0
    return not (variable and undefined and fields is not None and MQA in fields)


def configuration(chosen: Mapping[str, Any]) -> KernelConfig:
    """The configuration of a choice from SETTINGS.

    Raises:
        ConfigError: there is no such configuration.
    """
    settings = dict(chosen)
    n = settings["num_backends"]
    offsets, shared = settings.pop("offsets"), settings.pop("shared")
    indices = settings.pop("indices")
    if "kv_indices" in settings["fields"]:
        settings["dtypes"] = {"kv_indices": indices}
    settings["seqlen_offsets"] = {"none": (), "one": (7,), "each": tuple(range(n, 0, -1))}[offsets]
    if shared == "tables":
        tables = [name for name in settings["fields"] if FIELDS[name].kind == "table"]
        settings["distinct"] = tuple((name, 1) for name in tables if (name, settings["page_size"]) != (TABLES[1], 1))
    return bindable(KernelConfig(**settings))


def bindable(config: KernelConfig) -> KernelConfig:
    """The same, with the 16-byte stores that bind() chooses for a single page_indices destination."""
    return config.replace(vector_bytes=16) if config.destinations("page_indices") == 1 else config


def all_pairs(
    factors: Mapping[str, Sequence[Any]], allowed: Callable[[Mapping[str, Any]], bool], seed: int = 1
) -> list[dict[str, Any]]:
    """Choices in which any two values of any two factors meet at least once, where that is allowed.

    Greedy and deterministic: each choice starts from a pair that is still missing, and takes the values, factor by
    factor, that meet the most missing pairs.
    """
    numbers = random.Random(seed)
    names = list(factors)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }

    def values(picks: Mapping[str, int]) -> dict[str, Any]:
        return {name: factors[name][i] for name, i in picks.items()}

    def pairs(picks: Mapping[str, int]) -> set[tuple[tuple[str, int], tuple[str, int]]]:
        known = [(name, picks[name]) for name in names if name in picks]
        return set(itertools.combinations(known, 2))

    choices = []
    while missing:
        first = min(missing)
        picks = dict(first)
        if not allowed(values(picks)):
            missing.discard(first)
            continue
        for name in names:
            if name not in picks:
                possible = [i for i in range(len(factors[name])) if allowed(values({**picks, name: i}))]
                numbers.shuffle(possible)
                new = {i: len(pairs({**picks, name: i}) & missing) for i in possible}
                picks[name] = max(possible, key=new.__getitem__)
        missing -= pairs(picks)
        choices.append(values({name: picks[name] for name in names}))
    return choices


def any_two_settings() -> dict[str, tuple[KernelConfig, tuple[Shape, ...]]]:
    """Configurations in which any two settings meet, each with some of the shapes."""
    table: dict[str, tuple[KernelConfig, tuple[Shape, ...]]] = {}
    for index, chosen in enumerate(all_pairs(SETTINGS, allowed)):
        try:
            config = configuration(chosen)
        except ConfigError:
            continue
        shapes = BATCH_SHAPES[index % 5], BATCH_SHAPES[(index + 2) % 5], RAGGED
        table[f"{index}"] = config, affordable(config, shapes)
    return table


def affordable(config: KernelConfig, shapes: Sequence[Shape]) -> tuple[Shape, ...]:
    """The shapes, less large batches for 64 backends: these take long, and no path of the kernel depends on both."""
    return tuple(shape for shape in shapes if config.num_backends < 64 or len(shape.lengths) < 50)
