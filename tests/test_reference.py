"""The reference against small cases worked out by hand. Every literal here was computed on paper, not by code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from onelaunch import FIELDS, MetadataBuffers
from onelaunch.spec import reference
from torch import Tensor

U = -1  # "untouched": the value that destinations hold before a refresh


def ints(values: Any, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def buffers(rows: int, width: int, pages: int, **without: None) -> MetadataBuffers:
    """Every field, filled with U."""
    shapes: dict[str, tuple[int, ...]] = {
        "cache_seqlens": (rows,),
        "cu_seqlens_k": (rows + 1,),
        "page_indices": (rows, width),
        "nsa_cache_seqlens": (rows,),
        "nsa_cu_seqlens_k": (rows + 1,),
        "real_page_table": (rows, pages),
        "seqlens_expanded": (rows,),
        "pooled_cache_seqlens": (rows,),
        "pooled_real_page_table": (rows, pages),
    }
    return MetadataBuffers(
        **{name: torch.full(shape, U, dtype=torch.int32) for name, shape in shapes.items() if name not in without}
    )


def refresh(
    backends: list[MetadataBuffers], seq_lens: Any, rows: Any, pool: Any, dtype: Any = torch.int64, **facts: Any
) -> None:
    facts = {"index_topk": 4, "page_size": 2, "extent": "live", **facts}
    reference.refresh(backends, ints(seq_lens, dtype), ints(rows, dtype), ints(pool), **facts)


# Three pool rows of six tokens.
POOL = [
    [0, 1, 2, 3, 4, 5],
    [10, 11, 18, 19, 6, 7],
    [100, 101, 64, 65, 31, 30],
]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_every_field_live(dtype: torch.dtype) -> None:
    b = buffers(4, 6, 3)
    refresh([b], [3, 6, 0], [1, 2, 0], POOL, dtype)
    assert b.cache_seqlens.tolist() == [3, 6, 0, U]
    assert b.cu_seqlens_k.tolist() == [0, 3, 9, 9, U]
    assert b.nsa_cache_seqlens.tolist() == [3, 4, 0, U]
    assert b.nsa_cu_seqlens_k.tolist() == [0, 3, 7, 7, U]
    assert b.seqlens_expanded.tolist() == [3, 6, 0, U]
    assert b.page_indices.tolist() == [
        [10, 11, 18, U, U, U],
        [100, 101, 64, 65, 31, 30],
        [U] * 6,  # length 0: the row is left alone
        [U] * 6,  # beyond the batch
    ]
    # A page is the token of column 0, 2 or 4, divided by 2. The request with three tokens has begun its second page.
    assert b.real_page_table.tolist() == [[5, 9, U], [50, 32, 15], [U, U, U], [U, U, U]]


def test_every_field_full() -> None:
    b = buffers(4, 6, 3)
    refresh([b], [3, 6, 0], [1, 2, 0], POOL, extent="full")
    assert b.cache_seqlens.tolist() == [3, 6, 0, U]
    assert b.cu_seqlens_k.tolist() == [0, 3, 9, 9, U]
    assert b.page_indices.tolist() == [[10, 11, 18, 19, 6, 7], [100, 101, 64, 65, 31, 30], [0, 1, 2, 3, 4, 5], [U] * 6]
    assert b.real_page_table.tolist() == [[5, 9, 3], [50, 32, 15], [0, 1, 2], [U, U, U]]


def test_all_backends_are_written_and_missing_fields_are_not() -> None:
    a, b = buffers(1, 6, 3), buffers(1, 6, 3, page_indices=None, cu_seqlens_k=None)
    refresh([a, b], [5], [1], POOL)
    for one in (a, b):
        assert one.cache_seqlens.tolist() == [5]
        assert one.real_page_table.tolist() == [[5, 9, 3]]
    assert a.page_indices.tolist() == [[10, 11, 18, 19, 6, U]]
    assert b.page_indices is None


@pytest.mark.parametrize("extent", ["live", "full"])
def test_no_requests(extent: str) -> None:
    b = buffers(2, 6, 3)
    refresh([b], [], [], POOL, extent=extent)
    assert b.cache_seqlens.tolist() == [U, U]
    assert b.cu_seqlens_k.tolist() == [0, U, U]
    assert b.nsa_cu_seqlens_k.tolist() == [0, U, U]
    assert b.page_indices.tolist() == [[U] * 6] * 2
    assert b.real_page_table.tolist() == [[U] * 3] * 2


def test_a_length_beyond_the_table() -> None:
    """Length fields keep the length; tables end at their width."""
    b = buffers(2, 6, 3)
    refresh([b], [9, 1], [2, 1], POOL, index_topk=8)
    assert b.cache_seqlens.tolist() == [9, 1]
    assert b.cu_seqlens_k.tolist() == [0, 9, 10]
    assert b.nsa_cache_seqlens.tolist() == [8, 1]
    assert b.nsa_cu_seqlens_k.tolist() == [0, 8, 9]
    assert b.page_indices.tolist() == [[100, 101, 64, 65, 31, 30], [10, U, U, U, U, U]]
    assert b.real_page_table.tolist() == [[50, 32, 15], [5, U, U]]


def test_a_table_narrower_than_the_pool_and_one_that_is_wider() -> None:
    narrow, wide = buffers(1, 3, 2), buffers(1, 8, 4)
    refresh([narrow], [6], [1], POOL, extent="full")
    refresh([wide], [7], [1], POOL, extent="full")
    assert narrow.page_indices.tolist() == [[10, 11, 18]]
    assert narrow.real_page_table.tolist() == [[5, 9]]
    assert wide.page_indices.tolist() == [[10, 11, 18, 19, 6, 7, U, U]]
    assert wide.real_page_table.tolist() == [[5, 9, 3, U]]


@pytest.mark.parametrize(
    ("extent", "max_len", "tokens", "pages"),
    [
        ("full", 3, [10, 11, 18, U, U, U], [5, 9, U]),
        ("full", 0, [U] * 6, [U] * 3),
        ("live", 3, [10, 11, 18, U, U, U], [5, 9, U]),
        ("live", 6, [10, 11, 18, 19, 6, U], [5, 9, 3]),
    ],
)
def test_max_len(extent: str, max_len: int, tokens: list[int], pages: list[int]) -> None:
    b = buffers(1, 6, 3)
    refresh([b], [5], [1], POOL, extent=extent, max_len=max_len)
    assert b.cache_seqlens.tolist() == [5]
    assert b.page_indices.tolist() == [tokens]
    assert b.real_page_table.tolist() == [pages]


def test_pages_of_one_token() -> None:
    """With pages of one token, real_page_table is the same tensor as page_indices; nothing is divided."""
    b = buffers(1, 6, 6)
    b.real_page_table = b.page_indices
    refresh([b], [4], [2], POOL, page_size=1)
    assert b.real_page_table.tolist() == [[100, 101, 64, 65, U, U]]


def test_pages_of_16() -> None:
    pool = [list(range(160, 200))]  # columns 0, 16, 32 hold 160, 176, 192
    b = buffers(3, 40, 3)
    refresh([b], [16, 17, 40], [0, 0, 0], pool, page_size=16)
    assert b.real_page_table.tolist() == [[10, U, U], [10, 11, U], [10, 11, 12]]


def test_pages_of_64() -> None:
    pool = [[64 * 7 + i for i in range(64)] + [64 * 3 + i for i in range(64)] + [640]]
    b = buffers(4, 129, 3)
    refresh([b], [63, 64, 65, 129], [0, 0, 0, 0], pool, page_size=64)
    assert b.real_page_table.tolist() == [[7, U, U], [7, U, U], [7, 3, U], [7, 3, 10]]


def test_real_page_table_alone_is_bounded_by_its_own_width() -> None:
    b = MetadataBuffers(real_page_table=torch.full((1, 2), U, dtype=torch.int32))
    refresh([b], [6], [2], POOL, extent="full")
    assert b.real_page_table.tolist() == [[50, 32]]


@pytest.mark.parametrize(
    ("page_size", "pages"),
    [
        # floor(-1/16) = -1, floor(-16/16) = -1, floor(-17/16) = -2, floor(15/16) = 0
        (16, {-1: -1, -16: -1, -17: -2, 15: 0, 0: 0}),
        (3, {-1: -1, -3: -1, -4: -2, 2: 0, 3: 1}),
        (64, {-1: -1, -64: -1, -65: -2, 63: 0, 128: 2}),
    ],
)
def test_pages_of_negative_tokens_round_down(page_size: int, pages: dict[int, int]) -> None:
    for token, page in pages.items():
        assert reference.page_row(ints([token]), page_size).tolist() == [page]
        assert reference.page_row(ints([token], torch.int64), page_size).tolist() == [page]


def test_int64_tokens_are_divided_before_they_are_narrowed() -> None:
    """2^33 + 64 lies on page 2^27 + 1; narrowed first it would be token 64, on page 1."""
    token = 2**33 + 64
    assert reference.page_row(ints([token], torch.int64), 64).tolist() == [2**27 + 1]
    b = buffers(1, 1, 1)
    reference.refresh(
        [b],
        ints([1]),
        ints([0]),
        ints([[token]], torch.int64),
        index_topk=1,
        page_size=64,
        extent="live",
    )
    assert b.page_indices.tolist() == [[64]]
    assert b.real_page_table.tolist() == [[2**27 + 1]]


def test_running_sums_wrap_as_int32_sums_do() -> None:
    # 2000000000 + 2000000000 = 4000000000 = 4000000000 - 4294967296; one more gives +1 705 032 704.
    values = ints([2_000_000_000, 2_000_000_000, 2_000_000_000])
    assert reference.running_sum(values).tolist() == [0, 2_000_000_000, -294_967_296, 1_705_032_704]
    assert reference.running_sum(ints([])).tolist() == [0]


def test_lengths_are_narrowed_to_int32() -> None:
    made = reference.lengths(ints([2**32 + 5, -3], torch.int64), index_topk=4)[0]
    assert made["cache_seqlens"].tolist() == [5, -3]
    assert made["cu_seqlens_k"].tolist() == [0, 5, 2]
    assert made["nsa_cache_seqlens"].tolist() == [4, -3]
    assert made["nsa_cu_seqlens_k"].tolist() == [0, 4, 1]
    assert made["seqlens_expanded"].tolist() == [5, -3]


@pytest.mark.parametrize(("topk", "nsa"), [(0, [0, 0, 0]), (3, [3, 3, 2]), (2**31 - 1, [7, 3, 2])])
def test_index_topk(topk: int, nsa: list[int]) -> None:
    made = reference.lengths(ints([7, 3, 2]), index_topk=topk)[0]
    assert made["nsa_cache_seqlens"].tolist() == nsa
    assert made["cache_seqlens"].tolist() == [7, 3, 2]


def test_unknown_mode_and_extent() -> None:
    with pytest.raises(ValueError, match="'prefill'"):
        refresh([buffers(1, 6, 3)], [1], [0], POOL, mode="prefill")
    with pytest.raises(ValueError, match="'all'"):
        refresh([buffers(1, 6, 3)], [1], [0], POOL, extent="all")


def test_every_field_has_a_case() -> None:
    """A field that is added to the table must be added here."""
    assert tuple(FIELDS) == (
        "cache_seqlens",
        "cu_seqlens_k",
        "page_indices",
        "nsa_cache_seqlens",
        "nsa_cu_seqlens_k",
        "real_page_table",
        "seqlens_expanded",
        "pooled_cache_seqlens",
        "pooled_real_page_table",
        "paged_mqa_schedule_metadata",
        "flashmla_metadata",
        "num_splits",
        "kv_indptr",
        "kv_indices",
        "num_kv_splits",
    )
    assert {name: field.kind for name, field in FIELDS.items()} == {
        "cache_seqlens": "vector",
        "cu_seqlens_k": "running_sum",
        "page_indices": "table",
        "nsa_cache_seqlens": "vector",
        "nsa_cu_seqlens_k": "running_sum",
        "real_page_table": "table",
        "seqlens_expanded": "vector",
        "pooled_cache_seqlens": "vector",
        "pooled_real_page_table": "table",
        "paged_mqa_schedule_metadata": "schedule",
        "flashmla_metadata": "schedule",
        "num_splits": "splits",
        "kv_indptr": "running_sum",
        "kv_indices": "packed",
        "num_kv_splits": "counts",
    }
    assert [name for name, field in FIELDS.items() if field.per == "request"] == [
        "cache_seqlens",
        "cu_seqlens_k",
        "pooled_cache_seqlens",
        "paged_mqa_schedule_metadata",
        "flashmla_metadata",
        "num_splits",
        "kv_indptr",
        "kv_indices",
        "num_kv_splits",
    ]


def source_of_copy() -> MetadataBuffers:
    return MetadataBuffers(
        cache_seqlens=ints([5, 6, 7]),
        cu_seqlens_k=ints([0, 5, 11, 18]),
        page_indices=ints([[1, 2, 3], [4, 5, 6], [7, 8, 9]]),
        nsa_cache_seqlens=ints([4, 4, 4]),
        nsa_cu_seqlens_k=ints([0, 4, 8, 12]),
        real_page_table=ints([[10, 11], [12, 13], [14, 15]]),
        seqlens_expanded=ints([50, 60, 70]),
        pooled_cache_seqlens=ints([2, 3, 3]),
        pooled_real_page_table=ints([[1], [2], [3]]),
    )


def test_copy() -> None:
    a, b = buffers(4, 4, 3), buffers(2, 3, 2, seqlens_expanded=None)
    reference.copy(source_of_copy(), [a, b], bs=2)
    for one in (a, b):
        assert one.cache_seqlens.tolist()[:2] == [5, 6]
        assert one.cu_seqlens_k.tolist()[:3] == [0, 5, 11]
        assert one.nsa_cache_seqlens.tolist()[:2] == [4, 4]
        assert one.nsa_cu_seqlens_k.tolist()[:3] == [0, 4, 8]
    assert a.cache_seqlens.tolist()[2:] == [U, U]
    assert a.cu_seqlens_k.tolist()[3:] == [U, U]
    assert a.page_indices.tolist() == [[1, 2, 3, U], [4, 5, 6, U], [U] * 4, [U] * 4]
    assert a.real_page_table.tolist() == [[10, 11, U], [12, 13, U], [U] * 3, [U] * 3]
    assert a.seqlens_expanded.tolist() == [50, 60, U, U]
    assert b.page_indices.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert b.seqlens_expanded is None


def test_copy_of_rows() -> None:
    """Per-request fields are copied for the batch's requests, per-row fields for its rows."""
    b = buffers(3, 3, 2)
    reference.copy(source_of_copy(), [b], bs=1, rows=2)
    assert b.cache_seqlens.tolist() == [5, U, U]
    assert b.cu_seqlens_k.tolist() == [0, 5, U, U]
    assert b.nsa_cache_seqlens.tolist() == [4, 4, U]
    assert b.nsa_cu_seqlens_k.tolist() == [0, 4, 8, U]
    assert b.seqlens_expanded.tolist() == [50, 60, U]
    assert b.page_indices.tolist() == [[1, 2, 3], [4, 5, 6], [U] * 3]


def test_copy_of_a_part() -> None:
    b = buffers(3, 3, 2)
    reference.copy(source_of_copy(), [b], bs=1, columns=2, page_columns=1)
    assert b.page_indices.tolist() == [[1, 2, U], [U] * 3, [U] * 3]
    assert b.real_page_table.tolist() == [[10, U], [U, U], [U, U]]
    empty = buffers(3, 3, 2)
    reference.copy(source_of_copy(), [empty], bs=0)
    assert empty.cu_seqlens_k.tolist() == [0, U, U, U]
    assert empty.cache_seqlens.tolist() == [U, U, U]
    assert empty.page_indices.tolist() == [[U] * 3] * 3


def listed(values: dict[str, Tensor]) -> dict[str, list[int]]:
    return {name: value.tolist() for name, value in values.items()}


def test_target_verify() -> None:
    values, rows = reference.lengths(ints([5, 1]), mode="target_verify", index_topk=7, next_n=3)
    assert listed(values) == {
        "cache_seqlens": [8, 4],
        "cu_seqlens_k": [0, 8, 12],
        "nsa_cache_seqlens": [6, 7, 7, 2, 3, 4],
        "nsa_cu_seqlens_k": [0, 6, 13, 20, 22, 25, 29],
        "seqlens_expanded": [6, 7, 8, 2, 3, 4],
        "pooled_cache_seqlens": [8, 4],
    }
    assert rows.request.tolist() == [0, 0, 0, 1, 1, 1]
    assert rows.live.tolist() == [8, 8, 8, 4, 4, 4]


def test_draft_extend_with_one_length_for_all() -> None:
    # The second request is padding: its length of 1 is less than the number of tokens that it extends by.
    values, rows = reference.lengths(ints([5, 1]), mode="draft_extend", index_topk=4, next_n=3)
    assert listed(values) == {
        "cache_seqlens": [5, 1],
        "cu_seqlens_k": [0, 5, 6],
        "nsa_cache_seqlens": [3, 4, 4, 0, 0, 1],
        "nsa_cu_seqlens_k": [0, 3, 7, 11, 11, 11, 12],
        "seqlens_expanded": [3, 4, 5, 0, 0, 1],
        "pooled_cache_seqlens": [5, 1],
    }
    assert rows.live.tolist() == [5, 5, 5, 1, 1, 1]


def test_draft_extend_with_lengths_of_their_own() -> None:
    values, rows = reference.lengths(
        ints([9, 4, 6]), mode="draft_extend", index_topk=2048, extend_seq_lens=ints([2, 0, 3])
    )
    assert values["cache_seqlens"].tolist() == [9, 4, 6]
    assert values["cu_seqlens_k"].tolist() == [0, 9, 13, 19]
    assert values["seqlens_expanded"].tolist() == [8, 9, 4, 5, 6]
    assert values["nsa_cu_seqlens_k"].tolist() == [0, 8, 17, 21, 26, 32]
    assert rows.request.tolist() == [0, 0, 2, 2, 2]
    assert rows.live.tolist() == [9, 9, 6, 6, 6]


@pytest.mark.parametrize("mode", ["decode", "target_verify", "draft_extend"])
def test_no_requests_and_no_rows(mode: str) -> None:
    values, rows = reference.lengths(ints([]), mode=mode, index_topk=4, next_n=2)
    assert values["cu_seqlens_k"].tolist() == values["nsa_cu_seqlens_k"].tolist() == [0]
    assert rows.request.numel() == 0
    if mode == "draft_extend":
        values, rows = reference.lengths(ints([3, 2]), mode=mode, index_topk=4, extend_seq_lens=ints([0, 0]))
        assert values["cu_seqlens_k"].tolist() == [0, 3, 5]
        assert values["nsa_cu_seqlens_k"].tolist() == [0]
        assert rows.request.numel() == 0


def test_verify_rows_repeat_their_request() -> None:
    pool = ints([[0] * 8, list(range(10, 18)), list(range(20, 28))])
    made = MetadataBuffers(
        page_indices=torch.full((5, 6), -1, dtype=torch.int32),
        real_page_table=torch.full((5, 3), -1, dtype=torch.int32),
    )
    reference.refresh(
        [made],
        ints([1, 9]),
        ints([2, 1]),
        pool,
        mode="target_verify",
        next_n=2,
        index_topk=4,
        page_size=2,
        extent="live",
    )
    assert made.page_indices is not None
    assert made.real_page_table is not None
    assert made.page_indices.tolist() == [
        [20, 21, 22, -1, -1, -1],
        [20, 21, 22, -1, -1, -1],
        [10, 11, 12, 13, 14, 15],
        [10, 11, 12, 13, 14, 15],
        [-1] * 6,
    ]
    assert made.real_page_table.tolist() == [[10, 11, -1], [10, 11, -1], [5, 6, 7], [5, 6, 7], [-1] * 3]


def test_offsets_give_each_backend_its_own_lengths() -> None:
    pool = ints([[7, 8, 9, 10]])
    made = [
        MetadataBuffers(
            cache_seqlens=torch.full((1,), -1, dtype=torch.int32),
            page_indices=torch.full((1, 4), -1, dtype=torch.int32),
        )
        for _ in range(2)
    ]
    reference.refresh(made, ints([1]), ints([0]), pool, index_topk=4, page_size=1, extent="live", seqlen_offsets=(1, 2))
    assert [b.cache_seqlens.tolist() for b in made if b.cache_seqlens is not None] == [[2], [3]]
    assert [b.page_indices.tolist() for b in made if b.page_indices is not None] == [[[7, 8, -1, -1]], [[7, 8, 9, -1]]]


def test_pools_of_tokens() -> None:
    # Complete pools are clamped, the unfinished pool is kept: 11 = 2 pools of 4 tokens, and 3 tokens.
    made = reference.nsa_lengths(ints([3, 4, 11, 16, 18]), index_topk=8, index_kpool=4)
    assert made.tolist() == [3, 4, 11, 8, 10]
    assert reference.pooled_lengths(ints([3, 4, 11]), 4).tolist() == [0, 1, 2]
    assert reference.pooled_page_table(ints([[8, 12, 16, 21, 5]]), 2).tolist() == [[4, 8, 2]]


def test_pools_of_pages() -> None:
    pool = ints([[12, 13, 40, 41, 70, 71, 99, 98]])  # in pages of two: 6, 20, 35, 49
    made = MetadataBuffers(
        nsa_cache_seqlens=torch.full((1,), U, dtype=torch.int32),
        real_page_table=torch.full((1, 4), U, dtype=torch.int32),
        pooled_cache_seqlens=torch.full((1,), U, dtype=torch.int32),
        pooled_real_page_table=torch.full((1, 2), U, dtype=torch.int32),
    )
    reference.refresh([made], ints([5]), ints([0]), pool, index_topk=2, page_size=2, extent="live", index_kpool=2)
    assert made.nsa_cache_seqlens.tolist() == [3]  # two complete pools of two, clamped to two tokens, and one more
    assert made.real_page_table.tolist() == [[6, 20, 35, U]]
    assert made.pooled_cache_seqlens.tolist() == [2]
    assert made.pooled_real_page_table.tolist() == [[3, 17]]
    reference.refresh([made], ints([4]), ints([0]), pool, index_topk=2, page_size=2, extent="live", index_kpool=2)
    assert made.pooled_real_page_table.tolist() == [[3, 17]], "the second pool isn't live, so its element stays"


def test_page_fill_goes_to_the_width_of_the_table() -> None:
    pool = ints([[12, 13, 40, 41, 70, 71]])
    made = MetadataBuffers(real_page_table=torch.full((3, 5), 77, dtype=torch.int32))
    reference.refresh([made], ints([3, 0]), ints([0, 0]), pool, index_topk=2, page_size=2, extent="live", page_fill=-1)
    assert made.real_page_table.tolist() == [[6, 20, -1, -1, -1], [-1] * 5, [77] * 5]


def test_a_length_that_wraps_is_live_to_the_end() -> None:
    """Length fields wrap as int32 does; the tables use the length before it wraps."""
    values, rows = reference.lengths(ints([2**31 - 1]), mode="target_verify", index_topk=4, next_n=2)
    assert values["cache_seqlens"].tolist() == [-(2**31) + 1]
    assert values["seqlens_expanded"].tolist() == [0, 0]
    assert rows.live.tolist() == [2**31 + 1] * 2


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode is 'encode'"):
        reference.lengths(ints([1]), mode="encode", index_topk=4)
