"""kv_indptr and kv_indices, the token table of FlashInfer and Triton: against the reference, at the limits, refused."""

from __future__ import annotations

import random
from typing import Any

import onelaunch
import pytest
import support
import torch
from onelaunch import KernelConfig, MetadataBuffers
from onelaunch.errors import ArgumentError, ConfigError
from onelaunch.spec import reference
from support import DTYPES, POISON, assert_same, assert_untouched

BOTH = ("kv_indptr", "kv_indices")
POOL_ROWS = 7


def capacity_for(lengths: list[int], added: int) -> int:
    return sum(max(length, 0) + added for length in lengths)


def check(
    device: torch.device,
    lengths: list[int],
    *,
    width: int,
    fields: tuple[str, ...] = BOTH,
    n: int = 2,
    capacity: int | None = None,
    shared: bool = False,
    checked: bool = False,
    max_len: int | None = None,
    token_dtype: torch.dtype = torch.int32,
    seq_lens_dtype: torch.dtype = torch.int64,
    pool_dtype: torch.dtype = torch.int64,
    layout: str = "plain",
    **facts: Any,
) -> onelaunch.Plan:
    """Binds poisoned backends, refreshes them and compares every word; as much room as is needed unless it is told."""
    bs = len(lengths)
    offsets = facts.get("seqlen_offsets") or (0,) * n
    added = facts.get("next_n", 1) if facts.get("mode") == "target_verify" else 0
    room = capacity_for(lengths, max(offsets) + added) if capacity is None else capacity
    backends = [
        support.destination(fields, bs + 2, 1, 64, device=device, shapes={"kv_indices": (room,)}, offset=b % 4)
        for b in range(n)
    ]
    pool = support.token_pool(POOL_ROWS, width, dtype=token_dtype, strides="odd", offset=1, device=device)
    plan = onelaunch.bind(
        support.buffers_of([backends[0]] * n if shared else backends),
        req_to_token=pool,
        seq_lens_dtype=seq_lens_dtype,
        req_pool_indices_dtype=pool_dtype,
        checked=checked,
        **facts,
    )
    seq_lens = support.vector(lengths, seq_lens_dtype, device, layout)
    rows = support.vector(support.pool_rows(bs, POOL_ROWS), pool_dtype, device, layout)
    plan.run(seq_lens, rows, max_len=max_len)
    facts.pop("seqlen_offsets", None)
    facts = {"index_topk": 0, "page_size": 64, "extent": "live", "max_len": max_len, **facts}
    expected = [
        support.expected_refresh(backends, seq_lens, rows, pool, seqlen_offsets=[offset], **facts) for offset in offsets
    ]
    if shared:
        backends, expected = backends[:1], expected[:1]
    assert_same(backends, expected)
    return plan


# ------------------------------------------------------------------------------------------------ by hand


def test_by_hand(device: torch.device) -> None:
    pool = torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23], [30, 31, 32, 33]], dtype=torch.int32, device=device)
    backends = [
        MetadataBuffers(
            kv_indptr=torch.full((4,), -1, dtype=torch.int32, device=device),
            kv_indices=torch.full((9,), -1, dtype=torch.int32, device=device),
        )
        for _ in range(2)
    ]
    plan = onelaunch.bind(backends, req_to_token=pool, seqlen_offsets=(0, 1))
    plan.run(torch.tensor([2, 0, 3], device=device), torch.tensor([2, 0, 1], device=device))
    assert backends[0].kv_indptr is not None
    assert backends[0].kv_indptr.tolist() == [0, 2, 2, 5]
    assert backends[0].kv_indices is not None
    assert backends[0].kv_indices.tolist() == [30, 31, 20, 21, 22, -1, -1, -1, -1]
    assert backends[1].kv_indptr is not None
    assert backends[1].kv_indptr.tolist() == [0, 3, 4, 8]
    assert backends[1].kv_indices is not None
    assert backends[1].kv_indices.tolist() == [30, 31, 32, 10, 20, 21, 22, 23, -1]


# ------------------------------------------------------------------------------------------------ kernels


@pytest.mark.parametrize("bs", [0, 1, 2, 7, 31, 33, 255, 256, 257, 600])
def test_any_batch(bs: int, device: torch.device) -> None:
    numbers = random.Random(bs)
    width = 1301 if bs < 50 else 150
    for lengths in (
        [numbers.choice([0, 0, 1, 2, numbers.randint(0, width), width]) for _ in range(bs)],
        [0] * bs,
        [width] * bs,
        [width if i == bs // 2 else i % 3 for i in range(bs)],
    ):
        check(device, lengths, width=width)


@pytest.mark.parametrize("seq_lens_dtype", DTYPES)
@pytest.mark.parametrize("pool_dtype", DTYPES)
@pytest.mark.parametrize("token_dtype", DTYPES)
def test_dtypes_and_strides(
    seq_lens_dtype: torch.dtype, pool_dtype: torch.dtype, token_dtype: torch.dtype, device: torch.device
) -> None:
    dtypes = {"seq_lens_dtype": seq_lens_dtype, "pool_dtype": pool_dtype, "token_dtype": token_dtype}
    check(device, [70, 3, 0, 200, 129], width=201, n=3, layout="strided", **dtypes)  # type: ignore[arg-type]


@pytest.mark.usefixtures("quick_builds")
@pytest.mark.parametrize("fields", [("kv_indptr",), ("kv_indices",), (*BOTH, "cache_seqlens", "cu_seqlens_k")])
@pytest.mark.parametrize("offsets", [None, (4, 4, 4), (1, 2, 3), (0, 300, 7)])
@pytest.mark.parametrize(("mode", "next_n"), [("decode", 1), ("target_verify", 5), ("draft_extend", 2)])
def test_offsets_in_every_mode(
    fields: tuple[str, ...], offsets: tuple[int, ...] | None, mode: str, next_n: int, device: torch.device
) -> None:
    # A length below zero counts as none.
    facts = {"seqlen_offsets": offsets, "mode": mode, "next_n": next_n}
    check(device, [70, 3, 0, -9, 200, 128, 1], width=260, fields=fields, n=3, **facts)


def test_a_batch_of_many_windows_with_offsets(device: torch.device) -> None:
    lengths = [(i * 37) % 150 for i in range(1500)]
    check(device, lengths, width=160, n=3, seqlen_offsets=(1, 2, 3))


def test_no_cap_on_the_batch(device: torch.device) -> None:
    check(device, [i % 9 for i in range(65_536)], width=20, n=1)


def test_backends_that_share_are_written_once(device: torch.device) -> None:
    plan = check(device, [70, 3, 0, 200], width=201, n=4, shared=True)
    assert plan.config.distinct == (("kv_indptr", 1), ("kv_indices", 1))


# ------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize("capacity", [1, 69, 70, 71, 200, 272])
@pytest.mark.parametrize("offsets", [None, (1, 2)])
def test_nothing_is_written_beyond_the_capacity(
    capacity: int, offsets: tuple[int, ...] | None, device: torch.device
) -> None:
    check(device, [70, 3, 0, 200], width=201, capacity=capacity, seqlen_offsets=offsets)


def test_no_capacity_at_all(device: torch.device) -> None:
    check(device, [70, 3, 0, 200], width=201, capacity=0, n=1)


def test_lengths_beyond_the_table_leave_their_place_untouched(device: torch.device) -> None:
    # Positions follow from the lengths, so that they agree with kv_indptr; tokens that aren't there aren't written.
    check(device, [70, 300, 5], width=100)
    check(device, [70, 300, 5], width=100, max_len=60)


def test_sums_beyond_32_bits_do_not_come_back(device: torch.device) -> None:
    # kv_indptr wraps as int32 sums do; a position that wrapped with it would be the first request's.
    check(device, [2**31 - 1, 2**31 - 1, 2, 50, 7], width=90, capacity=500)
    check(device, [2**31 - 1, 2**31 - 1, 2, 50, 7], width=90, capacity=500, seqlen_offsets=(1, 9))


def test_a_checked_plan_tells_what_does_not_fit(device: torch.device) -> None:
    plan = check(device, [70, 3, 0, 50], width=100, capacity=123, checked=True)
    plan.check()
    plan = check(device, [70, 3, 0, 50], width=100, capacity=122, checked=True)
    with pytest.raises(
        ArgumentError, match="up to request 3 need 123 elements of kv_indices; the destinations have 122"
    ):
        plan.check()
    plan.check()
    plan = check(device, [70, 3], width=100, capacity=76, checked=True, seqlen_offsets=(1, 2))
    with pytest.raises(ArgumentError, match="up to request 1 need 77 elements"):
        plan.check()


def test_a_checked_plan_reads_no_row_that_is_not_there(device: torch.device) -> None:
    backend = support.destination(BOTH, 3, 1, 64, device=device, shapes={"kv_indices": (30,)})
    pool = support.token_pool(2, 20, device=device)
    plan = onelaunch.bind([backend.buffers], req_to_token=pool, checked=True)
    plan.run(torch.tensor([4, 5, 6], device=device), torch.tensor([1, 2, 0], device=device))
    with pytest.raises(ArgumentError, match=r"req_pool_indices\[1\] is 2"):
        plan.check()
    indices = backend.buffers.kv_indices
    assert indices is not None
    assert indices.tolist() == [*pool[1, :4].tolist(), *[POISON] * 5, *pool[0, :6].tolist(), *[POISON] * 15]


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("table", ["page_indices", "real_page_table", "pooled_real_page_table"])
def test_indices_beside_tables_are_refused(table: str) -> None:
    with pytest.raises(ConfigError, match=f"fields has kv_indices and {table}; .*two plans"):
        KernelConfig(fields=("kv_indices", table))


def test_copies_of_indices_are_refused() -> None:
    with pytest.raises(ConfigError, match="fields has kv_indices and operation is 'copy'"):
        KernelConfig(operation="copy", fields=BOTH)


def test_indices_have_no_dead_columns() -> None:
    config = KernelConfig(fields=BOTH)
    assert config == config.replace(extent="full", vector_bytes=16, page_size=16, index_topk=7)
    assert (config.extent, config.vector_bytes, config.paged_tables) == ("live", 4, ())


def test_backends_of_other_capacities_are_refused() -> None:
    backends = [support.destination(BOTH, 3, 1, 64, shapes={"kv_indices": (n,)}) for n in (9, 8)]
    with pytest.raises(ArgumentError, match=r"has 8 elements and .* has 9; all backends must have the same"):
        onelaunch.bind(support.buffers_of(backends), req_to_token=torch.zeros(2, 9, dtype=torch.int32))
    assert_untouched(backends)


def test_shared_indices_of_different_lengths_are_refused() -> None:
    shared = torch.zeros(9, dtype=torch.int32)
    backends = [MetadataBuffers(kv_indices=shared) for _ in range(2)]
    with pytest.raises(ArgumentError, match="share a table that all of them have, or nothing"):
        onelaunch.bind(backends, req_to_token=torch.zeros(2, 9, dtype=torch.int32), seqlen_offsets=(1, 2))


def test_the_batch_is_bounded_by_the_offsets_tensor_alone() -> None:
    backend = support.destination(BOTH, 3, 1, 64, shapes={"kv_indices": (9,)})
    plan = onelaunch.bind([backend.buffers], req_to_token=torch.zeros(2, 9, dtype=torch.int32))
    assert plan.capacity == 3
    with pytest.raises(ArgumentError, match=r"backends\[0\]\.kv_indptr has room for 3"):
        plan.run(torch.ones(4, dtype=torch.int64), torch.zeros(4, dtype=torch.int64))


def test_the_reference_counts_no_token_below_zero() -> None:
    assert reference.kv_lengths(torch.tensor([-5, 0, 3]), 2).tolist() == [2, 2, 5]
