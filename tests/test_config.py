"""KernelConfig: accepted values, unused settings, its key, and its text and dict forms."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from onelaunch import FIELDS, PRESETS, ConfigError, KernelConfig, preset, vector
from onelaunch.spec import layout
from onelaunch.spec.config import SETTINGS
from onelaunch.spec.layout import MAX_PARAM_WORDS
from onelaunch.spec.parts import PARTS, Pages
from onelaunch.spec.settings import parse_settings
from processes import light_package
from support import ALL_FIELDS

MQA = "paged_mqa_schedule_metadata"
LENGTHS = ("cache_seqlens", "cu_seqlens_k", "seqlens_expanded")

# One change to each setting that shapes a kernel which has every field.
CHANGES: dict[str, Any] = {
    "writes": "verified",
    "operation": "copy",
    "mode": "draft_extend",
    "num_backends": 5,
    "fields": ("cache_seqlens", "page_indices", "nsa_cache_seqlens", "real_page_table"),
    "distinct": (("page_indices", 1),),
    "seq_lens_dtype": "int32",
    "req_pool_indices_dtype": "int32",
    "req_to_token_dtype": "int64",
    "index_topk": 1024,
    "page_size": 32,
    "extent": "full",
    "vector_bytes": 4,
    "target": "cpu",
    "threads": 128,
    "unroll": 7,
    "blocks_per_sm": 5,
    "seqlen_offsets": (1, 2, 3),
    "index_kpool": 2,
    "checked": True,
}
# Settings that need another one to say anything.
TOGETHER: dict[str, dict[str, Any]] = {
    "next_n": {"mode": "target_verify", "next_n": 3},
    "next_n of draft_extend": {"mode": "draft_extend", "next_n": 3},
    "extend": {"mode": "draft_extend", "extend": "variable"},
    "extend_seq_lens_dtype": {"mode": "draft_extend", "extend": "variable", "extend_seq_lens_dtype": "int32"},
    "one offset": {"seqlen_offsets": (4,)},
    "page_fill": {"fields": ("cache_seqlens", "real_page_table"), "page_fill": -1},
    "padding_len": {"padding_len": 1},
    "declare": {"declare": {"mine": vector("seq_len + 1", "request")}, "fields": ("mine",)},
    "inputs": {"declare": {"mine": vector("given", "request")}, "fields": ("mine",), "inputs": {"given": "int64"}},
    "constants": {"declare": {"mine": vector("seq_len * most")}, "fields": ("mine",), "constants": {"most": 7}},
    "sources": {"declare": {"mine": vector("table(row)")}, "fields": ("mine",), "sources": {"table": "int64"}},
    "maps": {"declare": {"mine": vector("map_(row)")}, "fields": ("mine",), "maps": {"map_": ("int64", 7)}},
    "strided": {"declare": {"mine": vector("seq_len + 1", "request")}, "fields": ("mine",), "strided": ("mine",)},
    "dtypes": {"fields": ("kv_indptr", "kv_indices"), "dtypes": {"kv_indices": "int64"}},
    "schedule_remainder": {"fields": (MQA,), "schedule_remainder": "first"},
    "schedule_per": {"fields": (MQA,), "mode": "target_verify", "schedule_per": "row"},
    "schedule_atoms": {"fields": (MQA,), "schedule_atoms": 2},
    "schedule_split_cost": {"fields": (MQA,), "schedule_split_cost": 3},
    "flashmla_order": {"fields": ("flashmla_metadata",), "flashmla_order": "2025"},
    "num_head": {"fields": ("num_kv_splits",), "num_head": 16},
    "num_kv_head": {"fields": ("num_kv_splits",), "num_kv_head": 16},
    "max_kv_splits": {"fields": ("num_kv_splits",), "max_kv_splits": 16},
    "device_core_count": {"fields": ("num_kv_splits",), "device_core_count": 16},
    "copied rows": {"operation": "copy", "mode": "target_verify"},
}


def base(**changes: Any) -> KernelConfig:
    return KernelConfig(**{"num_backends": 3, "fields": ALL_FIELDS, **changes})


# ------------------------------------------------------------------------------------------------ validation


@pytest.mark.parametrize(
    ("facts", "fragments"),
    [
        ({"operation": "refresh"}, ("operation is 'refresh'", "'precompute_and_broadcast', 'copy'")),
        ({"operation": "cop"}, ("Did you mean 'copy'?",)),
        ({"mode": "verify"}, ("mode is 'verify'", "'decode', 'target_verify', 'draft_extend'")),
        ({"next_n": 0}, ("next_n is 0", "1 to 32768")),
        ({"next_n": 2**15 + 1}, ("next_n is 32769", "1 to 32768")),
        ({"next_n": True}, ("next_n is True", "whole number")),
        ({"extend": "some"}, ("extend is 'some'", "'uniform', 'variable'")),
        ({"extend_seq_lens_dtype": "int8"}, ("extend_seq_lens_dtype is 'int8'", "'int32', 'int64'")),
        ({"seqlen_offsets": (1, 2)}, ("seqlen_offsets has 2 numbers", "num_backends is 3")),
        ({"seqlen_offsets": (1, -2, 3)}, ("seqlen_offsets[1] is -2", "0 to 32768")),
        ({"seqlen_offsets": (1, 2, 2**15 + 1)}, ("seqlen_offsets[2] is 32769", "0 to 32768")),
        ({"seqlen_offsets": (1, 2, 3.0)}, ("seqlen_offsets[2] is 3.0", "whole number")),
        ({"seqlen_offsets": 3}, ("seqlen_offsets is 3", "one whole number per backend")),
        ({"seqlen_offsets": "123"}, ("seqlen_offsets is '123'", "one whole number per backend")),
        (
            {"seqlen_offsets": (1, 2, 3), "distinct": (("cache_seqlens", 1),)},
            ("distinct[cache_seqlens] is 1", "can share only a table"),
        ),
        (
            {"seqlen_offsets": (1, 2, 3), "distinct": (("page_indices", 2),)},
            ("distinct[page_indices] is 2", "can share only a table"),
        ),
        ({"index_kpool": 0}, ("index_kpool is 0", "1 to 2147483647")),
        ({"page_fill": 0}, ("page_fill is 0", "None, -1")),
        ({"page_fill": -1}, ("page_fill is -1", "only table")),
        (
            {"page_fill": -1, "fields": ("real_page_table",), "extent": "full"},
            ("page_fill is -1", "extent 'full'", "only table"),
        ),
        ({"page_fill": -1, "fields": ("cache_seqlens",)}, ("page_fill is -1", "the tables none")),
        ({"checked": 1}, ("checked is 1", "False, True")),
        ({"num_backends": 0}, ("num_backends is 0", "1 or more")),
        ({"num_backends": True}, ("num_backends is True", "whole number")),
        ({"num_backends": 2.0}, ("num_backends is 2.0", "whole number")),
        ({"num_backends": "3"}, ("num_backends is '3'", "whole number")),
        ({"fields": ()}, ("fields is empty", "cache_seqlens")),
        ({"fields": "page_indices"}, ("fields is 'page_indices'", "tuple of names")),
        ({"fields": 3}, ("fields is 3", "tuple of names")),
        ({"fields": ("page_indexes",)}, ("fields is 'page_indexes'", "Did you mean 'page_indices'?")),
        ({"fields": ("page_indices", "page_indices")}, ("name each field once",)),
        ({"fields": ("real_page_table",), "page_size": 1}, ("real_page_table without page_indices", "page_size is 1")),
        ({"distinct": (("page_indices", 4),)}, ("distinct[page_indices] is 4", "1 to 3")),
        ({"distinct": (("page_indices", 0),)}, ("distinct[page_indices] is 0", "1 to 3")),
        ({"distinct": (("page_tables", 1),)}, ("distinct is 'page_tables'",)),
        ({"dtypes": {"kv_indices": "int64"}}, ("dtypes is 'kv_indices'",)),
        ({"dtypes": {"page_indices": "int64"}}, ("dtypes[page_indices] is 'int64'; allowed: 'int32'",)),
        ({"fields": ("cache_seqlens",), "distinct": (("page_indices", 1),)}, ("distinct is 'page_indices'",)),
        ({"seq_lens_dtype": "int16"}, ("seq_lens_dtype is 'int16'", "'int32', 'int64'")),
        ({"req_pool_indices_dtype": "uint32"}, ("req_pool_indices_dtype is 'uint32'",)),
        ({"req_to_token_dtype": None}, ("req_to_token_dtype is None",)),
        ({"index_topk": -1}, ("index_topk is -1", "0 to 2147483647")),
        ({"index_topk": 2**31}, ("index_topk is 2147483648", "0 to 2147483647")),
        ({"page_size": 0}, ("page_size is 0", "1 to 2147483647")),
        ({"page_size": 2**31}, ("page_size is 2147483648",)),
        ({"extent": "dead"}, ("extent is 'dead'", "'live', 'full'")),
        ({"vector_bytes": 8}, ("vector_bytes is 8", "4, 16")),
        ({"vector_bytes": 16.0}, ("vector_bytes is 16.0", "4, 16")),
        ({"target": "hip"}, ("target is 'hip'", "'cuda', 'cpu'")),
        ({"threads": 16}, ("threads is 16", "power of two from 32 to 1024")),
        ({"threads": 96}, ("threads is 96", "power of two from 32 to 1024")),
        ({"threads": 2048}, ("threads is 2048", "1 to 1024")),
        ({"unroll": 0}, ("unroll is 0", "1 to 8")),
        ({"unroll": 9}, ("unroll is 9", "1 to 8")),
        ({"blocks_per_sm": 0}, ("blocks_per_sm is 0", "1 to 32")),
        ({"blocks_per_sm": 33}, ("blocks_per_sm is 33", "1 to 32")),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_setting_outside_what_is_allowed(facts: dict[str, Any], fragments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        base(**facts)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_names_are_needed() -> None:
    with pytest.raises(TypeError):
        KernelConfig("copy")  # type: ignore[misc]
    with pytest.raises(ConfigError, match=r"'backends'. Did you mean 'num_backends'\?\nAllowed: "):
        KernelConfig(backends=3)


def test_more_backends_than_the_parameter_block_takes() -> None:
    """The limit is CUDA's, not ours: it is found by asking for one backend more until it is refused."""
    low, high = 1, 5_000
    while high - low > 1:
        middle = (low + high) // 2
        try:
            KernelConfig(num_backends=middle)
            low = middle
        except ConfigError:
            high = middle
    words = KernelConfig(num_backends=low).param_words
    # Four addresses, and two tables of an address and a stride, a backend.
    assert words <= MAX_PARAM_WORDS < words + 8
    assert low > 500
    with pytest.raises(ConfigError) as caught:
        KernelConfig(num_backends=high)
    assert f"num_backends is {high}" in str(caught.value)
    assert f"{8 * (words + 8)} bytes" in str(caught.value)
    assert f"CUDA allows {8 * MAX_PARAM_WORDS}" in str(caught.value)
    assert "several plans" in str(caught.value)
    # Shared destinations take one place.
    shared = tuple((name, 1) for name in KernelConfig().fields)
    assert KernelConfig(num_backends=high, distinct=shared).param_words < 30


def test_a_huge_number_of_backends_is_refused_at_once() -> None:
    began = time.process_time()
    with pytest.raises(ConfigError, match=r"num_backends is 100000000 with 6 fields. That needs \d+ bytes"):
        KernelConfig(num_backends=10**8)
    assert time.process_time() - began < 1


# ------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("same", "as_this"),
    [
        ({"fields": LENGTHS, "index_topk": 7}, {"fields": LENGTHS}),
        ({"fields": LENGTHS, "page_size": 7}, {"fields": LENGTHS}),
        ({"fields": LENGTHS, "req_to_token_dtype": "int64"}, {"fields": LENGTHS}),
        ({"fields": LENGTHS, "req_pool_indices_dtype": "int32"}, {"fields": LENGTHS}),
        ({"fields": LENGTHS, "extent": "live"}, {"fields": LENGTHS, "extent": "full"}),
        ({"fields": LENGTHS, "vector_bytes": 16}, {"fields": LENGTHS, "vector_bytes": 4}),
        ({"fields": LENGTHS, "unroll": 1, "blocks_per_sm": 1}, {"fields": LENGTHS, "unroll": 8, "blocks_per_sm": 32}),
        ({"fields": ("page_indices",), "page_size": 7}, {"fields": ("page_indices",), "page_size": 64}),
        ({"fields": ("real_page_table",), "vector_bytes": 16}, {"fields": ("real_page_table",), "vector_bytes": 4}),
        (
            {"fields": ("page_indices",), "extent": "full", "seq_lens_dtype": "int32"},
            {"fields": ("page_indices",), "extent": "full", "seq_lens_dtype": "int64"},
        ),
        ({"page_size": 1}, {"page_size": 1, "fields": tuple(n for n in ALL_FIELDS if n != "real_page_table")}),
        ({"operation": "copy", "extent": "live"}, {"operation": "copy", "extent": "full"}),
        ({"operation": "copy", "index_topk": 9, "page_size": 8}, {"operation": "copy"}),
        ({"operation": "copy", "seq_lens_dtype": "int32", "req_to_token_dtype": "int64"}, {"operation": "copy"}),
        ({"target": "cpu", "threads": 7, "blocks_per_sm": 3}, {"target": "cpu"}),
        ({"distinct": (("page_indices", 3),)}, {}),
        ({"fields": tuple(reversed(ALL_FIELDS))}, {"fields": ALL_FIELDS}),
        ({"fields": list(ALL_FIELDS)}, {"fields": ALL_FIELDS}),
        ({"next_n": 5}, {}),
        ({"extend": "variable"}, {}),
        ({"extend_seq_lens_dtype": "int32"}, {}),
        ({"mode": "draft_extend", "extend": "variable", "next_n": 5}, {"mode": "draft_extend", "extend": "variable"}),
        (
            {"mode": "draft_extend", "next_n": 3, "fields": ("cu_seqlens_k",)},
            {"mode": "draft_extend", "fields": ("cu_seqlens_k",)},
        ),
        (
            {"mode": "draft_extend", "extend": "variable", "fields": ("cu_seqlens_k",)},
            {"mode": "draft_extend", "fields": ("cu_seqlens_k",)},
        ),
        ({"operation": "copy", "mode": "draft_extend"}, {"operation": "copy", "mode": "target_verify"}),
        (
            {"operation": "copy", "mode": "target_verify", "next_n": 4, "checked": True, "seqlen_offsets": (1, 2, 3)},
            {"operation": "copy", "mode": "target_verify"},
        ),
        ({"seqlen_offsets": (0, 0, 0)}, {}),
        ({"seqlen_offsets": (0,)}, {}),
        ({"seqlen_offsets": (4, 4, 4)}, {"seqlen_offsets": (4,)}),
        ({"seqlen_offsets": [1, 2, 3]}, {"seqlen_offsets": (1, 2, 3)}),
        (
            {"fields": ("page_indices",), "extent": "full", "seqlen_offsets": (1, 2, 3)},
            {"fields": ("page_indices",), "extent": "full"},
        ),
        ({"fields": LENGTHS, "index_kpool": 4}, {"fields": LENGTHS}),
        ({"operation": "copy", "index_kpool": 4}, {"operation": "copy"}),
        ({"operation": "copy", "page_fill": -1}, {"operation": "copy"}),
        ({"operation": "copy", "req_pool_indices_dtype": "int32"}, {"operation": "copy"}),
        ({"schedule_remainder": "first"}, {}),
        ({"schedule_atoms": 2}, {}),
        ({"schedule_split_cost": 2}, {}),
        ({"flashmla_order": "2025"}, {}),
        ({"num_head": 4, "num_kv_head": 2, "max_kv_splits": 4, "device_core_count": 7}, {}),
        ({"mode": "target_verify", "schedule_per": "row"}, {"mode": "target_verify"}),
        ({"fields": (MQA,), "schedule_per": "row"}, {"fields": (MQA,)}),
        ({"fields": (MQA,), "schedule_atoms": 1}, {"fields": (MQA,)}),
        (
            {"fields": (MQA,), "mode": "target_verify", "next_n": 4, "schedule_atoms": 2},
            {"fields": (MQA,), "mode": "target_verify", "next_n": 4},
        ),
        (
            {"fields": (MQA,), "mode": "target_verify", "next_n": 4, "schedule_per": "row", "schedule_atoms": 2},
            {"fields": (MQA,), "mode": "target_verify", "next_n": 4, "schedule_per": "row"},
        ),
        ({"fields": ("kv_indices",), "extent": "full"}, {"fields": ("kv_indices",), "extent": "live"}),
        ({"fields": ("kv_indices",), "page_size": 7, "vector_bytes": 4}, {"fields": ("kv_indices",)}),
        (
            {"distinct": (("real_page_table", 1), ("cache_seqlens", 2))},
            {"distinct": (("cache_seqlens", 2), ("real_page_table", 1))},
        ),
    ],
    ids=str,
)
def test_settings_that_change_nothing_are_left_out(same: dict[str, Any], as_this: dict[str, Any]) -> None:
    a, b = base(**same), base(**as_this)
    assert a == b
    assert hash(a) == hash(b)
    assert a.key == b.key
    assert a.symbol == b.symbol


def test_settings_that_matter_stay() -> None:
    lengths_with_topk = KernelConfig(fields=("nsa_cu_seqlens_k",), index_topk=7)
    assert lengths_with_topk.index_topk == 7
    assert KernelConfig(fields=("real_page_table",), page_size=7).page_size == 7
    assert KernelConfig(fields=("page_indices",), seq_lens_dtype="int32").seq_lens_dtype == "int32"
    assert KernelConfig(fields=("page_indices",), req_pool_indices_dtype="int32").req_pool_indices_dtype == "int32"
    assert KernelConfig(fields=LENGTHS, seq_lens_dtype="int32").seq_lens_dtype == "int32"
    assert KernelConfig(operation="copy", page_size=1).fields == KernelConfig().fields, "a copy copies both tables"
    assert KernelConfig(operation="copy", vector_bytes=16).vector_bytes == 16
    assert KernelConfig(fields=(MQA,), seq_lens_dtype="int32").seq_lens_dtype == "int32"
    assert KernelConfig(fields=("kv_indices",), extent="full", seq_lens_dtype="int32").seq_lens_dtype == "int32"
    assert KernelConfig(fields=(MQA,), index_kpool=4).index_kpool == 4
    assert KernelConfig(fields=("pooled_cache_seqlens",), index_kpool=4).index_kpool == 4
    assert KernelConfig(fields=("pooled_real_page_table",), index_kpool=4, page_size=7).page_size == 7
    assert KernelConfig(fields=("nsa_cache_seqlens",), index_topk=7).index_topk == 7
    assert KernelConfig(fields=(MQA,), mode="draft_extend", next_n=4).next_n == 4
    verify = KernelConfig(fields=(MQA,), mode="target_verify", next_n=4, schedule_per="row", schedule_remainder="first")
    assert (verify.schedule_per, verify.schedule_remainder, verify.next_n) == ("row", "first", 4)
    assert KernelConfig(fields=(MQA,), mode="target_verify", next_n=4, schedule_atoms=1).schedule_atoms == 1
    assert KernelConfig(fields=(MQA,), seqlen_offsets=(3,)).seqlen_offsets == (3,)
    several = KernelConfig(num_backends=2, seqlen_offsets=(1, 2), distinct=(("page_indices", 1),))
    assert several.distinct == (("page_indices", 1),)
    alike = KernelConfig(num_backends=2, seqlen_offsets=(5,), distinct=(("cache_seqlens", 1),))
    assert (alike.distinct, alike.seqlen_offsets) == ((("cache_seqlens", 1),), (5,))


@pytest.mark.parametrize(
    ("settings", "read"),
    [
        ({"fields": LENGTHS}, {"page_size": 1, "vector_bytes": 4, "unroll": 1}),
        ({"fields": LENGTHS, "blocks_per_sm": 3}, {"blocks_per_sm": 1}),
        ({"operation": "copy"}, {"page_size": 1, "index_kpool": 1}),
        ({"fields": ("real_page_table",)}, {"vector_bytes": 4, "unroll": 2, "blocks_per_sm": 4, "extent": "live"}),
        ({"fields": ("kv_indices",)}, {"vector_bytes": 4, "page_size": 1, "extent": "live"}),
        ({"mode": "decode", "next_n": 4}, {"next_n": 1}),
        ({"mode": "draft_extend", "next_n": 4, "fields": LENGTHS[:2]}, {"next_n": 1, "mode": "draft_extend"}),
        ({"target": "cpu"}, {"threads": 1, "blocks_per_sm": 1, "unroll": 2}),
    ],
    ids=str,
)
def test_what_reading_an_unused_setting_yields(settings: dict[str, Any], read: dict[str, Any]) -> None:
    config = KernelConfig(**settings)
    assert {name: getattr(config, name) for name in read} == read


def test_parts_that_are_not_needed_are_absent() -> None:
    def present(**settings: Any) -> set[str]:
        config = KernelConfig(**settings)
        return {name for name in PARTS if getattr(config, name) is not None}

    assert present() == {"lengths", "gather", "pages", "sparse", "launch"}
    assert present(fields=("cache_seqlens",)) == {"lengths", "launch"}
    assert present(fields=("cache_seqlens",), target="cpu") == {"lengths"}
    assert present(fields=("page_indices",), extent="full") == {"gather", "launch"}
    assert present(operation="copy", mode="target_verify") == {"launch"}
    assert present(fields=(MQA,)) == {"lengths", "sparse", "mqa_schedule", "launch"}
    assert present(fields=("flashmla_metadata",)) == {"lengths", "flashmla_schedule", "launch"}
    assert present(fields=("num_kv_splits",)) == {"lengths", "kv_splits", "launch"}
    assert present(fields=("cache_seqlens",), mode="target_verify") == {"lengths", "rows", "launch"}
    full = KernelConfig(extent="full").launch
    assert full is not None
    assert (full.threads, full.blocks_per_sm) == (256, None)


def test_a_part_checks_itself() -> None:
    assert Pages(page_size=16) == Pages(page_size=16, page_fill=None)
    with pytest.raises(ConfigError, match=r"^page_size is 0; allowed: 1 to 2147483647\.$"):
        Pages(page_size=0)
    with pytest.raises(ConfigError, match="page_size is None"):
        KernelConfig(page_size=None)


def test_an_attribute_that_is_no_setting() -> None:
    with pytest.raises(AttributeError, match="KernelConfig has no attribute 'pagesize'"):
        _ = KernelConfig().pagesize
    assert not hasattr(KernelConfig(), "__deepcopy__")


def test_copies_are_equal() -> None:
    for config in (base(), base(target="cpu"), KernelConfig(fields=("cache_seqlens",))):
        for other in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
            assert (other, other.key, other.page_size) == (config, config.key, config.page_size)
        assert eval(repr(config)) == config


def test_atoms_of_a_schedule() -> None:
    per_request = [KernelConfig(fields=(MQA,), mode="target_verify", next_n=n).atoms for n in (1, 2, 3, 4, 5)]
    assert per_request == [1, 1, 2, 2, 3]
    assert KernelConfig(fields=(MQA,), mode="target_verify", next_n=4, schedule_per="row").atoms == 1
    assert KernelConfig(fields=(MQA,), mode="target_verify", next_n=4, schedule_atoms=3).atoms == 3
    assert KernelConfig(fields=(MQA,), mode="target_verify", next_n=4, schedule_split_cost=9).atoms == 4, "tokens"


def test_what_a_configuration_needs() -> None:
    assert KernelConfig().needs_lengths
    assert not KernelConfig(operation="copy").needs_lengths
    assert not KernelConfig(fields=("page_indices",), extent="full").needs_lengths
    assert KernelConfig(fields=("page_indices",), extent="live").needs_lengths
    assert base().tables == ("page_indices", "real_page_table", "pooled_real_page_table")
    assert base().vectors == tuple(n for n in ALL_FIELDS if FIELDS[n].kind != "table")
    assert base(distinct=(("page_indices", 2),)).destinations("page_indices") == 2
    assert base(distinct=(("page_indices", 2),)).destinations("cache_seqlens") == 3


# --------------------------------------------------------------------------------------------------- identity


def test_every_setting_is_in_the_key() -> None:
    """Each change gives a key of its own."""
    changes = [{name: value} for name, value in CHANGES.items()] + list(TOGETHER.values())
    assert set(SETTINGS) == {name for change in changes for name in change}
    keys = {base().key}
    for change in changes:
        changed = base(**change)
        assert changed != base(), change
        assert re.fullmatch(r"[0-9a-f]{64}", changed.key)
        keys.add(changed.key)
    assert len(keys) == 1 + len(changes)


def test_defaults_are_not_in_the_key() -> None:
    """So a setting that is added later changes no key that exists. This one is as old as the second schema."""
    config = preset("nsa-decode-3")
    assert config.settings() == "num_backends=3"
    assert config.key == hashlib.sha256(b"2,num_backends=3").hexdigest()
    assert config.replace(page_size=64, unroll=2, checked=False).key == config.key


def test_what_a_banner_shows() -> None:
    own = ["operation", "mode", "num_backends", "fields", "distinct", "target", "checked"]
    assert list(base().shown_settings()) == own
    assert list(base(index_kpool=4, page_size=64).shown_settings()) == [*own, "index_kpool"]
    assert base(seqlen_offsets=(1, 2, 3)).shown_settings()["seqlen_offsets"] == [1, 2, 3]


def test_symbols_name_what_they_are() -> None:
    assert base().symbol == f"onelaunch_broadcast_decode_n3_{base().key[:16]}"
    copies = base(operation="copy", num_backends=2)
    assert copies.symbol == f"onelaunch_copy_decode_n2_{copies.key[:16]}"
    assert len({config.symbol for config in PRESETS.values()}) == len(PRESETS)


def test_the_key_is_the_same_in_every_process(tmp_path: Path) -> None:
    """No hash randomization, no address and no time in it."""
    code = (
        "from onelaunch.spec.presets import PRESETS; import json;"
        "print(json.dumps({n: c.key for n, c in PRESETS.items()}))"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(light_package(tmp_path))}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == {name: config.key for name, config in PRESETS.items()}


def test_frozen_and_hashable() -> None:
    config = base()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_backends = 4  # type: ignore[misc]
    assert {config: 1}[base()] == 1
    assert len({*PRESETS.values()}) == len(PRESETS)


def test_replace_validates_again() -> None:
    assert base().replace(num_backends=7) == base(num_backends=7)
    with pytest.raises(ConfigError, match="page_size is 0"):
        base().replace(page_size=0)
    with pytest.raises(ConfigError, match=r"distinct\[page_indices\] is 2"):
        base(distinct=(("page_indices", 2),)).replace(num_backends=1)
    # What wasn't used has its default where it is used again.
    assert base(fields=LENGTHS, page_size=16).replace(fields=ALL_FIELDS) == base()
    assert base(threads=128, target="cpu").replace(target="cuda") == base()


# -------------------------------------------------------------------------------------------------- written down

WRITTEN = {
    **PRESETS,
    **{f"other {name}": base(**{name: value}) for name, value in CHANGES.items()},
    **{f"other {name}": base(**facts) for name, facts in TOGETHER.items()},
    "all shared": base(distinct=tuple((name, 1) for name in ALL_FIELDS)),
    "one field": KernelConfig(fields=("cu_seqlens_k",)),
    "page 1": base(page_size=1),
}


@pytest.mark.parametrize("config", WRITTEN.values(), ids=WRITTEN)
def test_settings_and_dicts_are_read_back(config: KernelConfig) -> None:
    assert parse_settings(config.settings()) == config
    assert KernelConfig.from_dict(config.to_dict()) == config
    assert KernelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert list(config.to_dict()) == list(SETTINGS)
    # It is typed in a shell; only declarations, which are JSON, need quotes there.
    assert config.declare or not set(config.settings()) & set(" \"'$`\\|&;<>()*?[]{}!#~\n")


def test_settings_hold_what_differs_from_the_defaults() -> None:
    assert KernelConfig().settings() == ""
    assert KernelConfig(num_backends=3, page_size=16).settings() == "num_backends=3,page_size=16"
    assert KernelConfig(num_backends=2, distinct=(("page_indices", 1),)).settings() == (
        "num_backends=2,distinct=page_indices:1"
    )


def test_settings_over_a_base() -> None:
    assert parse_settings("", base()) == base()
    assert parse_settings(" page_size = 16 , extent=full, ", base()) == base(page_size=16, extent="full")
    assert parse_settings("fields=cu_seqlens_k+page_indices").fields == ("cu_seqlens_k", "page_indices")
    assert parse_settings("checked=false", base(checked=True)) == base()
    assert parse_settings("num_backends=2,seqlen_offsets=1+2").seqlen_offsets == (1, 2)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ("page_size", ("'page_size'", "key=value")),
        ("page_size=", ("key=value",)),
        ("page_sise=3", ("There is no setting 'page_sise'. Did you mean 'page_size'?\nAllowed: operation, ",)),
        ("page_size=three", ("page_size is 'three'", "whole number")),
        ("page_size=0", ("page_size is 0",)),
        ("fields=cache_seqlens+nothing", ("fields is 'nothing'",)),
        ("distinct=page_indices", ("distinct[page_indices] is ''", "whole number")),
        ("distinct=page_indices:many", ("distinct[page_indices] is 'many'",)),
        ("dtypes=kv_indices:int16", ("dtypes[kv_indices] is 'int16'", "'int32', 'int64'")),
        ("extent=both", ("extent is 'both'",)),
        ("seqlen_offsets=1+x", ("seqlen_offsets is 'x'", "whole number")),
        ("checked=yes", ("checked is 'yes'", "'false', 'true'")),
        ("page_fill=none", ("page_fill is 'none'", "'None', '-1'", "Did you mean 'None'?")),
        ("target=gpu", ("target is 'gpu'; allowed: 'cuda', 'cpu'.",)),
        ("vector_bytes=8", ("vector_bytes is '8'", "'4', '16'")),
        ("page_size=16,page_size=32", ("'page_size=32' gives page_size a second time", "give each key once")),
        ("page_size=16,extent=full,page_size=16", ("gives page_size a second time",)),
        ("page_size=²", ("page_size is '²'", "whole number")),
    ],
)
def test_settings_that_cannot_be_read(text: str, fragments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_settings(text)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_a_dict_with_an_unknown_setting() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'page_size'"):
        KernelConfig.from_dict({"pagesize": 3})


def test_presets() -> None:
    assert {
        "nsa-decode-1",
        "nsa-decode-2",
        "nsa-decode-3",
        "nsa-decode-3-full",
        "nsa-decode-3-page1",
        "nsa-decode-3-int32",
        "nsa-decode-3-int64",
        "nsa-decode-3-lengths-only",
        "nsa-precompute",
        "nsa-copy-1",
        "nsa-copy-3",
    } <= set(PRESETS)
    for name, config in PRESETS.items():
        assert preset(name) is config
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
        number = re.search(r"-(\d+)(-|$)", name)
        if not name.startswith("sglang-"):  # where it is the draft steps, or the tokens of a request
            assert config.num_backends == (int(number[1]) if number else 1)
        assert config.target == "cuda"
    with pytest.raises(ConfigError, match="Did you mean 'nsa-decode-3'"):
        preset("nsa-decode3")


# ----------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("config", WRITTEN.values(), ids=WRITTEN)
def test_the_parameter_block(config: KernelConfig) -> None:
    """What a call sets comes first, the rest follows, and no word is without a name."""
    members = layout.members(config)
    words = layout.param_words(config)
    assert len(words) == sum(m.words for m in members) == config.param_words
    per_call = [m.per_call for m in members]
    assert per_call == sorted(per_call, reverse=True)
    assert words[: len(layout.call_words(config))] == layout.call_words(config)
    names = [m.name for m in members]
    assert len(set(names)) == len(names)
    for name in config.fields:
        each = 3 if name in config.strided else 2 if config.field(name).kind == "table" else 1
        assert words.count(config.member(name)) == config.destinations(name) * each


def test_a_dict_of_some_settings() -> None:
    assert KernelConfig.from_dict({}) == KernelConfig()
    facts = {"fields": ["cache_seqlens"], "distinct": {"cache_seqlens": 1}, "num_backends": 2}
    wanted = KernelConfig(num_backends=2, fields=("cache_seqlens",), distinct=(("cache_seqlens", 1),))
    assert KernelConfig.from_dict(facts) == wanted
    with pytest.raises(ConfigError, match=r"^fields is 'cache_seqlens'; it must be a tuple of names"):
        KernelConfig.from_dict({"fields": "cache_seqlens"})


def test_messages_begin_with_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"^There is no setting 'no_such'\.\nAllowed: operation, "):
        KernelConfig.from_dict({"no_such": 1})
    with pytest.raises(ConfigError, match=r"^There is no setting 'no_such'\.\nAllowed: operation, "):
        parse_settings("no_such=1")
    with pytest.raises(ConfigError, match=r"^num_backends is '3=4'; it must be a whole number"):
        parse_settings("num_backends=3=4")


NAMES = ", ".join(FIELDS)

# The whole text: a message that says the right thing in the wrong words still misleads.
MESSAGES: list[tuple[dict[str, Any], str]] = [
    (
        {"threads": 16},
        "threads is 16; on the cuda target it must be a power of two from 32 to 1024, because a block consists "
        "of whole warps.",
    ),
    ({"fields": "all"}, f"fields is 'all'; it must be a tuple of names from {NAMES}."),
    ({"fields": ()}, f"fields is empty; name at least one of {NAMES}."),
    (
        {"fields": ("real_page_table",), "page_size": 1},
        "fields has real_page_table without page_indices and page_size is 1; with pages of one token the two are the "
        "same table. Request page_indices instead.",
    ),
    ({"target": 3}, "target is 3; allowed: 'cuda', 'cpu'."),
    ({"target": "xyz"}, "target is 'xyz'; allowed: 'cuda', 'cpu'."),
    ({"extent": "liv"}, "extent is 'liv'; allowed: 'live', 'full'. Did you mean 'live'?"),
    ({"seq_lens_dtype": "int3"}, "seq_lens_dtype is 'int3'; allowed: 'int32', 'int64'. Did you mean 'int32'?"),
    (
        {"num_backends": 4100, "fields": ("cache_seqlens",)},
        f"num_backends is 4100 with 1 fields. That needs {8 * 4104} bytes of kernel parameters; "
        f"CUDA allows {8 * MAX_PARAM_WORDS}. Bind the backends in several plans.",
    ),
    (
        {"fields": ("page_indices", "page_indices")},
        "fields is ('page_indices', 'page_indices'); name each field once.",
    ),
    (
        {"operation": "copy", "fields": ("cache_seqlens", "kv_indices")},
        "fields has kv_indices and operation is 'copy'; a copy can't write schedules, counts or kv_indices, which "
        "each refresh computes. Leave them out of the destinations.",
    ),
    (
        {"operation": "copy", "fields": ("flashmla_metadata", "num_splits")},
        "fields has flashmla_metadata and operation is 'copy'; a copy can't write schedules, counts or kv_indices, "
        "which each refresh computes. Leave them out of the destinations.",
    ),
    (
        {"operation": "copy", "fields": ("cache_seqlens", "num_splits")},
        "fields has num_splits and operation is 'copy'; a copy can't write schedules, counts or kv_indices, which "
        "each refresh computes. Leave them out of the destinations.",
    ),
    (
        {"operation": "copy", "fields": ("num_kv_splits",)},
        "fields has num_kv_splits and operation is 'copy'; a copy can't write schedules, counts or kv_indices, which "
        "each refresh computes. Leave them out of the destinations.",
    ),
    (
        {"fields": ("num_kv_splits",), "num_head": 4},
        "num_kv_head is 8 and num_head is 4; num_kv_splits needs a query head or more for each head of keys and "
        "values. Set num_head.",
    ),
    ({"fields": ("num_kv_splits",), "device_core_count": 0}, "device_core_count is 0; allowed: 1 to 65536."),
    ({"max_kv_splits": 65_537}, "max_kv_splits is 65537; allowed: 1 to 65536."),
    (
        {"fields": ("real_page_table", "kv_indices")},
        "fields has kv_indices and real_page_table; a kernel writes either tables or kv_indices. Bind them to "
        "two plans.",
    ),
    (
        {"fields": ("cache_seqlens", "num_splits")},
        "fields has num_splits without flashmla_metadata, whose rows give the number of parts. Request both.",
    ),
    (
        {"mode": "draft_extend", "extend": "variable", "fields": ("seqlens_expanded", MQA), "schedule_per": "row"},
        "fields has paged_mqa_schedule_metadata, schedule_per is 'row' and extend is 'variable'; a schedule of rows is "
        "defined for next_n rows per request. Set extend='uniform'.",
    ),
    (
        {"mode": "draft_extend", "extend": "variable", "fields": ("seqlens_expanded", MQA)},
        "fields has paged_mqa_schedule_metadata, schedule_atoms is 0 and extend is 'variable'; the atoms follow only "
        "from a fixed next_n. Set schedule_atoms.",
    ),
    (
        {"num_backends": 2, "seqlen_offsets": "12"},
        "seqlen_offsets is '12'; it must be a tuple with one whole number per backend.",
    ),
    (
        {"num_backends": 3, "seqlen_offsets": (1, 2)},
        "seqlen_offsets has 2 numbers and num_backends is 3; give one per backend, one for all, or none.",
    ),
    ({"num_backends": 2, "seqlen_offsets": (0, -1)}, "seqlen_offsets[1] is -1; allowed: 0 to 32768."),
    (
        {"num_backends": 2, "seqlen_offsets": (1, 2), "distinct": (("cache_seqlens", 1),)},
        "distinct[cache_seqlens] is 1 and seqlen_offsets is (1, 2); backends whose lengths differ can share only "
        "a table, and only if all of them share it.",
    ),
    (
        {"page_fill": -1},
        "page_fill is -1 with the tables page_indices, real_page_table and extent 'live'; it needs extent "
        "'live' and real_page_table as the only table. Set page_fill to None.",
    ),
    (
        {"page_fill": -1, "fields": ("cache_seqlens",)},
        "page_fill is -1 with the tables none and extent 'live'; it needs extent 'live' and real_page_table as "
        "the only table. Set page_fill to None.",
    ),
]


@pytest.mark.parametrize(("facts", "message"), MESSAGES, ids=[str(facts) for facts, _ in MESSAGES])
def test_the_whole_message(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KernelConfig(**facts)
    assert str(caught.value) == message


def test_the_ends_of_what_is_allowed() -> None:
    assert [KernelConfig(threads=n).threads for n in (32, 64, 512, 1024)] == [32, 64, 512, 1024]
    fields = ("cache_seqlens",)
    other = KernelConfig(fields=fields).param_words - 1
    most = MAX_PARAM_WORDS - other
    assert KernelConfig(fields=fields, num_backends=most).param_words == MAX_PARAM_WORDS
    with pytest.raises(ConfigError, match=f"^num_backends is {most + 1} "):
        KernelConfig(fields=fields, num_backends=most + 1)
