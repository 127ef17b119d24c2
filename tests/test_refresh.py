"""The refresh and the three functions against the reference: dtypes, fields, batches, strides, extents, sharing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import onelaunch
import pytest
import support
import torch
from onelaunch import FIELDS, MetadataBuffers
from onelaunch.spec import reference
from support import ALL_FIELDS, DTYPES, POISON, SIX_FIELDS, TABLES, Poisoned, assert_same, assert_untouched
from torch import Tensor

BATCHES = (0, 1, 2, 3, 5, 6, 7, 31, 32, 33, 100, 255, 256, 257, 1000, 4097)
BACKENDS = (1, 2, 3, 4, 7, 8, 9, 16, 64)
PAGE_SIZES = (1, 16, 64, 3, 48)
EXTENTS = ("live", "full")
POOL_ROWS = 61

FIELD_SETS: tuple[tuple[str, ...], ...] = (
    *((name,) for name in ALL_FIELDS),
    ("cache_seqlens", "cu_seqlens_k"),
    ("cache_seqlens", "seqlens_expanded"),
    ("nsa_cache_seqlens", "nsa_cu_seqlens_k"),
    ("cu_seqlens_k", "real_page_table"),
    ("page_indices", "nsa_cu_seqlens_k"),
    TABLES,
    SIX_FIELDS,
    ALL_FIELDS,
)


def has_kernel(case: dict[str, Any]) -> bool:
    """With pages of one token, real_page_table alone is refused: it would be page_indices."""
    fields = case.get("fields", ())
    return not (case.get("page_size") == 1 and "real_page_table" in fields and "page_indices" not in fields)


CASES = support.all_pairs(
    {
        "extent": EXTENTS,
        "n": BACKENDS,
        "fields": FIELD_SETS,
        "page_size": PAGE_SIZES,
        "seq_lens_dtype": DTYPES,
        "pool_dtype": DTYPES,
        "token_dtype": DTYPES,
        "strides": ("aligned", "odd"),
        "inputs": ("plain", "strided", "expanded"),
    },
    has_kernel,
)


def width_for(bs: int, n: int) -> int:
    """Wide enough for whole tiles of either target where that is affordable."""
    return 1101 if bs * n <= 600 else 141


def inputs_for(
    bs: int,
    width: int,
    page_size: int,
    layout: str,
    device: torch.device,
    seq_lens_dtype: torch.dtype = torch.int64,
    pool_dtype: torch.dtype = torch.int64,
) -> tuple[Tensor, Tensor]:
    """seq_lens and req_pool_indices: "plain", "strided" (every other element), or "expanded" (one length, stride 0)."""
    rows = support.vector(
        support.pool_rows(bs, POOL_ROWS), pool_dtype, device, "plain" if layout == "plain" else "strided"
    )
    if layout == "expanded":
        length = support.lengths(11, width, page_size)[bs % 11]
        return torch.tensor([length], dtype=seq_lens_dtype, device=device).expand(bs), rows
    return support.vector(support.lengths(bs, width, page_size), seq_lens_dtype, device, layout), rows


def check_refresh(
    device: torch.device,
    *,
    n: int = 3,
    fields: Sequence[str] = SIX_FIELDS,
    page_size: int = 64,
    extent: str = "live",
    seq_lens_dtype: torch.dtype = torch.int64,
    pool_dtype: torch.dtype = torch.int64,
    token_dtype: torch.dtype = torch.int32,
    strides: str = "odd",
    inputs: str = "plain",
    bs: int = 7,
    index_topk: int = 100,
    width: int | None = None,
    pool_width: int | None = None,
    offset: int = 0,
    pool_offset: int = 0,
    max_len: int | None = None,
) -> onelaunch.Plan:
    """Binds N poisoned backends with three rows to spare, refreshes ``bs`` requests, compares every word."""
    width = width or width_for(bs, n)
    pool = support.token_pool(
        POOL_ROWS, pool_width or width, dtype=token_dtype, strides=strides, offset=pool_offset, device=device
    )
    # Strides that differ from backend to backend, by whole 16 bytes: rows keep one phase.
    backends = [
        support.destination(
            fields, bs + 3, width, page_size, strides=strides, extra_stride=4 * (b % 3), offset=offset, device=device
        )
        for b in range(n)
    ]
    plan = onelaunch.bind(
        support.buffers_of(backends),
        req_to_token=pool,
        index_topk=index_topk,
        page_size=page_size,
        extent=extent,
        max_len=max_len,
        seq_lens_dtype=seq_lens_dtype,
        req_pool_indices_dtype=pool_dtype,
    )
    assert plan.config.num_backends == n
    assert plan.config.target == device.type
    seq_lens, req_pool_indices = inputs_for(bs, width, page_size, inputs, device, seq_lens_dtype, pool_dtype)
    plan.run(seq_lens, req_pool_indices)
    expected = support.expected_refresh(
        backends,
        seq_lens,
        req_pool_indices,
        pool,
        index_topk=index_topk,
        page_size=page_size,
        extent=extent,
        max_len=max_len,
    )
    assert_same(backends, expected)
    return plan


# ----------------------------------------------------------------------------------------------- the matrix


@pytest.mark.usefixtures("quick_builds")
@pytest.mark.parametrize("index", range(len(CASES)), ids=[support.case_name(case) for case in CASES])
def test_any_two_facts_together(device: torch.device, index: int) -> None:
    """Any two of extent, N, fields, page size, dtypes, strides and input layouts meet in one of these."""
    case = CASES[index]
    for bs in (BATCHES[index % 16], BATCHES[(5 * index + 3) % 16], 33):
        if bs * case["n"] <= 70_000:
            narrower = width_for(bs, case["n"]) - 9 if index % 2 else None
            check_refresh(device, **case, bs=bs, pool_width=narrower)


def test_the_cases_hold_every_value_with_both_extents() -> None:
    for extent in EXTENTS:
        of_extent = [case for case in CASES if case["extent"] == extent]
        assert {case["n"] for case in of_extent} == set(BACKENDS)
        assert {case["fields"] for case in of_extent} == set(FIELD_SETS)
        assert {case["page_size"] for case in of_extent} == set(PAGE_SIZES)
        for name in ("seq_lens_dtype", "pool_dtype", "token_dtype"):
            assert {case[name] for case in of_extent} == set(DTYPES)


@pytest.mark.parametrize("bs", BATCHES)
@pytest.mark.parametrize("strides", ["aligned", "odd"])
@pytest.mark.parametrize("extent", EXTENTS)
def test_every_batch_size(device: torch.device, extent: str, strides: str, bs: int) -> None:
    check_refresh(device, extent=extent, strides=strides, bs=bs)
    check_refresh(device, extent=extent, strides=strides, bs=bs, fields=ALL_FIELDS, inputs="strided")


@pytest.mark.parametrize("bs", BATCHES)
def test_every_batch_size_of_the_preset_kernels(device: torch.device, bs: int) -> None:
    """Fields without page_indices go page by page, and fields without tables take one block."""
    check_refresh(device, bs=bs, fields=("cu_seqlens_k", "real_page_table"), extent="live")
    check_refresh(device, bs=bs, fields=("cache_seqlens", "cu_seqlens_k", "nsa_cache_seqlens", "nsa_cu_seqlens_k"))


@pytest.mark.parametrize("extent", EXTENTS)
def test_65536_requests_of_64_backends(device: torch.device, extent: str) -> None:
    fields = ("cache_seqlens", "cu_seqlens_k", "page_indices")
    plan = check_refresh(device, n=64, fields=fields, bs=65_536, width=5, page_size=2, extent=extent, strides="odd")
    assert plan.capacity == 65_539


# ----------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize(("offset", "pool_offset"), list(product(range(4), range(4))))
def test_every_16_byte_phase(device: torch.device, offset: int, pool_offset: int, extent: str) -> None:
    """Destination and source rows begin at every distance from a 16-byte boundary."""
    for strides in ("aligned", "odd"):
        plan = check_refresh(device, bs=9, offset=offset, pool_offset=pool_offset, extent=extent, strides=strides)
        assert plan.config.vector_bytes == 16


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("max_len", [0, 1, 63, 64, 65, 500, 1100, 1101])
def test_max_len(device: torch.device, max_len: int, extent: str) -> None:
    check_refresh(device, bs=12, width=1101, max_len=max_len, extent=extent)
    check_refresh(device, bs=12, width=1101, max_len=max_len, extent=extent, fields=("cu_seqlens_k", "real_page_table"))


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 511, 512, 513, 516, 520, 1030])
def test_widths(device: torch.device, width: int, extent: str) -> None:
    """Around the tiles of both targets: 16 columns on the CPU, 512 on a GPU."""
    check_refresh(device, bs=1, width=width, extent=extent)
    check_refresh(device, bs=13, width=width, extent=extent)
    check_refresh(device, bs=13, width=width, pool_width=width + 3, extent=extent, offset=1)


@pytest.mark.parametrize("extent", EXTENTS)
def test_tables_without_columns(device: torch.device, extent: str) -> None:
    pool = support.token_pool(5, 40, device=device)
    tables = {"page_indices": torch.empty(4, 0, dtype=torch.int32, device=device)}
    cache, storage = support.guarded(4, device=device)
    backend = Poisoned(MetadataBuffers(cache_seqlens=cache, **tables), {"cache_seqlens": storage})
    plan = onelaunch.bind([backend.buffers], req_to_token=pool, extent=extent)
    plan.run(torch.tensor([3, 4], device=device), torch.tensor([1, 2], device=device))
    assert storage[support.GUARD : support.GUARD + 4].tolist() == [3, 4, POISON, POISON]


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("page_size", [2, 1_000, 2**30, 2**31 - 1])
def test_large_pages(device: torch.device, page_size: int, extent: str) -> None:
    check_refresh(device, bs=9, page_size=page_size, extent=extent)
    check_refresh(device, bs=9, page_size=page_size, extent=extent, fields=("real_page_table",))


@pytest.mark.parametrize("index_topk", [0, 1, 2048, 2**31 - 1])
def test_index_topk(device: torch.device, index_topk: int) -> None:
    check_refresh(device, bs=40, index_topk=index_topk)


# --------------------------------------------------------------------------------------- backends that differ


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("difference", ["offset", "stride", "both"])
def test_rows_with_different_16_byte_phases(device: torch.device, difference: str, extent: str) -> None:
    """Backends whose rows aren't congruent get 4-byte stores, and are right."""
    bs, width, page_size = 9, 1101, 64
    pool = support.token_pool(POOL_ROWS, width, strides="odd", device=device)
    backends = [
        support.destination(
            SIX_FIELDS,
            bs + b,
            width,
            page_size,
            extra_stride=b if difference != "offset" else 0,
            offset=b if difference != "stride" else 0,
            device=device,
        )
        for b in range(3)
    ]
    plan = onelaunch.bind(support.buffers_of(backends), req_to_token=pool, index_topk=100, extent=extent)
    assert plan.config.vector_bytes == 4
    assert plan.capacity == bs
    seq_lens, rows = inputs_for(bs, width, page_size, "plain", device)
    plan.run(seq_lens, rows)
    for backend in backends:
        facts = {"index_topk": 100, "page_size": page_size, "extent": extent}
        assert_same([backend], support.expected_refresh([backend], seq_lens, rows, pool, **facts))


@pytest.mark.parametrize("extent", EXTENTS)
def test_shared_destinations_are_written_once(device: torch.device, extent: str) -> None:
    bs, width, page_size = 33, 300, 16
    pool = support.token_pool(POOL_ROWS, width, strides="odd", device=device)
    backends = [support.destination(SIX_FIELDS, bs, width, page_size, device=device) for _ in range(4)]

    def share(name: str, first: int, *others: int) -> None:
        for other in others:
            setattr(backends[other].buffers, name, getattr(backends[first].buffers, name))
            backends[other].storages[name] = backends[first].storages[name]

    share("cache_seqlens", 0, 1, 2, 3)
    share("nsa_cu_seqlens_k", 1, 3)
    share("page_indices", 0, 1, 2, 3)
    share("real_page_table", 2, 3)
    plan = onelaunch.bind(
        support.buffers_of(backends), req_to_token=pool, index_topk=100, page_size=page_size, extent=extent
    )
    assert dict(plan.config.distinct) == {
        "cache_seqlens": 1,
        "page_indices": 1,
        "nsa_cu_seqlens_k": 3,
        "real_page_table": 3,
    }
    seq_lens, rows = inputs_for(bs, width, page_size, "plain", device)
    plan.run(seq_lens, rows)
    facts = {"index_topk": 100, "page_size": page_size, "extent": extent}
    assert_same(backends, support.expected_refresh(backends, seq_lens, rows, pool, **facts))


@pytest.mark.parametrize(
    "mode", [{"next_n": 3, "mode": "target_verify"}, {"mode": "draft_extend", "next_n": 2}], ids=str
)
def test_shared_rows_are_written_once(device: torch.device, mode: dict[str, Any]) -> None:
    bs, width = 20, 300
    pool = support.token_pool(POOL_ROWS, width, strides="odd", device=device)
    backends = [support.destination(ALL_FIELDS, bs * 3, width, 16, index_kpool=2, device=device) for _ in range(3)]
    for name in ("nsa_cache_seqlens", "seqlens_expanded", "page_indices", "pooled_real_page_table"):
        for backend in backends[1:]:
            setattr(backend.buffers, name, getattr(backends[0].buffers, name))
            backend.storages[name] = backends[0].storages[name]
    facts: dict[str, Any] = {"index_topk": 100, "page_size": 16, "extent": "live", "index_kpool": 2, **mode}
    plan = onelaunch.bind(support.buffers_of(backends), req_to_token=pool, **facts)
    assert set(dict(plan.config.distinct).values()) == {1}
    assert len(plan.config.distinct) == 4
    seq_lens, rows = inputs_for(bs, width, 16, "plain", device)
    plan.run(seq_lens, rows)
    assert_same(backends, support.expected_refresh(backends, seq_lens, rows, pool, **facts))


def test_the_same_memory_under_two_tensors_counts_as_shared(device: torch.device) -> None:
    table = torch.full((4, 80), POISON, dtype=torch.int32, device=device)
    pool = support.token_pool(5, 80, device=device)
    plan = onelaunch.bind(
        [MetadataBuffers(page_indices=table), MetadataBuffers(page_indices=table[:])], req_to_token=pool
    )
    assert dict(plan.config.distinct) == {"page_indices": 1}


def test_expanded_lengths_that_are_cache_seqlens_are_not_a_field_of_their_own(device: torch.device) -> None:
    """Engines hand over one tensor under both names in decode."""
    backend = support.destination(SIX_FIELDS, 5, 80, 16, device=device)
    backend.buffers.seqlens_expanded = backend.buffers.cache_seqlens
    backend.storages["seqlens_expanded"] = backend.storages["cache_seqlens"]
    pool = support.token_pool(POOL_ROWS, 80, device=device)
    plan = onelaunch.bind([backend.buffers], req_to_token=pool, index_topk=9, page_size=16)
    assert plan.config.fields == SIX_FIELDS
    seq_lens, rows = inputs_for(5, 80, 16, "plain", device)
    plan.run(seq_lens, rows)
    facts = {"index_topk": 9, "page_size": 16, "extent": "live"}
    assert_same([backend], support.expected_refresh([backend], seq_lens, rows, pool, **facts))


def test_interleaved_column_slices_of_one_table(device: torch.device) -> None:
    """Backends may own column ranges of one allocation: nobody's columns are written by another."""
    bs, width = 6, 40
    table = torch.full((bs + 1, 3 * width + 1), POISON, dtype=torch.int32, device=device)
    slices = [table[:, b * width : (b + 1) * width] for b in range(3)]
    pool = support.token_pool(POOL_ROWS, width, device=device)
    plan = onelaunch.bind([MetadataBuffers(page_indices=s) for s in slices], req_to_token=pool)
    seq_lens, rows = inputs_for(bs, width, 1, "plain", device)
    plan.run(seq_lens, rows)
    wanted = torch.full(table.shape, POISON, dtype=torch.int32)
    reference.refresh(
        [MetadataBuffers(page_indices=wanted[:, b * width : (b + 1) * width]) for b in range(3)],
        seq_lens.cpu(),
        rows.cpu(),
        pool.cpu(),
        index_topk=1,
        page_size=1,
        extent="live",
    )
    assert torch.equal(table.cpu(), wanted)


# ----------------------------------------------------------------------------------------------- reuse


@pytest.mark.parametrize("extent", EXTENTS)
def test_a_plan_is_reused_with_other_batches_inputs_and_bounds(device: torch.device, extent: str) -> None:
    width, page_size, capacity = 200, 16, 300
    pool = support.token_pool(POOL_ROWS, width, strides="odd", device=device)
    backends = [support.destination(SIX_FIELDS, capacity, width, page_size, device=device) for _ in range(3)]
    plan = onelaunch.bind(
        support.buffers_of(backends), req_to_token=pool, index_topk=50, page_size=page_size, extent=extent
    )
    assert plan.launches == 0
    wanted = support.plain_copy(backends[0].buffers)
    # Nothing is cleared between calls: what an earlier, larger batch wrote stays where a later one writes nothing.
    for step, (bs, layout, max_len) in enumerate(
        [(300, "plain", None), (1, "plain", None), (0, "plain", None), (257, "strided", 77), (256, "expanded", 0),
         (33, "strided", None), (300, "expanded", 200)]
    ):  # fmt: skip
        seq_lens, rows = inputs_for(bs, width, page_size, layout, device)
        plan.run(seq_lens, rows, max_len=max_len)
        reference.refresh(
            [wanted],
            seq_lens.cpu(),
            rows.cpu(),
            pool.cpu(),
            index_topk=50,
            page_size=page_size,
            extent=extent,
            max_len=max_len,
        )
        assert_same(backends, wanted)
        assert plan.launches == step + 1


def test_inputs_changed_in_place_are_read_again(device: torch.device) -> None:
    """The plan remembers that it checked these tensors, not what was in them: a captured step updates them in place."""
    backend = support.destination(SIX_FIELDS, 3, 200, 16, device=device)
    pool = support.token_pool(POOL_ROWS, 200, device=device)
    plan = onelaunch.bind([backend.buffers], req_to_token=pool, index_topk=50, page_size=16, extent="full")
    seq_lens, rows = inputs_for(3, 200, 16, "plain", device)
    for step in range(4):
        plan.run(seq_lens, rows)
        facts = {"index_topk": 50, "page_size": 16, "extent": "full"}
        assert_same([backend], support.expected_refresh([backend], seq_lens, rows, pool, **facts))
        seq_lens += step + 1
        rows.copy_(rows.roll(1))
        pool[1:9] += 64


def test_a_refused_call_leaves_the_plan_usable(device: torch.device) -> None:
    backend = support.destination(("cache_seqlens",), 3, 0, 1, device=device)
    plan = onelaunch.bind([backend.buffers], req_to_token=support.token_pool(2, 4, device=device))
    seq_lens = torch.tensor([5, 6], device=device)
    with pytest.raises(onelaunch.ArgumentError):
        plan.run(seq_lens.repeat(2), seq_lens.repeat(2))
    assert_untouched([backend])
    assert plan.launches == 0
    plan.run(seq_lens, seq_lens)
    assert backend.buffers.cache_seqlens is not None
    assert backend.buffers.cache_seqlens.tolist() == [5, 6, POISON]


# ------------------------------------------------------------------------------------- the three functions


def lists_of(backends: Sequence[Poisoned]) -> list[list[Tensor] | None]:
    """The out-lists in the order of the signature."""
    return [
        None if getattr(backends[0].buffers, name) is None else [getattr(b.buffers, name) for b in backends]
        for name in SIX_FIELDS
    ]


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("n", [1, 3, 7])
def test_precompute_and_broadcast(device: torch.device, n: int, page_size: int) -> None:
    pool = support.token_pool(POOL_ROWS, 1_000, strides="odd", device=device)
    for bs, max_len, extent in ((0, 9, None), (1, 1, None), (7, 1000, "full"), (33, 640, "live"), (257, 65, "full")):
        backends = [
            support.destination(SIX_FIELDS, bs + 1, 1_000, page_size, strides="odd", device=device) for _ in range(n)
        ]
        seq_lens, rows = inputs_for(bs, max_len, page_size, "plain", device)
        chosen = {} if extent is None else {"extent": extent}
        for _ in range(2):  # the second call takes the remembered plan
            onelaunch.fused_metadata_precompute_and_broadcast_cuda(
                seq_lens,
                rows,
                pool,
                *lists_of(backends),
                max_len=max_len,
                nsa_index_topk=100,
                real_page_size=page_size,
                **chosen,
            )
            expected = support.expected_refresh(
                backends,
                seq_lens,
                rows,
                pool,
                index_topk=100,
                page_size=page_size,
                extent=extent or "full",
                max_len=max_len,
            )
            assert_same(backends, expected)


@pytest.mark.parametrize("left_out", [*SIX_FIELDS, "everything but cu_seqlens_k"])
def test_a_list_that_is_none_is_left_out(device: torch.device, left_out: str) -> None:
    keep = ("cu_seqlens_k",) if left_out not in SIX_FIELDS else tuple(f for f in SIX_FIELDS if f != left_out)
    pool = support.token_pool(POOL_ROWS, 300, device=device)
    backends = [support.destination(keep, 9, 300, 64, device=device) for _ in range(2)]
    seq_lens, rows = inputs_for(8, 300, 64, "plain", device)
    onelaunch.fused_metadata_precompute_and_broadcast_cuda(
        seq_lens, rows, pool, *lists_of(backends), max_len=300, nsa_index_topk=100, real_page_size=64
    )
    facts = {"index_topk": 100, "page_size": 64, "extent": "full"}
    assert_same(backends, support.expected_refresh(backends, seq_lens, rows, pool, **facts))


@pytest.mark.parametrize("page_size", [1, 3, 64])
def test_precompute_allocates_exact_shapes(device: torch.device, page_size: int) -> None:
    pool = support.token_pool(POOL_ROWS, 300, strides="odd", device=device)
    for bs, max_len in ((0, 5), (1, 300), (33, 65)):
        seq_lens, rows = inputs_for(bs, max_len, page_size, "plain", device)
        made = onelaunch.precompute_decode_metadata_cuda(
            seq_lens, rows, pool, max_len=max_len, nsa_index_topk=100, real_page_size=page_size
        )
        assert made.seqlens_expanded is made.cache_seqlens
        assert (made.real_page_table is made.page_indices) == (page_size == 1)
        shapes = {field.name: tuple(tensor.shape) for field, tensor in made.items()}
        assert shapes == {
            "cache_seqlens": (bs,),
            "cu_seqlens_k": (bs + 1,),
            "page_indices": (bs, max_len),
            "nsa_cache_seqlens": (bs,),
            "nsa_cu_seqlens_k": (bs + 1,),
            "real_page_table": (bs, support.page_columns(max_len, page_size)),
            "seqlens_expanded": (bs,),
        }
        wanted = support.plain_copy(made)
        if page_size == 1:
            wanted.real_page_table = None
        for _, tensor in wanted.items():
            tensor.fill_(POISON)
        reference.refresh(
            [wanted],
            seq_lens.cpu(),
            rows.cpu(),
            pool.cpu(),
            index_topk=100,
            page_size=page_size,
            extent="full",
            max_len=max_len,
        )
        for field, tensor in wanted.items():
            assert torch.equal(getattr(made, field.name).cpu(), tensor), field.name


def test_a_destination_that_changed_in_place_is_noticed(device: torch.device) -> None:
    """The functions find their plan by what the tensors are at each call, whichever objects they are."""
    pool = support.token_pool(POOL_ROWS, 300, device=device)
    seq_lens, rows = inputs_for(3, 100, 64, "plain", device)
    memory = torch.full((8 * 300,), POISON, dtype=torch.int32, device=device)
    table, copied = memory[: 4 * 300].view(4, 300), torch.full((4, 300), POISON, dtype=torch.int32, device=device)
    numbers = {"nsa_index_topk": 100, "real_page_size": 64, "max_len": 100}
    for size, stride in (((4, 300), (300, 1)), ((4, 100), (300, 1)), ((4, 100), (100, 1)), ((3, 100), (250, 1))):
        table.as_strided_(size, stride)
        copied.as_strided_(size, stride)
        expected = reference_table(seq_lens, rows, pool)
        for call in (
            lambda: onelaunch.fused_metadata_precompute_and_broadcast_cuda(
                seq_lens, rows, pool, None, None, [table], None, None, **numbers
            ),
            lambda: onelaunch.precompute_decode_metadata_cuda(
                seq_lens, rows, pool, out=MetadataBuffers(page_indices=table), **numbers
            ),
        ):
            memory.fill_(POISON)
            call()
            assert torch.equal(table[:3, :100].cpu(), expected)
            assert int((memory != POISON).sum()) == 300
        onelaunch.fused_metadata_copy_cuda(
            MetadataBuffers(page_indices=table), MetadataBuffers(page_indices=copied), bs=3, max_len=100
        )
        assert torch.equal(copied[:3, :100].cpu(), expected)
    table.resize_(4, 99)
    memory.fill_(POISON)
    with pytest.raises(onelaunch.ArgumentError, match="max_len is 100"):
        onelaunch.fused_metadata_precompute_and_broadcast_cuda(
            seq_lens, rows, pool, None, None, [table], None, None, **numbers
        )
    assert (memory == POISON).all()


def reference_table(seq_lens: Tensor, rows: Tensor, pool: Tensor) -> Tensor:
    """The first 100 columns of the requests' rows, which extent "full" writes."""
    return pool.cpu()[rows.cpu().long(), :100].clone()


def test_precompute_into_given_buffers(device: torch.device) -> None:
    pool = support.token_pool(POOL_ROWS, 300, device=device)
    seq_lens, rows = inputs_for(20, 200, 16, "plain", device)
    for fields in (ALL_FIELDS, ("cu_seqlens_k", "real_page_table")):
        out = support.destination(fields, 22, 300, 16, strides="odd", device=device)
        made = onelaunch.precompute_decode_metadata_cuda(
            seq_lens, rows, pool, max_len=200, nsa_index_topk=100, real_page_size=16, out=out.buffers
        )
        assert made is out.buffers
        facts = {"index_topk": 100, "page_size": 16, "extent": "full", "max_len": 200}
        assert_same([out], support.expected_refresh([out], seq_lens, rows, pool, **facts))


def precomputed_for(
    bs: int, width: int, page_size: int, device: torch.device, fields: Sequence[str] = ALL_FIELDS, offset: int = 0
) -> MetadataBuffers:
    """Random numbers in every field: a copy must not depend on what they mean."""
    source = support.destination(fields, bs, width, page_size, strides="odd", offset=offset, device=device).buffers
    numbers = torch.Generator().manual_seed(bs + width)
    for _, tensor in source.items():
        tensor.copy_(torch.randint(-(2**31), 2**31 - 1, tensor.shape, generator=numbers, dtype=torch.int64))
    return source


def check_copy(
    source: MetadataBuffers,
    backends: Sequence[Poisoned],
    *,
    rows: int,
    columns: int | None = None,
    pages: int | None = None,
    one: bool = False,
    **arguments: Any,
) -> None:
    targets = support.buffers_of(backends)
    onelaunch.fused_metadata_copy_cuda(source, targets[0] if one else targets, **arguments)
    for backend in backends:
        wanted = support.plain_copy(backend.buffers)
        for _, tensor in wanted.items():
            tensor.fill_(POISON)
        reference.copy(support.plain_copy(source), [wanted], bs=rows, columns=columns, page_columns=pages)
        assert_same([backend], wanted)


@pytest.mark.parametrize("n", BACKENDS)
def test_copy_to_n(device: torch.device, n: int) -> None:
    for bs, width in ((1, 1), (7, 1_101), (33, 90), (257, 17)):
        source = precomputed_for(bs, width, 16, device)
        backends = [
            support.destination(ALL_FIELDS, bs + b % 2, width + 7, 16, extra_stride=4 * (b % 3), device=device)
            for b in range(n)
        ]
        check_copy(source, backends, rows=bs, one=n == 1)


@pytest.mark.parametrize("bs", BATCHES)
def test_copy_of_every_batch_size(device: torch.device, bs: int) -> None:
    source = precomputed_for(bs + 2, 65, 16, device)
    backends = [support.destination(ALL_FIELDS, bs + 1, 65, 16, strides="odd", device=device) for _ in range(3)]
    check_copy(source, backends, rows=bs, bs=bs)


@pytest.mark.parametrize("fields", FIELD_SETS, ids="+".join)
def test_copy_of_fields(device: torch.device, fields: tuple[str, ...]) -> None:
    """The source may have more fields than the destinations."""
    source = precomputed_for(33, 200, 16, device)
    backends = [support.destination(fields, 33, 200, 16, device=device) for _ in range(2)]
    check_copy(source, backends, rows=33)


@pytest.mark.parametrize(("offset", "source_offset"), list(product(range(4), range(4))))
def test_copy_of_every_16_byte_phase(device: torch.device, offset: int, source_offset: int) -> None:
    source = precomputed_for(9, 1_101, 16, device, offset=source_offset)
    for strides in ("aligned", "odd"):
        backends = [
            support.destination(ALL_FIELDS, 9, 1_101, 16, strides=strides, offset=offset, device=device)
            for _ in range(3)
        ]
        check_copy(source, backends, rows=9)
    incongruent = [
        support.destination(ALL_FIELDS, 9, 1_101, 16, offset=(offset + b) % 4, device=device) for b in range(3)
    ]
    check_copy(source, incongruent, rows=9)


def test_copy_of_a_part(device: torch.device) -> None:
    source = precomputed_for(20, 200, 16, device)

    def fresh(width: int = 210) -> list[Poisoned]:
        return [support.destination(SIX_FIELDS, 20, width, 16, device=device) for _ in range(3)]

    check_copy(source, fresh(), rows=0, bs=0)
    check_copy(source, fresh(), rows=5, bs=5, columns=0, pages=0, max_len=0, real_page_size=16)
    check_copy(source, fresh(), rows=20, columns=70, max_len=70)
    check_copy(source, fresh(), rows=20, columns=70, pages=5, max_len=70, real_page_size=16)
    check_copy(source, fresh(70), rows=19, bs=19, columns=70, pages=5, max_len=70, real_page_size=16)


def test_copy_of_pages_of_one_token(device: torch.device) -> None:
    """With pages of one token both names are one tensor, in the source and in the destinations."""
    source = precomputed_for(6, 50, 1, device, SIX_FIELDS)
    backends = [support.destination(SIX_FIELDS, 6, 50, 1, device=device) for _ in range(2)]
    check_copy(source, backends, rows=6)


def test_precompute_then_copy_is_the_broadcast(device: torch.device) -> None:
    """The two ways to the same metadata agree, whatever the page size."""
    pool = support.token_pool(POOL_ROWS, 300, strides="odd", device=device)
    seq_lens, rows = inputs_for(31, 300, 64, "plain", device)
    for page_size in (1, 64):
        one_way, other = (
            [support.destination(SIX_FIELDS, 31, 300, page_size, device=device) for _ in range(3)] for _ in range(2)
        )
        made = onelaunch.precompute_decode_metadata_cuda(
            seq_lens, rows, pool, max_len=300, nsa_index_topk=100, real_page_size=page_size
        )
        onelaunch.fused_metadata_copy_cuda(made, support.buffers_of(one_way))
        onelaunch.fused_metadata_precompute_and_broadcast_cuda(
            seq_lens, rows, pool, *lists_of(other), max_len=300, nsa_index_topk=100, real_page_size=page_size
        )
        for a, b in zip(one_way, other, strict=True):
            assert_same([a], support.plain_copy(b.buffers))


# ------------------------------------------------------------------------------------------- forward modes

ROW_MODES: dict[str, dict[str, Any]] = {
    "verify 1": {"mode": "target_verify", "next_n": 1},
    "verify 4": {"mode": "target_verify", "next_n": 4},
    "extend 3": {"mode": "draft_extend", "next_n": 3},
    "variable": {"mode": "draft_extend", "extend": "variable"},
    "variable int32": {"mode": "draft_extend", "extend": "variable", "extend_seq_lens_dtype": torch.int32},
}
KPOOL_FIELDS = tuple(name for name in ALL_FIELDS if name != "seqlens_expanded")


def extend_lengths(bs: int, dtype: torch.dtype, device: torch.device, layout: str = "plain") -> Tensor:
    """Zeros among them, at the ends of windows too."""
    return support.vector([(0, 3, 1, 0, 2, 7, 0)[i % 7] for i in range(bs)], dtype, device, layout)


def check_rows(
    device: torch.device,
    mode: dict[str, Any],
    *,
    bs: int,
    n: int = 2,
    fields: Sequence[str] = support.SEVEN_FIELDS,
    page_size: int = 16,
    extent: str = "live",
    strides: str = "aligned",
    inputs: str = "plain",
    width: int = 333,
    max_len: int | None = None,
    **more: Any,
) -> onelaunch.Plan:
    """As check_refresh, for requests of several rows, with a request and a row to spare."""
    facts = {
        "index_topk": 100,
        "page_size": page_size,
        "extent": extent,
        "max_len": max_len,
        **{name: value for name, value in mode.items() if name in ("mode", "next_n")},
        **more,
    }
    extends = None
    if "extend" in mode:
        extends = extend_lengths(bs, mode.get("extend_seq_lens_dtype", torch.int64), device, inputs)
    rows = bs * mode.get("next_n", 1) if extends is None else int(extends.sum())
    pool = support.token_pool(POOL_ROWS, width, strides="odd", device=device)
    spare = mode.get("next_n", 1)
    backends = [
        support.destination(
            fields,
            rows + spare,
            width,
            page_size,
            strides=strides,
            extra_stride=4 * b,
            device=device,
            requests=bs + 1,
            index_kpool=more.get("index_kpool", 1),
        )
        for b in range(n)
    ]
    bound = {name: value for name, value in mode.items() if name.startswith("extend")}
    plan = onelaunch.bind(support.buffers_of(backends), req_to_token=pool, **facts, **bound)
    assert plan.config.mode == mode["mode"]
    if {FIELDS[name].per for name in fields} == {"request", "row"} and mode["mode"] != "decode":
        assert (plan.capacity, plan.row_capacity) == (bs + 1, rows + spare)
    seq_lens, req_pool_indices = inputs_for(bs, width, page_size, inputs, device)
    plan.run(seq_lens, req_pool_indices, extends)
    offsets = facts.pop("seqlen_offsets", None) or [0] * n
    for backend, offset in zip(backends, offsets, strict=True):
        wanted = support.expected_refresh(
            [backend], seq_lens, req_pool_indices, pool, extend_seq_lens=extends, seqlen_offsets=[offset], **facts
        )
        assert_same([backend], wanted)
    return plan


@pytest.mark.parametrize("mode", ROW_MODES.values(), ids=ROW_MODES)
@pytest.mark.parametrize("bs", [0, 1, 2, 6, 7, 31, 32, 33, 100, 255, 256, 257, 700])
def test_rows_of_every_batch_size(device: torch.device, bs: int, mode: dict[str, Any]) -> None:
    check_rows(device, mode, bs=bs, extent="live")
    check_rows(device, mode, bs=bs, extent="full", width=70, inputs="strided")


@pytest.mark.usefixtures("quick_builds")
@pytest.mark.parametrize("mode", ROW_MODES.values(), ids=ROW_MODES)
@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("strides", ["aligned", "odd"])
def test_rows_of_every_shape(device: torch.device, strides: str, extent: str, mode: dict[str, Any]) -> None:
    """Rows of 16-byte stores and of 4-byte ones, wide and narrow, of few fields and of many."""
    several = mode.get("next_n", 2) > 1
    for width in (1, 5, 64, 517, 1101):
        plan = check_rows(device, mode, bs=9, width=width, extent=extent, strides=strides)
        assert plan.config.vector_bytes == (4 if strides == "odd" and several else 16)
    check_rows(device, mode, bs=9, width=600, max_len=333, extent=extent, strides=strides, fields=TABLES)
    if (extent, strides) == ("live", "odd"):
        for name in ALL_FIELDS:
            fields = ("cache_seqlens", name) if name != "cache_seqlens" else (name, "nsa_cache_seqlens")
            check_rows(device, mode, bs=9, fields=fields)
    check_rows(device, mode, bs=9, extent=extent, strides=strides, fields=ALL_FIELDS, index_kpool=3)


def test_variable_lengths_that_are_all_zero(device: torch.device) -> None:
    """No rows at all: what belongs to requests is written, and the first 0 of the rows' running sum."""
    backend = support.destination(support.SEVEN_FIELDS, 2, 40, 16, requests=3, device=device)
    pool = support.token_pool(POOL_ROWS, 40, device=device)
    plan = onelaunch.bind([backend.buffers], req_to_token=pool, mode="draft_extend", extend="variable", page_size=16)
    zeros = torch.zeros(3, dtype=torch.int64, device=device)
    plan.run(torch.tensor([9, 1, 40], device=device), zeros, zeros)
    wanted = {"cache_seqlens": [9, 1, 40], "cu_seqlens_k": [0, 9, 10, 50], "nsa_cu_seqlens_k": [0, POISON, POISON]}
    for field, tensor in backend.buffers.items():
        got = tensor.tolist()
        assert got == wanted.get(field.name, torch.full(tensor.shape, POISON).tolist()), field.name


def test_one_row_of_the_last_request(device: torch.device) -> None:
    """The only row belongs to any request: its 16-byte phase must not be looked for at that request's number."""
    backend = support.destination(TABLES, 1, 333, 16, strides="odd", device=device)
    pool = support.token_pool(POOL_ROWS, 333, device=device)
    plan = onelaunch.bind([backend.buffers], req_to_token=pool, mode="draft_extend", extend="variable", page_size=16)
    assert plan.config.vector_bytes == 4
    seq_lens, rows = torch.tensor([9, 9, 9, 333], device=device), torch.tensor([1, 2, 3, 4], device=device)
    extends = torch.tensor([0, 0, 0, 1], device=device)
    plan.run(seq_lens, rows, extends)
    facts: dict[str, Any] = {"index_topk": 9, "page_size": 16, "extent": "live", "mode": "draft_extend"}
    assert_same([backend], support.expected_refresh([backend], seq_lens, rows, pool, extend_seq_lens=extends, **facts))


def test_padding_requests_have_expanded_lengths_of_zero(device: torch.device) -> None:
    """A graph's padding requests have one token and as many rows as any: lengths below zero would be read as 2^32."""
    backend = support.destination(("cache_seqlens", "seqlens_expanded"), 8, 0, 1, requests=2, device=device)
    pool = support.token_pool(POOL_ROWS, 40, device=device)
    plan = onelaunch.bind([backend.buffers], req_to_token=pool, mode="draft_extend", next_n=4)
    plan.run(torch.tensor([6, 1], device=device), torch.tensor([1, 0], device=device))
    assert backend.buffers.seqlens_expanded is not None
    assert backend.buffers.seqlens_expanded.tolist() == [3, 4, 5, 6, 0, 0, 0, 1]


def test_a_plan_of_variable_lengths_is_reused(device: torch.device) -> None:
    width, capacity = 90, 40
    pool = support.token_pool(POOL_ROWS, width, device=device)
    backends = [support.destination(support.SEVEN_FIELDS, capacity, width, 16, requests=50, device=device)]
    plan = onelaunch.bind(
        support.buffers_of(backends), req_to_token=pool, mode="draft_extend", extend="variable", page_size=16
    )
    wanted = support.plain_copy(backends[0].buffers)
    seq_lens, rows = inputs_for(20, width, 16, "plain", device)
    extends = torch.zeros(20, dtype=torch.int64, device=device)
    for step in range(5):
        extends.copy_(torch.arange(20) * (step + 1) % 4)  # in place, as a captured step updates it
        plan.run(seq_lens, rows, extends)
        facts: dict[str, Any] = {"index_topk": 2048, "page_size": 16, "extent": "live", "mode": "draft_extend"}
        reference.refresh([wanted], seq_lens.cpu(), rows.cpu(), pool.cpu(), extend_seq_lens=extends.cpu(), **facts)
        assert_same(backends, wanted)


# ------------------------------------------------------------------------------------------- offsets, pools, filling


@pytest.mark.usefixtures("quick_builds")
@pytest.mark.parametrize(
    ("offsets", "mode", "extent"),
    [
        *product(((0, 600, 5),), ({"mode": "decode"}, ROW_MODES["verify 4"], ROW_MODES["variable"]), EXTENTS),
        *product(((1, 2, 3), (7, 7, 7), (0, 0, 0)), ({"mode": "decode"},), ("live",)),
    ],
    ids=str,
)
def test_offsets(device: torch.device, offsets: tuple[int, ...], mode: dict[str, Any], extent: str) -> None:
    for bs in (1, 9, 300):
        fields = support.SEVEN_FIELDS
        if bs == 300:
            fields = ("cache_seqlens", "cu_seqlens_k", "real_page_table")
        if mode["mode"] == "decode" and bs != 300:
            fields = ALL_FIELDS
        plan = check_rows(
            device,
            mode,
            bs=bs,
            n=3,
            seqlen_offsets=offsets,
            extent=extent,
            fields=fields,
            width=1101 if bs < 99 else 90,
        )
        assert plan.config.seqlen_offsets == {1: (7,) if offsets[0] else (), 3: offsets}[len(set(offsets))]


def test_64_offsets(device: torch.device) -> None:
    check_rows(device, {"mode": "decode"}, bs=33, n=64, seqlen_offsets=tuple(range(64)), width=90)


def test_offsets_share_a_table_that_all_backends_have(device: torch.device) -> None:
    """It is live up to the longest."""
    backends = [support.destination(("cache_seqlens", "real_page_table"), 5, 90, 16, device=device) for _ in range(2)]
    backends[1].buffers.real_page_table = backends[0].buffers.real_page_table
    backends[1].storages["real_page_table"] = backends[0].storages["real_page_table"]
    pool = support.token_pool(POOL_ROWS, 90, device=device)
    plan = onelaunch.bind(
        support.buffers_of(backends), req_to_token=pool, page_size=16, index_topk=9, seqlen_offsets=(20, 1)
    )
    assert dict(plan.config.distinct) == {"real_page_table": 1}
    seq_lens, rows = inputs_for(5, 90, 16, "plain", device)
    plan.run(seq_lens, rows)
    facts = {"page_size": 16, "index_topk": 9, "extent": "live"}
    wanted = [
        support.expected_refresh([b], seq_lens, rows, pool, seqlen_offsets=[offset], **facts)
        for b, offset in zip(backends, (20, 1), strict=True)
    ]
    wanted[1].real_page_table = wanted[0].real_page_table
    assert_same(backends, wanted)


@pytest.mark.usefixtures("quick_builds")
@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize(("index_kpool", "page_size"), [(1, 7), (3, 1), (4, 64), (64, 7)])
def test_pools(device: torch.device, page_size: int, index_kpool: int, extent: str) -> None:
    for fields in (KPOOL_FIELDS, ("real_page_table", "pooled_real_page_table"), ("pooled_real_page_table",)):
        if page_size == 1:
            fields = tuple(name for name in fields if name != "real_page_table")
        check_rows(
            device,
            {"mode": "decode"},
            bs=33,
            fields=fields,
            page_size=page_size,
            extent=extent,
            index_kpool=index_kpool,
            width=1101,
        )


@pytest.mark.parametrize("mode", [{"mode": "decode"}, *ROW_MODES.values()], ids=str)
def test_filled_pages(device: torch.device, mode: dict[str, Any]) -> None:
    """Dead pages are -1 up to the table's width, which may be more than the tokens need; rows behind stay."""
    for bs, width in ((1, 50), (33, 1101), (300, 90)):
        for fields in (("cache_seqlens", "real_page_table"), ("real_page_table",)):
            check_rows(device, mode, bs=bs, width=width, fields=fields, page_fill=-1)
    check_rows(device, mode, bs=9, width=90, max_len=40, fields=("real_page_table",), page_fill=-1)
    check_rows(device, mode, bs=9, width=90, n=2, fields=("real_page_table",), page_fill=-1, seqlen_offsets=(0, 30))


def test_filled_pages_of_a_table_wider_than_the_pool(device: torch.device) -> None:
    backend = support.destination(("cache_seqlens", "real_page_table"), 3, 40 * 16, 16, device=device)
    pool = support.token_pool(POOL_ROWS, 90, device=device)
    plan = onelaunch.bind([backend.buffers], req_to_token=pool, page_size=16, page_fill=-1)
    seq_lens, rows = torch.tensor([33, 0], device=device), torch.tensor([5, 6], device=device)
    plan.run(seq_lens, rows)
    table = backend.buffers.real_page_table
    assert table is not None
    assert table[0, :3].tolist() == (pool[5, [0, 16, 32]] // 16).tolist()
    assert (table[0, 3:] == -1).all()
    assert (table[1] == -1).all()
    assert (table[2] == POISON).all()


# ---------------------------------------------------------------------------------------------------- checked


def checked_plan(
    device: torch.device, fields: Sequence[str] = support.SEVEN_FIELDS, **facts: Any
) -> tuple[onelaunch.Plan, Poisoned, Tensor]:
    pool = support.token_pool(6, 90, device=device)
    backend = support.destination(fields, 8, 90, 16, requests=9, device=device)
    plan = onelaunch.bind([backend.buffers], req_to_token=pool, page_size=16, checked=True, **facts)
    return plan, backend, pool


OFFENCES: dict[str, tuple[dict[str, Any], list[int], list[int], list[int] | None, str]] = {
    "row": ({}, [5, 6, 7], [1, 6, 2], None, "req_pool_indices[1] is 6; allowed: rows of req_to_token, 0 to 6 excl"),
    "row below": ({"extent": "full"}, [5, 6, 7], [1, 2, -1], None, "req_pool_indices[2] is -1;"),
    "row far away": ({}, [5, 6], [2**40, 1], None, f"req_pool_indices[0] is {2**40};"),
    "length below": ({}, [5, -6, 7], [1, 2, 3], None, "seq_lens[1] is -6; allowed: 0 or more."),
    "length beyond": ({}, [5, 90, 91], [1, 2, 3], None, "seq_lens[2] is 91; allowed: up to 90,"),
    "length beyond, bounded": ({"max_len": 50}, [5, 51], [1, 2], None, "seq_lens[1] is 51; allowed: up to 50,"),
    "length beyond, verify": (
        {"mode": "target_verify", "next_n": 2},
        [88, 89],
        [1, 2],
        None,
        "seq_lens[1] is 89; allowed: up to 88,",
    ),
    "length beyond, offset": ({"seqlen_offsets": (7,)}, [83, 84], [1, 2], None, "seq_lens[1] is 84; allowed: up to 83"),
    "extend below": (
        {"mode": "draft_extend", "extend": "variable"},
        [5, 6],
        [1, 2],
        [3, -1],
        "extend_seq_lens[1] is -1; allowed: 0 to 8,",
    ),
    "extend beyond": (
        {"mode": "draft_extend", "extend": "variable"},
        [5, 6],
        [1, 2],
        [9, 1],
        "extend_seq_lens[0] is 9; allowed: 0 to 8,",
    ),
    "rows beyond": (
        {"mode": "draft_extend", "extend": "variable"},
        [5, 6, 7],
        [1, 2, 3],
        [3, 4, 2],
        "extend_seq_lens add up to 9 rows at request 2; the destinations have 8.",
    ),
}


@pytest.mark.parametrize(("facts", "lengths", "rows", "extends", "said"), OFFENCES.values(), ids=OFFENCES)
def test_an_offence_is_told(
    device: torch.device,
    facts: dict[str, Any],
    lengths: list[int],
    rows: list[int],
    extends: list[int] | None,
    said: str,
) -> None:
    """By the plan's check, once; what can't be read isn't, and nothing behind the destinations is written."""
    plan, backend, pool = checked_plan(device, **facts)
    given = None if extends is None else torch.tensor(extends, device=device)
    plan.run(torch.tensor(lengths, device=device), torch.tensor(rows, device=device), given)
    with pytest.raises(onelaunch.ArgumentError) as caught:
        plan.check()
    assert said in str(caught.value)
    plan.check()  # told once
    for name, storage in backend.storages.items():
        assert (storage[: support.GUARD] == POISON).all(), name
        assert (storage[-support.GUARD :] == POISON).all(), name
    bad = [i for i, row in enumerate(rows) if not 0 <= row < 6]
    table = backend.buffers.page_indices
    assert table is not None
    for request in bad:
        assert (table[request] == POISON).all()
    for request in set(range(len(rows))) - set(bad) if extends is None and "mode" not in facts else ():
        live = min(max(0, lengths[request]), 90 if "max_len" not in facts else 50)
        assert torch.equal(table[request, :live], pool[rows[request], :live])


def test_rows_beyond_the_capacity_are_left_out(device: torch.device) -> None:
    """The rows that fit are right, those that don't aren't written, by the kernel of a checked plan."""
    plan, backend, pool = checked_plan(device, mode="draft_extend", extend="variable")
    lengths, rows = torch.tensor([50, 60, 70, 80], device=device), torch.tensor([1, 2, 3, 4], device=device)
    extends = torch.tensor([3, 4, 4, 1], device=device)
    plan.run(lengths, rows, extends)
    larger = support.destination(support.SEVEN_FIELDS, 12, 90, 16, requests=9)
    facts: dict[str, Any] = {"index_topk": 2048, "page_size": 16, "extent": "live", "mode": "draft_extend"}
    wanted = support.expected_refresh([larger], lengths, rows, pool, extend_seq_lens=extends, **facts)
    for field, tensor in backend.buffers.items():
        assert torch.equal(tensor.cpu(), getattr(wanted, field.name)[: tensor.shape[0]]), field.name
    assert_guards([backend])


def assert_guards(backends: Sequence[Poisoned]) -> None:
    for backend in backends:
        for name, storage in backend.storages.items():
            assert (storage[: support.GUARD] == POISON).all(), name
            assert (storage[-support.GUARD :] == POISON).all(), name


def test_a_checked_plan_with_nothing_wrong(device: torch.device) -> None:
    plan, backend, pool = checked_plan(device)
    seq_lens, rows = torch.tensor([90, 0, 17], device=device), torch.tensor([0, 5, 3], device=device)
    for _ in range(3):
        plan.run(seq_lens, rows)
        plan.check()
    facts = {"index_topk": 2048, "page_size": 16, "extent": "live"}
    assert_same([backend], support.expected_refresh([backend], seq_lens, rows, pool, **facts))


def test_the_first_of_many_offences_stays(device: torch.device) -> None:
    plan, _, _ = checked_plan(device)
    good = torch.tensor([1, 2], device=device)
    plan.run(torch.tensor([-1, 2], device=device), good)
    plan.run(torch.tensor([1, -2], device=device), good)
    with pytest.raises(onelaunch.ArgumentError, match=r"seq_lens\[0\] is -1"):
        plan.check()
    plan.run(torch.tensor([1, -2], device=device), good)
    with pytest.raises(onelaunch.ArgumentError, match=r"seq_lens\[1\] is -2"):
        plan.check()


# ------------------------------------------------------------------------------- the three functions, with rows


def verify_lists(backends: Sequence[Poisoned]) -> dict[str, list[Tensor]]:
    return {f"{name}_list": [getattr(b.buffers, name) for b in backends] for name in support.SEVEN_FIELDS}


@pytest.mark.parametrize("mode", ROW_MODES.values(), ids=ROW_MODES)
def test_broadcast_precompute_and_copy_of_rows(device: torch.device, mode: dict[str, Any]) -> None:
    """The ways to the same metadata agree with the reference, at the first call and at later ones."""
    bs, width, page_size = 21, 300, 16
    pool = support.token_pool(POOL_ROWS, width, strides="odd", device=device)
    seq_lens, pool_rows = inputs_for(bs, width, page_size, "plain", device)
    extends = extend_lengths(bs, mode.get("extend_seq_lens_dtype", torch.int64), device) if "extend" in mode else None
    rows = bs * mode.get("next_n", 1) if extends is None else int(extends.sum())
    numbers = {name: mode[name] for name in ("mode", "next_n") if name in mode}
    facts: dict[str, Any] = {"index_topk": 100, "page_size": page_size, "extent": "full", "max_len": 250, **numbers}

    def fresh() -> list[Poisoned]:
        return [
            support.destination(support.SEVEN_FIELDS, rows + 1, width, page_size, requests=bs + 2, device=device)
            for _ in range(3)
        ]

    arguments: dict[str, Any] = {"max_len": 250, "nsa_index_topk": 100, "real_page_size": page_size}
    backends = fresh()
    wanted = support.expected_refresh(backends, seq_lens, pool_rows, pool, extend_seq_lens=extends, **facts)
    for _ in range(2):
        onelaunch.fused_metadata_precompute_and_broadcast_cuda(
            seq_lens, pool_rows, pool, **verify_lists(backends), extend_seq_lens=extends, **numbers, **arguments
        )
        assert_same(backends, wanted)

    if mode["mode"] == "target_verify":
        made = onelaunch.precompute_target_verify_metadata_cuda(
            seq_lens, pool_rows, pool, next_n=mode["next_n"], **arguments
        )
    else:
        made = onelaunch.precompute_draft_extend_metadata_cuda(
            seq_lens,
            pool_rows,
            pool,
            next_n=mode.get("next_n", 1),
            extend_seq_lens=extends,
            rows=rows if extends is not None else None,
            **arguments,
        )
    for field, tensor in made.items():
        count = (bs if field.per == "request" else rows) + (field.kind == "running_sum")
        assert tensor.shape[0] == count, field.name
        columns = slice(None, tensor.shape[1]) if field.kind == "table" else Ellipsis
        want = getattr(wanted, field.name)[:count]
        assert torch.equal(tensor.cpu(), want[:, columns] if field.kind == "table" else want), field.name

    copied = fresh()
    onelaunch.fused_metadata_copy_cuda(made, support.buffers_of(copied), mode=mode["mode"])
    assert_same(copied, wanted)
    copied = fresh()
    half = bs // 2
    if extends is None:
        part = {"next_n": mode["next_n"]}
        part_rows = half * mode["next_n"]
    else:
        part_rows = int(extends[:half].sum())
        part = {"rows": part_rows}
    onelaunch.fused_metadata_copy_cuda(made, support.buffers_of(copied), mode=mode["mode"], bs=half, **part)
    for backend in copied:
        expected = support.plain_copy(backend.buffers)
        for _, tensor in expected.items():
            tensor.fill_(POISON)
        reference.copy(support.plain_copy(made), [expected], bs=half, rows=part_rows)
        assert_same([backend], expected)


def test_precompute_into_buffers_of_another_mode_is_another_plan(device: torch.device) -> None:
    """The table of plans knows the mode: a verify must not find the plan of a decode step on the same tensors."""
    out = support.destination(support.SEVEN_FIELDS, 12, 90, 16, requests=12, device=device)
    pool = support.token_pool(POOL_ROWS, 90, device=device)
    seq_lens, rows = inputs_for(4, 90, 16, "plain", device)
    arguments: dict[str, Any] = {"max_len": 90, "nsa_index_topk": 9, "real_page_size": 16, "out": out.buffers}
    facts: dict[str, Any] = {"index_topk": 9, "page_size": 16, "extent": "full"}
    wanted = support.plain_copy(out.buffers)
    for next_n in (0, 1, 3, 2):
        if next_n:
            onelaunch.precompute_target_verify_metadata_cuda(seq_lens, rows, pool, next_n=next_n, **arguments)
            more: dict[str, Any] = {"mode": "target_verify", "next_n": next_n}
        else:
            onelaunch.precompute_decode_metadata_cuda(seq_lens, rows, pool, **arguments)
            more = {}
        reference.refresh([wanted], seq_lens.cpu(), rows.cpu(), pool.cpu(), **facts, **more)
        assert_same([out], wanted)


# ----------------------------------------------------------------------------------------------- several GPUs


@pytest.mark.gpu
def test_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("there is only one CUDA device")
    other = torch.device("cuda", 1)
    with torch.cuda.device(0):
        check_refresh(other, bs=33)
        check_refresh(other, bs=33, extent="full")
        assert torch.cuda.current_device() == 0


@pytest.mark.gpu
def test_runs_on_the_current_stream() -> None:
    """A refresh on a side stream waits for what that stream is doing, and nobody else has to."""
    device = torch.device("cuda", torch.cuda.current_device())
    backend = support.destination(SIX_FIELDS, 8, 300, 64, device=device)
    pool = support.token_pool(POOL_ROWS, 300, device=device)
    plan = onelaunch.bind([backend.buffers], req_to_token=pool, index_topk=100)
    seq_lens, rows = inputs_for(8, 300, 64, "plain", device)
    late = torch.zeros_like(seq_lens)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        late.copy_(seq_lens)
        plan.run(late, rows)
    side.synchronize()
    facts = {"index_topk": 100, "page_size": 64, "extent": "live"}
    assert_same([backend], support.expected_refresh([backend], seq_lens, rows, pool, **facts))
