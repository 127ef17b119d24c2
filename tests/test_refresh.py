"""The refresh and the three functions against the reference: dtypes, fields, batches, strides, extents, sharing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import onelaunch
import pytest
import support
import torch
from onelaunch import MetadataBuffers, reference
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
