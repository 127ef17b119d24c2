"""Schedules of DeepGEMM's paged MQA logits and of FlashMLA, which a refresh computes: reference, kernels, refusals."""

from __future__ import annotations

import itertools
import random
from typing import Any

import onelaunch
import pytest
import support
import torch
from onelaunch import KernelConfig, MetadataBuffers
from onelaunch.errors import ArgumentError, ConfigError
from onelaunch.spec import reference
from support import assert_same, assert_untouched

MQA = "paged_mqa_schedule_metadata"
BATCHES = (0, 1, 2, 3, 7, 31, 255, 256, 257, 600)
WIDTH = 130


def lengths_for(bs: int, kind: str, seed: int = 0) -> list[int]:
    """Lengths at the edges of splits and blocks, zeros, or some that differ by far; tables needn't hold them."""
    numbers = random.Random(f"{bs}.{kind}.{seed}")
    edges = [0, 1, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1024, 5000, -3]
    return {
        "zero": [0] * bs,
        "one": [1] * bs,
        "edges": [edges[(i * 5 + seed) % len(edges)] for i in range(bs)],
        "one long": [131_072 if i == bs // 2 else 1 for i in range(bs)],
        "random": [numbers.choice([numbers.randint(0, 300), numbers.randint(0, 200_000)]) for _ in range(bs)],
        "beyond": [2**31 - 1] * bs,
    }[kind]


KINDS = ("zero", "one", "edges", "one long", "random", "beyond")

# ------------------------------------------------------------------------------------------------ the reference


def test_splits_that_do_not_divide_go_to_the_last_multiprocessors() -> None:
    # Splits: 2, 0 and 3, so five for three multiprocessors.
    lengths = [300, 0, 700]
    assert reference.paged_mqa_schedule(lengths, 3) == [[0, 0], [0, 1], [2, 1], [3, 0]]
    assert reference.paged_mqa_schedule(lengths, 3, remainder="first") == [[0, 0], [2, 0], [2, 2], [3, 0]]


def test_the_atoms_of_an_item_follow_one_another() -> None:
    assert reference.paged_mqa_schedule([300, 700], 5, atoms=2) == [[0, 0], [1, 0], [2, 0], [2, 2], [3, 1], [4, 0]]


def test_multiprocessors_without_work() -> None:
    assert reference.paged_mqa_schedule([0, 0], 2) == [[1, 0], [1, 0], [2, 0]]
    assert reference.paged_mqa_schedule([0, 0], 2, remainder="first") == [[2, 0], [2, 0], [2, 0]]
    assert reference.paged_mqa_schedule([], 2) == [[0, 0]] * 3
    assert reference.paged_mqa_schedule([9], 3) == [[0, 0], [0, 0], [0, 0], [1, 0]]
    assert reference.paged_mqa_schedule([9], 3, remainder="first") == [[0, 0], [1, 0], [1, 0], [1, 0]]


@pytest.mark.parametrize("remainder", ["last", "first"])
@pytest.mark.parametrize("atoms", [1, 2, 3])
@pytest.mark.parametrize("num_sms", [1, 2, 7, 132])
def test_every_split_is_scheduled_once(remainder: str, atoms: int, num_sms: int) -> None:
    for seed in range(20):
        lengths = lengths_for(seed, "edges", seed)
        entries = reference.paged_mqa_schedule(lengths, num_sms, atoms=atoms, remainder=remainder)
        every = [
            [item * atoms + atom, split]
            for item, length in enumerate(lengths)
            for atom in range(atoms)
            for split in range(-(-max(length, 0) // 256))
        ]
        if not every:
            continue
        starts = [every.index(entry) if entry in every else len(every) for entry in entries]
        counts = [stop - start for start, stop in itertools.pairwise(starts)]
        assert sum(counts) == len(every)
        assert max(counts) - min(counts) <= 1
        assert counts == sorted(counts, reverse=remainder == "first")


def test_the_parts_of_flashmla_by_hand() -> None:
    # Blocks: 10 and 1; (15 + 6) / 2 rounded up and 5 more is a payload of 16: the first part takes the first request
    # (15) and has 1 left, too little for a block of the second.
    assert reference.flashmla_schedule([640, 0], 2) == (
        [[0, 0, 0, 10, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0]],
        [0, 1, 2],
    )
    # One request of 100 blocks: a payload of 40, 35 blocks a part.
    assert reference.flashmla_schedule([6400], 3) == (
        [[0, 0, 0, 35, 0, 1, 1, 0], [0, 0, 35, 70, 1, 1, 1, 0], [0, 0, 70, 100, 2, 1, 1, 0]],
        [0, 3],
    )
    assert reference.flashmla_schedule([6400], 3, order="2025")[0] == [
        [0, 0, 0, 35, 0, 0, 0, 0],
        [0, 35, 0, 70, 1, 0, 0, 0],
        [0, 70, 0, 100, 2, 0, 0, 0],
    ]
    assert reference.flashmla_schedule([], 2) == ([[0, -1, 0, 0, 0, 0, 0, 0]] * 2, [0])


@pytest.mark.parametrize("parts", [1, 2, 7, 132])
def test_every_block_belongs_to_one_part(parts: int) -> None:
    for seed in range(25):
        lengths = lengths_for(1 + seed, KINDS[seed % 5], seed)
        blocks = [max(length - 1, 0) // 64 + 1 for length in lengths]
        metadata, num_splits = reference.flashmla_schedule(lengths, parts)
        taken: list[tuple[int, int, int]] = []
        for first, last, begin, stop, _, _, _, _ in metadata:
            for request in range(first, last + 1):
                low = begin if request == first else 0
                high = stop if request == last else blocks[request]
                taken.append((request, low, high))
        for request, count in enumerate(blocks):
            pieces = [(low, high) for of, low, high in taken if of == request]
            assert pieces[0][0] == 0
            assert pieces[-1][1] == count
            assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
            assert len(pieces) == num_splits[request + 1] - num_splits[request]


def test_unknown_conventions_are_refused() -> None:
    with pytest.raises(ValueError, match="remainder is 'middle'"):
        reference.paged_mqa_schedule([1], 1, remainder="middle")
    with pytest.raises(ValueError, match="order is '2024'"):
        reference.flashmla_schedule([1], 1, order="2024")


# ------------------------------------------------------------------------------------------------ kernels


def check(
    device: torch.device,
    lengths: list[int],
    *,
    fields: tuple[str, ...],
    n: int = 2,
    num_sms: int = 132,
    parts: int = 132,
    mode: str = "decode",
    next_n: int = 1,
    offset: int = 0,
    shared: bool = False,
    checked: bool = False,
    plan: Any = None,
    **facts: Any,
) -> onelaunch.Plan:
    """Binds poisoned backends, refreshes them and compares every word."""
    bs = len(lengths)
    rows = bs * next_n if mode != "decode" else bs
    shapes = {MQA: (num_sms + 1, 2), "flashmla_metadata": (parts, 8)}
    backends = [
        support.destination(
            fields, rows + 1, WIDTH, 16, device=device, requests=bs + 1, shapes=shapes, offset=b % 4,
            index_kpool=facts.get("index_kpool", 1),
        )
        for b in range(n)
    ]  # fmt: skip
    buffers = support.buffers_of([backends[0]] * n if shared else backends)
    pool = support.token_pool(5, WIDTH, device=device)
    facts = {"index_topk": 90, "page_size": 16, "mode": mode, "next_n": next_n, **facts}
    plan = onelaunch.bind(buffers, req_to_token=pool, checked=checked, **facts)
    seq_lens = torch.tensor(lengths, dtype=torch.int64, device=device)
    rows_of_pool = support.vector(support.pool_rows(bs, 5), torch.int64, device)
    plan.run(seq_lens, rows_of_pool)
    offsets = facts.pop("seqlen_offsets", None)
    expected = [
        support.expected_refresh(
            backends, seq_lens, rows_of_pool, pool, extent="live", seqlen_offsets=offset and [offset], **facts
        )
        for offset in offsets or [0] * n
    ]
    if shared:
        backends, expected = backends[:1], expected[:1]
    assert_same(backends, expected)
    return plan


@pytest.mark.parametrize("bs", BATCHES)
@pytest.mark.parametrize("remainder", ["last", "first"])
def test_paged_mqa_schedule_of_any_batch(bs: int, remainder: str, device: torch.device) -> None:
    for kind in KINDS:
        for num_sms in (1, 5, 132):
            lengths = lengths_for(bs, kind)
            check(device, lengths, fields=(MQA,), num_sms=num_sms, schedule_remainder=remainder)


@pytest.mark.parametrize("bs", BATCHES)
@pytest.mark.parametrize("order", ["2026", "2025"])
def test_flashmla_schedule_of_any_batch(bs: int, order: str, device: torch.device) -> None:
    for kind in KINDS:
        for parts in (1, 5, 132, 512):
            fields = ("flashmla_metadata", "num_splits")
            check(device, lengths_for(bs, kind), fields=fields, parts=parts, flashmla_order=order)


@pytest.mark.usefixtures("quick_builds")
@pytest.mark.parametrize("mode", ["decode", "target_verify", "draft_extend"])
@pytest.mark.parametrize("per", ["request", "row"])
@pytest.mark.parametrize("atoms", [0, 3])
def test_schedules_in_every_mode(mode: str, per: str, atoms: int, device: torch.device) -> None:
    for next_n in (1,) if mode == "decode" else (3,) if atoms else (1, 2, 3, 4):
        facts = {"mode": mode, "next_n": next_n, "schedule_per": per, "schedule_atoms": atoms}
        fields = (MQA, "flashmla_metadata", "num_splits", "cache_seqlens")
        plan = check(device, lengths_for(37, "edges"), fields=fields, **facts)
        by_rows = per == "row" and mode != "decode"
        assert plan.config.atoms == (1 if by_rows else atoms or (next_n + 1) // 2)


@pytest.mark.parametrize("remainder", ["last", "first"])
def test_schedule_of_pools(remainder: str, device: torch.device) -> None:
    for bs, kind in ((300, "edges"), (7, "zero"), (5, "random")):
        check(device, lengths_for(bs, kind), fields=(MQA,), index_kpool=4, schedule_remainder=remainder)
    for per in ("request", "row"):
        facts: dict[str, Any] = {"mode": "target_verify", "next_n": 3, "schedule_per": per}
        check(device, lengths_for(9, "edges"), fields=(MQA, "pooled_cache_seqlens"), index_kpool=3, **facts)


@pytest.mark.parametrize("offsets", [(1, 2, 3), (7, 7, 7)])
@pytest.mark.parametrize("mode", ["decode", "target_verify"])
def test_backends_of_other_lengths_get_other_schedules(
    offsets: tuple[int, ...], mode: str, device: torch.device
) -> None:
    for fields in ((MQA,), ("flashmla_metadata", "num_splits"), (MQA, "flashmla_metadata", "cu_seqlens_k")):
        facts = {"seqlen_offsets": offsets, "mode": mode, "next_n": 2 if mode == "target_verify" else 1}
        check(device, lengths_for(41, "edges"), fields=fields, n=3, **facts)


def test_beside_all_other_fields(device: torch.device) -> None:
    fields = (*support.ALL_FIELDS, MQA, "flashmla_metadata", "num_splits")
    for mode, next_n in (("decode", 1), ("target_verify", 3)):
        facts: dict[str, Any] = {"mode": mode, "next_n": next_n, "index_kpool": 2}
        lengths = [length % WIDTH for length in lengths_for(33, "edges")]
        plan = check(device, lengths, fields=fields, n=3, checked=True, **facts)
        if mode == "decode":
            plan.check()


def test_a_schedule_that_backends_share_is_written_once(device: torch.device) -> None:
    plan = check(device, lengths_for(9, "edges"), fields=(MQA, "flashmla_metadata"), n=4, shared=True)
    assert plan.config.distinct == ((MQA, 1), ("flashmla_metadata", 1))


def test_no_cap_on_the_batch(device: torch.device) -> None:
    lengths = [(i * 7919) % 100_003 for i in range(65_536)]
    check(device, lengths, fields=(MQA, "flashmla_metadata", "num_splits"), n=1)


def test_a_plan_serves_every_batch(device: torch.device) -> None:
    fields = (MQA, "flashmla_metadata", "num_splits")
    shapes = {MQA: (9, 2), "flashmla_metadata": (8, 8)}
    pool = support.token_pool(5, WIDTH, device=device)
    backend = support.destination(fields, 300, WIDTH, 16, device=device, shapes=shapes)
    plan = onelaunch.bind([backend.buffers], req_to_token=pool)
    for bs in (300, 3, 0, 257):
        seq_lens = torch.tensor(lengths_for(bs, "edges"), dtype=torch.int64, device=device)
        rows = torch.zeros_like(seq_lens)
        wanted = support.plain_copy(backend.buffers)
        plan.run(seq_lens, rows)
        reference.refresh(
            [wanted], seq_lens.cpu(), rows.cpu(), pool.cpu(), index_topk=2048, page_size=64, extent="live"
        )
        assert_same([backend], wanted)


# ------------------------------------------------------------------------------------------------ the sparse schedule


def test_the_sparse_schedule_is_that_of_equal_lengths() -> None:
    for rows, topk, parts in ((1, 2048, 132), (64, 2048, 132), (300, 512, 66), (0, 2048, 4)):
        for order in ("2026", "2025"):
            metadata, num_splits = onelaunch.sparse_flashmla_metadata(rows, topk, parts, order=order)
            want, splits = reference.flashmla_schedule([topk] * rows, parts, order=order)
            assert metadata.dtype == num_splits.dtype == torch.int32
            assert metadata.tolist() == want
            assert num_splits.tolist() == splits


@pytest.mark.parametrize(
    ("arguments", "told"),
    [((-1, 64, 4), "rows is -1"), ((2, 0, 4), "topk is 0"), ((2, 64, 0), "num_sm_parts is 0"),
     ((2, 64, "4"), "num_sm_parts is '4'")],
)  # fmt: skip
def test_a_sparse_schedule_of_nothing_is_refused(arguments: tuple[Any, ...], told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        onelaunch.sparse_flashmla_metadata(*arguments)


def test_an_unknown_order_of_a_sparse_schedule_is_refused() -> None:
    with pytest.raises(ArgumentError, match="order is '2027'; allowed: '2026', '2025'"):
        onelaunch.sparse_flashmla_metadata(2, 64, 4, order="2027")


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        ({"fields": (MQA,), "operation": "copy"}, "computed by each refresh, and not copied"),
        ({"fields": ("num_splits",)}, "num_splits without flashmla_metadata"),
        ({"fields": (MQA,), "schedule_remainder": "middle"}, "schedule_remainder is 'middle'"),
        ({"fields": (MQA,), "schedule_per": "rows"}, "Did you mean 'row'"),
        ({"fields": (MQA,), "schedule_atoms": -1}, "schedule_atoms is -1"),
        ({"fields": ("flashmla_metadata",), "flashmla_order": 2026}, "flashmla_order is 2026"),
        (
            {"fields": (MQA,), "mode": "draft_extend", "extend": "variable", "schedule_per": "row"},
            "a schedule of rows is defined for next_n rows a request",
        ),
        ({"fields": (MQA,), "mode": "draft_extend", "extend": "variable"}, "Give their number"),
        (
            {"fields": (MQA,), "num_backends": 2, "seqlen_offsets": (1, 2), "distinct": ((MQA, 1),)},
            "share a table that all of them have, or nothing",
        ),
    ],
)
def test_what_is_not_defined_is_refused(facts: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        KernelConfig(**facts)


def test_facts_that_do_not_matter_leave_no_trace() -> None:
    plain = KernelConfig()
    assert plain == KernelConfig(
        schedule_remainder="first", schedule_per="row", schedule_atoms=3, flashmla_order="2025"
    )
    scheduled = KernelConfig(fields=(MQA,), mode="target_verify", next_n=4)
    assert scheduled == scheduled.replace(schedule_atoms=2)
    assert scheduled != scheduled.replace(schedule_atoms=1)
    assert not {"schedule_remainder", "schedule_per", "schedule_atoms"} & scheduled.shown_settings().keys()
    assert KernelConfig(fields=(MQA,), schedule_per="row") == KernelConfig(fields=(MQA,))


def bad(name: str, tensor: torch.Tensor) -> MetadataBuffers:
    return MetadataBuffers(**{name: tensor})


def int32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "tensor", "told"),
    [
        (MQA, int32(1, 2), r"shape \(1, 2\); it must be \[num_sms \+ 1, 2\]"),
        (MQA, int32(9, 3), r"shape \(9, 3\)"),
        (MQA, int32(9), "must have 2 dimensions"),
        (MQA, int32(9, 4)[:, :2], "a schedule must be contiguous"),
        (MQA, int32(9, 2).long(), "dtype int64"),
        ("flashmla_metadata", int32(0, 8), r"shape \(0, 8\); it must be \[num_sm_parts, 8\], of 1 to 512 rows"),
        ("flashmla_metadata", int32(513, 8), "of 1 to 512 rows"),
        ("flashmla_metadata", int32(4, 5), r"shape \(4, 5\)"),
        ("num_splits", int32(0), "must have room for the first 0"),
    ],
)
def test_tensors_that_are_no_schedule_are_refused(name: str, tensor: torch.Tensor, told: str) -> None:
    with pytest.raises(ArgumentError, match=told):
        onelaunch.bind([bad(name, tensor)], req_to_token=int32(2, 9))


def test_backends_of_other_sizes_are_refused() -> None:
    backends = [support.destination((MQA,), 3, WIDTH, 16, shapes={MQA: (n, 2)}) for n in (5, 6)]
    with pytest.raises(ArgumentError, match=r"has 6 rows and backends\[0\]\.paged_mqa_schedule_metadata has 5"):
        onelaunch.bind(support.buffers_of(backends), req_to_token=int32(2, 9))
    assert_untouched(backends)


def test_a_shared_schedule_of_different_lengths_is_refused() -> None:
    schedule = int32(9, 2)
    with pytest.raises(ArgumentError, match="backends of different lengths share a table that all of them have"):
        onelaunch.bind([bad(MQA, schedule)] * 2, req_to_token=int32(2, 9), seqlen_offsets=(1, 2))


def test_schedules_are_not_copied() -> None:
    with pytest.raises(ConfigError, match="computed by each refresh"):
        onelaunch.fused_metadata_copy_cuda(bad(MQA, int32(9, 2)), bad(MQA, int32(9, 2)))
