"""The binding of a plan: which arguments of the last calls it checks again, and that no reference leaks."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections.abc import Callable
from typing import Any

import onelaunch
import pytest
import torch
from counting import CountingPlan, Number, inputs
from onelaunch import ArgumentError, LaunchError, MetadataBuffers
from references import check_references
from torch import Tensor
from torch._subclasses import FakeTensorMode


def test_what_is_the_same_is_checked_once(counting: CountingPlan, out: Tensor, device: torch.device) -> None:
    lengths, rows = inputs(device, 3, 4, 5)
    assert [counting.run(lengths, rows, None, None) for _ in range(3)] == [1, 0, 0]
    # Another object for the same memory: engines slice their buffers anew at each step.
    assert counting.run(lengths[:], rows.view(3), None, None) == 0
    lengths += 1
    assert counting.run(lengths, rows, None, None) == 0
    assert out.tolist() == [4, 5, 6, -7, -7, -7, -7, -7]


def test_arguments_that_take_turns_are_checked_once(counting: CountingPlan, out: Tensor, device: torch.device) -> None:
    """An engine's allocator returns inputs at a few addresses in turn; 8 are remembered."""
    turns = [(torch.tensor([i, i + 1], device=device), torch.tensor([0, 1], device=device)) for i in range(9)]
    for round_, numbers in enumerate((range(8), range(8), (8, 1, 8))):
        for number in numbers:
            out.fill_(-7)
            new = round_ == 0 or (number == 8 and counting.times == 8)
            assert counting.run(*turns[number], None, None) == new, (round_, number)
            assert out.tolist()[:3] == [number, number + 1, -7]
    assert counting.run(*turns[0], None, None) == 1, "the ninth replaced the first"


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
    counting: CountingPlan,
    out: Tensor,
    device: torch.device,
    change: Callable[[Tensor, Tensor], None],
    wanted: list[int],
) -> None:
    lengths, rows = inputs(device, 3, 4, 5, 6)
    counting.run(lengths, rows, None, None)
    out.fill_(-7)
    change(lengths, rows)
    assert counting.run(lengths, rows, None, None) == 1
    assert out.tolist() == wanted + [-7] * (8 - len(wanted))


@pytest.mark.parametrize("change", [lambda t: t.unsqueeze_(0), lambda t: t.resize_(4, 1), lambda t: t.resize_(0)])
def test_a_shape_that_changed_in_place_is_refused(
    counting: CountingPlan, out: Tensor, device: torch.device, change: Callable[[Tensor], Tensor]
) -> None:
    lengths, rows = inputs(device, 3, 4, 5, 6)
    counting.run(lengths, rows, None, None)
    out.fill_(-7)
    change(rows)
    for _ in range(2):
        with pytest.raises(ArgumentError):
            counting.run(lengths, rows, None, None)
    assert out.tolist() == [-7] * 8


def test_the_same_memory_of_another_dtype_is_refused(counting: CountingPlan, out: Tensor, device: torch.device) -> None:
    lengths, rows = inputs(device, 3, 4, 5, 6)
    counting.run(lengths, rows, None, None)
    out.fill_(-7)
    for other in (lengths.view(torch.float64), lengths.view(torch.int32)[:4], lengths.view(torch.uint64)):
        with pytest.raises(ArgumentError, match=r"seq_lens has dtype"):
            counting.run(other, rows, None, None)
    assert out.tolist() == [-7] * 8


def test_a_tensor_in_the_place_of_one_that_died(counting: CountingPlan, out: Tensor, device: torch.device) -> None:
    """It probably reuses the dead tensor's object and memory; its properties count, not its addresses."""
    _, rows = inputs(device, 0, 0, 0, 0)
    for step in range(200):
        lengths = torch.full((4 - step % 3,), step, dtype=torch.int64, device=device)
        out.fill_(-7)
        counting.run(lengths, rows[: len(lengths)], None, None)
        assert out.tolist() == [step] * len(lengths) + [-7] * (8 - len(lengths))
        del lengths
    lengths = torch.zeros(4, dtype=torch.int64, device=device)
    counting.run(lengths, rows, None, None)
    del lengths
    with pytest.raises(ArgumentError, match="float64"):
        counting.run(torch.zeros(4, dtype=torch.float64, device=device), rows, None, None)


@pytest.mark.parametrize("bad", [True, 16.0, "16", [16], torch.tensor(16), 2**70, -(2**70)])
def test_a_number_that_only_looks_like_the_last_one(counting: CountingPlan, device: torch.device, bad: Any) -> None:
    lengths, rows = inputs(device, 3, 4)
    for good in (1, 16):
        counting.run(lengths, rows, None, good)
        for _ in range(2):
            with pytest.raises(ArgumentError, match="max_len is"):
                counting.run(lengths, rows, None, bad)
        assert counting.run(lengths, rows, None, good) == 0
        assert counting.run(lengths, rows, None, Number(good)) == 0


def test_a_refused_call_leaves_the_last_one(counting: CountingPlan, out: Tensor, device: torch.device) -> None:
    lengths, rows = inputs(device, 3, 4)
    counting.run(lengths, rows, None, None)
    with pytest.raises(ArgumentError):
        counting.run(lengths, rows[:1], None, None)
    out.fill_(-7)
    assert counting.run(lengths, rows, None, None) == 0
    assert out.tolist()[:3] == [3, 4, -7]


def test_words_that_are_wrong_change_nothing(counting: CountingPlan, out: Tensor, device: torch.device) -> None:
    lengths, rows = inputs(device, 3, 4)
    counting.run(lengths, rows, None, None)

    class Wrong:
        def __init__(self, words: Any) -> None:
            self._check = lambda *arguments: words

    few = counting.plan._check(lengths, rows, None, None)
    out.fill_(-7)
    for words, error in (
        (few[:-1], TypeError),
        (7, TypeError),
        ([0] * 5 + ["1"], TypeError),
        ([2**70] * 6, OverflowError),
    ):
        with pytest.raises(error):
            counting.plan._bound.run(Wrong(words), lengths[:1], rows[:1], None, None)
    with pytest.raises(AttributeError, match="_check"):
        counting.plan._bound.run(object(), lengths[:1], rows[:1], None, None)
    for count in (0, 38):
        with pytest.raises(TypeError, match="run takes an owner and up to 20 arguments"):
            counting.plan._bound.run(*[None] * count)
    assert out.tolist() == [-7] * 8
    assert counting.run(lengths, rows, None, None) == 0
    assert out.tolist()[:3] == [3, 4, -7]


def test_a_bare_launch_leaves_no_trace(counting: CountingPlan, out: Tensor, device: torch.device) -> None:
    lengths, rows = inputs(device, 3, 4)
    counting.run(lengths, rows, None, None)
    counting.plan._bound.launch(*counting.plan._check(lengths[:1], rows[:1], None, None), 0)
    out.fill_(-7)
    assert counting.run(lengths, rows, None, None) == 0
    assert out.tolist()[:3] == [3, 4, -7]


def test_a_subclass_of_tensor_is_read_like_one(counting: CountingPlan, out: Tensor, device: torch.device) -> None:
    class Mine(Tensor):
        pass

    lengths, rows = inputs(device, 3, 4)
    assert [counting.run(lengths.as_subclass(Mine), rows, None, None) for _ in range(2)] == [1, 0]
    assert out.tolist()[:3] == [3, 4, -7]


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_a_tensor_without_memory_is_refused(counting: CountingPlan, out: Tensor, device: torch.device) -> None:
    _, rows = inputs(device, 3, 4)
    with FakeTensorMode():
        fake = torch.zeros(2, dtype=torch.int64, device=device)
    for _ in range(2):
        with pytest.raises(ArgumentError, match="seq_lens is a FakeTensor without memory"):
            counting.run(fake, rows, None, None)
    assert out.tolist() == [-7] * 8


_versions = (ctypes.c_uint32 * 32)()


def capsule(version: int) -> object:
    """What a tensor class offers in this version of DLPack."""
    _versions[0] = version
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    made: object = new(ctypes.addressof(_versions), b"dlpack_exchange_api", None)
    return made


def test_a_torch_whose_tensors_cannot_be_read_is_named(counting: CountingPlan, monkeypatch: pytest.MonkeyPatch) -> None:
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


# ------------------------------------------------------------------------------------------------ references


def test_inputs_are_not_kept_alive(counting: CountingPlan, device: torch.device) -> None:
    lengths, rows = inputs(device, 3, 4)
    counting.plan.run(lengths, rows)
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
def test_references_of_calls(counting: CountingPlan, device: torch.device) -> None:
    lengths, rows = inputs(device, 30_000, 40_000)  # not cached small integers, so that they are counted
    number = 2**40
    plan = counting.plan
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
