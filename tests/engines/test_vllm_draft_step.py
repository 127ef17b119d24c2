"""A drafter's steps: vLLM's kernels and builders advance one set of buffers, one launch per step another set."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import Any

import pytest
import results
import torch
import vllm_objects
from onelaunch import ArgumentError, preset
from onelaunch.integrations import vllm
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm_objects import POISON, WIDTH, Drafter, differences, poison

LONGEST = 64 * WIDTH


def batches(captured: int) -> Iterator[dict[str, Any]]:
    """As many requests as captured, fewer, a dummy run; lengths at block edges and at the model's longest."""
    lengths = (1, 64, 65, LONGEST, 257, LONGEST - 1, 16, 300)
    yield {"lengths": lengths[:captured]}
    yield {"lengths": lengths[: max(captured - 3, 1)]}
    yield {"lengths": (512,) * captured}
    yield {"lengths": lengths[:captured], "dummy": True}


# ------------------------------------------------------------------------------------------------ vLLM's own


@pytest.mark.parametrize("captured", [1, 5, 8])
@pytest.mark.parametrize("next_n", [1, 2, 3, 4, 8])
def test_steps_of_a_batch(next_n: int, captured: int) -> None:
    engine, mine = Drafter(next_n, captured), Drafter(next_n, captured)
    step = mine.bind()
    for batch in batches(captured):
        poison(engine, mine)
        for drafter in (engine, mine):
            drafter.begin(**batch)
        for number in range(1, 5):
            engine.step()
            step.run(tail=number == 1)
            assert differences(engine, mine) == [], (batch, number)
            for drafter in (engine, mine):
                drafter.advance()
    assert step.plan.launches == 16
    results.record(type(mine.builder).__name__, *vllm_objects.INDEXER, "draft step", next_n=next_n)
    results.record(type(mine.tables).__name__, "slot mappings of all groups", "the tables", "draft step")
    results.record(type(mine.sparse_builder).__name__, "req_id_per_token", "all else", "draft step", next_n=next_n)


@pytest.mark.parametrize(("captured", "next_n"), [(1, 2), (8, 3)])
def test_a_wrong_entry_anywhere_is_found(captured: int, next_n: int) -> None:
    """The control: each tensor that the launch writes, in its first and its last entry."""
    engine, mine = Drafter(next_n, captured), Drafter(next_n, captured)
    step = mine.bind()
    for drafter in (engine, mine):
        drafter.begin((300, 200, 100)[:captured])
    engine.step()
    written = mine.destinations()
    # Slot mappings, lengths, two numbers of tokens, the schedule and each token's request; for 3 a flattened table too.
    assert len(written) == 6 + (next_n == 3)
    for name, tensor in written.items():
        for at in ((0,) * tensor.dim(), (-1,) * tensor.dim()):
            step.run()
            assert differences(engine, mine) == []
            tensor[at] += 1
            assert differences(engine, mine) == [name]


@pytest.mark.parametrize("next_n", [2, 3])
def test_nothing_else_is_written(next_n: int) -> None:
    """The runner's buffers, the block tables, and the builders' memory beyond the metadata's slices of it stay."""
    drafter = Drafter(next_n, 3)
    step = drafter.bind()
    drafter.begin((300, 200))
    owners = (drafter.builder, drafter.sparse_builder, drafter.runner, drafter)
    buffers = [value for owner in owners for value in vars(owner).values() if isinstance(value, Tensor)]
    buffers = [tensor for tensor in buffers if not tensor.is_floating_point()]  # workspaces may hold NaN
    buffers += [table.gpu for table in drafter.tables.block_tables] + drafter.tables.input_block_tables
    poison(drafter)
    before = [tensor.clone() for tensor in buffers]
    step.run()
    written = {tensor.data_ptr(): tensor for tensor in drafter.destinations().values()}
    changed = [(t, old) for t, old in zip(buffers, before, strict=True) if not torch.equal(t, old)]
    assert {tensor.data_ptr() for tensor, _ in changed} == written.keys() - {drafter.tables.slot_mappings.data_ptr()}
    for tensor, old in changed:
        behind = written[tensor.data_ptr()].numel()
        assert torch.equal(tensor.view(-1)[behind:], old.view(-1)[behind:])


def test_the_docstrings_lines() -> None:
    engine, mine = Drafter(2, 3), Drafter(2, 3)
    names = {
        "indexer_builder": mine.builder,
        "indexer_metadata": mine.metadata,
        "sparse_metadata": mine.sparse,
        "block_tables": mine.tables,
        "idx_mapping": mine.idx_mapping,
        "positions": mine.positions,
    }
    for drafter in (engine, mine):
        drafter.begin((300, 200))
    engine.step()
    assert differences(engine, mine) != []
    lines = str(vllm.__doc__).partition("::\n")[2].partition("\nOne launch")[0]
    exec(textwrap.dedent(lines), names)
    assert differences(engine, mine) == []


def test_without_the_tail() -> None:
    drafter = Drafter(2, 3)
    step = drafter.bind()
    drafter.begin((300, 200))
    poison(drafter)
    step.run(tail=False)
    assert drafter.tables.slot_mappings[:, 2].tolist() == [-1, -1], "padding of the captured requests"
    assert bool((drafter.tables.slot_mappings[:, 3:] == POISON).all())
    step.run()
    assert bool((drafter.tables.slot_mappings[:, 3:] == -1).all())


def test_one_kernel_for_all_captured_sizes_is_the_preset() -> None:
    steps = [Drafter(3, captured).bind() for captured in (1, 4, 8)]
    assert {step.plan.config for step in steps} == {preset("vllm-draft-step").replace(target="cpu")}


@pytest.mark.parametrize("sizes", [(64,), (64, 16, 48)])
def test_other_numbers_of_groups(sizes: tuple[int, ...]) -> None:
    engine, mine = Drafter(2, 4, sizes), Drafter(2, 4, sizes)
    step = mine.bind()
    for drafter in (engine, mine):
        drafter.begin((1, 17, LONGEST))
    engine.step()
    step.run()
    assert differences(engine, mine) == []


def test_a_group_without_slot_mapping() -> None:
    engine, mine = (Drafter(3, 4, slot_mapping_enabled=[True, False]) for _ in range(2))
    step = mine.bind()
    for drafter in (engine, mine):
        drafter.begin((1, 17, 300, 64))
    engine.step()
    step.run()
    assert differences(engine, mine) == []
    assert bool((mine.tables.slot_mappings[1] == -1).all())
    assert bool((mine.tables.slot_mappings[0, :4] >= 0).all())


def test_without_schedule_and_sparse_metadata() -> None:
    engine, mine = Drafter(3, 4), Drafter(3, 4)
    step = mine.bind(schedule=False, sparse=())
    poison(engine, mine)
    for drafter in (engine, mine):
        drafter.begin((1, 17, 300, 64))
    engine.step()
    step.run()
    assert differences(engine, mine) == ["decode.schedule_metadata", "sparse.req_id_per_token"]


@pytest.mark.parametrize(("next_n", "launches"), [(1, 6), (2, 7), (3, 8), (4, 7)])
def test_how_many_launches_one_takes_the_place_of(next_n: int, launches: int) -> None:
    """Equals the count on a GPU for 3 and 4 (gpu/vllm_seam.json). Only a flattened block table is copied."""
    assert _launches(next_n) == launches


def _launches(next_n: int) -> int:
    drafter = Drafter(next_n, 5)
    drafter.begin((300, 20, 64))
    with Writes() as writes:
        drafter.builder.update_draft_decode_metadata(drafter.metadata)
    others = 3  # DeepGEMM's schedule, compute_slot_mappings and compute_token_to_req_indices
    return len(writes.names) + others


class Writes(TorchDispatchMode):
    """The operations that write to memory, by name; on a GPU each of them is a launch.

    A copy of a tensor onto itself doesn't count, because PyTorch returns at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        copied = func is torch.ops.aten.copy_.default and args[0].data_ptr() == args[1].data_ptr()
        if func._schema.is_mutable and not copied:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


# ------------------------------------------------------------------------------------------------ SM100


@pytest.fixture
def blackwell(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import cuda
    from vllm.platforms.interface import DeviceCapability

    answer = classmethod(lambda cls, device_id=0: DeviceCapability(10, 0))
    monkeypatch.setattr(cuda.NonNvmlCudaPlatform, "get_device_capability", answer)


@pytest.mark.usefixtures("blackwell")
def test_varlen() -> None:
    """vLLM's hook writes the indices too, and DeepGEMM's schedule depends on a split's cost, here for 64 heads."""
    engine, mine = Drafter(4, 5), Drafter(4, 5)
    with pytest.raises(ArgumentError, match=r"schedule_split_cost isn't given.*pass 2 \* q \+ 1"):
        mine.bind()
    step = mine.bind(schedule_split_cost=5)
    assert mine.metadata.decode.indices is not None
    for batch in batches(5):
        poison(engine, mine)
        for drafter in (engine, mine):
            drafter.begin(**batch)
        engine.step()
        step.run()
        assert differences(engine, mine) == [], batch
    assert _launches(4) == 9


# ------------------------------------------------------------------------------------------------ refusals


def test_metadata_of_a_verified_batch_is_refused() -> None:
    drafter = Drafter(3, 4)
    drafter.runner.fill((300, 200), (3, 3))
    drafter.metadata = drafter.builder.build(0, drafter.runner.metadata(2, 6, 3))
    with pytest.raises(ArgumentError, match="metadata has 2 decodes with 6 tokens, and 0 prefills; in a draft step"):
        drafter.bind()


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [("tables", "cp_size", 2), ("builder", "dcp_world_size", 2), ("builder", "use_pcp", True)],
)
def test_parallel_contexts_are_refused(owner: str, name: str, value: Any) -> None:
    """vLLM would request a process group, which a single process doesn't have."""
    drafter = Drafter(3, 4)
    setattr(getattr(drafter, owner), name, value)
    with pytest.raises(ArgumentError, match=rf"\.{name} is {value}: .*Leave this batch to vLLM"):
        drafter.bind()
