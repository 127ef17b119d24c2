"""Any valid configuration agrees with the reference, any invalid one is refused; and what must hold between runs."""

from __future__ import annotations

from typing import Any

import onelaunch
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onelaunch import FIELDS, KernelConfig, MetadataBuffers, render
from onelaunch.errors import ArgumentError, ConfigError
from onelaunch.run.plan import make_plan
from onelaunch.spec import reference
from torch import Tensor

POISON = -858993460
VECTORS = [name for name, field in FIELDS.items() if field.kind != "table"]
DERIVED = [name for name, field in FIELDS.items() if field.kind in ("schedule", "splits", "indices")]

# A new configuration builds a kernel, so an example can take a second.
BUILDS = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
RUNS = settings(max_examples=150, deadline=None, derandomize=True)

field_sets = st.sets(st.sampled_from(sorted(FIELDS)), min_size=1).map(
    lambda names: tuple(n for n in FIELDS if n in names)
)
dtypes = st.sampled_from(["int32", "int64"])


@st.composite
def configurations(draw: st.DrawFn) -> KernelConfig:
    """Any valid configuration of the CPU target, small enough to build quickly."""
    facts: dict[str, Any] = {
        "operation": draw(st.sampled_from(["precompute_and_broadcast", "precompute_and_broadcast", "copy"])),
        "num_backends": draw(st.integers(1, 9)),
        "fields": draw(field_sets),
        "seq_lens_dtype": draw(dtypes),
        "req_pool_indices_dtype": draw(dtypes),
        "req_to_token_dtype": draw(dtypes),
        "index_topk": draw(st.sampled_from([0, 1, 7, 64, 2048])),
        "page_size": draw(st.sampled_from([1, 2, 3, 16, 48, 64, 100])),
        "extent": draw(st.sampled_from(["live", "full"])),
        "vector_bytes": draw(st.sampled_from([4, 16])),
        "unroll": draw(st.integers(1, 4)),
        "target": "cpu",
        "mode": draw(st.sampled_from(["decode", "decode", "target_verify", "draft_extend"])),
        "next_n": draw(st.integers(1, 5)),
        "extend": draw(st.sampled_from(["uniform", "variable"])),
        "extend_seq_lens_dtype": draw(dtypes),
        "index_kpool": draw(st.sampled_from([1, 1, 2, 3, 64])),
        "page_fill": draw(st.sampled_from([None, None, None, -1])),
        "checked": draw(st.booleans()),
        "schedule_remainder": draw(st.sampled_from(["last", "first"])),
        "schedule_per": draw(st.sampled_from(["request", "row"])),
        "schedule_atoms": draw(st.integers(0, 3)),
        "flashmla_order": draw(st.sampled_from(["2026", "2025"])),
    }
    # What would be refused is left out, and most of it kept.
    tables = [n for n in facts["fields"] if FIELDS[n].kind == "table"]
    refused = DERIVED if facts["operation"] == "copy" else draw(st.sampled_from([["kv_indices"], tables]))
    if "flashmla_metadata" not in facts["fields"]:
        refused = [*refused, "num_splits"]
    facts["fields"] = tuple(n for n in facts["fields"] if n not in refused) or ("cu_seqlens_k",)
    offsets = draw(st.sampled_from(["none", "none", "one", "each"]))
    if offsets != "none":
        number = st.integers(0, 9)
        count = facts["num_backends"]
        facts["seqlen_offsets"] = [draw(number)] * count if offsets == "one" else [draw(number) for _ in range(count)]
    if facts["page_fill"] is not None:
        facts["fields"] = (*(n for n in facts["fields"] if FIELDS[n].kind != "table"), "real_page_table")
        facts["extent"] = "live"
    try:
        return KernelConfig.from_dict(facts)
    except ConfigError:
        assume(False)
        raise


@st.composite
def scenes(draw: st.DrawFn) -> dict[str, Any]:
    """Lengths, rows and a pool for a few requests."""
    width = draw(st.integers(1, 90))
    bs = draw(st.integers(0, 6))
    pool_rows = draw(st.integers(1, 5))
    return {
        "width": width,
        "lengths": draw(st.lists(st.integers(0, width + 9), min_size=bs, max_size=bs)),
        "rows": draw(st.lists(st.integers(0, pool_rows - 1), min_size=bs, max_size=bs)),
        "pool_rows": pool_rows,
        "gap": draw(st.integers(0, 5)),
        "extends": draw(st.lists(st.integers(0, 5), min_size=bs, max_size=bs)),
        "seed": draw(st.integers(0, 99)),
        "sizes": {
            "paged_mqa_schedule_metadata": (draw(st.integers(1, 9)) + 1, 2),
            "flashmla_metadata": (draw(st.integers(1, 9)), 8),
            "kv_indices": (draw(st.integers(1, 300)),),
        },
    }


def table(rows: int, columns: int, stride: int) -> Tensor:
    return torch.full((rows * stride + 3,), POISON, dtype=torch.int32)[: rows * stride].view(rows, stride)[:, :columns]


def destinations(
    fields: tuple[str, ...],
    count: int,
    bs: int,
    width: int,
    page: int,
    gap: int,
    step: int,
    *,
    rows: int | None = None,
    kpool: int = 1,
    aligned: bool = False,
    sizes: dict[str, tuple[int, ...]] | None = None,
) -> Any:
    """Poisoned backends with one request (and row) to spare; ``aligned`` makes every row stride a multiple of 4."""
    out = []
    for b in range(count):
        made = {}
        for name in fields:
            kind = FIELDS[name].kind
            height = bs if rows is None or FIELDS[name].per == "request" else rows
            if kind == "table":
                tokens = {"page_indices": 1, "real_page_table": page, "pooled_real_page_table": page * kpool}[name]
                columns = -(-width // tokens)
                stride = columns + gap + step * b
                made[name] = table(height + 1, columns, -(-stride // 4) * 4 if aligned else stride)
            else:
                vector = (height + 1 + FIELDS[name].extra,)
                made[name] = torch.full((sizes or {}).get(name, vector), POISON, dtype=torch.int32)
        out.append(MetadataBuffers(**made))
    return out


def words(backend: MetadataBuffers) -> dict[str, Tensor]:
    """Each field's whole allocation, the gaps between rows included."""
    return {f.name: t._base if t._base is not None else t for f, t in backend.items()}


def refresh(config: KernelConfig, scene: dict[str, Any], lengths: list[int], rows: list[int]) -> list[MetadataBuffers]:
    """Fresh poisoned destinations after one refresh of the plan that fits the configuration."""
    width, page = scene["width"], config.page_size
    bs = len(scene["lengths"])
    rows_of = {"uniform": [config.next_n] * bs, "variable": scene["extends"]}[config.extend]

    def fresh() -> list[MetadataBuffers]:
        made: list[MetadataBuffers] = destinations(
            config.fields,
            config.num_backends,
            bs,
            width,
            page,
            scene["gap"],
            4 if config.vector_bytes == 16 else 1,
            rows=sum(rows_of) if config.mode != "decode" else None,
            kpool=config.index_kpool,
            aligned=config.vector_bytes == 16 and config.mode != "decode",
            sizes=scene["sizes"],
        )
        return made

    backends, expected = fresh(), fresh()
    generator = torch.Generator().manual_seed(scene["seed"])
    pool = torch.randint(-5, 2**30, (scene["pool_rows"], width), generator=generator)
    pool = pool.to(getattr(torch, config.req_to_token_dtype))
    offsets = config.seqlen_offsets * (config.num_backends if len(config.seqlen_offsets) == 1 else 1) or None
    facts: dict[str, Any] = {
        "mode": config.mode,
        "index_topk": config.index_topk,
        "page_size": page,
        "extent": config.extent,
        "max_len": None,
        "next_n": config.next_n,
        "seqlen_offsets": offsets,
        "index_kpool": config.index_kpool,
        "page_fill": config.page_fill,
        "schedule_remainder": config.schedule_remainder,
        "schedule_per": config.schedule_per,
        "schedule_atoms": config.schedule_atoms,
        "flashmla_order": config.flashmla_order,
    }
    settings = {
        **facts,
        "seq_lens_dtype": getattr(torch, config.seq_lens_dtype),
        "req_pool_indices_dtype": getattr(torch, config.req_pool_indices_dtype),
        "extend": config.extend,
        "extend_seq_lens_dtype": getattr(torch, config.extend_seq_lens_dtype),
        "checked": config.checked,
        "unroll": config.unroll,
    }
    made = make_plan(backends, pool, settings)
    if scene["width"] > 1:  # a single column is of any phase
        assert made.config == config or config.vector_bytes != made.config.vector_bytes, made.config.settings()
    s = torch.tensor(lengths, dtype=getattr(torch, config.seq_lens_dtype))
    r = torch.tensor(rows, dtype=getattr(torch, config.req_pool_indices_dtype))
    extends = None
    if config.extend == "variable":
        extends = torch.tensor(scene["extends"], dtype=getattr(torch, config.extend_seq_lens_dtype))
    made.run(s, r, extends)
    reference.refresh(expected, s, r, pool, extend_seq_lens=extends, **facts)
    for got, want in zip(backends, expected, strict=True):
        for (name, a), b in zip(words(got).items(), words(want).values(), strict=True):
            assert torch.equal(a, b), name
    if config.checked:
        # Lengths beyond the tables, or tokens beyond kv_indices, are the only offences here.
        longest = max(offsets or [0]) + (config.next_n if config.mode == "target_verify" else 0)
        beyond = config.needs_lengths and config.tables and any(n + longest > width for n in lengths)
        room = scene["sizes"]["kv_indices"][0]
        beyond = beyond or ("kv_indices" in config.fields and sum(lengths) + longest * len(lengths) > room)
        if beyond:
            with pytest.raises(ArgumentError, match="seq_lens"):
                made.check()
        made.check()
    return backends


@BUILDS
@given(configurations(), scenes())
def test_any_valid_configuration_agrees_with_the_reference(config: KernelConfig, scene: dict[str, Any]) -> None:
    assert render(config).count(config.symbol) >= 3
    if config.operation == "precompute_and_broadcast":
        refresh(config, scene, scene["lengths"], scene["rows"])
        return
    bs, width = len(scene["lengths"]), scene["width"]
    step = 4 if config.vector_bytes == 16 else 1
    rows = sum(scene["extends"]) if config.mode != "decode" else None
    backends = destinations(config.fields, config.num_backends, bs, width, 16, scene["gap"], step, rows=rows)
    expected = destinations(config.fields, config.num_backends, bs, width, 16, scene["gap"], step, rows=rows)
    source = destinations(config.fields, 1, bs, width, 16, scene["seed"] % 4, 0, rows=rows)[0]
    generator = torch.Generator().manual_seed(scene["seed"])
    for _, tensor in source.items():
        tensor.copy_(torch.randint(-9, 2**30, tensor.shape, dtype=torch.int32, generator=generator))
    onelaunch.fused_metadata_copy_cuda(source, backends, bs=bs, mode=config.mode, rows=rows)
    reference.copy(source, expected, bs=bs, rows=rows)
    for got, want in zip(backends, expected, strict=True):
        for (name, a), b in zip(words(got).items(), words(want).values(), strict=True):
            assert torch.equal(a, b), name


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
@given(scenes(), BAD_CALLS)
def test_any_invalid_call_is_refused_and_writes_nothing(scene: dict[str, Any], wrong: tuple[str, Any]) -> None:
    name, value = wrong
    backends = destinations(tuple(FIELDS)[:6], 2, len(scene["lengths"]), scene["width"], 64, scene["gap"], 4)
    good: dict[str, Any] = {"req_to_token": torch.zeros((2, scene["width"]), dtype=torch.int32)}
    with pytest.raises((ArgumentError, ConfigError), match=name):
        onelaunch.bind(backends, **{**good, name: value})
    for backend in backends:
        for whole in words(backend).values():
            assert bool((whole == POISON).all())


MAIN = KernelConfig(num_backends=2, target="cpu", page_size=16, index_topk=20)


@RUNS
@given(scenes(), st.randoms(use_true_random=False))
def test_permuting_requests_permutes_rows(scene: dict[str, Any], random: Any) -> None:
    n = len(scene["lengths"])
    order = list(range(n))
    random.shuffle(order)
    before = refresh(MAIN, scene, scene["lengths"], scene["rows"])[0]
    after = refresh(MAIN, scene, [scene["lengths"][i] for i in order], [scene["rows"][i] for i in order])[0]
    for name in ("cache_seqlens", "nsa_cache_seqlens", "page_indices", "real_page_table"):
        assert torch.equal(getattr(after, name)[:n], getattr(before, name)[order]), name


@RUNS
@given(scenes(), st.integers(0, 6))
def test_concatenating_batches_concatenates_sums(scene: dict[str, Any], at: int) -> None:
    n = len(scene["lengths"])
    at = min(at, n)
    whole = refresh(MAIN, scene, scene["lengths"], scene["rows"])[0]
    left = refresh(MAIN, scene, scene["lengths"][:at], scene["rows"][:at])[0]
    right = refresh(MAIN, scene, scene["lengths"][at:], scene["rows"][at:])[0]
    for name in ("cu_seqlens_k", "nsa_cu_seqlens_k"):
        sums = getattr(whole, name)
        assert torch.equal(sums[: at + 1], getattr(left, name)[: at + 1])
        assert torch.equal(sums[at : n + 1] - sums[at], getattr(right, name)[: n - at + 1])


@RUNS
@given(scenes(), st.integers(2, 4))
def test_adding_a_backend_changes_nothing_for_the_others(scene: dict[str, Any], count: int) -> None:
    few = refresh(MAIN.replace(num_backends=1), scene, scene["lengths"], scene["rows"])
    many = refresh(MAIN.replace(num_backends=count), scene, scene["lengths"], scene["rows"])
    for (field, a), (_, b) in zip(few[0].items(), many[0].items(), strict=True):
        assert torch.equal(a, b), field.name


@RUNS
@given(scenes())
def test_live_is_a_part_of_full(scene: dict[str, Any]) -> None:
    live = refresh(MAIN, scene, scene["lengths"], scene["rows"])[0]
    full = refresh(MAIN.replace(extent="full"), scene, scene["lengths"], scene["rows"])[0]
    for (field, a), (_, b) in zip(live.items(), full.items(), strict=True):
        written = a != POISON
        assert torch.equal(a[written], b[written]), field.name
