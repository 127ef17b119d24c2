"""Settings that a KernelConfig refuses: fragments of each message, and the whole text of some."""

from __future__ import annotations

import time
from typing import Any

import pytest
from onelaunch import FIELDS, ConfigError, KernelConfig
from onelaunch.spec.layout import MAX_PARAM_WORDS
from onelaunch.spec.settings import parse_settings
from support import ALL_FIELDS

MQA = "paged_mqa_schedule_metadata"


def base(**changes: Any) -> KernelConfig:
    return KernelConfig(**{"num_backends": 3, "fields": ALL_FIELDS, **changes})


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
        ({"seqlen_offsets": (1, 2, 2**15 + 1)}, ("seqlen_offsets[2] is 32769", "0 to 32768")),
        ({"seqlen_offsets": (1, 2, 3.0)}, ("seqlen_offsets[2] is 3.0", "whole number")),
        ({"seqlen_offsets": 3}, ("seqlen_offsets is 3", "one whole number per backend")),
        (
            {"seqlen_offsets": (1, 2, 3), "distinct": (("page_indices", 2),)},
            ("distinct[page_indices] is 2", "can share only a table"),
        ),
        ({"index_kpool": 0}, ("index_kpool is 0", "1 to 2147483647")),
        ({"page_fill": 0}, ("page_fill is 0", "None, -1")),
        (
            {"page_fill": -1, "fields": ("real_page_table",), "extent": "full"},
            ("page_fill is -1", "extent 'full'", "only table"),
        ),
        ({"checked": 1}, ("checked is 1", "False, True")),
        ({"num_backends": 0}, ("num_backends is 0", "1 or more")),
        ({"num_backends": True}, ("num_backends is True", "whole number")),
        ({"num_backends": 2.0}, ("num_backends is 2.0", "whole number")),
        ({"num_backends": "3"}, ("num_backends is '3'", "whole number")),
        ({"fields": 3}, ("fields is 3", "tuple of names")),
        ({"fields": ("page_indexes",)}, ("fields is 'page_indexes'", "Did you mean 'page_indices'?")),
        ({"distinct": (("page_indices", 4),)}, ("distinct[page_indices] is 4", "1 to 3")),
        ({"distinct": (("page_indices", 0),)}, ("distinct[page_indices] is 0", "1 to 3")),
        ({"distinct": (("page_tables", 1),)}, ("distinct is 'page_tables'",)),
        ({"dtypes": {"kv_indices": "int64"}}, ("dtypes is 'kv_indices'",)),
        ({"dtypes": {"page_indices": "int64"}}, ("dtypes[page_indices] is 'int64'; allowed: 'int32'",)),
        ({"fields": ("cache_seqlens",), "distinct": (("page_indices", 1),)}, ("distinct is 'page_indices'",)),
        ({"req_pool_indices_dtype": "uint32"}, ("req_pool_indices_dtype is 'uint32'",)),
        ({"req_to_token_dtype": None}, ("req_to_token_dtype is None",)),
        ({"index_topk": -1}, ("index_topk is -1", "0 to 2147483647")),
        ({"index_topk": 2**31}, ("index_topk is 2147483648", "0 to 2147483647")),
        ({"page_size": 0}, ("page_size is 0", "1 to 2147483647")),
        ({"page_size": 2**31}, ("page_size is 2147483648",)),
        ({"vector_bytes": 8}, ("vector_bytes is 8", "4, 16")),
        ({"vector_bytes": 16.0}, ("vector_bytes is 16.0", "4, 16")),
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
    """The limit is CUDA's, not ours: a bisection finds the first number that is refused."""
    low, high = 1, 5_000
    while high - low > 1:
        middle = (low + high) // 2
        try:
            KernelConfig(num_backends=middle)
            low = middle
        except ConfigError:
            high = middle
    words = KernelConfig(num_backends=low).param_words
    # Each backend takes 8 words: four addresses, and an address and a stride for each of two tables.
    assert words <= MAX_PARAM_WORDS < words + 8
    assert low > 500
    with pytest.raises(ConfigError) as caught:
        KernelConfig(num_backends=high)
    assert f"num_backends is {high}" in str(caught.value)
    assert f"{8 * (words + 8)} bytes" in str(caught.value)
    assert f"CUDA allows {8 * MAX_PARAM_WORDS}" in str(caught.value)
    assert "several plans" in str(caught.value)
    # Destinations that all backends share are in the parameter block once.
    shared = tuple((name, 1) for name in KernelConfig().fields)
    assert KernelConfig(num_backends=high, distinct=shared).param_words < 30


def test_a_huge_number_of_backends_is_refused_at_once() -> None:
    began = time.process_time()
    with pytest.raises(ConfigError, match=r"num_backends is 100000000 with 6 fields. That needs \d+ bytes"):
        KernelConfig(num_backends=10**8)
    assert time.process_time() - began < 1


def test_the_ends_of_what_is_allowed() -> None:
    assert [KernelConfig(threads=n).threads for n in (32, 64, 512, 1024)] == [32, 64, 512, 1024]
    fields = ("cache_seqlens",)
    other = KernelConfig(fields=fields).param_words - 1
    most = MAX_PARAM_WORDS - other
    assert KernelConfig(fields=fields, num_backends=most).param_words == MAX_PARAM_WORDS
    with pytest.raises(ConfigError, match=f"^num_backends is {most + 1} "):
        KernelConfig(fields=fields, num_backends=most + 1)


# --------------------------------------------------------------------------------------------------- written down


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


def test_messages_begin_with_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match=r"^There is no setting 'no_such'\.\nAllowed: operation, "):
        KernelConfig.from_dict({"no_such": 1})
    with pytest.raises(ConfigError, match=r"^There is no setting 'no_such'\.\nAllowed: operation, "):
        parse_settings("no_such=1")
    with pytest.raises(ConfigError, match=r"^num_backends is '3=4'; it must be a whole number"):
        parse_settings("num_backends=3=4")


# ----------------------------------------------------------------------------------------------- whole messages

NAMES = ", ".join(FIELDS)

# The whole text, because a fragment would not show a misleading sentence around it.
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
