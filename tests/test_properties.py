"""Any valid configuration agrees with the reference; any invalid one is refused; relations hold between refreshes."""

from __future__ import annotations

from typing import Any

import onelaunch
import pairs
import pytest
import support
import torch
from cases import Shape
from checker import Scene, check
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onelaunch import FIELDS, KernelConfig, render
from onelaunch.errors import ArgumentError, ConfigError
from support import POISON

pytestmark = pytest.mark.uncounted
# A new configuration builds a kernel, so an example can take a second.
BUILDS = settings(max_examples=25)
RUNS = settings(max_examples=60)

# Any set of fields, and any value that the table of cases has for each other setting.
field_sets = st.sets(st.sampled_from(sorted(FIELDS)), min_size=1).map(
    lambda names: tuple(n for n in FIELDS if n in names)
)
choices = {name: st.sampled_from(values) for name, values in pairs.SETTINGS.items()}
refreshes = st.fixed_dictionaries({**choices, "fields": field_sets, "num_backends": st.integers(1, 9)})
copies = st.fixed_dictionaries(
    {
        "operation": st.just("copy"),
        "fields": field_sets,
        "num_backends": st.integers(1, 9),
        "mode": st.sampled_from(["decode", "target_verify"]),
    }
)


@st.composite
def configurations(draw: st.DrawFn) -> KernelConfig:
    """Any valid configuration."""
    chosen: dict[str, Any] = draw(st.one_of(refreshes, refreshes, copies))
    # Fields that some other field rules out are dropped, so that Hypothesis can use most draws.
    tables = [name for name in chosen["fields"] if FIELDS[name].kind == "table"]
    refused = draw(st.sampled_from([["kv_indices"], tables]))
    if "flashmla_metadata" not in chosen["fields"]:
        refused = [*refused, "num_splits"]
    if "operation" in chosen:
        refused = [
            *refused,
            *(name for name in FIELDS if FIELDS[name].kind in ("schedule", "splits", "counts", "packed")),
        ]
    elif chosen["page_fill"] is not None:
        refused = [*refused, "page_indices", "pooled_real_page_table"]
    chosen["fields"] = tuple(n for n in chosen["fields"] if n not in refused) or ("cu_seqlens_k",)
    try:
        return KernelConfig(**chosen) if "operation" in chosen else pairs.configuration(chosen)
    except ConfigError:
        assume(False)
        raise


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    """A few requests on small tables."""
    width = draw(st.integers(2, 90))
    bs = draw(st.integers(0, 6))
    lengths = draw(st.lists(st.integers(-1, width + 9), min_size=bs, max_size=bs))
    return Shape(
        "drawn",
        tuple(lengths),
        width,
        table_columns=draw(st.one_of(st.none(), st.integers(2, width + 9))),
        max_len=draw(st.one_of(st.none(), st.just(2))),
        pool_rows=draw(st.integers(1, 5)),
        token_phase=4 * draw(st.integers(0, 3)),
        table_phase=4 * draw(st.integers(0, 3)),
        token_pad=draw(st.integers(0, 5)),
        table_pad=draw(st.integers(0, 5)),
        input_stride=draw(st.integers(1, 3)),
        spare_rows=draw(st.integers(1, 3)),
        extends=tuple(draw(st.lists(st.integers(-1, 5), min_size=1, max_size=6))),
        num_sms=draw(st.integers(1, 9)),
        num_sm_parts=draw(st.integers(1, 9)),
        max_indices=draw(st.integers(1, 300)),
        seed=draw(st.integers(0, 99)),
    )


@BUILDS
@given(configurations(), shapes())
def test_any_valid_configuration_agrees_with_the_reference(config: KernelConfig, shape: Shape) -> None:
    assert render(config).count(config.symbol) >= 3
    check(config, shape, "cpu")


@pytest.mark.long
@settings(BUILDS, max_examples=1500)
@given(configurations(), shapes())
def test_any_of_many_configurations_agrees_with_the_reference(config: KernelConfig, shape: Shape) -> None:
    check(config, shape, "cpu")


BAD_FACTS = st.one_of(
    st.tuples(st.sampled_from(["num_backends", "page_size", "threads", "unroll", "blocks_per_sm"]), st.integers(-9, 0)),
    st.tuples(st.sampled_from(["num_backends", "page_size", "index_topk"]), st.sampled_from([1.5, "3", None, True])),
    st.tuples(st.just("index_topk"), st.integers(max_value=-1)),
    st.tuples(
        st.sampled_from(["operation", "mode", "extent", "target", "seq_lens_dtype", "extend"]), st.text(max_size=6)
    ),
    st.tuples(st.sampled_from(["next_n", "index_kpool"]), st.sampled_from([0, -1, 1.0, "2", None, True])),
    st.tuples(st.just("seqlen_offsets"), st.sampled_from([[1, 2], [-1], ["1"], "12", 3, [2**15 + 1]])),
    st.tuples(st.just("page_fill"), st.sampled_from([0, 1, -2, "-1", True])),
    st.tuples(st.just("checked"), st.sampled_from([0, 1, "true", None])),
    st.tuples(st.sampled_from(["schedule_remainder", "schedule_per", "flashmla_order"]), st.text(max_size=6)),
    st.tuples(st.just("schedule_atoms"), st.sampled_from([-1, 1.0, "2", None, True])),
    st.tuples(st.just("vector_bytes"), st.sampled_from([0, 1, 8, 32, "16"])),
    st.tuples(st.just("fields"), st.lists(st.text(min_size=1, max_size=5), min_size=1, max_size=3)),
    st.tuples(st.just("fields"), st.just([])),
    st.tuples(st.text(min_size=1, max_size=9).filter(lambda t: not t.isidentifier()), st.integers()),
)


@RUNS
@given(BAD_FACTS)
def test_any_invalid_configuration_is_refused_by_name(fact: tuple[str, Any]) -> None:
    name, value = fact
    with pytest.raises(ConfigError) as caught:
        KernelConfig.from_dict({name: value})
    text = str(caught.value)
    assert name in text or repr(name) in text
    assert text.endswith((".", "?"))


BAD_CALLS = st.sampled_from(
    [
        ("index_topk", -1),
        ("page_size", 0),
        ("page_size", -64),
        ("extent", "most"),
        ("mode", "encode"),
        ("max_len", -1),
        ("max_len", 10**6),
        ("next_n", 2),
        ("next_n", 0),
        ("seqlen_offsets", (1, 2, 3)),
        ("seqlen_offsets", (1, -2)),
        ("extend", "variable"),
        ("index_kpool", 0),
        ("page_fill", 0),
        ("page_fill", -1),
        ("checked", 1),
        ("schedule_remainder", "most"),
        ("schedule_per", "block"),
        ("schedule_atoms", -1),
        ("flashmla_order", "2024"),
        ("seq_lens_dtype", torch.float32),
        ("req_pool_indices_dtype", torch.int16),
        ("req_to_token", torch.zeros(3, 40)),
        ("req_to_token", torch.zeros(40, dtype=torch.int32)),
        ("req_to_token", torch.zeros(40, 3, dtype=torch.int32).t()),
    ]
)


@RUNS
@given(shapes(), BAD_CALLS)
def test_any_invalid_call_is_refused_and_writes_nothing(shape: Shape, wrong: tuple[str, Any]) -> None:
    name, value = wrong
    scene = Scene(LIVE, shape)
    good: dict[str, Any] = {"req_to_token": scene.req_to_token}
    with pytest.raises((ArgumentError, ConfigError), match=name):
        onelaunch.bind(support.buffers_of(scene.backends), **{**good, name: value})
    support.assert_untouched(scene.backends)


LIVE = KernelConfig(num_backends=2, target="cpu", page_size=16, index_topk=20)


def refreshed(
    config: KernelConfig, shape: Shape, lengths: list[int], rows: list[int]
) -> list[onelaunch.MetadataBuffers]:
    """The destinations after a refresh of these requests, with the tokens and tables of the shape."""
    scene = Scene(config, shape)
    plan: Any = scene.bind()
    plan.run(torch.tensor(lengths, dtype=torch.int64), torch.tensor(rows, dtype=torch.int64))
    return support.buffers_of(scene.backends)


def requests_of(shape: Shape) -> tuple[list[int], list[int]]:
    scene = Scene(LIVE, shape)
    return scene.seq_lens.tolist(), scene.req_pool_indices.tolist()


@RUNS
@given(shapes(), st.randoms(use_true_random=False))
def test_permuting_requests_permutes_rows(shape: Shape, random: Any) -> None:
    lengths, rows = requests_of(shape)
    order = list(range(len(lengths)))
    random.shuffle(order)
    before = refreshed(LIVE, shape, lengths, rows)[0]
    after = refreshed(LIVE, shape, [lengths[i] for i in order], [rows[i] for i in order])[0]
    for name in ("cache_seqlens", "nsa_cache_seqlens", "page_indices", "real_page_table"):
        assert torch.equal(getattr(after, name)[: len(order)], getattr(before, name)[order]), name


@RUNS
@given(shapes(), st.integers(0, 6))
def test_concatenating_batches_concatenates_sums(shape: Shape, at: int) -> None:
    lengths, rows = requests_of(shape)
    n = len(lengths)
    at = min(at, n)
    whole = refreshed(LIVE, shape, lengths, rows)[0]
    left = refreshed(LIVE, shape, lengths[:at], rows[:at])[0]
    right = refreshed(LIVE, shape, lengths[at:], rows[at:])[0]
    for name in ("cu_seqlens_k", "nsa_cu_seqlens_k"):
        sums = getattr(whole, name)
        assert torch.equal(sums[: at + 1], getattr(left, name)[: at + 1])
        assert torch.equal(sums[at : n + 1] - sums[at], getattr(right, name)[: n - at + 1])


@RUNS
@given(shapes(), st.integers(2, 4))
def test_adding_a_backend_changes_nothing_for_the_others(shape: Shape, count: int) -> None:
    few = refreshed(LIVE.replace(num_backends=1), shape, *requests_of(shape))
    many = refreshed(LIVE.replace(num_backends=count), shape, *requests_of(shape))
    for (field, a), (_, b) in zip(few[0].items(), many[0].items(), strict=True):
        assert torch.equal(a, b), field.name


@RUNS
@given(shapes())
def test_live_is_a_part_of_full(shape: Shape) -> None:
    live = refreshed(LIVE, shape, *requests_of(shape))[0]
    full = refreshed(LIVE.replace(extent="full"), shape, *requests_of(shape))[0]
    for (field, a), (_, b) in zip(live.items(), full.items(), strict=True):
        written = a != POISON
        assert torch.equal(a[written], b[written]), field.name
