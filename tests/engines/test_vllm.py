"""The sparse indexer's decode metadata: vLLM's builder makes one set, the plan refreshes another. They must match."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import results
import torch
import vllm_objects
from onelaunch import ArgumentError
from onelaunch.integrations import vllm
from torch import Tensor
from vllm_objects import Runner

POISON = -7
SM90 = (1, 2, 3, 4, 5, 8)
FLATTENED = (3, 5, 8)


class Pair:
    """Two runners with a builder each. Both build for the capture; later the engine builds and the plan refreshes.

    Args:
        next_n: the tokens per request that the builder is made for.
        tokens: the tokens per request in the batch; 0 for next_n.
        captured: the captured number of requests.
        schedule: whether the plan computes DeepGEMM's schedule too.
    """

    def __init__(self, next_n: int, captured: int, *, schedule: bool, tokens: int = 0, **builder: Any) -> None:
        self.tokens, self.captured = tokens or next_n, captured
        self.runners = [Runner(), Runner()]
        self.builders = [vllm_objects.builder(next_n, **builder) for _ in range(2)]
        self.fill((1,) * captured, (self.tokens,) * captured)
        self.engine, self.mine = (self.build(i) for i in range(2))
        starts = self.runners[1].query_start_loc
        self.plan = vllm.bind_backends(self.builders[1], self.mine, starts, schedule=schedule)
        self.written = [t.untyped_storage().data_ptr() for t in self.destinations()]

    def fill(self, lengths: tuple[int, ...], query_lens: tuple[int, ...]) -> None:
        for runner in self.runners:
            runner.fill(lengths, query_lens)

    def build(self, index: int) -> Any:
        common = self.runners[index].metadata(self.captured, self.captured * self.tokens, self.tokens)
        return self.builders[index].build(0, common)

    def destinations(self) -> Iterator[Tensor]:
        """The tensors that the plan writes: all except the runner's own memory."""
        for field in dataclasses.fields(self.mine.decode):
            tensor = getattr(self.mine.decode, field.name)
            if field.name == "schedule_metadata" and "paged_mqa_schedule_metadata" not in self.plan.config.fields:
                continue
            if isinstance(tensor, Tensor) and not self.runners[1].owns(tensor):
                yield tensor

    def replay(self, lengths: tuple[int, ...], query_lens: tuple[int, ...]) -> None:
        """Refreshes for these requests, which may be fewer than the captured ones."""
        self.fill(lengths, query_lens)
        self.engine = self.build(0)
        for tensor in self.destinations():
            tensor.fill_(POISON)
        self.run()

    def run(self) -> None:
        self.plan.run(self.runners[1].seq_lens[: self.captured], torch.arange(self.captured))

    def differences(self) -> list[str]:
        """A sentence for every tensor of the metadata that differs."""
        found = []
        for label, engine, mine in (
            ("metadata", self.engine, self.mine),
            ("decode", self.engine.decode, self.mine.decode),
        ):
            for field in dataclasses.fields(mine):
                wanted, got = getattr(engine, field.name), getattr(mine, field.name)
                if isinstance(got, Tensor):
                    found += _difference(f"{label}.{field.name}", *self._read(label, field.name, wanted, got))
        return found

    def _read(self, label: str, name: str, wanted: Tensor, got: Tensor) -> tuple[Tensor, Tensor]:
        """The two tensors to compare. In padding rows of a flattened table vLLM zeroes only the first column."""
        if label == "decode" and name == "block_table" and len(got) == self.captured * self.tokens:
            padding = self.engine.decode.seq_lens.view(-1) == 0
            wanted, got = (tensor.clone() for tensor in (wanted, got))
            wanted[padding, 1:] = got[padding, 1:] = 0
        return wanted, got


def _difference(label: str, wanted: Tensor, got: Tensor) -> list[str]:
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return [f"{label}: engine {tuple(wanted.shape)} {wanted.dtype}, onelaunch {tuple(got.shape)} {got.dtype}"]
    if torch.equal(wanted, got):
        return []
    first = tuple((wanted != got).nonzero()[0].tolist())
    return [f"{label}{list(first)}: engine {wanted[first].item()}, onelaunch {got[first].item()}"]


def batches(next_n: int, captured: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Lengths and numbers of tokens: as many requests as captured, fewer, and none with a length."""
    lengths = (next_n, 500, 64 + next_n, 257, 512, 256 + next_n, 65, 300)
    for requests in (captured, max(captured - 2, 1)):
        yield lengths[:requests], (next_n,) * requests
    # A padding request may have tokens and no length, as in a dummy run.
    yield (*lengths[: captured - 1], 0), (next_n,) * captured
    yield (0,) * captured, (next_n,) * captured


# ------------------------------------------------------------------------------------------------ Hopper


@pytest.mark.parametrize("captured", [1, 5, 8])
@pytest.mark.parametrize("next_n", SM90)
def test_what_a_build_writes(next_n: int, captured: int) -> None:
    pair = Pair(next_n, captured, schedule=True)
    assert pair.builders[0].use_flattening == (next_n in FLATTENED)
    assert pair.differences() == []
    for lengths, query_lens in batches(next_n, captured):
        pair.replay(lengths, query_lens)
        assert pair.differences() == [], (lengths, query_lens)
    results.record(
        type(pair.builders[1]).__name__,
        *vllm_objects.INDEXER,
        "flattened" if next_n in FLATTENED else "native",
        next_n=next_n,
    )


@pytest.mark.parametrize(("next_n", "tokens"), [(2, 1), (3, 2), (4, 1), (4, 2), (4, 3), (5, 2)])
def test_steps_with_fewer_tokens_than_the_builder_is_for(next_n: int, tokens: int) -> None:
    """DeepGEMM may have a kernel for this many tokens where next_n needs a flattened table, or the other way round."""
    pair = Pair(next_n, 5, schedule=True, tokens=tokens)
    for lengths, query_lens in batches(tokens, 5):
        pair.replay(lengths, query_lens)
        assert pair.differences() == [], (lengths, query_lens)


@pytest.mark.parametrize("next_n", SM90)
def test_lengths_and_tables_without_the_schedule(next_n: int) -> None:
    pair = Pair(next_n, 4, schedule=False)
    before = pair.mine.decode.schedule_metadata.clone()
    pair.replay((300, 200, 100, next_n), (next_n,) * 4)
    assert [d.partition("[")[0] for d in pair.differences()] == ["decode.schedule_metadata"]
    assert torch.equal(pair.mine.decode.schedule_metadata, before)


@pytest.mark.parametrize("next_n", SM90)
def test_a_wrong_entry_anywhere_is_found(next_n: int) -> None:
    """The control: each tensor that the plan writes, in its first and its last entry."""
    pair = Pair(next_n, 3, schedule=True)
    count = {1: 3, 2: 4, 4: 4}.get(next_n, 5)  # two numbers of tokens and the schedule; lengths; a flattened table
    assert len(list(pair.destinations())) == count
    for index in range(count):
        for at in (0, -1):
            pair.replay((300, 200, 100), (next_n,) * 3)
            assert pair.differences() == []
            list(pair.destinations())[index].view(-1)[at] += 1
            assert len(pair.differences()) == 1


@pytest.mark.parametrize("next_n", SM90)
def test_nothing_else_is_written(next_n: int) -> None:
    """The runner's buffers stay, and so does the builder's memory beyond the metadata's slices of it."""
    pair = Pair(next_n, 3, schedule=True)
    builder = pair.builders[1]
    buffers = [value for value in vars(builder).values() if isinstance(value, Tensor)]
    buffers += [pair.runners[1].seq_lens, pair.runners[1].block_table]
    pair.fill((300, 200, 100), (next_n,) * 3)
    for tensor in pair.destinations():
        tensor.fill_(POISON)
    before = [tensor.clone() for tensor in buffers]
    pair.run()
    changed = [tensor for tensor, old in zip(buffers, before, strict=True) if not torch.equal(tensor, old)]
    assert {t.untyped_storage().data_ptr() for t in changed} == set(pair.written)
    for tensor in pair.destinations():
        (whole,) = [t for t in buffers if t.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()]
        (old,) = [o for t, o in zip(buffers, before, strict=True) if t is whole]
        assert torch.equal(whole.view(-1)[tensor.numel() :], old.view(-1)[tensor.numel() :])


def test_the_docstrings_lines() -> None:
    runner, builder = Runner(), vllm_objects.builder(2)
    runner.fill((1, 1, 1), (2, 2, 2))
    metadata = builder.build(0, runner.metadata(3, 6, 2))
    names = {
        "torch": torch,
        "builder": builder,
        "indexer_metadata": metadata,
        "query_start_loc": runner.query_start_loc,
        "seq_lens": runner.seq_lens,
        "num_reqs": 3,
    }
    lines = str(vllm.__doc__).split("::\n")[2].partition("\nWhat that gains")[0]
    runner.fill((300, 200), (2, 2))
    exec(textwrap.dedent(lines), names)
    assert metadata.decode.seq_lens.tolist() == [[299, 300], [199, 200], [0, 0]]


# ------------------------------------------------------------------------------------------------ adaptive verification


@pytest.mark.parametrize("next_n", [2, 3, 4])
@pytest.mark.parametrize("schedule", [True, False])
def test_flattened_for_adaptive_verification(next_n: int, schedule: bool) -> None:
    pair = Pair(next_n, 4, schedule=schedule, adaptive=True)
    assert pair.builders[0].use_flattening
    pair.replay((300, 200, 100, next_n), (next_n,) * 4)
    assert [d for d in pair.differences() if schedule or "schedule_metadata" not in d] == []


@pytest.mark.parametrize("query_lens", [(3, 1, 4, 2), (1, 1, 1, 4), (4, 2, 3, 0)])
def test_requests_with_different_numbers_of_tokens(query_lens: tuple[int, ...]) -> None:
    """One plan serves any numbers, which run() takes. It leaves rows after the last request; vLLM zeroes them."""
    runners = [Runner(), Runner()]
    builders = [vllm_objects.builder(4, adaptive=True) for _ in range(2)]
    total = sum(query_lens)

    def build(index: int, lengths: tuple[int, ...], tokens: tuple[int, ...]) -> Any:
        runners[index].fill(lengths, tokens)
        return builders[index].build(0, runners[index].metadata(4, 14, max(tokens)))

    engine, mine = build(0, (300, 200, 100, 4), query_lens), build(1, (9, 9, 9, 9), (4, 3, 4, 3))
    plan = vllm.bind_backends(builders[1], mine, runners[1].query_start_loc)
    with pytest.raises(ArgumentError, match="schedule is True and requests have different numbers of tokens"):
        vllm.bind_backends(builders[1], mine, runners[1].query_start_loc, schedule=True)
    mine.decode.seq_lens.fill_(POISON)
    mine.decode.block_table.fill_(POISON)
    runners[1].fill((300, 200, 100, 4), query_lens)
    plan.run(runners[1].seq_lens[:4], torch.arange(4), torch.tensor(query_lens, dtype=torch.int32))
    assert torch.equal(mine.decode.seq_lens[:total], engine.decode.seq_lens[:total])
    assert torch.equal(mine.decode.block_table[:total], engine.decode.block_table[:total])
    assert torch.equal(mine.decode.decode_lens, engine.decode.decode_lens)
    assert torch.equal(mine.decode.per_req_decode_lens, engine.decode.per_req_decode_lens)
    assert bool((engine.decode.seq_lens[total:] == 0).all())
    assert bool((mine.decode.seq_lens[total:] == POISON).all())
    assert bool((mine.decode.block_table[total:] == POISON).all())


# ------------------------------------------------------------------------------------------------ refusals


def test_a_batch_of_prefills_is_refused() -> None:
    builder, runner = vllm_objects.builder(3), Runner()
    runner.fill((40, 30), (40, 30))
    metadata = builder.build(0, runner.metadata(2, 70, 40))
    assert metadata.decode is None
    assert metadata.num_prefills == 2
    with pytest.raises(ArgumentError, match=r"metadata\.decode is None: the batch has no decode requests"):
        vllm.bind_backends(builder, metadata, runner.query_start_loc)


def test_the_decodes_of_a_mixed_batch() -> None:
    """The decode metadata has rows only for the first requests, the decodes, and so has the plan."""
    runners, builders = [Runner(), Runner()], [vllm_objects.builder(3) for _ in range(2)]
    for runner in runners:
        runner.fill((100, 70, 30), (3, 3, 30))
    engine, mine = (b.build(0, r.metadata(3, 36, 30)) for b, r in zip(builders, runners, strict=True))
    assert (mine.num_decodes, mine.num_prefills) == (2, 1)
    plan = vllm.bind_backends(builders[1], mine, runners[1].query_start_loc)
    mine.decode.seq_lens.fill_(POISON)
    mine.decode.block_table.fill_(POISON)
    plan.run(runners[1].seq_lens[:2], torch.arange(2))
    assert torch.equal(mine.decode.seq_lens, engine.decode.seq_lens)
    assert torch.equal(mine.decode.block_table, engine.decode.block_table)


def test_where_lengths_and_table_are_the_runners_own() -> None:
    builder, runner = vllm_objects.builder(1), Runner()
    runner.fill((40, 30), (1, 1))
    metadata = builder.build(0, runner.metadata(2, 2, 1))
    assert metadata.decode.seq_lens.shape == (2, 1)
    assert runner.owns(metadata.decode.seq_lens)
    assert runner.owns(metadata.decode.block_table)
    plan = vllm.bind_backends(builder, metadata, runner.query_start_loc, schedule=True)
    assert set(plan.config.fields) == {"paged_mqa_schedule_metadata", "decode_lens", "per_req_decode_lens"}


def test_compressed_lengths_are_refused() -> None:
    builder, runner = vllm_objects.builder(3, tokens_per_state=4), Runner()
    runner.fill((40, 30), (3, 3))
    metadata = builder.build(0, runner.metadata(2, 6, 3))
    with pytest.raises(ArgumentError, match=r"builder\.compress_ratio is 4: lengths count compressed states"):
        vllm.bind_backends(builder, metadata, runner.query_start_loc)


@pytest.mark.parametrize(("name", "value"), [("dcp_world_size", 2), ("use_pcp", True)])
def test_parallel_contexts_are_refused(name: str, value: Any) -> None:
    """The builder would request a process group, which a single process doesn't have."""
    builder, runner = vllm_objects.builder(3), Runner()
    runner.fill((40, 30), (3, 3))
    metadata = builder.build(0, runner.metadata(2, 6, 3))
    setattr(builder, name, value)
    with pytest.raises(ArgumentError, match=rf"builder\.{name} is {value}: .*Leave this batch to vLLM"):
        vllm.bind_backends(builder, metadata, runner.query_start_loc)


def test_varlen_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability

    blackwell = classmethod(lambda cls, device_id=0: DeviceCapability(10, 0))
    monkeypatch.setattr(cuda.NonNvmlCudaPlatform, "get_device_capability", blackwell)
    builder, runner = vllm_objects.builder(3), Runner()
    runner.fill((40, 30), (3, 3))
    metadata = builder.build(0, runner.metadata(2, 6, 3))
    assert metadata.decode.indices.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(ArgumentError, match=r"builder\.supports_varlen is True: one kernel of vLLM's writes all of it"):
        vllm.bind_backends(builder, metadata, runner.query_start_loc)
