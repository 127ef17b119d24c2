"""The serving simulation: the trace, the allocator, and continuous batching on both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from onelaunch.cli.lab.replay.pool import PagedAllocator, row_width
from onelaunch.cli.lab.replay.serving import ServingSimulation, Step
from onelaunch.cli.lab.replay.traces import Trace
from onelaunch.errors import ArgumentError

DATA = Path(__file__).parent / "data"
HEADER = "arrival_ms,input_tokens,output_tokens\n"


def trace_of(*requests: tuple[float, int, int]) -> Trace:
    arrivals, prompts, outputs = zip(*requests, strict=True)
    return Trace(np.array(arrivals, float), np.array(prompts), np.array(outputs))


def allocator_of(pages: int = 40, max_requests: int = 6, width: int = 71, page_size: int = 8) -> PagedAllocator:
    return PagedAllocator(
        max_requests=max_requests,
        width=width,
        page_size=page_size,
        pages=pages,
        rng=np.random.default_rng(1),
    )


def check_ownership(allocator: PagedAllocator, rows: Sequence[int]) -> None:
    """No page has two owners, is lost, or is the padding page, and the rows list exactly the owned pages."""
    owned = [page for row in rows for page in allocator.pages_of(row).tolist()]
    assert len(set(owned)) == len(owned)
    assert 0 not in owned
    assert all(0 < page < allocator.pages for page in owned)
    assert len(owned) + allocator.free_pages == allocator.pages - 1
    for row in rows:
        pages = allocator.pages_of(row)
        slots = (pages[:, None] * allocator.page_size + np.arange(allocator.page_size)).reshape(-1)
        slots = slots[: allocator.width]
        assert allocator.req_to_token[row, : len(slots)].tolist() == slots.tolist()
    assert not allocator.req_to_token[0].any()


# --------------------------------------------------------------------------------------------------- trace


@pytest.mark.parametrize("name", ["azure_2023_conversation.csv", "mooncake_conversation.csv"])
def test_excerpts_load(name: str) -> None:
    trace = Trace.load(DATA / name)
    lines = (DATA / name).read_text().splitlines()[1:]
    assert len(trace) == len(lines) == 1500
    for i in (0, 1, 1499):
        arrival, prompt, output = lines[i].split(",")
        assert (trace.arrival_ms[i], trace.input_tokens[i], trace.output_tokens[i]) == (
            float(arrival),
            int(prompt),
            int(output),
        )
    assert len(trace.head(7)) == 7
    assert trace.head(7).input_tokens.tolist() == trace.input_tokens[:7].tolist()


def test_trace_takes_columns_in_any_order_and_ignores_others(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfoutput_tokens,user, arrival_ms,input_tokens\r\n5,ann,0,7\r\n\r\n6,bob,2.5,8\r\n")
    trace = Trace.load(path)
    assert trace.arrival_ms.tolist() == [0, 2.5]
    assert trace.input_tokens.tolist() == [7, 8]
    assert trace.output_tokens.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("arrival_ms,input_tokens\n0,1\n", 1, "output_tokens"),
        ("", 1, "arrival_ms"),
        ("arrival_ms,arrival_ms,input_tokens,output_tokens\n0,0,1,1\n", 1, "arrival_ms"),
        (HEADER + "0,1,1\n0,x,1\n", 3, "input_tokens"),
        (HEADER + "0,1,1\n0,1\n", 3, "output_tokens"),
        (HEADER + "0,0,1\n", 2, "input_tokens"),
        (HEADER + "0,1,-1\n", 2, "output_tokens"),
        (HEADER + "0,1,1.5\n", 2, "output_tokens"),
        (HEADER + "0,1,2147483648\n", 2, "output_tokens"),
        (HEADER + "nan,1,1\n", 2, "arrival_ms"),
        (HEADER + "-1,1,1\n", 2, "arrival_ms"),
        (HEADER + "0,1_0,1\n", 2, "input_tokens"),
        (HEADER + "5,1,1\n\n4,1,1\n", 4, "arrival_ms"),
    ],
)
def test_trace_errors_name_line_and_column(tmp_path: Path, text: str, line: int, column: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    with pytest.raises(ArgumentError) as caught:
        Trace.load(path)
    message = str(caught.value)
    assert f"{path}, line {line}" in message
    assert column in message
    assert message.endswith(".")


def test_trace_that_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="can't be opened: No such file"):
        Trace.load(tmp_path / "missing.csv")
    with pytest.raises(ArgumentError, match="can't be opened"):
        Trace.load(tmp_path)
    empty = tmp_path / "empty.csv"
    empty.write_text(HEADER)
    with pytest.raises(ArgumentError, match="holds no request"):
        Trace.load(empty)
    binary = tmp_path / "binary.csv"
    binary.write_bytes(HEADER.encode() + b"\xff\xfe\n")
    with pytest.raises(ArgumentError, match="UTF-8"):
        Trace.load(binary)


# ----------------------------------------------------------------------------------------------- allocator


def test_row_width_is_sglangs_and_odd() -> None:
    assert row_width(163840, 4, 64) == 163911
    assert row_width(16384, 4, 64) == 16384 + 71
    assert row_width(1000, 4, 1) == 1009  # 4 + 4, made odd
    assert all(
        row_width(context, drafts, page) % 2 == 1
        and row_width(context, drafts, page) >= context + max(4 + drafts, 2 * drafts + page - 1)
        for context in range(60, 64)
        for drafts in range(1, 9)
        for page in (1, 2, 64)
    )


def test_allocator_keeps_ownership_over_random_use() -> None:
    rng = np.random.default_rng(5)
    allocator = allocator_of(pages=24)
    tokens: dict[int, int] = {}
    refused_growth = refused_admission = freed = 0
    for _ in range(600):
        action = rng.integers(3)
        if action == 0:
            wanted = int(rng.integers(1, 60))
            if allocator.can_admit(wanted):
                row = allocator.admit(wanted)
                assert row not in tokens
                assert row != 0
                tokens[row] = wanted
            else:
                refused_admission += 1
                with pytest.raises(ArgumentError, match="can't be admitted"):
                    allocator.admit(wanted)
        elif action == 1 and tokens:
            row = int(rng.choice(list(tokens)))
            wanted = min(tokens[row] + int(rng.integers(1, 9)), allocator.width)
            before = allocator.pages_of(row).tolist()
            if allocator.grow(row, wanted):
                tokens[row] = wanted
                assert allocator.pages_of(row).tolist()[: len(before)] == before
            else:
                refused_growth += 1
                assert allocator.pages_of(row).tolist() == before
        elif action == 2 and tokens:
            row = int(rng.choice(list(tokens)))
            back = len(allocator.pages_of(row))
            free = allocator.free_pages
            allocator.free(row)
            assert allocator.free_pages == free + back
            del tokens[row]
            freed += 1
        check_ownership(allocator, list(tokens))
        assert allocator.free_rows + len(tokens) == 6
        for row, count in tokens.items():
            assert len(allocator.pages_of(row)) == -(-count // 8)
    assert refused_growth > 5
    assert refused_admission > 5
    assert freed > 50
    for row in list(tokens):
        allocator.free(row)
    assert (allocator.free_pages, allocator.free_rows) == (23, 6)


def test_pages_are_scattered_and_tokens_in_a_page_contiguous() -> None:
    allocator = allocator_of(width=641, page_size=64, pages=100)
    row = allocator.admit(641)
    slots = allocator.req_to_token[row].tolist()
    assert len(slots) == 641
    firsts = slots[::64]
    assert all(first % 64 == 0 for first in firsts)
    assert slots == [firsts[i // 64] + i % 64 for i in range(641)]
    gaps = np.diff(firsts)
    assert (gaps != 64).any()
    assert (gaps < 0).any()


def test_allocator_changes_replay_to_the_same_table() -> None:
    allocator = allocator_of()
    mirror = torch.zeros_like(allocator.req_to_token)

    def apply() -> None:
        changes = allocator.drain_changes()
        assert changes is not None
        mirror.view(-1)[torch.from_numpy(changes[0])] = torch.from_numpy(changes[1])
        assert torch.equal(mirror, allocator.req_to_token)

    first = allocator.admit(20)
    allocator.admit(71)
    apply()
    assert allocator.drain_changes() is None
    assert allocator.grow(first, 40)
    apply()
    # A row that grows within pages it already owns changes no table entry.
    assert allocator.grow(first, 39)
    assert allocator.drain_changes() is None
    # Rows get new owners between two drains. Only the last owner's writes may arrive.
    allocator.free(first)
    rows = [allocator.admit(30) for _ in range(4)]
    for row in rows:
        allocator.free(row)
    again = [allocator.admit(25) for _ in range(4)]
    assert set(rows) & set(again)
    apply()


def test_allocator_refuses_rows_nobody_owns() -> None:
    allocator = allocator_of()
    row = allocator.admit(8)
    allocator.free(row)
    for wrong in (row, 0, -1, 7):
        with pytest.raises(ArgumentError, match="isn't owned"):
            allocator.free(wrong)
        with pytest.raises(ArgumentError, match="isn't owned"):
            allocator.grow(wrong, 9)
    with pytest.raises(ArgumentError, match="don't fit a row"):
        allocator.admit(72)
    assert (allocator.free_pages, allocator.free_rows) == (39, 6)
    with pytest.raises(ArgumentError, match="int32"):
        allocator_of(pages=2**28 + 1)


# ---------------------------------------------------------------------------------------------- simulation


def run(simulation: ServingSimulation) -> list[Step]:
    """All steps of a simulation, each checked against the simulation's state."""
    steps = []
    for step in simulation:
        requests = simulation.running
        rows = step.req_pool_indices.tolist()[: step.requests]
        assert sorted(rows) == sorted(requests)
        assert len(set(rows)) == len(rows)
        assert 1 <= step.requests <= simulation.max_batch
        assert step.seq_lens.dtype == step.req_pool_indices.dtype == torch.int64
        assert step.seq_lens.tolist() == step.lengths.tolist()
        assert step.max_len == max(step.lengths)
        check_ownership(simulation.allocator, rows)
        for row, length in zip(rows, step.lengths.tolist(), strict=False):
            assert requests[row].prompt_tokens <= length <= simulation.context_len
            room = len(simulation.allocator.pages_of(row)) * simulation.allocator.page_size
            assert room >= length + simulation.num_draft_tokens
        steps.append(step)
    assert simulation.waiting == 0
    assert not simulation.running
    assert simulation.allocator.free_pages == simulation.allocator.pages - 1
    return steps


def test_a_request_runs_until_its_output_is_there() -> None:
    simulation = ServingSimulation(trace_of((0, 100, 50)), num_backends=3, context_len=400)
    steps = run(simulation)
    lengths = [step.lengths.tolist() for step in steps]
    assert lengths[0] == [100]
    accepted = np.diff([length[0] for length in lengths])
    assert set(accepted.tolist()) == {1, 2, 3, 4}
    # In the last step the request isn't finished yet; at most four more tokens finish it.
    assert 150 - 4 <= lengths[-1][0] < 150
    assert simulation.finished == 1


@pytest.mark.parametrize("backends", [1, 5])
def test_accepted_tokens_span_one_to_one_more_than_the_backends(backends: int) -> None:
    simulation = ServingSimulation(trace_of((0, 1, 1500)), num_backends=backends, context_len=2000)
    lengths = [int(step.lengths[0]) for step in run(simulation)]
    assert set(np.diff(lengths).tolist()) == set(range(1, backends + 2))


def test_pool_has_an_odd_row_stride_and_a_fixed_address() -> None:
    simulation = ServingSimulation(trace_of((0, 10, 9), (50, 30, 9)), max_batch=4, context_len=128)
    address = simulation.req_to_token.data_ptr()
    assert simulation.req_to_token.dtype == torch.int32
    assert simulation.req_to_token.shape == (5, 128 + 71)
    assert simulation.req_to_token.stride() == (199, 1)
    run(simulation)
    assert simulation.req_to_token.data_ptr() == address


def test_batch_limit_holds_and_arrivals_keep_their_order() -> None:
    requests = [(0, 5 + i, 20) for i in range(11)]
    simulation = ServingSimulation(trace_of(*requests), max_batch=4, context_len=64, page_size=8)
    admitted: list[int] = []
    batches = []
    for step in simulation:
        for request in simulation.running.values():
            if request.number not in admitted:
                admitted.append(request.number)
        batches.append(step.requests)
    assert admitted == list(range(11))
    assert max(batches) == 4
    assert simulation.finished == 11
    assert 0 < simulation.queued_steps < len(batches)


def test_admission_waits_for_pages() -> None:
    # 9 pages of 8 tokens are free. A request of 16 tokens, with its 2 draft tokens and its output, needs 3 pages.
    requests = [(0, 16, 4) for _ in range(10)]
    simulation = ServingSimulation(
        trace_of(*requests), max_batch=8, context_len=64, page_size=8, pages=10, num_backends=1
    )
    steps = run(simulation)
    assert max(step.requests for step in steps) == 3
    assert simulation.queued_steps > 0
    assert simulation.preemptions == 0
    assert simulation.finished == 10


def test_decoding_that_runs_out_of_pages_preempts_the_last_admitted_and_loses_no_token() -> None:
    simulation = ServingSimulation(
        trace_of(*[(0, 8, 40)] * 4), max_batch=4, context_len=64, page_size=8, pages=14, num_backends=1
    )
    longest: dict[int, int] = {}
    first_of_all = []
    for step in simulation:
        requests = simulation.running
        rows = step.req_pool_indices.tolist()
        check_ownership(simulation.allocator, rows)
        for row, length in zip(rows, step.lengths.tolist(), strict=True):
            number = requests[row].number
            assert length >= longest.get(number, 8)
            longest[number] = length
        first_of_all.append(requests[rows[0]].number)
    assert simulation.preemptions > 0
    assert simulation.finished == 4
    assert all(46 <= length < 48 for length in longest.values())
    # The request admitted first is never preempted.
    assert first_of_all == sorted(first_of_all)


def test_random_preemption_finishes_every_request_all_the_same() -> None:
    trace = Trace.load(DATA / "azure_2023_conversation.csv").head(40)
    simulation = ServingSimulation(trace, max_batch=8, context_len=1024, preempt_probability=0.05, seed=3)
    run(simulation)
    assert simulation.finished == 40
    assert simulation.preemptions > 20
    calm = ServingSimulation(trace, max_batch=8, context_len=1024, seed=3)
    run(calm)
    assert calm.preemptions == 0


def test_preempted_requests_go_before_those_that_wait_and_keep_their_order() -> None:
    simulation = ServingSimulation(trace_of(*[(0, 8, 30)] * 7), max_batch=3, context_len=64, preempt_probability=1.0)
    done: set[int] = set()
    previous: list[int] = []
    for step in simulation:
        running = simulation.running
        batch = [running[row].number for row in step.req_pool_indices.tolist()]
        done |= set(previous) - set(batch)
        assert batch == [number for number in range(7) if number not in done][:3]
        previous = batch
    assert simulation.finished == 7
    assert simulation.preemptions > 7


def test_clock_ticks_and_jumps_over_idle_time() -> None:
    simulation = ServingSimulation(
        trace_of((100, 4, 1), (100.5, 4, 1), (9000, 4, 1)), step_ms=10, context_len=32, page_size=8
    )
    steps = run(simulation)
    assert [step.clock_ms for step in steps] == [100, 110, 9000]
    assert [step.requests for step in steps] == [1, 1, 1]
    assert [step.number for step in steps] == [0, 1, 2]


def test_requests_join_a_running_batch_when_they_arrive() -> None:
    simulation = ServingSimulation(trace_of((0, 4, 100), (35, 4, 100)), step_ms=10, context_len=256, page_size=8)
    steps = run(simulation)
    assert [step.requests for step in steps][:6] == [1, 1, 1, 1, 2, 2]


def test_long_prompts_are_clipped_and_counted_and_no_sequence_outgrows_the_context() -> None:
    simulation = ServingSimulation(
        trace_of((0, 129, 5), (0, 128, 5), (0, 120, 500), (0, 10**9, 5)), context_len=128, page_size=8
    )
    steps = run(simulation)
    assert simulation.clipped_prompts == 2
    assert steps[0].lengths.tolist() == [128, 128, 120, 128]
    assert max(step.max_len for step in steps) == 128
    assert simulation.finished == 4


def test_padding_requests_fill_batches_up() -> None:
    trace = trace_of(*[(i * 40, 30, 60) for i in range(9)])
    simulation = ServingSimulation(trace, max_batch=6, context_len=128, pad_batch=4)
    sizes = set()
    for step in run(simulation):
        bs = len(step.seq_lens)
        assert bs == (4 if step.requests <= 4 else 6)
        assert step.seq_lens[step.requests :].tolist() == [1] * (bs - step.requests)
        assert step.req_pool_indices[step.requests :].tolist() == [0] * (bs - step.requests)
        assert 0 not in step.req_pool_indices[: step.requests].tolist()
        sizes.add((bs, step.requests))
    assert {(4, 1), (6, 5), (6, 6)} <= sizes


def test_a_seed_decides_everything() -> None:
    trace = Trace.load(DATA / "azure_2023_conversation.csv").head(12)

    def history(seed: int) -> list[tuple[list[int], list[int], int]]:
        simulation = ServingSimulation(trace, max_batch=4, context_len=512, seed=seed, preempt_probability=0.01)
        return [
            (s.seq_lens.tolist(), s.req_pool_indices.tolist(), int(simulation.req_to_token.sum())) for s in simulation
        ]

    assert history(1) == history(1)
    assert history(1) != history(2)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_batch", 0),
        ("context_len", 0),
        ("num_backends", 0),
        ("page_size", 0),
        ("pad_batch", 0),
        ("step_ms", 0.0),
        ("step_ms", float("nan")),
        ("preempt_probability", 1.5),
        ("seed", -1),
        ("pages", 257),
    ],
)
def test_numbers_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ArgumentError, match=f"{name} is {value}"):
        ServingSimulation(trace_of((0, 1, 1)), **{name: value})  # type: ignore[arg-type]


def test_smallest_pool_serves_a_full_context() -> None:
    simulation = ServingSimulation(trace_of((0, 16384, 9), (0, 16000, 600)), pages=258)
    run(simulation)
    assert simulation.finished == 2


@pytest.mark.gpu
def test_device_rows_follow_the_host() -> None:
    trace = Trace.load(DATA / "mooncake_conversation.csv").head(30)
    simulation = ServingSimulation(
        trace, max_batch=8, context_len=2048, pages=200, preempt_probability=0.02, device="cuda"
    )
    for step in simulation:
        assert step.seq_lens.is_cuda
        assert torch.equal(simulation.req_to_token.cpu(), simulation.allocator.req_to_token)
    assert simulation.preemptions > 0
