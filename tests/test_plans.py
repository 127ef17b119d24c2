"""A plan and its tensors: what backends share, one tensor under two names, columns of one allocation, reuse."""

from __future__ import annotations

from typing import Any

import onelaunch
import pytest
import support
import torch
from cases import CONFIGURATIONS, SHAPES, batch
from checker import check
from onelaunch import ArgumentError, KernelConfig, MetadataBuffers
from onelaunch.spec import reference
from support import POISON, SIX_FIELDS, assert_same
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick_builds")
POOL_ROWS = 61
SETTINGS: dict[str, Any] = {"index_topk": 50, "page_size": 16}


def inputs_for(bs: int, width: int, device: torch.device, layout: str = "plain") -> tuple[Tensor, Tensor]:
    """seq_lens and req_pool_indices: "plain", "strided" (every other element), or "expanded" (one length, stride 0)."""
    rows = support.vector(support.pool_rows(bs, POOL_ROWS), torch.int64, device, "plain")
    if layout == "expanded":
        return torch.tensor([support.lengths(11, width, 16)[bs % 11]], device=device).expand(bs), rows
    return support.vector(support.lengths(bs, width, 16), torch.int64, device, layout), rows


def test_bind_passes_every_argument_on(monkeypatch: pytest.MonkeyPatch) -> None:
    passed: list[Any] = []
    monkeypatch.setattr(onelaunch.run.bind, "make_plan", lambda *arguments: passed.extend(arguments))
    settings = {name: object() for name in onelaunch.bind.__kwdefaults__}
    backends, pool = object(), object()
    onelaunch.bind(backends, req_to_token=pool, **settings)
    assert passed == [backends, pool, settings]


# ------------------------------------------------------------------------------------------------ shared tensors


@pytest.mark.parametrize("name", ["shared", "shared rows", "offsets, shared", "schedules alone", "indices of int64"])
def test_a_tensor_that_backends_share_is_written_once(device: torch.device, name: str) -> None:
    """bind() detects shared tensors itself: check() fails if the plan's configuration differs from the declared one."""
    config = CONFIGURATIONS[name]
    assert config.distinct
    for shape in (*SHAPES[:3], batch(33, 300)):
        check(config, shape, device)


def test_the_same_memory_under_two_tensors_counts_as_shared(device: torch.device) -> None:
    table = torch.full((4, 80), POISON, dtype=torch.int32, device=device)
    pool = support.token_pool(5, 80, device=device)
    plan = onelaunch.bind(
        [MetadataBuffers(page_indices=table), MetadataBuffers(page_indices=table[:])], req_to_token=pool
    )
    assert dict(plan.config.distinct) == {"page_indices": 1}


def test_expanded_lengths_that_are_cache_seqlens_are_not_a_field_of_their_own(device: torch.device) -> None:
    """In decode, engines pass one tensor under both names, and page_indices also as real_page_table."""
    for page_size in (16, 1):
        backend = support.destination(SIX_FIELDS, 5, 80, page_size, device=device)
        backend.buffers.seqlens_expanded = backend.buffers.cache_seqlens
        backend.storages["seqlens_expanded"] = backend.storages["cache_seqlens"]
        pool = support.token_pool(POOL_ROWS, 80, device=device)
        settings = {"index_topk": 9, "page_size": page_size, "extent": "live"}
        plan = onelaunch.bind([backend.buffers], req_to_token=pool, **settings)
        assert plan.config.fields == tuple(n for n in SIX_FIELDS if page_size > 1 or n != "real_page_table")
        seq_lens, rows = inputs_for(5, 80, device)
        plan.run(seq_lens, rows)
        assert_same([backend], support.expected_refresh([backend], seq_lens, rows, pool, **settings))


def test_interleaved_column_slices_of_one_table(device: torch.device) -> None:
    """Backends may own column ranges of one allocation. No backend writes another backend's columns."""
    bs, width = 6, 40
    table = torch.full((bs + 1, 3 * width + 1), POISON, dtype=torch.int32, device=device)
    slices = [table[:, b * width : (b + 1) * width] for b in range(3)]
    pool = support.token_pool(POOL_ROWS, width, device=device)
    plan = onelaunch.bind([MetadataBuffers(page_indices=s) for s in slices], req_to_token=pool)
    seq_lens, rows = inputs_for(bs, width, device)
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


def test_rows_that_start_at_different_16_byte_phases_get_4_byte_stores(device: torch.device) -> None:
    for offset, stride in ((1, 0), (0, 1), (1, 1)):
        backends = [
            support.destination(
                ("page_indices",), 9 + b, 300, 16, extra_stride=stride * b, offset=offset * b, device=device
            )
            for b in range(3)
        ]
        pool = support.token_pool(POOL_ROWS, 300, strides="odd", device=device)
        plan = onelaunch.bind(support.buffers_of(backends), req_to_token=pool)
        assert (plan.config.vector_bytes, plan.capacity) == (4, 9)
        seq_lens, rows = inputs_for(9, 300, device)
        plan.run(seq_lens, rows)
        for backend in backends:
            settings = {"index_topk": 1, "page_size": 1, "extent": "live"}
            assert_same([backend], support.expected_refresh([backend], seq_lens, rows, pool, **settings))


# ------------------------------------------------------------------------------------------------ reuse


@pytest.mark.parametrize("extent", ["live", "full"])
def test_a_plan_is_reused_with_other_batches_inputs_and_bounds(device: torch.device, extent: str) -> None:
    width, capacity = 200, 300
    pool = support.token_pool(POOL_ROWS, width, strides="odd", device=device)
    backends = [support.destination(SIX_FIELDS, capacity, width, 16, device=device) for _ in range(3)]
    plan = onelaunch.bind(support.buffers_of(backends), req_to_token=pool, extent=extent, **SETTINGS)
    assert plan.launches == 0
    wanted = support.plain_copy(backends[0].buffers)
    # Nothing is cleared between calls: values of a larger batch must stay where a later, smaller batch writes nothing.
    for step, (bs, layout, max_len) in enumerate(
        [
            (300, "plain", None),
            (1, "plain", None),
            (0, "plain", None),
            (257, "strided", 77),
            (256, "expanded", 0),
            (33, "strided", None),
            (300, "expanded", 200),
        ]
    ):
        seq_lens, rows = inputs_for(bs, width, device, layout)
        plan.run(seq_lens, rows, max_len=max_len)
        reference.refresh([wanted], seq_lens.cpu(), rows.cpu(), pool.cpu(), extent=extent, max_len=max_len, **SETTINGS)
        assert_same(backends, wanted)
        assert plan.launches == step + 1


def test_a_plan_of_schedules_serves_every_batch(device: torch.device) -> None:
    fields = ("paged_mqa_schedule_metadata", "flashmla_metadata", "num_splits")
    shapes = {"paged_mqa_schedule_metadata": (9, 2), "flashmla_metadata": (8, 8)}
    pool = support.token_pool(5, 130, device=device)
    backend = support.destination(fields, 300, 130, 16, device=device, shapes=shapes)
    plan = onelaunch.bind([backend.buffers], req_to_token=pool)
    for bs in (300, 3, 0, 257):
        seq_lens = torch.tensor(batch(bs, 5_000).lengths, dtype=torch.int64, device=device)
        rows = torch.zeros_like(seq_lens)
        wanted = support.plain_copy(backend.buffers)
        plan.run(seq_lens, rows)
        reference.refresh([wanted], seq_lens.cpu(), rows.cpu(), pool.cpu(), extent="live", **SETTINGS)
        assert_same([backend], wanted)


def test_a_plan_of_variable_lengths_is_reused(device: torch.device) -> None:
    pool = support.token_pool(POOL_ROWS, 90, device=device)
    backends = [support.destination(support.SEVEN_FIELDS, 40, 90, 16, requests=50, device=device)]
    plan = onelaunch.bind(
        support.buffers_of(backends), req_to_token=pool, mode="draft_extend", extend="variable", **SETTINGS
    )
    wanted = support.plain_copy(backends[0].buffers)
    seq_lens, rows = inputs_for(20, 90, device)
    extends = torch.zeros(20, dtype=torch.int64, device=device)
    settings: dict[str, Any] = {**SETTINGS, "extent": "live", "mode": "draft_extend"}
    for step in range(5):
        extends.copy_(torch.arange(20) * (step + 1) % 4)  # in place, as a captured step updates it
        plan.run(seq_lens, rows, extends)
        reference.refresh([wanted], seq_lens.cpu(), rows.cpu(), pool.cpu(), extend_seq_lens=extends.cpu(), **settings)
        assert_same(backends, wanted)


def test_variable_lengths_that_are_all_zero(device: torch.device) -> None:
    """Without rows, only the per-request fields and the leading 0 of the per-row running sum are written."""
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
    """The only row belongs to the last request. Its 16-byte phase must be looked up by row, not by request."""
    config = KernelConfig(fields=support.TABLES, page_size=16, mode="draft_extend", extend="variable")
    check(config, batch(4, 333, extends=(0, 0, 0, 1), spare_rows=0), device)


def test_inputs_changed_in_place_are_read_again(device: torch.device) -> None:
    """The plan remembers which tensors it checked, not their values, because a captured step updates them in place."""
    backend = support.destination(SIX_FIELDS, 3, 200, 16, device=device)
    pool = support.token_pool(POOL_ROWS, 200, device=device)
    plan = onelaunch.bind([backend.buffers], req_to_token=pool, extent="full", **SETTINGS)
    seq_lens, rows = inputs_for(3, 200, device)
    for step in range(4):
        plan.run(seq_lens, rows)
        assert_same([backend], support.expected_refresh([backend], seq_lens, rows, pool, extent="full", **SETTINGS))
        seq_lens += step + 1
        rows.copy_(rows.roll(1))
        pool[1:9] += 64


# ------------------------------------------------------------------------------------------------ follow_addresses()


def test_inputs_at_other_addresses_are_followed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    new = {name: torch.full((4,), POISON, dtype=torch.int32, device=device) for name in ("lengths", "sums")}
    new["sums"] = torch.full((5,), POISON, dtype=torch.int32, device=device)
    table = torch.full((4, 16), POISON, dtype=torch.int32, device=device)
    pool = torch.arange(80, dtype=torch.int32, device=device).view(5, 16)
    plan = onelaunch.bind(
        [MetadataBuffers(cache_seqlens=new["lengths"], page_indices=table)],
        req_to_token=pool,
        declare={"sums": onelaunch.into(onelaunch.running_sum("extended"), new["sums"])},
        inputs={"extended": torch.int32},
    )
    plan.follow_addresses()

    def inputs(lengths: list[int], rows: list[int], extended: list[int]) -> list[Tensor]:
        wide = [torch.tensor(lengths, device=device), torch.tensor(rows, device=device)]
        return [*wide, torch.tensor(extended, dtype=torch.int32, device=device)]

    kept = inputs([1, 2], [0, 1], [3, 4])
    plan.run(kept[0], kept[1], extended=kept[2])
    checks = []
    check = plan._check
    monkeypatch.setattr(plan, "_check", lambda *arguments: checks.append(arguments) or check(*arguments))
    held = []
    for shift in range(20):  # more address sets than a plan remembers
        lengths, rows, extended = inputs([3 + shift % 9, 2], [4, shift % 4], [shift, 2])
        held += [lengths, rows, extended]  # kept alive, so that the next tensors get other addresses
        plan.run(lengths, rows, extended=extended)
        assert new["lengths"].tolist()[:2] == lengths.tolist()
        assert new["sums"].tolist()[:3] == [0, shift, shift + 2]
        for request in range(2):
            live = int(lengths[request])
            assert table[request, :live].equal(pool[rows[request], :live])
    assert not checks, "inputs that differ only in their addresses were checked again"
    wide = torch.tensor([5, 6, 7, 8], device=device)
    plan.run(wide[::2], kept[1], extended=kept[2])  # another stride
    plan.run(wide, torch.arange(4, device=device), extended=torch.arange(4, dtype=torch.int32, device=device))
    assert len(checks) == 2
    assert new["sums"].tolist() == [0, 0, 1, 3, 6]
    with pytest.raises(ArgumentError, match="seq_lens has dtype int32"):
        plan.run(kept[0].int(), kept[1], extended=kept[2])
    before = [tensor.clone() for tensor in (new["lengths"], new["sums"], table)]
    with pytest.raises(ArgumentError, match="extended overlaps"):
        plan.run(kept[0], kept[1], extended=new["sums"][3:])
    assert all(now.equal(then) for now, then in zip((new["lengths"], new["sums"], table), before, strict=True))


class Columns:
    """Wraps a plan. Two of the plan's inputs are columns of one argument of run()."""

    def __init__(self, plan: onelaunch.Plan) -> None:
        self.plan, self.checks = plan, 0

    def run(self, seq_lens: Tensor, rows: Tensor, tokens: Tensor) -> None:
        self.plan._run(self, seq_lens, rows, None, None, None, tokens)

    def _check(self, seq_lens: Tensor, rows: Tensor, extended: None, *numbers: Any) -> list[int]:
        self.checks += 1
        *numbers, tokens = numbers
        inputs = {"pool_rows": rows, "first": tokens[:, 0], "second": tokens[:, 1]}
        return self.plan._check(seq_lens, rows, extended, *numbers, *(inputs[name] for name in self.plan._input_names))


def test_views_of_arguments_at_other_addresses_are_followed(device: torch.device) -> None:
    sums = torch.full((3,), POISON, dtype=torch.int64, device=device)
    formula = onelaunch.vector("first - second + 100 * pool_rows", "request", dtype="int64")
    plan = onelaunch.bind(
        [MetadataBuffers()],
        req_to_token=torch.zeros((4, 8), dtype=torch.int32, device=device),
        declare={"sums": onelaunch.into(formula, sums)},
        inputs={"pool_rows": torch.int64, "first": torch.int64, "second": torch.int64},
    )
    columns = Columns(plan)
    arguments = {"pool_rows": 1, "first": 5, "second": 5}
    plan.follow_addresses([arguments[name] for name in plan._input_names])
    held = []
    for step in range(20):  # more address sets than a plan remembers
        tensors = [torch.tensor(values, device=device) for values in ([5, 6], [step, 1], [[step, 4], [7, step * step]])]
        held.append(tensors)  # kept alive, so that the next tensors get other addresses
        columns.run(*tensors)
        assert sums.tolist()[:2] == [step - 4 + 100 * step, 7 - step * step + 100]
    assert columns.checks == 1
    lengths, rows, tokens = held[0]
    columns.run(lengths, rows, torch.tensor([[9, 7], [4, 4]], device=device).t())  # another stride
    assert (columns.checks, sums.tolist()[:2]) == (2, [9 - 4, 7 - 4 + 100])
    # A direct call passes as many arguments as the plan has inputs, so follow_addresses() must not apply to it.
    for first in ([3, 4], [5, 6], [7, 8]):
        held.append([torch.tensor(first, device=device)])
        plan.run(lengths, rows, pool_rows=rows, first=held[-1][0], second=tokens[:, 0])
        assert sums.tolist()[:2] == [first[0], first[1] - 7 + 100]
    with pytest.raises(ArgumentError, match=r"overlaps declare\['sums'\]"):
        columns.run(lengths[:1], rows[:1], sums[1:].view(1, 2))


@pytest.mark.parametrize("mode", ["decode", "draft_extend"])
def test_addresses_of_inputs_that_no_field_reads_and_of_extend_lengths(device: torch.device, mode: str) -> None:
    lengths = torch.full((3,), POISON, dtype=torch.int32, device=device)
    expanded = torch.full((9,), POISON, dtype=torch.int32, device=device)
    settings: dict[str, Any] = {"mode": mode}
    buffers = MetadataBuffers(cache_seqlens=lengths)
    if mode == "draft_extend":
        settings["extend"] = "variable"
        buffers.seqlens_expanded = expanded
    plan = onelaunch.bind([buffers], req_to_token=torch.zeros((4, 8), dtype=torch.int32, device=device), **settings)
    plan.follow_addresses()
    held = []
    for first in range(4):
        seq_lens, rows = torch.tensor([first + 5, 9], device=device), torch.zeros(2, dtype=torch.int64, device=device)
        extends = torch.tensor([1, 2], device=device) if mode == "draft_extend" else None
        held += [seq_lens, rows, extends]
        plan.run(seq_lens, rows, extends)
        assert lengths.tolist()[:2] == [first + 5, 9]
        if extends is not None:
            assert expanded.tolist()[:3] == [first + 5, 8, 9]
