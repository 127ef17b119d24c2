"""A plan and its bound memory when a tensor gets another storage or its storage is resized."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import onelaunch
import pytest
import torch
from onelaunch import ArgumentError, MetadataBuffers
from onelaunch.run.copy_plan import CopyPlan
from onelaunch.run.destinations import Destinations, backend_field
from onelaunch.run.memory import Region
from torch import Tensor

LENGTHS, ROWS = torch.tensor([3, 2]), torch.tensor([1, 0])


def other_storage(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.set_(torch.full_like(tensor, 9))


def other_data(tensor: Tensor) -> None:
    tensor.data = torch.full_like(tensor, 9)


def grown(tensor: Tensor) -> None:
    tensor.resize_(64, 64)


def emptied(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(0)


def shrunk(tensor: Tensor) -> None:
    tensor.untyped_storage().resize_(4)


class Bound:
    """A plan with one table, and its tensors."""

    def __init__(self) -> None:
        self.table = torch.full((2, 4), -1, dtype=torch.int32)
        self.pool = torch.arange(8, dtype=torch.int32).view(2, 4)
        self.plan = onelaunch.bind([MetadataBuffers(page_indices=self.table)], req_to_token=self.pool)


@pytest.mark.parametrize("change", [other_storage, other_data])
@pytest.mark.parametrize("name", ["table", "pool"])
@pytest.mark.parametrize("earlier", [False, True], ids=["first call", "later call"])
def test_memory_lives_on_when_a_tensor_gets_another_one(
    change: Callable[[Tensor], None], name: str, earlier: bool
) -> None:
    """The plan keeps using the memory that was bound, and is the last to hold it."""
    memory = {"table": np.full((2, 4), -1, np.int32), "pool": np.arange(8, dtype=np.int32).reshape(2, 4)}
    tensors = {key: torch.from_numpy(array) for key, array in memory.items()}
    plan = onelaunch.bind([MetadataBuffers(page_indices=tensors["table"])], req_to_token=tensors["pool"])
    if earlier:
        plan.run(LENGTHS, ROWS)
        memory["table"].fill(-1)
    alive = {key: weakref.ref(array) for key, array in memory.items()}
    change(tensors[name])
    memory.clear()
    tensors.clear()
    gc.collect()
    plan.run(LENGTHS, ROWS)
    assert alive["table"]().tolist() == [[4, 5, 6, -1], [0, 1, -1, -1]]
    assert alive["pool"]().tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    del plan
    gc.collect()
    assert alive["table"]() is None
    assert alive["pool"]() is None


@pytest.mark.parametrize("change", [grown, emptied, shrunk])
@pytest.mark.parametrize(("name", "shown"), [("table", r"backends\[0\].page_indices"), ("pool", "req_to_token")])
def test_a_storage_that_was_resized_is_refused(change: Callable[[Tensor], None], name: str, shown: str) -> None:
    bound = Bound()
    change(getattr(bound, name))
    with pytest.raises(ArgumentError, match=f"the storage of {shown} was resized after the plan was bound, from 32 by"):
        bound.plan.run(LENGTHS, ROWS)
    with pytest.raises(ArgumentError, match="was resized"):
        bound.plan.run(LENGTHS[:1], ROWS[:1])
    assert bound.plan.launches == 0


def test_a_copys_storages_are_held_and_checked() -> None:
    source, destination = (MetadataBuffers(cache_seqlens=torch.full((2,), v, dtype=torch.int32)) for v in (5, 0))
    target = destination.cache_seqlens
    assert target is not None
    copies = CopyPlan(source, Destinations([destination], 2, backend_field), keep=True)
    seen = target.detach()
    other_data(target)
    copies.run(bs=1)
    assert (seen.tolist(), target.tolist()) == ([5, 0], [9, 9])
    emptied(seen)
    with pytest.raises(ArgumentError, match=r"the storage of backends\[0\].cache_seqlens was resized"):
        copies.run(bs=2)


@pytest.mark.parametrize("name", ["seq_lens", "req_pool_indices"])
@pytest.mark.parametrize("earlier", [False, True], ids=["first call", "later call"])
def test_an_input_whose_storage_was_shrunk_is_refused(name: str, earlier: bool) -> None:
    bound = Bound()
    inputs = {"seq_lens": LENGTHS.clone(), "req_pool_indices": ROWS.clone()}
    if earlier:
        bound.plan.run(**inputs)
    shrunk(inputs[name])
    with pytest.raises(ArgumentError, match=f"{name} needs 16 bytes and its storage has 4: the storage was resized"):
        bound.plan.run(**inputs)
    assert bound.plan.launches == earlier


@pytest.mark.parametrize(("change", "message"), [(shrunk, "needs 32 bytes"), (emptied, "without memory")])
def test_a_tensor_whose_storage_was_shrunk_is_not_bound(change: Callable[[Tensor], None], message: str) -> None:
    for name in ("table", "pool"):
        spoilt: dict[str, Any] = {
            "table": torch.zeros((2, 4), dtype=torch.int32),
            "pool": torch.zeros((2, 4), dtype=torch.int32),
        }
        change(spoilt[name])
        with pytest.raises(ArgumentError, match=message):
            onelaunch.bind([MetadataBuffers(page_indices=spoilt["table"])], req_to_token=spoilt["pool"])


def test_the_functions_that_remember_plans_hold_no_memory() -> None:
    """They find a plan by the tensors of the call, which the caller holds."""
    source, destination = np.ones(2, np.int32), np.zeros(2, np.int32)
    onelaunch.fused_metadata_copy_cuda(
        *(MetadataBuffers(cache_seqlens=torch.from_numpy(a)) for a in (source, destination))
    )
    assert destination.tolist() == [1, 1]
    alive = [weakref.ref(source), weakref.ref(destination)]
    del source, destination
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_a_view_is_not_a_shrunk_tensor() -> None:
    whole = torch.zeros((4, 8), dtype=torch.int64)
    assert Region.of("view", whole[1:, 2:5]).row_bytes == 24
    assert Region.of("last", whole[3, 7:]).end == whole.data_ptr() + 8 * 32


def test_the_bound_of_a_call_is_never_a_remembered_one() -> None:
    """max_len of bind() is the default of run(); one call's max_len doesn't change the next call."""
    table = torch.full((1, 8), -1, dtype=torch.int32)
    pool = torch.arange(8, dtype=torch.int32)[None]
    plan = onelaunch.bind([MetadataBuffers(page_indices=table)], req_to_token=pool, max_len=4)
    for max_len, written in ((None, 4), (8, 8), (None, 4), (2, 2), (8, 8)):
        table.fill_(-1)
        plan.run(torch.tensor([8]), torch.tensor([0]), max_len=max_len)
        assert table.tolist() == [[*range(written), *[-1] * (8 - written)]]
    assert not hasattr(plan, "limit_columns")
