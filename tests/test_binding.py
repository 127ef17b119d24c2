"""The binding: which arguments it remembers, when it checks them again, and that no reference leaks."""

from __future__ import annotations

import copy
import ctypes
import gc
import sys
import weakref
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import onelaunch
import pytest
import torch
from onelaunch import ArgumentError, LaunchError, MetadataBuffers
from onelaunch.run.plan import Plan
from onelaunch.spec.fields import FIELDS
from torch import Tensor
from torch._subclasses import FakeTensorMode


class Number(int):
    """An int that isn't exactly one."""


class Asked:
    """Stands for a plan and returns the real one's words; counts how often the binding requests them."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.times = plan, 0

    def _check(self, *arguments: Any) -> list[int]:
        self.times += 1
        return self.plan._check(*arguments)

    def run(self, *arguments: Any) -> int:
        """How often the binding requested words in this call."""
        before = self.times
        self.plan._bound.run(self, *arguments)
        return self.times - before


@pytest.fixture
def out(device: torch.device) -> Tensor:
    return torch.full((8,), -7, dtype=torch.int32, device=device)


@pytest.fixture
def asked(out: Tensor, device: torch.device) -> Asked:
    pool = torch.zeros((8, 64), dtype=torch.int32, device=device)
    table = torch.zeros((8, 64), dtype=torch.int32, device=device)
    return Asked(onelaunch.bind([MetadataBuffers(cache_seqlens=out, page_indices=table)], req_to_token=pool))


def inputs(device: torch.device, *lengths: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(lengths, device=device), torch.arange(len(lengths), device=device)


# ------------------------------------------------------------------------------------------------ the last call


def test_what_is_the_same_is_checked_once(asked: Asked, out: Tensor, device: torch.device) -> None:
    lengths, rows = inputs(device, 3, 4, 5)
    assert [asked.run(lengths, rows, None, None) for _ in range(3)] == [1, 0, 0]
    # Another object for the same memory: engines slice their buffers anew at each step.
    assert asked.run(lengths[:], rows.view(3), None, None) == 0
    lengths += 1
    assert asked.run(lengths, rows, None, None) == 0
    assert out.tolist() == [4, 5, 6, -7, -7, -7, -7, -7]


def test_arguments_that_take_turns_are_checked_once(asked: Asked, out: Tensor, device: torch.device) -> None:
    """An engine's allocator returns inputs at a few addresses in turn; 8 are remembered."""
    turns = [(torch.tensor([i, i + 1], device=device), torch.tensor([0, 1], device=device)) for i in range(9)]
    for round_, numbers in enumerate((range(8), range(8), (8, 1, 8))):
        for number in numbers:
            out.fill_(-7)
            new = round_ == 0 or (number == 8 and asked.times == 8)
            assert asked.run(*turns[number], None, None) == new, (round_, number)
            assert out.tolist()[:3] == [number, number + 1, -7]
    assert asked.run(*turns[0], None, None) == 1, "the ninth replaced the first"


def resized(lengths: Tensor, rows: Tensor) -> None:
    lengths.resize_(2)
    rows.resize_(2)


def moved(lengths: Tensor, rows: Tensor) -> None:
    lengths.set_(lengths.flip(0))


def stretched(lengths: Tensor, rows: Tensor) -> None:
    lengths.as_strided_((4,), (0,))


def offset(lengths: Tensor, rows: Tensor) -> None:
    lengths.as_strided_((3,), (1,), 1)
    rows.resize_(3)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [(resized, [3, 4]), (moved, [6, 5, 4, 3]), (stretched, [3, 3, 3, 3]), (offset, [4, 5, 6])],
)
def test_a_tensor_that_changed_in_place_is_noticed(
    asked: Asked, out: Tensor, device: torch.device, change: Callable[[Tensor, Tensor], None], wanted: list[int]
) -> None:
    lengths, rows = inputs(device, 3, 4, 5, 6)
    asked.run(lengths, rows, None, None)
    out.fill_(-7)
    change(lengths, rows)
    assert asked.run(lengths, rows, None, None) == 1
    assert out.tolist() == wanted + [-7] * (8 - len(wanted))


@pytest.mark.parametrize("change", [lambda t: t.unsqueeze_(0), lambda t: t.resize_(4, 1), lambda t: t.resize_(0)])
def test_a_shape_that_changed_in_place_is_refused(
    asked: Asked, out: Tensor, device: torch.device, change: Callable[[Tensor], Tensor]
) -> None:
    lengths, rows = inputs(device, 3, 4, 5, 6)
    asked.run(lengths, rows, None, None)
    out.fill_(-7)
    change(rows)
    for _ in range(2):
        with pytest.raises(ArgumentError):
            asked.run(lengths, rows, None, None)
    assert out.tolist() == [-7] * 8


def test_the_same_memory_of_another_dtype_is_refused(asked: Asked, out: Tensor, device: torch.device) -> None:
    lengths, rows = inputs(device, 3, 4, 5, 6)
    asked.run(lengths, rows, None, None)
    out.fill_(-7)
    for other in (lengths.view(torch.float64), lengths.view(torch.int32)[:4], lengths.view(torch.uint64)):
        with pytest.raises(ArgumentError, match=r"seq_lens has dtype"):
            asked.run(other, rows, None, None)
    assert out.tolist() == [-7] * 8


def test_a_tensor_in_the_place_of_one_that_died(asked: Asked, out: Tensor, device: torch.device) -> None:
    """It probably reuses the dead tensor's object and memory; its properties count, not its addresses."""
    _, rows = inputs(device, 0, 0, 0, 0)
    for step in range(200):
        lengths = torch.full((4 - step % 3,), step, dtype=torch.int64, device=device)
        out.fill_(-7)
        asked.run(lengths, rows[: len(lengths)], None, None)
        assert out.tolist() == [step] * len(lengths) + [-7] * (8 - len(lengths))
        del lengths
    lengths = torch.zeros(4, dtype=torch.int64, device=device)
    asked.run(lengths, rows, None, None)
    del lengths
    with pytest.raises(ArgumentError, match="float64"):
        asked.run(torch.zeros(4, dtype=torch.float64, device=device), rows, None, None)


@pytest.mark.parametrize("bad", [True, 16.0, "16", [16], torch.tensor(16), 2**70, -(2**70)])
def test_a_number_that_only_looks_like_the_last_one(asked: Asked, device: torch.device, bad: Any) -> None:
    lengths, rows = inputs(device, 3, 4)
    for good in (1, 16):
        asked.run(lengths, rows, None, good)
        for _ in range(2):
            with pytest.raises(ArgumentError, match="max_len is"):
                asked.run(lengths, rows, None, bad)
        assert asked.run(lengths, rows, None, good) == 0
        assert asked.run(lengths, rows, None, Number(good)) == 0


def test_a_refused_call_leaves_the_last_one(asked: Asked, out: Tensor, device: torch.device) -> None:
    lengths, rows = inputs(device, 3, 4)
    asked.run(lengths, rows, None, None)
    with pytest.raises(ArgumentError):
        asked.run(lengths, rows[:1], None, None)
    out.fill_(-7)
    assert asked.run(lengths, rows, None, None) == 0
    assert out.tolist()[:3] == [3, 4, -7]


def test_words_that_are_wrong_change_nothing(asked: Asked, out: Tensor, device: torch.device) -> None:
    lengths, rows = inputs(device, 3, 4)
    asked.run(lengths, rows, None, None)

    class Wrong:
        def __init__(self, words: Any) -> None:
            self._check = lambda *arguments: words

    few = asked.plan._check(lengths, rows, None, None)
    out.fill_(-7)
    for words, error in (
        (few[:-1], TypeError),
        (7, TypeError),
        ([0] * 5 + ["1"], TypeError),
        ([2**70] * 6, OverflowError),
    ):
        with pytest.raises(error):
            asked.plan._bound.run(Wrong(words), lengths[:1], rows[:1], None, None)
    with pytest.raises(AttributeError, match="_check"):
        asked.plan._bound.run(object(), lengths[:1], rows[:1], None, None)
    for count in (0, 38):
        with pytest.raises(TypeError, match="run takes an owner and up to 20 arguments"):
            asked.plan._bound.run(*[None] * count)
    assert out.tolist() == [-7] * 8
    assert asked.run(lengths, rows, None, None) == 0
    assert out.tolist()[:3] == [3, 4, -7]


def test_a_bare_launch_leaves_no_trace(asked: Asked, out: Tensor, device: torch.device) -> None:
    lengths, rows = inputs(device, 3, 4)
    asked.run(lengths, rows, None, None)
    asked.plan._bound.launch(*asked.plan._check(lengths[:1], rows[:1], None, None), 0)
    out.fill_(-7)
    assert asked.run(lengths, rows, None, None) == 0
    assert out.tolist()[:3] == [3, 4, -7]


def test_a_subclass_of_tensor_is_read_like_one(asked: Asked, out: Tensor, device: torch.device) -> None:
    class Mine(Tensor):
        pass

    lengths, rows = inputs(device, 3, 4)
    assert [asked.run(lengths.as_subclass(Mine), rows, None, None) for _ in range(2)] == [1, 0]
    assert out.tolist()[:3] == [3, 4, -7]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_tensor_without_memory_is_refused(asked: Asked, out: Tensor, device: torch.device) -> None:
    _, rows = inputs(device, 3, 4)
    with FakeTensorMode():
        fake = torch.zeros(2, dtype=torch.int64, device=device)
    for _ in range(2):
        with pytest.raises(ArgumentError, match="seq_lens is a FakeTensor without memory"):
            asked.run(fake, rows, None, None)
    assert out.tolist() == [-7] * 8


# ------------------------------------------------------------------------------------------------ telling apart


@pytest.fixture
def module(asked: Asked) -> ModuleType:
    return asked.plan.kernel.module


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
    assert memo.run(*arguments) == (ran != [])
    return ran.pop() if ran else None


def moved_alone(table: Tensor) -> Tensor:
    table.data = torch.zeros_like(table)
    return table


_versions = (ctypes.c_uint32 * 32)()


def capsule(version: int) -> object:
    """What a tensor class offers in this version of DLPack."""
    _versions[0] = version
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    made: object = new(ctypes.addressof(_versions), b"dlpack_exchange_api", None)
    return made


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
    for passed, inputs in ((2, 3), (1, -1), (21, 0)):
        with pytest.raises(ValueError, match=rf"{inputs} inputs of {passed} arguments; run\(\) takes up to 20"):
            module.memo(1, passed, inputs)
    with pytest.raises(TypeError, match="keep takes an owner, its run and arguments"):
        module.memo(1).keep("owner")
    with pytest.raises(TypeError, match="cannot create"):
        type(module.memo(1))()
    good = (Tensor, torch.dtype, MetadataBuffers, tuple(FIELDS))
    for wrong in (good[:3], (*good, 1), (*good[:3], list(FIELDS)), (*good[:2], "text", good[3])):
        with pytest.raises(TypeError, match="three classes and a tuple of names"):
            module.register_classes(*wrong)


def test_a_torch_whose_tensors_cannot_be_read_is_named(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before torch 2.11, tensors lack the C functions of the DLPack standard."""
    backends, pool = [MetadataBuffers(cache_seqlens=torch.zeros(8, dtype=torch.int32))], torch.zeros((8, 64)).int()
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    for change in (
        lambda: monkeypatch.setattr(Tensor, "__dlpack_c_exchange_api__", capsule(2)),
        lambda: monkeypatch.delattr(Tensor, "__dlpack_c_exchange_api__"),
    ):
        change()
        with pytest.raises(
            LaunchError,
            match=r"^onelaunch_\w+ can't read the tensors of torch 2\.10\.0\+cpu: .*(no attribute|has version 2).*\. "
            r"It needs torch\.Tensor\.__dlpack_c_exchange_api__ of DLPack 1: install torch 2\.11 or later\.$",
        ):
            onelaunch.bind(backends, req_to_token=pool)


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


def test_a_memo_runs_its_plan(asked: Asked, module: ModuleType, out: Tensor, device: torch.device) -> None:
    """The plan's checks count as in its own run()."""
    lengths, rows = inputs(device, 3, 4)
    memo = module.memo(2, 4, 2)

    def call(lengths: Tensor, rows: Tensor, max_len: Any = None, name: str = "mine") -> tuple[bool, int]:
        """Whether the memo has a plan, and how often its words were requested."""
        out.fill_(-7)
        before = asked.times
        return memo.run(lengths, rows, None, max_len, name), asked.times - before

    assert call(lengths, rows) == (False, 0)
    memo.keep(asked, asked.plan._run, lengths, rows, None, None, "mine")
    assert [call(lengths, rows) for _ in range(2)] == [(True, 1), (True, 0)]
    assert out.tolist()[:3] == [3, 4, -7]
    longer = inputs(device, 5, 6, 7)
    assert [call(*longer) for _ in range(2)] == [(True, 1), (True, 0)]
    assert out.tolist()[:4] == [5, 6, 7, -7]
    assert [call(*longer, 16) for _ in range(2)] == [(True, 1), (True, 0)]
    asked.run(lengths, rows, None, 2)
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
    asked = Asked(onelaunch.bind([MetadataBuffers(cache_seqlens=out) for out in new], req_to_token=pool))
    assert asked.plan.kernel.module is not module
    memo = module.memo(1, 4, 2)
    memo.keep(asked, asked.plan._run, *inputs(device, 1), None, None)
    for number in range(3):
        assert memo.run(*inputs(device, number), None, None)
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
    asked: Asked, module: ModuleType, error: type[Exception], instead: type[Exception] | None, said: str
) -> None:
    for run in (asked.plan._run, lambda owner, *arguments: owner._check(*arguments)):
        memo = module.memo(1, 4)
        memo.keep(Fails(error, instead), run, 0, 0, 0, 0, "key")
        with pytest.raises(LaunchError if said == "bare in words" else error, match=f"^{said}$"):
            memo.run(1, 2, 3, 4, "key")


def test_a_check_may_drop_what_runs(asked: Asked, module: ModuleType, out: Tensor, device: torch.device) -> None:
    """A check runs Python: here another call takes the only place of the memo, and the last reference to the plan."""
    memo = module.memo(1, 4, 2)
    lengths, rows = inputs(device, 3, 4)

    class Drops(Asked):
        def _check(self, *arguments: Any) -> list[int]:
            keep(memo, "another", lengths, rows, None, None, "other")
            return super()._check(*arguments)

    owner = Drops(asked.plan)
    seen = weakref.ref(owner)
    memo.keep(owner, asked.plan._run, lengths, rows, None, None, "mine")
    del owner
    assert memo.run(lengths, rows, None, None, "mine")
    assert out.tolist()[:3] == [3, 4, -7]
    assert seen() is None
    assert not memo.run(lengths, rows, None, None, "mine")
    assert find(memo, lengths, rows, None, None, "other") == "another"


@pytest.mark.uncounted
def test_references_of_a_memo(asked: Asked, module: ModuleType, device: torch.device) -> None:
    plan = asked.plan
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


# ------------------------------------------------------------------------------------------------ references


def test_inputs_are_not_kept_alive(asked: Asked, device: torch.device) -> None:
    lengths, rows = inputs(device, 3, 4)
    asked.plan.run(lengths, rows)
    seen = weakref.ref(lengths), weakref.ref(rows)
    gc.disable()
    try:
        del lengths, rows
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


def test_a_plan_goes_with_its_last_reference(device: torch.device) -> None:
    """Its destinations' memory is released as well: no reference cycle waits for the garbage collector."""
    out = torch.zeros(4, dtype=torch.int32, device=device)
    plan = onelaunch.bind([MetadataBuffers(cache_seqlens=out)], req_to_token=torch.zeros_like(out)[None])
    plan.run(*inputs(device, 1, 2))
    seen = weakref.ref(plan), weakref.ref(out)
    gc.disable()
    try:
        del plan, out
        assert [ref() for ref in seen] == [None, None]
    finally:
        gc.enable()


def refcounts(things: list[Any]) -> list[int]:
    return [sys.getrefcount(thing) for thing in things]


def check_references(things: list[Any], call: Callable[[], object]) -> None:
    """After many calls every reference count is unchanged, and so is the number of memory blocks.

    A few may differ: field names are interned strings, which other threads of the test run hold and release. A leak
    of one reference per call is off by a thousand.
    """
    for _ in range(10):
        call()
    gc.collect()
    before, blocks = refcounts(things), sys.getallocatedblocks()
    for _ in range(1_000):
        call()
    gc.collect()
    assert [now - was for now, was in zip(refcounts(things), before, strict=True) if abs(now - was) > 50] == []
    assert sys.getallocatedblocks() - blocks < 500


@pytest.mark.uncounted
def test_references_of_the_functions_that_take_lists(device: torch.device) -> None:
    new = lambda *shape: torch.zeros(shape, dtype=torch.int32, device=device)  # noqa: E731
    pool, table = new(8, 64), new(8, 64)
    lists = [[new(8)], [new(9)], [table], None, None, None]
    buffers, target = MetadataBuffers(page_indices=table), MetadataBuffers(page_indices=new(8, 64))
    lengths, rows = inputs(device, 3, 4)
    numbers = {"max_len": 64, "nsa_index_topk": 300, "real_page_size": 300}

    def call() -> None:
        onelaunch.fused_metadata_precompute_and_broadcast_cuda(lengths, rows, pool, *lists, **numbers)
        onelaunch.precompute_decode_metadata_cuda(lengths, rows, pool, **numbers, out=buffers)
        onelaunch.fused_metadata_copy_cuda(buffers, [target], bs=2)

    tensors = [lengths, rows, pool, table, *[t for given in lists for t in given or ()]]
    check_references([*tensors, *lists, buffers, target, numbers, Tensor], call)


@pytest.mark.uncounted
def test_references_of_calls(asked: Asked, device: torch.device) -> None:
    lengths, rows = inputs(device, 30_000, 40_000)  # not cached small integers, so that they are counted
    number = 2**40
    plan = asked.plan
    things = [lengths, rows, number, plan, Tensor, plan._bound, plan._bound._plan]
    check_references(things, lambda: plan.run(lengths, rows))
    turns = iter(range(10**9))
    check_references(things, lambda: plan.run(lengths, rows, max_len=next(turns) % 2))  # checked in each call

    def refused(*arguments: Any) -> None:
        with pytest.raises((ArgumentError, TypeError, OverflowError)):
            plan.run(*arguments, max_len=number)

    check_references(things, lambda: refused(lengths, rows))
    check_references(things, lambda: refused(lengths, number))
    check_references(things, lambda: refused(rows.to_sparse(), rows))

    class Wrong:
        words: Any = [number] * 5

        def _check(self, *arguments: Any) -> Any:
            return self.words

    def wrong(owner: object) -> None:
        with pytest.raises((TypeError, AttributeError)):
            plan._bound.run(owner, lengths, rows, None, number)

    owner = Wrong()
    for words in ([number] * 5, [number] * 5 + ["1"], number):
        owner.words = words
        check_references([*things, owner, words], lambda: wrong(owner))
    check_references(things, lambda: wrong(number))
    words = plan._check(lengths, rows, None, None)
    check_references([*things, *words], lambda: plan._bound.launch(*words, 0))
