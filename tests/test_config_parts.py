"""The parts of a KernelConfig: what an unused setting leaves out, and what follows from the others."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
from onelaunch import FIELDS, ConfigError, KernelConfig
from onelaunch.spec.parts import PARTS, Pages
from support import ALL_FIELDS

MQA = "paged_mqa_schedule_metadata"
LENGTHS = ("cache_seqlens", "cu_seqlens_k", "seqlens_expanded")


def base(**changes: Any) -> KernelConfig:
    return KernelConfig(**{"num_backends": 3, "fields": ALL_FIELDS, **changes})


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
