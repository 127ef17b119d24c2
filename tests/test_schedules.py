"""The schedules that a refresh computes for DeepGEMM's paged MQA logits and FlashMLA: reference, kernels, refusals."""

from __future__ import annotations

import itertools
import random
from typing import Any

import cases
import onelaunch
import pytest
import support
import torch
from cases import Shape
from checker import check
from onelaunch import KernelConfig, MetadataBuffers
from onelaunch.errors import ArgumentError, ConfigError
from onelaunch.spec import reference
from support import assert_untouched

pytestmark = pytest.mark.usefixtures("quick_builds")

MQA = "paged_mqa_schedule_metadata"
BATCHES = (0, 1, 2, 3, 7, 31, 255, 256, 257, 600)
WIDTH = 130


def lengths_for(bs: int, kind: str, seed: int = 0) -> list[int]:
    """Lengths at the edges of splits and blocks, zeros, or of very different sizes. No table limits them."""
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
    # The requests have 2, 0 and 3 splits: five splits for three multiprocessors.
    lengths = [300, 0, 700]
    assert reference.paged_mqa_schedule(lengths, 3) == [[0, 0], [0, 1], [2, 1], [3, 0]]
    assert reference.paged_mqa_schedule(lengths, 3, remainder="first") == [[0, 0], [2, 0], [2, 2], [3, 0]]


def test_the_atoms_of_an_item_follow_one_another() -> None:
    assert reference.paged_mqa_schedule([300, 700], 5, atoms=2) == [[0, 0], [1, 0], [2, 0], [2, 2], [3, 1], [4, 0]]


def test_where_splits_cost_work_entries_begin_at_requests() -> None:
    # A split costs 2 units. 2, 0 and 3 splits cost 10 units, so the three multiprocessors get 4, 3 and 3 units.
    lengths, tokens = [300, 0, 700], {"atoms": 2, "split_cost": 2, "remainder": "first"}
    # The second multiprocessor begins at unit 4, the first of the third request; the third at unit 7, in its split 1.
    assert reference.paged_mqa_schedule(lengths, 3, **tokens) == [[0, 0], [4, 0], [4, 1], [6, 0]]
    # With one token per request and one unit per split, the result equals the schedule of atoms.
    one = {"split_cost": 1, "remainder": "first"}
    assert reference.paged_mqa_schedule(lengths, 3, **one) == [[0, 0], [2, 0], [2, 2], [3, 0]]


def test_multiprocessors_without_work() -> None:
    assert reference.paged_mqa_schedule([0, 0], 2) == [[2, 0], [2, 0], [2, 0]]
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
    # The requests have 10 and 1 blocks, and each costs 5 more. The payload of a part is (15 + 6) / 2 rounded up, plus
    # 5: 16. The first part takes the first request (15); the 1 that is left is too little for a block of the second.
    # Without tokens the second is paid for as one block, and ends at 0.
    for length, stop in ((64, 1), (1, 1), (0, 0)):
        assert reference.flashmla_schedule([640, length], 2) == (
            [[0, 0, 0, 10, 0, 0, 0, 0], [1, 1, 0, stop, 0, 0, 0, 0]],
            [0, 1, 2],
        )
    # A payload of 7: a part has 2 blocks. Parts without work name the last of the first request's 3 blocks.
    assert reference.flashmla_schedule([192], 4) == (
        [[0, 0, 0, 2, 0, 1, 1, 0], [0, 0, 2, 3, 1, 1, 1, 0], [1, 0, 2, 3, 0, 0, 0, 0], [1, 0, 2, 3, 0, 0, 0, 0]],
        [0, 2],
    )
    # One request of 100 blocks: the payload is 40, so a part has 35 blocks.
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
        blocks = [0 if length == 0 else max(length - 1, 0) // 64 + 1 for length in lengths]
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("remainder", "order"), [("last", "2026"), ("first", "2025")])
def test_schedules_of_any_lengths(remainder: str, order: str, kind: str, device: torch.device) -> None:
    config = KernelConfig(num_backends=2, fields=cases.SCHEDULES, schedule_remainder=remainder, flashmla_order=order)
    for bs in BATCHES:
        for num_sms, parts in ((1, 1), (5, 5), (132, 132), (7, 512)):
            lengths = tuple(lengths_for(bs, kind))
            shape = Shape(f"{bs} {kind}", lengths, num_sms=num_sms, num_sm_parts=parts, spare_rows=1)
            check(config, shape, device)


@pytest.mark.parametrize("next_n", [1, 2, 3, 4])
def test_the_atoms_of_a_verified_request(next_n: int, device: torch.device) -> None:
    """A request has next_n / 2 atoms, rounded up, unless schedule_atoms gives their number. A row is one atom."""
    for settings, atoms in (
        ({}, (next_n + 1) // 2),
        ({"schedule_atoms": 3}, 3),
        ({"schedule_per": "row"}, 1),
        ({"schedule_split_cost": next_n, "schedule_remainder": "first"}, next_n),
        ({"schedule_split_cost": 9, "schedule_per": "row"}, 1),
    ):
        config = KernelConfig(fields=(MQA,), mode="target_verify", next_n=next_n, **settings)
        assert config.atoms == atoms
        check(config, Shape("edges", tuple(lengths_for(37, "edges"))), device)


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
    ("arguments", "message"),
    [
        ((-1, 64, 4), "rows is -1"),
        ((2, 0, 4), "topk is 0"),
        ((2, 64, 0), "num_sm_parts is 0"),
        ((2, 64, "4"), "num_sm_parts is '4'"),
    ],
)
def test_a_sparse_schedule_of_nothing_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        onelaunch.sparse_flashmla_metadata(*arguments)


def test_an_unknown_order_of_a_sparse_schedule_is_refused() -> None:
    with pytest.raises(ArgumentError, match="order is '2027'; allowed: '2026', '2025'"):
        onelaunch.sparse_flashmla_metadata(2, 64, 4, order="2027")


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"fields": (MQA,), "operation": "copy"}, "a copy can't write schedules"),
        ({"fields": ("num_splits",)}, "num_splits without flashmla_metadata"),
        ({"fields": (MQA,), "schedule_remainder": "middle"}, "schedule_remainder is 'middle'"),
        ({"fields": (MQA,), "schedule_per": "rows"}, "Did you mean 'row'"),
        ({"fields": (MQA,), "schedule_atoms": -1}, "schedule_atoms is -1"),
        ({"fields": ("flashmla_metadata",), "flashmla_order": 2026}, "flashmla_order is 2026"),
        (
            {"fields": (MQA,), "mode": "draft_extend", "extend": "variable", "schedule_per": "row"},
            "a schedule of rows is defined for next_n rows per request",
        ),
        ({"fields": (MQA,), "mode": "draft_extend", "extend": "variable"}, "Set schedule_atoms"),
        (
            {"fields": (MQA,), "num_backends": 2, "seqlen_offsets": (1, 2), "distinct": ((MQA, 1),)},
            "can share only a table, and only if all of them share it",
        ),
    ],
)
def test_what_is_not_defined_is_refused(facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
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
    ("name", "tensor", "message"),
    [
        (MQA, int32(1, 2), r"shape \(1, 2\); it must be \[num_sms \+ 1, 2\]"),
        (MQA, int32(9, 3), r"shape \(9, 3\)"),
        (MQA, int32(9), "must have 2 dimensions"),
        (MQA, int32(9, 4)[:, :2], "a schedule must be contiguous"),
        (MQA, int32(9, 2).long(), "dtype int64"),
        ("flashmla_metadata", int32(0, 8), r"shape \(0, 8\); it must be \[num_sm_parts, 8\], of 1 to 512 rows"),
        ("flashmla_metadata", int32(513, 8), "of 1 to 512 rows"),
        ("flashmla_metadata", int32(4, 5), r"shape \(4, 5\)"),
        ("num_splits", int32(0), "with room for the first 0"),
    ],
)
def test_tensors_that_are_no_schedule_are_refused(name: str, tensor: torch.Tensor, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        onelaunch.bind([bad(name, tensor)], req_to_token=int32(2, 9))


def test_backends_of_other_sizes_are_refused() -> None:
    backends = [support.destination((MQA,), 3, WIDTH, 16, shapes={MQA: (n, 2)}) for n in (5, 6)]
    with pytest.raises(ArgumentError, match=r"has 6 rows and backends\[0\]\.paged_mqa_schedule_metadata has 5"):
        onelaunch.bind(support.buffers_of(backends), req_to_token=int32(2, 9))
    assert_untouched(backends)


def test_a_shared_schedule_of_different_lengths_is_refused() -> None:
    schedule = int32(9, 2)
    with pytest.raises(ArgumentError, match="backends with different offsets can share only a table"):
        onelaunch.bind([bad(MQA, schedule)] * 2, req_to_token=int32(2, 9), seqlen_offsets=(1, 2))


def test_schedules_are_not_copied() -> None:
    with pytest.raises(ConfigError, match="which each refresh computes"):
        onelaunch.fused_metadata_copy_cuda(bad(MQA, int32(9, 2)), bad(MQA, int32(9, 2)))
