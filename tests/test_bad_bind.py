"""What bind and its kin refuse: the error's class, a message that names the argument, and nothing written.

All functions share the checks of destinations and pools, so bind() gets every case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onelaunch
import pytest
import torch
from bad_input import (
    BS,
    DESTINATIONS,
    META,
    POOLS,
    WIDTH,
    Case,
    Scene,
    attribute,
    bind,
    case,
    fact,
    named,
    number_facts,
    refused,
    spoil,
    with_names,
)
from onelaunch import ArgumentError, ConfigError, MetadataBuffers
from support import assert_untouched

pytestmark = pytest.mark.usefixtures("quick_builds")
BIND: list[Case] = [
    case(attribute("backends", lambda s: s.backends[0]), "backends is a MetadataBuffers", "list of"),
    case(attribute("backends", lambda s: None), "backends is a NoneType", "list of MetadataBuffers"),
    case(attribute("backends", lambda s: []), "backends is empty", "at least one"),
    case(attribute("backends", lambda s: "ab"), "backends is a str", "list of MetadataBuffers"),
    case(attribute("backends", lambda s: [s.backends[0], None]), "backends[1] is a NoneType"),
    case(attribute("backends", lambda s: [{}, *s.backends]), "backends[0] is a dict"),
    case(attribute("backends", lambda s: [MetadataBuffers()] * 2), "backends have no fields", "at least one"),
    case(spoil("cu_seqlens_k", lambda t: None), "{cu_seqlens_k} is None", "same fields"),
    case(
        lambda s: setattr(s.backends[1], "seqlens_expanded", s.new(BS)),
        "backends[0].seqlens_expanded is None",
        "backends[1].seqlens_expanded is a tensor",
    ),
    case(
        attribute("backends", lambda s: [MetadataBuffers(cache_seqlens=s.new(BS, device=META))]),
        "backends[0].cache_seqlens is on meta",
        "cuda, cpu",
    ),
    case(
        lambda s: [s.set("real_page_table", lambda t: t[:, :2], backend) for backend in (0, 1)],
        "backends[0].real_page_table has 2 columns",
        "40 tokens in pages of 16 need 3",
    ),
    case(fact(page_size=1), "backends[0].real_page_table is a separate tensor", "pages of one token"),
    case(
        lambda s: (fact(page_size=1)(s), [s.set("page_indices", lambda t: None, b) for b in (0, 1)]),
        "backends[0].real_page_table is a separate tensor",
        "pages of one token",
    ),
    *number_facts("index_topk", 0, 2**31 - 1),
    *number_facts("page_size", 1, 2**31 - 1),
    *number_facts("max_len", 0, WIDTH),
    case(fact(next_n=2), "next_n is 2", "allowed: 1 in decode"),
    case(fact(next_n=None), "next_n is None", "must be a Python int"),
    case(fact(mode="target_verify", next_n=0), "next_n is 0", "1 to 32768"),
    case(fact(mode="draft_extend", next_n=2**40), f"next_n is {2**40}", "1 to 32768"),
    case(fact(mode="draft_extend", extend="variable", next_n=2), "next_n is 2", "1 with variable extend lengths"),
    case(fact(extend="variable"), "extend is 'variable' in decode", "'uniform'"),
    case(
        fact(mode="target_verify", next_n=2, extend="variable"), "next_n is 2; allowed: 1 with variable extend lengths"
    ),
    case(fact(extend_seq_lens_dtype=torch.int8), "extend_seq_lens_dtype is torch.int8"),
    case(fact(seqlen_offsets=[0, 1, 2]), "seqlen_offsets is [0, 1, 2]", "each of the 2"),
    case(fact(seqlen_offsets=1), "seqlen_offsets is 1", "None, or one whole number"),
    case(fact(seqlen_offsets="12"), "seqlen_offsets is '12'", "None, or one whole number"),
    case(fact(seqlen_offsets=torch.tensor([1, 2])), "seqlen_offsets is tensor([1, 2])", "None, or one whole number"),
    case(fact(seqlen_offsets=[0, -1]), "seqlen_offsets[1] is -1", "0 to 32768"),
    case(fact(seqlen_offsets=[0.0, 1]), "seqlen_offsets[0] is 0.0 (float)", "Python int"),
    case(
        lambda s: (
            fact(seqlen_offsets=[0, 1])(s),
            setattr(s.backends[1], "cache_seqlens", s.backends[0].cache_seqlens),
        ),
        "backends[0].cache_seqlens",
        "is shared",
        "seqlen_offsets is (0, 1)",
        "one tensor per backend",
    ),
    *number_facts("index_kpool", 1, 2**31 - 1),
    case(
        lambda s: (
            fact(mode="target_verify", next_n=1)(s),
            [setattr(b, "seqlens_expanded", b.cache_seqlens) for b in s.backends],
        ),
        "].seqlens_expanded overlaps backends[",
        "].cache_seqlens",
    ),
    case(
        lambda s: (
            fact(index_kpool=2)(s),
            [setattr(b, "pooled_real_page_table", s.new(BS, 1)) for b in s.backends],
        ),
        "backends[0].pooled_real_page_table has 1 columns",
        "40 tokens in pools of 32 need 2",
    ),
    case(fact(seq_lens_dtype=torch.int16), "seq_lens_dtype is torch.int16", "torch.int32, torch.int64"),
    case(fact(seq_lens_dtype="int64"), "seq_lens_dtype is 'int64'", "torch.int32, torch.int64"),
    case(
        fact(req_pool_indices_dtype=torch.float32),
        "req_pool_indices_dtype is torch.float32",
        "torch.int32, torch.int64",
    ),
]


@named([*DESTINATIONS, *POOLS, *BIND])
def test_bind(device: torch.device, change: Callable[[Scene], None], fragments: tuple[str, ...]) -> None:
    scene = Scene(device)
    change(scene)
    refused(ArgumentError, with_names(fragments, "backends[1].{}"), lambda: bind(scene))
    assert_untouched(scene.poisoned)


@named(
    [
        case(fact(mode="prefill"), "mode is 'prefill'", "'decode', 'target_verify', 'draft_extend'"),
        case(fact(mode=None), "mode is None", "'decode', 'target_verify', 'draft_extend'"),
        case(fact(mode="draft_extend", extend="varied"), "extend is 'varied'", "Did you mean 'variable'?"),
        case(fact(page_fill=-1), "page_fill is -1", "only table"),
        case(fact(page_fill=0), "page_fill is 0", "None, -1"),
        case(fact(checked=1), "checked is 1", "False, True"),
        case(fact(extent="everything"), "extent is 'everything'", "'live', 'full'"),
        case(fact(extent=["full"]), "extent is ['full']", "'live', 'full'"),
    ]
)
def test_bind_of_no_configuration(
    device: torch.device, change: Callable[[Scene], None], fragments: tuple[str, ...]
) -> None:
    scene = Scene(device)
    change(scene)
    refused(ConfigError, fragments, lambda: bind(scene))
    assert_untouched(scene.poisoned)


def test_bind_accepts_what_only_looks_like_an_overlap(device: torch.device) -> None:
    """Column slices of one table, neighbours in one allocation, one tensor in every backend."""
    scene = Scene(device)
    table, sums, cache = scene.new(BS, 2 * WIDTH + 3), scene.new(2 * BS + 2), scene.new(BS)
    for index, buffers in enumerate(scene.backends):
        buffers.page_indices = table[:, index * WIDTH : (index + 1) * WIDTH]
        buffers.cu_seqlens_k = sums[index * (BS + 1) : (index + 1) * (BS + 1)]
        buffers.cache_seqlens = cache
    bind(scene).run(scene.seq_lens, scene.rows)
    assert table[:, 2 * WIDTH :].tolist() == [[0, 0, 0]] * BS
    assert sums.tolist() == [0, 3, 43, 60, 60] * 2


# ------------------------------------------------------------------------------------------------ other entries


@pytest.mark.parametrize(
    ("call", "fragments"),
    [
        (lambda s: onelaunch.bind_groups(None, [[0]], req_to_token=s.pool), ("backends is a NoneType", "list of")),
        (lambda s: onelaunch.bind_groups(s.backends, None, req_to_token=s.pool), ("groups is None", "each of the 2")),
        (lambda s: onelaunch.bind_groups(s.backends, [[0, 1]], req_to_token=s.pool, fields=()), ("fields isn't an",)),
        (lambda s: onelaunch.specialize(3), ("config is a int", "it must be a KernelConfig")),
        (lambda s: onelaunch.specialize(onelaunch.KernelConfig(), 90), ("arch is 90", 'such as "90a"')),
        (lambda s: onelaunch.specialize(onelaunch.KernelConfig(), [90]), ("arch is [90]", 'such as "90a"')),
    ],
    ids=["no backends", "no groups", "a foreign setting", "no configuration", "a number", "a list of numbers"],
)
def test_other_entries(call: Callable[[Scene], Any], fragments: tuple[str, ...]) -> None:
    refused(ArgumentError, fragments, lambda: call(Scene(torch.device("cpu"))))


@pytest.mark.parametrize("page_size", [2, 64])
def test_pages_of_several_tokens_with_kv_indices(page_size: int) -> None:
    """Once they were ignored: kv_indptr counts tokens whatever the page size."""
    scene = Scene(torch.device("cpu"))
    scene.backends = [MetadataBuffers(kv_indptr=scene.new(BS + 1), kv_indices=scene.new(400))]
    scene.facts = {"page_size": page_size}
    refused(ArgumentError, (f"page_size is {page_size} with kv_indices", "allowed: 1"), lambda: bind(scene))
    for facts in ({"page_size": 1}, {"page_size": None}):
        scene.facts = facts
        bind(scene).run(scene.seq_lens, scene.rows)
        assert scene.backends[0].kv_indptr.tolist() == [0, 3, 43, 60, 60]


def test_a_checked_plan_bound_in_inference_mode_reports() -> None:
    scene = Scene(torch.device("cpu"))
    scene.facts = {"checked": True}
    with torch.inference_mode():
        plan = bind(scene)
    scene.rows[1] = 17
    plan.run(scene.seq_lens, scene.rows)
    for mode in (False, True):
        with torch.inference_mode(mode):
            refused(ArgumentError, ("req_pool_indices[1] is 17",), plan.check)
            plan.check()
            plan.run(scene.seq_lens, scene.rows)
