"""The memo by which functions that take lists find a plan again: which arguments count as equal, and what it runs."""

from __future__ import annotations

import copy
import traceback
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import onelaunch
import pytest
import torch
from counting import CountingPlan, Number, inputs
from onelaunch import ArgumentError, LaunchError, MetadataBuffers
from onelaunch.spec.fields import FIELDS
from references import check_references, refcounts
from torch import Tensor


@pytest.fixture
def module(counting: CountingPlan) -> ModuleType:
    return counting.plan.kernel.module


@pytest.fixture
def count_as_equal(module: ModuleType) -> Callable[[Sequence[Any], Sequence[Any]], bool]:
    """Whether the entry stored for the first arguments is found with the second ones."""

    def alike(first: Sequence[Any], second: Sequence[Any]) -> bool:
        memo = module.memo(1)
        keep(memo, "kept", *first)
        return find(memo, *second) == "kept"

    return alike


Alike = Callable[[Sequence[Any], Sequence[Any]], bool]

ran: list[Any] = []  # the owners whose run a memo called


def keep(memo: Any, owner: Any, *arguments: Any) -> None:
    memo.keep(owner, lambda owner, *passed: ran.append(owner), *arguments)


def find(memo: Any, *arguments: Any) -> Any:
    """The owner that the memo runs for these arguments, or None."""
    ran.clear()
    assert memo.run(*arguments) == (None if ran else arguments)
    return ran.pop() if ran else None


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
        (MetadataBuffers(a, seqlens_expanded=a),),
        (MetadataBuffers(a, seqlens_expanded=b),),
        (MetadataBuffers(kv_indices=a),),
        ([a] + [None] * (len(FIELDS) - 1),),
    ]
    memo = module.memo(len(different))
    for number, arguments in enumerate(different):
        assert find(memo, *arguments) is None
        keep(memo, number, *arguments)
    again = [[item[:] if isinstance(item, list) else item for item in arguments] for arguments in different]
    assert [find(memo, *arguments) for arguments in again] == list(range(len(different)))
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
    memo = module.memo(1, 2, 2)
    small, large = (
        torch.zeros(8, dtype=torch.int32, device=device),
        torch.zeros((4, 9), dtype=torch.int32, device=device),
    )
    keep(memo, "kept", small, None, small)
    assert find(memo, large[1:, ::2], None, small) == "kept"
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
        assert find(memo, *other) is None


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
        keep(memo, "kept", argument)
    shape, stride, before = table.shape, table.stride(), table.untyped_storage()
    change(table)
    assert [find(memo, argument) for memo, argument in zip(memos, lies_in, strict=True)] == [None] * len(memos)
    table.set_(before, 0, shape, stride)
    assert [find(memo, argument) for memo, argument in zip(memos, lies_in, strict=True)] == ["kept"] * len(memos)


def test_what_was_not_used_for_longest_goes(module: ModuleType) -> None:
    memo = module.memo(3)
    kept = [object() for _ in range(5)]
    for number in range(3):
        keep(memo, kept[number], number)
    assert find(memo, 0) is kept[0]
    keep(memo, kept[3], 3)
    assert [find(memo, number) for number in range(4)] == [kept[0], None, kept[2], kept[3]]
    keep(memo, kept[4], 2)  # what is kept later is found first
    assert find(memo, 2) is kept[4]
    before = refcounts(kept)
    del memo
    assert [now - then for now, then in zip(refcounts(kept), before, strict=True)] == [0, 0, -1, -1, -1]


class Keeps:
    """Calls back when it is deleted."""

    def __init__(self, memo: Any) -> None:
        self.memo = memo

    def __del__(self) -> None:
        keep(self.memo, "by the one that went", "again")


def test_one_that_goes_may_call_back(module: ModuleType) -> None:
    memo = module.memo(1)
    keep(memo, Keeps(memo), 1)
    keep(memo, "last", 2)
    assert (find(memo, 1), find(memo, 2), find(memo, "again")) == (None, None, "by the one that went")


def test_what_is_wrong_with_a_memo_is_said(module: ModuleType) -> None:
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"max_count is {bad}; a memo has room for 1 plan or more"):
            module.memo(bad)
    with pytest.raises(TypeError):
        module.memo("many")
    for passed, read in ((2, 3), (1, -1), (21, 0)):
        with pytest.raises(ValueError, match=rf"{read} inputs of {passed} arguments; run\(\) takes up to 20"):
            module.memo(1, passed, read)
    with pytest.raises(TypeError, match="keep takes an owner, its run and arguments"):
        module.memo(1).keep("owner")
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
        keep(memo, "kept", bad)
        assert find(memo, bad) is None
        keep(memo, "kept", good, [bad])
        assert find(memo, good, [bad]) is None


# ------------------------------------------------------------------------------------------------ plans in a memo


def test_a_memo_runs_its_plan(counting: CountingPlan, module: ModuleType, out: Tensor, device: torch.device) -> None:
    """The plan's checks count as in its own run()."""
    lengths, rows = inputs(device, 3, 4)
    memo = module.memo(2, 4, 2)

    def call(lengths: Tensor, rows: Tensor, max_len: Any = None, name: str = "mine") -> tuple[bool, int]:
        """Whether the memo has a plan, and how often its words were requested."""
        out.fill_(-7)
        before = counting.times
        missed = memo.run(lengths, rows, None, max_len, name)
        assert missed is None or missed == (lengths, rows, None, max_len, name)
        return missed is None, counting.times - before

    assert call(lengths, rows) == (False, 0)
    memo.keep(counting, counting.plan._run, lengths, rows, None, None, "mine")
    assert [call(lengths, rows) for _ in range(2)] == [(True, 1), (True, 0)]
    assert out.tolist()[:3] == [3, 4, -7]
    longer = inputs(device, 5, 6, 7)
    assert [call(*longer) for _ in range(2)] == [(True, 1), (True, 0)]
    assert out.tolist()[:4] == [5, 6, 7, -7]
    assert [call(*longer, 16) for _ in range(2)] == [(True, 1), (True, 0)]
    counting.run(lengths, rows, None, 2)
    assert call(lengths, rows, 2) == (True, 0), "the plan's own run() and the memo share what was checked"
    for bad in (16.0, True, 2**70, 65):
        for _ in range(2):
            with pytest.raises(ArgumentError, match="max_len is"):
                call(lengths, rows, bad)
    with pytest.raises(ArgumentError, match="they must have the same number"):
        call(lengths, rows[:1])
    assert out.tolist() == [-7] * 8
    assert call(lengths.int(), rows) == (False, 0), "inputs of another dtype are for another plan"
    assert call(lengths, rows, name="other") == (False, 0)
    assert call(lengths, rows) == (True, 0)


def test_a_memo_has_plans_of_other_modules(module: ModuleType, device: torch.device) -> None:
    new = [torch.full((4,), -7, dtype=torch.int32, device=device) for _ in range(2)]
    pool = torch.zeros((8, 64), dtype=torch.int32, device=device)
    counting = CountingPlan(onelaunch.bind([MetadataBuffers(cache_seqlens=out) for out in new], req_to_token=pool))
    assert counting.plan.kernel.module is not module
    memo = module.memo(1, 4, 2)
    memo.keep(counting, counting.plan._run, *inputs(device, 1), None, None)
    for number in range(3):
        assert memo.run(*inputs(device, number), None, None) is None
        assert [out.tolist() for out in new] == [[number, -7, -7, -7]] * 2
    with pytest.raises(ArgumentError):
        memo.run(*inputs(device, *range(5)), None, None)


class Fails:
    """An owner whose checks fail with an error that its _refused() may replace."""

    def __init__(self, error: type[Exception], instead: type[Exception] | None) -> None:
        self.error, self.instead = error, instead

    def _check(self, *arguments: Any) -> list[int]:
        raise self.error("bare")

    def _refused(self, error: RuntimeError) -> None:
        if self.instead is not None:
            raise self.instead(f"{error} in words") from error


@pytest.mark.parametrize(
    ("error", "instead", "said"),
    [
        (RuntimeError, LaunchError, "bare in words"),
        (RuntimeError, None, "bare"),
        (ValueError, LaunchError, "bare"),
    ],
)
def test_an_owner_explains_its_runtime_errors(
    counting: CountingPlan, module: ModuleType, error: type[Exception], instead: type[Exception] | None, said: str
) -> None:
    for run in (counting.plan._run, lambda owner, *arguments: owner._check(*arguments)):
        memo = module.memo(1, 4)
        memo.keep(Fails(error, instead), run, 0, 0, 0, 0, "key")
        with pytest.raises(LaunchError if said == "bare in words" else error, match=f"^{said}$") as caught:
            memo.run(1, 2, 3, 4, "key")
        where = traceback.extract_tb((caught.value.__cause__ or caught.value).__traceback__)
        assert where[-1].name == "_check", "it says where it was raised"


def test_a_check_may_drop_what_runs(
    counting: CountingPlan, module: ModuleType, out: Tensor, device: torch.device
) -> None:
    """A check runs Python: here another call takes the only place of the memo, and the last reference to the plan."""
    memo = module.memo(1, 4, 2)
    lengths, rows = inputs(device, 3, 4)

    class Drops(CountingPlan):
        def _check(self, *arguments: Any) -> list[int]:
            keep(memo, "another", lengths, rows, None, None, "other")
            return super()._check(*arguments)

    owner = Drops(counting.plan)
    seen = weakref.ref(owner)
    memo.keep(owner, counting.plan._run, lengths, rows, None, None, "mine")
    del owner
    assert memo.run(lengths, rows, None, None, "mine") is None
    assert out.tolist()[:3] == [3, 4, -7]
    assert seen() is None
    assert memo.run(lengths, rows, None, None, "mine") is not None
    assert find(memo, lengths, rows, None, None, "other") == "another"


@pytest.mark.uncounted
def test_references_of_a_memo(counting: CountingPlan, module: ModuleType, device: torch.device) -> None:
    plan = counting.plan
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
        keep(memo, kept, *arguments)
        check_references([*things, odd], lambda arguments=arguments: find(memo, *arguments))
    turns = iter(range(10**9))
    memo = module.memo(2)
    for _ in range(2):
        keep(memo, kept, good, next(turns))
    check_references(things[:4], lambda: keep(memo, kept, good, next(turns), "a" * 40, [good] * 200))
    check_references(things[:4], lambda: keep(module.memo(3), kept, good, buffers))
    memo = module.memo(2, 3, 1)
    passed = (good, 2**41, 2**42, "key")
    memo.keep(kept, lambda owner, *arguments: None, *passed)
    check_references([*things, *passed], lambda: memo.run(*passed))
    owner = Fails(RuntimeError, LaunchError)
    memo.keep(owner, plan._run, *passed)

    def refused() -> None:
        with pytest.raises(LaunchError):
            memo.run(*passed)

    check_references([*things, *passed, owner, plan], refused)
    check_references(things, lambda: module.register_classes(Tensor, torch.dtype, MetadataBuffers, tuple(FIELDS)))
