"""Groups of backends on separate streams: exact, refused before anything is written, and capturable."""

from __future__ import annotations

from typing import Any

import onelaunch
import pytest
import support
import torch
from onelaunch import ArgumentError
from support import SIX_FIELDS, Poisoned, assert_same, assert_untouched, buffers_of
from torch import Tensor

WIDTH, PAGE = 331, 16
FACTS: dict[str, Any] = {"index_topk": 70, "page_size": PAGE}


def scene(
    device: torch.device | str, n: int, bs: int = 7, fields: tuple[str, ...] = SIX_FIELDS
) -> tuple[list[Poisoned], Tensor, Tensor, Tensor]:
    backends = [support.destination(fields, bs, WIDTH, PAGE, device=device) for _ in range(n)]
    pool = support.token_pool(9, WIDTH, device=device)
    lengths = support.vector(support.lengths(bs, WIDTH, PAGE), torch.int64, device)
    rows = support.vector(support.pool_rows(bs, 9), torch.int64, device)
    return backends, pool, lengths, rows


@pytest.mark.parametrize("partition", [[[0, 1, 2]], [[0, 1], [2]], [[2], [0], [1]]])
def test_groups_write_what_one_plan_writes(device: torch.device, partition: list[list[int]]) -> None:
    backends, pool, lengths, rows = scene(device, 3)
    groups = onelaunch.bind_groups(buffers_of(backends), partition, req_to_token=pool, **FACTS)
    groups.run(lengths, rows)
    assert groups.launches == len(partition)
    assert [plan.config.num_backends for plan in groups.plans] == [len(group) for group in partition]
    assert_same(backends, support.expected_refresh(backends, lengths, rows, pool, extent="live", **FACTS))


def test_offsets_and_fields_belong_to_the_backends_of_a_group(device: torch.device) -> None:
    first, pool, lengths, rows = scene(device, 2, fields=("cache_seqlens", "real_page_table"))
    other, _, _, _ = scene(device, 1)
    backends = [first[0], other[0], first[1]]
    groups = onelaunch.bind_groups(
        buffers_of(backends), [[2, 0], [1]], req_to_token=pool, seqlen_offsets=(1, 2, 3), **FACTS
    )
    assert [plan.config.seqlen_offsets for plan in groups.plans] == [(3, 1), (2,)]
    groups.run(lengths, rows, max_len=200)
    for backend, offset in zip(backends, (1, 2, 3), strict=True):
        want = support.expected_refresh(
            [backend], lengths, rows, pool, extent="live", seqlen_offsets=(offset,), max_len=200, **FACTS
        )
        assert_same([backend], want)


@pytest.mark.parametrize("partition", [[[0], [1]], [[0, 1], [1, 2]], [[0, 1, 3]], [[0, 1, 2], []], [0, 1, 2], [["0"]]])
def test_groups_that_are_no_partition_are_refused(partition: list[Any]) -> None:
    backends, pool, _, _ = scene("cpu", 3)
    with pytest.raises(ArgumentError, match="with each of the 3 backends exactly once"):
        onelaunch.bind_groups(buffers_of(backends), partition, req_to_token=pool)


def test_what_does_not_fit_is_named_as_the_caller_numbers_it() -> None:
    backends, pool, _, _ = scene("cpu", 3)
    buffers = buffers_of(backends)
    buffers[2].cache_seqlens = torch.zeros(7)
    with pytest.raises(ArgumentError, match=r"backends\[2\].cache_seqlens has dtype float32"):
        onelaunch.bind_groups(buffers, [[0, 1], [2]], req_to_token=pool)
    buffers[2].cache_seqlens = buffers[0].cache_seqlens
    message = r"backends\[(0|2)\].cache_seqlens overlaps backends\[(0|2)\].* Put backends that share a tensor into one"
    with pytest.raises(ArgumentError, match=message):
        onelaunch.bind_groups(buffers, [[0, 1], [2]], req_to_token=pool)
    assert onelaunch.bind_groups(buffers, [[0, 2], [1]], req_to_token=pool).plans[0].config.distinct
    with pytest.raises(ArgumentError, match=r"seqlen_offsets is \(1, 2\); .* each of the 3 backends"):
        onelaunch.bind_groups(buffers, [[0, 2], [1]], req_to_token=pool, seqlen_offsets=(1, 2))
    with pytest.raises(ArgumentError, match=r"streams is \['here', None\]; the backends are on cpu"):
        onelaunch.bind_groups(buffers, [[0, 2], [1]], ["here", None], req_to_token=pool)


def test_a_call_that_one_group_refuses_writes_to_none(device: torch.device) -> None:
    backends, pool, lengths, rows = scene(device, 1)
    small, _, _, _ = scene(device, 1, bs=3)
    groups = onelaunch.bind_groups(buffers_of([*backends, *small]), [[0], [1]], req_to_token=pool, **FACTS)
    with pytest.raises(ArgumentError, match=r"seq_lens has 7 requests; .* has room for 3"):
        groups.run(lengths, rows)
    with pytest.raises(ArgumentError, match="seq_lens is a list"):
        groups.run([1, 2], rows)  # type: ignore[arg-type]
    assert_untouched([*backends, *small])
    assert groups.launches == 0


# ------------------------------------------------------------------------------------------------ streams


@pytest.mark.gpu
@pytest.mark.parametrize("given", [True, False])
def test_groups_are_captured_in_a_graph_and_follow_the_inputs(given: bool) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    backends, pool, lengths, rows = scene(device, 3, bs=40)
    streams = [torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Stream()] if given else None
    groups = onelaunch.bind_groups(buffers_of(backends), [[0], [1], [2]], streams, req_to_token=pool, **FACTS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        groups.run(lengths, rows)
        late = [backend.buffers.cu_seqlens_k.clone() for backend in backends]  # type: ignore[union-attr]
    for shift in (0, 3, 11):
        lengths.copy_(torch.roll(lengths, shift))
        for backend in backends:
            for storage in backend.storages.values():
                storage.fill_(support.POISON)
        graph.replay()
        torch.cuda.synchronize()
        want = support.expected_refresh(backends, lengths, rows, pool, extent="live", **FACTS)
        assert_same(backends, want)
        # Later work in the graph waits for every group.
        assert want.cu_seqlens_k is not None
        assert all(torch.equal(copy.cpu(), want.cu_seqlens_k) for copy in late)


@pytest.mark.gpu
def test_groups_wait_for_the_current_stream_and_it_waits_for_them() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    backends, pool, lengths, rows = scene(device, 2)
    groups = onelaunch.bind_groups(buffers_of(backends), [[0], [1]], req_to_token=pool, **FACTS)
    late = torch.zeros_like(lengths)
    groups.run(late, rows)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        late.copy_(lengths)
        groups.run(late, rows)
        got = [backend.buffers.cache_seqlens.clone() for backend in backends]  # type: ignore[union-attr]
        late.zero_()
    torch.cuda.synchronize()
    assert all(torch.equal(copy.long(), lengths) for copy in got)


@pytest.mark.gpu
def test_streams_that_do_not_fit_are_refused() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    backends, pool, _, _ = scene(device, 2)
    buffers = buffers_of(backends)
    with pytest.raises(ArgumentError, match="streams has 1 elements and groups has 2"):
        onelaunch.bind_groups(buffers, [[0], [1]], [None], req_to_token=pool, **FACTS)
    with pytest.raises(ArgumentError, match=r"streams\[1\] is 7; it must be a torch.cuda.Stream of cuda"):
        onelaunch.bind_groups(buffers, [[0], [1]], [None, 7], req_to_token=pool, **FACTS)
