"""The binding's memo, by which functions that take lists find a plan again: which arguments count as equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import onelaunch
import pytest
import torch
from onelaunch import MetadataBuffers
from onelaunch.spec.fields import FIELDS
from references import check_references, refcounts
from torch import Tensor


class Number(int):
    """An int that isn't exactly one."""


@pytest.fixture
def module(device: torch.device) -> ModuleType:
    """A kernel's binding."""
    out, pool = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((8,), (8, 64)))
    return onelaunch.bind([MetadataBuffers(cache_seqlens=out)], req_to_token=pool).kernel.module


@pytest.fixture
def count_as_equal(module: ModuleType) -> Callable[[Sequence[Any], Sequence[Any]], bool]:
    """Whether the entry stored for the first arguments is found with the second ones."""

    def alike(first: Sequence[Any], second: Sequence[Any]) -> bool:
        memo = module.memo(1)
        memo.keep("kept", *first)
        return bool(memo.find(*second) == "kept")

    return alike


Alike = Callable[[Sequence[Any], Sequence[Any]], bool]


def moved_alone(table: Tensor) -> Tensor:
    table.data = torch.zeros_like(table)
    return table


class Named(MetadataBuffers):
    """A user's own class of buffers."""


def test_what_is_distinguished(module: ModuleType, count_as_equal: Alike, device: torch.device) -> None:
    memory = torch.zeros(64, dtype=torch.int32, device=device)
    a, b = memory[:8], memory[8:16]
    different = [
        (a,),
        (b,),
        (memory[:9],),
        (memory[:16:2],),
        (memory[:8].view(torch.float32),),
        (memory[:16].view(torch.int64),),
        (memory[:8].view(2, 4),),
        (memory[:16].view(2, 8)[:, :4],),
        (memory[:8].view(4, 2),),
        (memory[:8].view(2, 4).T,),
        (memory[0],),
        (a, None),
        (None, a),
        ([a],),
        ([a], None),
        ([a, b],),
        ([a], [b]),
        ([[a], [b]],),
        ([[a, b]],),
        ([], [a, b]),
        ([a, b], []),
        ([None],),
        (None,),
        (),
        (0,),
        (1,),
        (2**40,),
        (-1,),
        (0, 0),
        ([0],),
        ([a] * 300,),
        ([a] * 299, a),
        ("",),
        ("\0",),
        ("decode",),
        ("decodf",),
        ("target_verify",),
        ("target_verifz",),
        (["decode"],),
        (torch.int32,),
        (torch.int64,),
        (MetadataBuffers(),),
        ([MetadataBuffers()],),
        ([MetadataBuffers()] * 2,),
        (MetadataBuffers(a),),
        (MetadataBuffers(b),),
        (MetadataBuffers(None, a),),
        (MetadataBuffers(kv_indices=a),),
        ([a] + [None] * (len(FIELDS) - 1),),
    ]
    memo = module.memo(len(different))
    for number, arguments in enumerate(different):
        assert memo.find(*arguments) is None
        memo.keep(number, *arguments)
    again = [[item[:] if isinstance(item, list) else item for item in arguments] for arguments in different]
    assert [memo.find(*arguments) for arguments in again] == list(range(len(different)))
    assert count_as_equal(([a, b], (a, b), memory[:8]), ((a, b), [a, b], a))
    assert count_as_equal((Number(7),), (7,))


def test_buffers_are_compared_by_their_fields(count_as_equal: Alike, device: torch.device) -> None:
    a, b, c = torch.zeros((3, 8), dtype=torch.int32, device=device)
    buffers = MetadataBuffers(cache_seqlens=a, kv_indices=b)

    def odd(change: Callable[[MetadataBuffers], object]) -> MetadataBuffers:
        made = MetadataBuffers(cache_seqlens=a, kv_indices=b)
        change(made)
        return made

    for same in (
        MetadataBuffers(cache_seqlens=a[:], kv_indices=b),
        Named(cache_seqlens=a, kv_indices=b),
        copy.copy(buffers),
        odd(lambda it: setattr(it, "note", "mine")),
        odd(lambda it: delattr(it, "page_indices")),  # the default is used then
        odd(lambda it: (delattr(it, "cache_seqlens"), setattr(it, "cache_seqlens", a))),  # after the others
        odd(lambda it: setattr(it, "__dict__", {"kv_indices": b, "cache_seqlens": a})),
    ):
        assert count_as_equal([buffers], [same])
        assert count_as_equal([same], [buffers])
    for other in (
        odd(lambda it: setattr(it, "kv_indices", c)),
        odd(lambda it: vars(it).update(cache_seqlens=c)),
        odd(lambda it: setattr(it, "cu_seqlens_k", c)),
        odd(lambda it: (delattr(it, "cache_seqlens"), setattr(it, "cache_seqlens", c))),
        odd(lambda it: setattr(it, "kv_indices", "text")),
        odd(lambda it: setattr(it, "kv_indices", [b])),
        Named(cache_seqlens=a, kv_indices=c),
        Named(cache_seqlens=a, kv_indices=object()),
    ):
        assert not count_as_equal([buffers], [other])
        assert not count_as_equal([other], [buffers])


def test_of_inputs_the_dtype_counts(module: ModuleType, device: torch.device) -> None:
    memo = module.memo(1, 2)
    small, large = (
        torch.zeros(8, dtype=torch.int32, device=device),
        torch.zeros((4, 9), dtype=torch.int32, device=device),
    )
    memo.keep("kept", small, None, small)
    assert memo.find(large[1:, ::2], None, small) == "kept"
    for other in (
        (small.long(), None, small),
        (small.float(), None, small),
        (None, None, small),
        (0, None, small),
        (small, small, small),
        (small, None, large),
        (small, None, small[1:]),
        (small.to_sparse(), None, small),
        (small,),
        (),
    ):
        assert memo.find(*other) is None


@pytest.mark.parametrize(
    "change", [moved_alone, lambda t: t.resize_(1, 4), lambda t: t.squeeze_(0).resize_(8), lambda t: t.t_()]
)
def test_a_destination_that_changed_in_place_is_told(
    module: ModuleType, device: torch.device, change: Callable[[Tensor], Tensor]
) -> None:
    """In any container: the changed one is a different argument, and equals the first when it is changed back."""
    table = torch.zeros((2, 4), dtype=torch.int32, device=device)
    lies_in = (table, [table], ([table], None), MetadataBuffers(page_indices=table), [Named(page_indices=table)])
    memos = [module.memo(1) for _ in lies_in]
    for memo, argument in zip(memos, lies_in, strict=True):
        memo.keep("kept", argument)
    shape, stride, before = table.shape, table.stride(), table.untyped_storage()
    change(table)
    assert [memo.find(argument) for memo, argument in zip(memos, lies_in, strict=True)] == [None] * len(memos)
    table.set_(before, 0, shape, stride)
    assert [memo.find(argument) for memo, argument in zip(memos, lies_in, strict=True)] == ["kept"] * len(memos)


def test_what_was_not_used_for_longest_goes(module: ModuleType) -> None:
    memo = module.memo(3)
    kept = [object() for _ in range(5)]
    for number in range(3):
        memo.keep(kept[number], number)
    assert memo.find(0) is kept[0]
    memo.keep(kept[3], 3)
    assert [memo.find(number) for number in range(4)] == [kept[0], None, kept[2], kept[3]]
    memo.keep(kept[4], 2)  # what is kept later is found first
    assert memo.find(2) is kept[4]
    before = refcounts(kept)
    del memo
    assert [now - then for now, then in zip(refcounts(kept), before, strict=True)] == [0, 0, -1, -1, -1]


class Keeps:
    """Calls back when it is deleted."""

    def __init__(self, memo: Any) -> None:
        self.memo = memo

    def __del__(self) -> None:
        self.memo.keep("by the one that went", "again")


def test_one_that_goes_may_call_back(module: ModuleType) -> None:
    memo = module.memo(1)
    memo.keep(Keeps(memo), 1)
    memo.keep("last", 2)
    assert (memo.find(1), memo.find(2), memo.find("again")) == (None, None, "by the one that went")


def test_what_is_wrong_with_a_memo_is_said(module: ModuleType) -> None:
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"max_count is {bad}; a memo has room for 1 object or more"):
            module.memo(bad)
    with pytest.raises(TypeError):
        module.memo("many")
    with pytest.raises(TypeError, match="keep takes an object and arguments"):
        module.memo(1).keep()
    with pytest.raises(TypeError, match="cannot create"):
        type(module.memo(1))()
    good = (Tensor, torch.dtype, MetadataBuffers, tuple(FIELDS))
    for wrong in (good[:3], (*good, 1), (*good[:3], list(FIELDS)), (*good[:2], "text", good[3])):
        with pytest.raises(TypeError, match="three classes and a tuple of names"):
            module.register_classes(*wrong)


class Endless:
    """A sequence that lies about its length."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        if index:
            raise IndexError
        return index


class Refuses(Endless):
    def __len__(self) -> int:
        raise RuntimeError


def test_what_cannot_be_told(module: ModuleType, device: torch.device) -> None:
    memo = module.memo(9)
    good = torch.zeros(8, dtype=torch.int32, device=device)
    for bad in (
        True,
        16.0,
        "a name that is longer than any that a mode has",
        "\ud800",
        {good: good},
        {good},
        object(),
        2**70,
        [[[good]]],
        [good, True],
        [MetadataBuffers(object())],
        good.to_sparse(),
        good.to("meta"),
        good.view(2, 2, 2),
        Endless(),
        Refuses(),
        Tensor,
        good.cpu().numpy(),
    ):
        memo.keep("kept", bad)
        assert memo.find(bad) is None
        memo.keep("kept", good, [bad])
        assert memo.find(good, [bad]) is None


@pytest.mark.uncounted
def test_references_of_a_memo(module: ModuleType, device: torch.device) -> None:
    good = torch.zeros(8, dtype=torch.int32, device=device)
    buffers, named, kept, memo = MetadataBuffers(good), Named(good), object(), module.memo(2)
    things = [good, buffers, named, kept, memo, Tensor, torch.int32, 2**40, MetadataBuffers, type(memo), *FIELDS]
    odd = MetadataBuffers(good)
    odd.kv_indices = object()
    for arguments in (
        ([good] * 200, (good, None), torch.int32, "text"),
        ([buffers, named], buffers, 2**40),
        ([buffers, odd], odd),
        (good, [good, True]),
        (good, Endless()),
    ):
        memo.keep(kept, *arguments)
        check_references([*things, odd], lambda arguments=arguments: memo.find(*arguments))
    turns = iter(range(10**9))
    memo = module.memo(2)
    for _ in range(2):
        memo.keep(kept, good, next(turns))
    check_references(things[:4], lambda: memo.keep(kept, good, next(turns), "a" * 40, [good] * 200))
    check_references(things[:4], lambda: module.memo(3).keep(kept, good, buffers))
    check_references(things, lambda: module.register_classes(Tensor, torch.dtype, MetadataBuffers, tuple(FIELDS)))
