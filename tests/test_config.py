"""KernelConfig: its key, its text and dict forms, and the parameter block that follows from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from onelaunch import PRESETS, ConfigError, KernelConfig, preset, vector
from onelaunch.spec import layout
from onelaunch.spec.config import SETTINGS
from onelaunch.spec.settings import parse_settings
from processes import light_package
from support import ALL_FIELDS

MQA = "paged_mqa_schedule_metadata"
LENGTHS = ("cache_seqlens", "cu_seqlens_k", "seqlens_expanded")

# One change to each setting, for a kernel with every field.
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
# Settings that have an effect only together with another one.
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


# --------------------------------------------------------------------------------------------------- identity


def test_every_setting_is_in_the_key() -> None:
    """Each change gives a different key."""
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
    """So a new setting changes no existing key. The key below dates from the second schema."""
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
    """It depends on no hash randomization, address or time."""
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
    # A setting that was dropped as unused has its default when it is used again.
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
    # Users type settings in a shell. Only declarations, which are JSON, may need quotes.
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


def test_a_dict_of_some_settings() -> None:
    assert KernelConfig.from_dict({}) == KernelConfig()
    facts = {"fields": ["cache_seqlens"], "distinct": {"cache_seqlens": 1}, "num_backends": 2}
    wanted = KernelConfig(num_backends=2, fields=("cache_seqlens",), distinct=(("cache_seqlens", 1),))
    assert KernelConfig.from_dict(facts) == wanted
    with pytest.raises(ConfigError, match=r"^fields is 'cache_seqlens'; it must be a tuple of names"):
        KernelConfig.from_dict({"fields": "cache_seqlens"})


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
        if not name.startswith("sglang-"):  # there the number counts draft steps, or tokens per request
            assert config.num_backends == (int(number[1]) if number else 1)
        assert config.target == "cuda"
    with pytest.raises(ConfigError, match="Did you mean 'nsa-decode-3'"):
        preset("nsa-decode3")


# ----------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("config", WRITTEN.values(), ids=WRITTEN)
def test_the_parameter_block(config: KernelConfig) -> None:
    """Words that a call sets come first, the others follow, and every word has a name."""
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
