"""What the functions that take lists of tensors refuse.

The checks are bind()'s, which is tested with every case; a few cases show that these functions make them too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onelaunch
import pytest
import support
import torch
from bad_input import (
    BS,
    INPUTS,
    META,
    PAGE_SIZE,
    SOME,
    WIDTH,
    Case,
    Scene,
    attribute,
    bind,
    case,
    fact,
    named,
    number_facts,
    overlap_of_two_fields,
    refused,
    spoil,
    with_names,
)
from onelaunch import ArgumentError, ConfigError, MetadataBuffers
from support import ALL_FIELDS, SIX_FIELDS, assert_untouched
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick_builds")


# ------------------------------------------------------------------------------------- precompute and broadcast


def broadcast(scene: Scene, lists: dict[str, Any] | None = None) -> None:
    given = {
        f"{name}_list": [getattr(b, name) for b in scene.backends] if hasattr(scene.backends[0], name) else None
        for name in SIX_FIELDS
    }
    facts = {"max_len": WIDTH, "nsa_index_topk": 9, "real_page_size": PAGE_SIZE, **scene.facts}
    onelaunch.fused_metadata_precompute_and_broadcast_cuda(
        scene.seq_lens, scene.rows, scene.pool, **{**given, **(lists or {})}, **facts
    )


BROADCAST: list[Case] = [
    *INPUTS,
    *number_facts("max_len", 0, WIDTH),
    *number_facts("nsa_index_topk", 0, 2**31 - 1),
    *number_facts("real_page_size", 1, 2**31 - 1),
    case(fact(real_page_size=1), "real_page_table_list[0] is a separate tensor", "pages of one token"),
    case(
        lambda s: [s.set("real_page_table", lambda t: t[:, :2], backend) for backend in (0, 1)],
        "real_page_table_list[0] has 2 columns",
        "need 3",
    ),
    case(
        lambda s: [s.set("page_indices", lambda t: t[:, :39], backend) for backend in (0, 1)],
        "max_len is 40; allowed: 0 to 39",
    ),
    case(spoil("cu_seqlens_k", lambda t: t[:4]), "4 requests; cu_seqlens_k_list[1] has room for 3"),
    case(spoil("page_indices", lambda t: t[:3]), "4 requests; page_indices_list[1] has room for 3"),
]


@pytest.mark.parametrize("earlier", [False, True], ids=["first call", "later call"])
@named([*SOME, *BROADCAST])
def test_broadcast(
    device: torch.device, change: Callable[[Scene], None], fragments: tuple[str, ...], earlier: bool
) -> None:
    """A remembered plan of the same tensors must not let a bad argument through."""
    scene = Scene(device)
    if earlier:
        # Equal to the bool and the float of number_facts.
        for value in (1, 16):
            page_table = {"real_page_table_list": None} if value == 1 else {}
            scene.facts = {"max_len": value, "nsa_index_topk": value, "real_page_size": value}
            broadcast(scene, page_table)
        for facts in ({"max_len": 1}, {"nsa_index_topk": 1}, {"max_len": 16}, {"nsa_index_topk": 16}):
            scene.facts = facts
            broadcast(scene)
        scene.poison()
        scene.facts = {}
    change(scene)
    refused(ArgumentError, with_names(fragments, "{}_list[1]"), lambda: broadcast(scene))
    assert_untouched(scene.poisoned)


LISTS: list[tuple[str, dict[str, Callable[[Scene], Any]], tuple[str, ...]]] = [
    case({f"{name}_list": lambda s: None for name in SIX_FIELDS}, "every list is None"),
    (
        "of different lengths",
        {"nsa_cache_seqlens_list": lambda s: [s.backends[0].nsa_cache_seqlens]},
        ("nsa_cache_seqlens_list has 1 tensors", "cache_seqlens_list has 2"),
    ),
    ("one empty", {"page_indices_list": lambda s: []}, ("page_indices_list has 0 tensors", "has 2")),
    case({f"{name}_list": lambda s: [] for name in SIX_FIELDS}, "empty", "at least one"),
    ("a tensor", {"cache_seqlens_list": lambda s: s.new(2, BS)}, ("cache_seqlens_list is a Tensor", "list of tensors")),
    ("a number", {"cache_seqlens_list": lambda s: 2}, ("cache_seqlens_list is a int", "list of tensors")),
    (
        "none in it",
        {"cu_seqlens_k_list": lambda s: [None, s.backends[0].cu_seqlens_k]},
        ("cu_seqlens_k_list[0] is a NoneType", "torch.Tensor"),
    ),
    (
        "a list in it",
        {"cu_seqlens_k_list": lambda s: [s.backends[0].cu_seqlens_k, [0, 1, 2, 3, 4]]},
        ("cu_seqlens_k_list[1] is a list", "torch.Tensor"),
    ),
]


@pytest.mark.parametrize(("lists", "fragments"), [case[1:] for case in LISTS], ids=[case[0] for case in LISTS])
def test_broadcast_lists(
    device: torch.device, lists: dict[str, Callable[[Scene], Any]], fragments: tuple[str, ...]
) -> None:
    scene = Scene(device)
    made = {name: make(scene) for name, make in lists.items()}
    refused(ArgumentError, fragments, lambda: broadcast(scene, made))
    assert_untouched(scene.poisoned)


@pytest.mark.parametrize("extent", ["half", ["full"]], ids=str)
def test_broadcast_extent(device: torch.device, extent: Any) -> None:
    scene = Scene(device)
    scene.facts = {"extent": extent}
    refused(ConfigError, (f"extent is {extent!r}", "'live', 'full'"), lambda: broadcast(scene))
    assert_untouched(scene.poisoned)


@named(
    [
        case(fact(extend_seq_lens=torch.tensor([1, 1, 1, 1])), "extend_seq_lens is a tensor", "draft_"),
        case(fact(mode="draft_extend", extend_seq_lens=[1, 1, 1, 1]), "extend_seq_lens is a list", "torch.Tensor"),
        case(fact(next_n=2), "next_n is 2", "allowed: 1 in decode"),
        case(fact(mode="target_verify", next_n=True), "next_n is True (bool)", "Python int"),
        case(fact(mode="target_verify", next_n=2), "4 requests of 2 rows each", "room for 2"),
    ]
)
def test_broadcast_of_rows(device: torch.device, change: Callable[[Scene], None], fragments: tuple[str, ...]) -> None:
    scene = Scene(device)
    change(scene)
    refused(ArgumentError, fragments, lambda: broadcast(scene))
    assert_untouched(scene.poisoned)


# ---------------------------------------------------------------------------------------------------- precompute


def precompute(scene: Scene) -> MetadataBuffers:
    out = scene.facts.pop("out", scene.backends[1])
    facts = {"max_len": WIDTH, "nsa_index_topk": 9, "real_page_size": PAGE_SIZE, **scene.facts}
    return onelaunch.precompute_decode_metadata_cuda(scene.seq_lens, scene.rows, scene.pool, out=out, **facts)


PRECOMPUTE: list[Case] = [
    *SOME,
    *INPUTS,
    *number_facts("max_len", 0, WIDTH),
    *number_facts("nsa_index_topk", 0, 2**31 - 1),
    *number_facts("real_page_size", 1, 2**31 - 1),
    case(lambda s: s.facts.update(out=[s.backends[1]]), "out is a list", "MetadataBuffers or None"),
    case(lambda s: s.facts.update(out=MetadataBuffers()), "backends have no fields"),
    case(spoil("page_indices", lambda t: t[:3]), "4 requests; out.page_indices has room for 3"),
    case(spoil("page_indices", lambda t: t[:, :39]), "max_len is 40; allowed: 0 to 39"),
    case(spoil("real_page_table", lambda t: t[:, :2]), "out.real_page_table has 2 columns", "need 3"),
]


@named(PRECOMPUTE)
def test_precompute(device: torch.device, change: Callable[[Scene], None], fragments: tuple[str, ...]) -> None:
    scene = Scene(device)
    change(scene)
    refused(ArgumentError, with_names(fragments, "out.{}"), lambda: precompute(scene))
    assert_untouched(scene.poisoned)


# Without ``out`` it allocates, so cases about the shapes of ``out`` don't apply.
PRECOMPUTE_NEW = [c for c in PRECOMPUTE if not re.search(r"\{|out|overlaps|no field|8 requests|0 to 39", c[0])]


@named(PRECOMPUTE_NEW)
def test_precompute_of_new_buffers(
    device: torch.device, change: Callable[[Scene], None], fragments: tuple[str, ...]
) -> None:
    """Without ``out`` it refuses bad input before it allocates anything."""
    scene = Scene(device)
    change(scene)
    scene.facts["out"] = None
    refused(ArgumentError, fragments, lambda: precompute(scene))


def test_precompute_allocates_only_for_a_known_number_of_rows(device: torch.device) -> None:
    scene = Scene(device)
    facts = {"max_len": WIDTH, "nsa_index_topk": 9, "real_page_size": PAGE_SIZE, "extend_seq_lens": scene.rows}

    def call(**changes: Any) -> None:
        onelaunch.precompute_draft_extend_metadata_cuda(scene.seq_lens, scene.rows, scene.pool, **{**facts, **changes})

    refused(ArgumentError, ("rows is None", "give the sum of extend_seq_lens"), call)
    refused(ArgumentError, ("rows is -1", "0 to"), lambda: call(rows=-1))
    refused(ArgumentError, ("next_n is 0", "1 to"), lambda: call(extend_seq_lens=None, next_n=0))


# ---------------------------------------------------------------------------------------------------------- copy


@dataclass
class CopyScene(Scene):
    """Backend 0's fields filled with numbers are the source of backends 1 and 2."""

    fields: Sequence[str] = ALL_FIELDS

    def __post_init__(self) -> None:
        super().__post_init__()
        self.source: Any = support.destination(self.fields, BS, WIDTH, PAGE_SIZE, device=self.device).buffers
        for _, tensor in self.source.items():
            tensor.fill_(7)

    def set_source(self, name: str, change: Callable[[Tensor], Any]) -> None:
        setattr(self.source, name, change(getattr(self.source, name)))


def copy(scene: CopyScene) -> None:
    onelaunch.fused_metadata_copy_cuda(scene.source, scene.backends, **scene.facts)


def spoil_source(name: str, change: Callable[[Tensor], Any]) -> Callable[[CopyScene], None]:
    return lambda scene: scene.set_source(name, change)


def into_the_source(name: str) -> Callable[[CopyScene], None]:
    return lambda scene: setattr(scene.backends[1], name, getattr(scene.source, name))


COPY: list[tuple[str, Callable[[CopyScene], None], tuple[str, ...]]] = [
    *[c for c in SOME if "req_to_token" not in c[0]],
    case(overlap_of_two_fields, "{nsa_cache_seqlens}", "{cache_seqlens}", "overlaps"),
    case(attribute("source", lambda s: None), "precomputed is a NoneType", "MetadataBuffers"),
    case(attribute("source", lambda s: [s.source]), "precomputed is a list", "MetadataBuffers"),
    case(spoil_source("cu_seqlens_k", lambda t: None), "precomputed.cu_seqlens_k is None"),
    case(spoil_source("cache_seqlens", Tensor.long), "precomputed.cache_seqlens has dtype int64", "int32"),
    case(spoil_source("page_indices", lambda t: t.to(META)), "precomputed.page_indices is on meta"),
    case(spoil_source("cache_seqlens", lambda t: 3), "precomputed.cache_seqlens is a int"),
    *[
        case(into_the_source(name), f"{{{name}}} overlaps precomputed.{name}")
        for name in ("cu_seqlens_k", "page_indices")
    ],
    case(attribute("backends", lambda s: None), "destinations is None", "MetadataBuffers"),
    case(attribute("backends", lambda s: []), "destinations is empty", "at least one"),
    case(attribute("backends", lambda s: [s.backends[0], None]), "destinations is [", "None]"),
    case(attribute("backends", lambda s: [MetadataBuffers()]), "backends have no fields"),
    case(spoil("cu_seqlens_k", lambda t: None), "{cu_seqlens_k} is None", "same fields"),
    case(
        lambda s: [s.set("page_indices", lambda t: t[:, :39], b) for b in (0, 1)],
        "page_indices has 40 columns to copy",
        "has 39",
    ),
    case(
        lambda s: [s.set("real_page_table", lambda t: t[:, :2], b) for b in (0, 1)],
        "real_page_table has 3 columns to copy",
        "has 2",
    ),
    case(spoil("nsa_cu_seqlens_k", lambda t: t[:4]), "bs is 4", "{nsa_cu_seqlens_k} has room for 3"),
    case(fact(bs=5), "bs is 5", "has room for 4"),
    *number_facts("bs", 0, None),
    *number_facts("max_len", 0, WIDTH),
    *number_facts("real_page_size", 1, 2**31 - 1),
]


@named(COPY)
def test_copy(device: torch.device, change: Callable[[CopyScene], None], fragments: tuple[str, ...]) -> None:
    scene = CopyScene(device)
    change(scene)
    refused(ArgumentError, with_names(fragments, "destinations[1].{}"), lambda: copy(scene))
    assert_untouched(scene.poisoned)


@pytest.mark.parametrize("bad", [-1, True], ids=repr)
def test_copy_of_lengths_alone_checks_max_len(device: torch.device, bad: Any) -> None:
    """No table needs max_len here, but a wrong one is still refused."""
    scene = CopyScene(device, fields=("cache_seqlens", "cu_seqlens_k"))
    scene.facts = {"max_len": bad}
    refused(ArgumentError, (f"max_len is {bad!r}",), lambda: copy(scene))
    assert_untouched(scene.poisoned)


@named(
    [
        case(fact(next_n=2), "next_n is 2", "in decode a request has one row"),
        case(fact(rows=2), "rows is 2", "in decode a request has one row"),
        case(fact(mode="target_verify", bs=2), "bs is 2 in target_verify", "next_n and rows are None"),
        case(fact(mode="draft_extend", bs=2, next_n=0), "next_n is 0", "1 to 32768"),
        case(fact(mode="draft_extend", rows=5), "rows is 5", "has room for 4"),
        case(fact(mode="draft_extend", rows=4.0), "rows is 4.0 (float)", "Python int"),
        case(fact(mode="target_verify", bs=2, next_n=3), "rows is 6", "has room for 4"),
    ]
)
def test_copy_of_rows(device: torch.device, change: Callable[[CopyScene], None], fragments: tuple[str, ...]) -> None:
    scene = CopyScene(device)
    change(scene)
    refused(ArgumentError, fragments, lambda: copy(scene))
    assert_untouched(scene.poisoned)


def test_copy_names_the_only_destination_without_an_index(device: torch.device) -> None:
    scene = CopyScene(device)
    scene.backends = scene.backends[1]
    scene.backends.cache_seqlens = scene.new(BS, dtype=torch.int64)
    refused(ArgumentError, ("destinations.cache_seqlens has dtype int64",), lambda: copy(scene))
    assert_untouched(scene.poisoned)


def test_nothing_is_built_for_a_refused_call(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bad input is refused before any build starts."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a kernel was loaded")

    monkeypatch.setattr("onelaunch.load.loader.load", load)
    scene = Scene(device)
    scene.facts = {"max_len": WIDTH + 1}
    refused(ArgumentError, ("max_len",), lambda: bind(scene))
    scene.set("page_indices", Tensor.long)
    refused(ArgumentError, ("page_indices",), lambda: broadcast(scene))
