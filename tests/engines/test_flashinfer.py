"""FlashInfer's own wrappers plan and fill one set of buffers; one launch fills another set. Both must be equal."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from typing import Any

import flashinfer
import pytest
import results
import torch
from flashinfer_fakes import planned
from onelaunch import ArgumentError, preset
from onelaunch.integrations.flashinfer import PlanInputs, bind_backends, on_host, plan_inputs
from torch import Tensor

MAX_BS, CAPACITY, WIDTH, POISON = 6, 4000, 704, -7
HEADS, DIM = 8, 64
# The captured number of requests. CUDA-graph wrappers accept no other number.
LENGTHS = ((77, 300, 640, 64, 1, 5), (128, 65, 5, 1, 1, 1), (2, 2, 2, 2, 2, 2))


def empty(*shape: int) -> Tensor:
    return torch.full(shape, POISON, dtype=torch.int32)


class Decode:
    """BatchDecodeWithPagedKVCacheWrapper."""

    tensor_cores = False
    query_len: int | None = None

    def __init__(self) -> None:
        self.wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            torch.zeros(1 << 20, dtype=torch.uint8),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=self.tensor_cores,
            backend="fa2",
            paged_kv_indptr_buffer=empty(MAX_BS + 1),
            paged_kv_indices_buffer=empty(CAPACITY),
            paged_kv_last_page_len_buffer=torch.ones(MAX_BS, dtype=torch.int32),
        )

    def plan(self, lists: PlanInputs, page: int) -> None:
        """Calls the wrapper's own plan() with these lists."""
        more = {} if self.query_len is None else {"q_len_per_req": self.query_len}
        self.wrapper.plan(lists.kv_indptr, lists.kv_indices, lists.last_page_len, HEADS, HEADS, DIM, page, **more)

    def fast_plan(self, lists: PlanInputs, page: int) -> None:
        """Calls the plan without copies on the device, as SGLang does. The wrapper must have been planned before."""
        more = {} if self.query_len is None else {"q_len_per_req": self.query_len}
        flashinfer.decode.fast_decode_plan(
            self.wrapper,
            *(lists.kv_indptr, lists.kv_indices, lists.last_page_len, HEADS, HEADS, DIM, page),
            global_override_indptr_cpu=lists.kv_indptr,
            **more,
        )


class TensorCores(Decode):
    """Decode with use_tensor_cores, where a request may have several query tokens."""

    tensor_cores = True
    query_len = 2


class Prefill:
    """BatchPrefillWithPagedKVCacheWrapper, as verification uses it."""

    query_len = 4

    def __init__(self) -> None:
        self.wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
            torch.zeros(1 << 20, dtype=torch.uint8),
            "NHD",
            use_cuda_graph=True,
            backend="fa2",
            qo_indptr_buf=empty(MAX_BS + 1),
            paged_kv_indptr_buf=empty(MAX_BS + 1),
            paged_kv_indices_buf=empty(CAPACITY),
            paged_kv_last_page_len_buf=torch.ones(MAX_BS, dtype=torch.int32),
        )

    def plan(self, lists: PlanInputs, page: int) -> None:
        self.wrapper.plan(
            lists.qo_indptr, lists.kv_indptr, lists.kv_indices, lists.last_page_len, HEADS, HEADS, DIM, page
        )

    fast_plan = plan


class MLA:
    """BatchMLAPagedAttentionWrapper."""

    query_len = 2

    def __init__(self) -> None:
        self.wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(
            torch.zeros(1 << 20, dtype=torch.uint8),
            use_cuda_graph=True,
            backend="fa2",
            qo_indptr=empty(MAX_BS + 1),
            kv_indptr=empty(MAX_BS + 1),
            kv_indices=empty(CAPACITY),
            kv_len_arr=empty(MAX_BS),
        )

    def plan(self, lists: PlanInputs, page: int) -> None:
        half = torch.bfloat16
        with warnings.catch_warnings():  # only once: the arguments of FlashInfer 0.6, which engines pass
            warnings.simplefilter("ignore", DeprecationWarning)
            self.wrapper.plan(
                *(lists.qo_indptr, lists.kv_indptr, lists.kv_indices, lists.kv_len_arr),
                *(HEADS, 512, DIM, page, False, 1.0, half, half),
            )

    fast_plan = plan


KINDS = (Decode, TensorCores, Prefill, MLA)
PAGES = (1, 16, 64)


def pool(page: int) -> Tensor:
    """req_to_token with pages in random order. Token c of a request is in the same page as its token c - c % page."""
    pages = torch.randperm(12 * WIDTH // page).view(12, WIDTH // page)
    return (pages[:, :, None] * page + torch.arange(page)).view(12, -1).to(torch.int32)


def lists_of(lengths: Tensor, rows: Tensor, source: Tensor, page: int, query_len: int | None) -> PlanInputs:
    """The lists that a caller of plan() makes."""
    indptr = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    indptr[1:] = torch.cumsum((lengths + page - 1) // page, 0)
    pages = [source[row, :length:page] // page for row, length in zip(rows.tolist(), lengths.tolist(), strict=True)]
    last = (lengths - 1) % page + 1
    last[lengths == 0] = 0
    starts = torch.arange(len(indptr), dtype=torch.int32) * (query_len or 1)
    return PlanInputs(indptr, torch.cat(pages), last, lengths.clone(), starts)


def poison(inputs: PlanInputs, *, page: int) -> None:
    """Poisons the lists, except last_page_len for pages of one token: there it is always 1."""
    for name, tensor in vars(inputs).items():
        if tensor is not None and (page > 1 or name != "last_page_len"):
            tensor.fill_(POISON)


def differences(wanted: PlanInputs, got: PlanInputs) -> list[str]:
    """The names of the buffers that differ."""
    names = [name for name, tensor in vars(wanted).items() if tensor is not None]
    assert names == [name for name, tensor in vars(got).items() if tensor is not None]
    return [name for name in names if not torch.equal(getattr(wanted, name), getattr(got, name))]


class Wrappers:
    """Three wrappers that plan as in the engine, and three whose buffers one launch fills."""

    def __init__(self, kind: Any, page: int) -> None:
        self.kind, self.page, self.source = kind, page, pool(page)
        self.engine, self.mine = ([kind() for _ in range(3)] for _ in range(2))
        self.host = [on_host(plan_inputs(one.wrapper)) for one in self.mine]
        self.plan = bind_backends(
            [one.wrapper for one in self.mine],
            self.source,
            page_size=page,
            query_len=kind.query_len,
            host=self.host,
            seqlen_offsets=(1, 2, 3),
        )

    def step(self, numbers: tuple[int, ...], seed: int = 0) -> None:
        """Refreshes for requests of these lengths: the engine's wrappers plan, and one launch fills ours."""
        rows = torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:MAX_BS]
        lengths = torch.tensor(numbers, dtype=torch.int32)
        for inputs in (*(plan_inputs(one.wrapper) for one in (*self.engine, *self.mine)), *self.host):
            poison(inputs, page=self.page)
        for step, one in enumerate(self.engine, 1):
            one.plan(lists_of(lengths + step, rows, self.source, self.page, self.kind.query_len), self.page)
        self.plan.run(lengths.long(), rows)

    def inputs(self, step: int) -> PlanInputs:
        """The inputs for a plan of one of our wrappers: all lists on the host except the page indices."""
        return dataclasses.replace(self.host[step], kv_indices=plan_inputs(self.mine[step].wrapper).kv_indices)

    def differences(self) -> list[str]:
        """The lists that differ from the engine's buffers, on the device and on the host."""
        found = []
        for step, theirs in enumerate(self.engine):
            wanted = plan_inputs(theirs.wrapper)
            for label, got in (("", plan_inputs(self.mine[step].wrapper)), ("host's ", self.inputs(step))):
                found += [f"{label}{name} of wrapper {step}" for name in differences(wanted, got)]
        return found


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_plan_writes(kind: Any, page: int) -> None:
    wrappers = Wrappers(kind, page)
    for seed, numbers in enumerate(LENGTHS):
        wrappers.step(numbers, seed)
        assert wrappers.differences() == []
    assert wrappers.plan.launches == len(LENGTHS)
    refreshed = "kv_indptr, kv_indices, last_page_len or kv_len_arr, and qo_indptr, also on the host"
    results.record(type(wrappers.mine[0].wrapper).__name__, refreshed, "its plan on the host", "any mode", page=page)


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_plan_reads_on_the_host(kind: Any, page: int) -> None:
    """From what the launch wrote on the host, FlashInfer plans our wrapper with the same lists as the engine's."""
    wrappers = Wrappers(kind, page)
    for seed, numbers in enumerate(LENGTHS):
        planned.clear()
        wrappers.step(numbers, seed)
        for step, one in enumerate(wrappers.mine):
            (one.plan if seed == 0 else one.fast_plan)(wrappers.inputs(step), page)
        assert len(planned) == 6
        for wanted, got in zip(planned[:3], planned[3:], strict=True):
            assert len(wanted) >= 1
            assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
        assert wrappers.differences() == [], "that plan must not change what the launch wrote"


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_entry_anywhere_is_found(kind: Any, page: int) -> None:
    """The control: the first and the last entry of each list, on the device and on the host."""
    wrappers = Wrappers(kind, page)
    for step, one in enumerate(wrappers.mine):
        for label, lists in (("", plan_inputs(one.wrapper)), ("host's ", wrappers.host[step])):
            for name, tensor in vars(lists).items():
                for at in (0, -1) if tensor is not None else ():
                    wrappers.step(LENGTHS[0])
                    assert wrappers.differences() == []
                    tensor[at] += 1
                    assert f"{label}{name} of wrapper {step}" in wrappers.differences()
                    tensor[at] -= 1  # with pages of one token last_page_len isn't written
    planned.clear()
    wrappers.step(LENGTHS[0])
    wrappers.host[0].kv_indptr[-2] += 1  # type: ignore[index]
    with contextlib.suppress(ValueError):  # MLA's plan detects the wrong entry itself
        wrappers.mine[0].plan(wrappers.inputs(0), page)
        assert not all(torch.equal(a, b) for a, b in zip(planned[0], planned[3], strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_requests_without_tokens(kind: Any) -> None:
    """They have no page and a last page of 0 tokens, so that FlashInfer's get_seq_lens returns length 0."""
    one = kind()
    plan = bind_backends([one.wrapper], pool(16), page_size=16)
    lengths = torch.tensor([0, 16, 0, 1, 33, 0])
    plan.run(lengths, torch.arange(MAX_BS))
    inputs = plan_inputs(one.wrapper)
    assert inputs.kv_indptr is not None
    assert inputs.kv_indptr.tolist() == [0, 0, 1, 1, 2, 5, 5]
    if inputs.last_page_len is not None:
        assert inputs.last_page_len.tolist() == [0, 16, 0, 1, 1, 0]
        counted = flashinfer.page.get_seq_lens(inputs.kv_indptr, inputs.last_page_len, 16)
        assert counted.tolist() == lengths.tolist()
    else:
        assert inputs.kv_len_arr is not None
        assert inputs.kv_len_arr.tolist() == lengths.tolist()


def test_the_preset() -> None:
    wrappers = [TensorCores().wrapper for _ in range(3)]
    host = [on_host(plan_inputs(wrapper)) for wrapper in wrappers]
    facts = {"seqlen_offsets": (1, 2, 3), "query_len": 1, "host": host}
    plan = bind_backends(wrappers, pool(16), page_size=16, **facts)
    assert plan.config == preset("flashinfer-pages-3").replace(target="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_another_page_size_than_it_was_planned_with_is_refused(kind: Any) -> None:
    one = kind()
    lengths = torch.full((MAX_BS,), 16, dtype=torch.int32)
    one.plan(lists_of(lengths, torch.arange(MAX_BS), pool(16), 16, kind.query_len), 16)
    with pytest.raises(ArgumentError, match="page_size is 1 and a wrapper was planned with pages of 16 tokens or more"):
        bind_backends([one.wrapper], pool(1))
    bind_backends([one.wrapper], pool(16), page_size=16)


def test_wrappers_of_different_kinds_are_refused() -> None:
    with pytest.raises(ArgumentError, match="wrapper 1 has no last_page_len and others have one"):
        bind_backends([Decode().wrapper, MLA().wrapper], pool(16), page_size=16)
    with pytest.raises(ArgumentError, match="query_len is 1 and the wrappers have no _qo_indptr_buf"):
        bind_backends([Decode().wrapper], pool(16), page_size=16, query_len=1)
    with pytest.raises(ArgumentError, match="host has 0 entries and there are 1 wrappers"):
        bind_backends([Decode().wrapper], pool(16), page_size=16, host=[])


def test_a_wrapper_without_buffers_is_refused() -> None:
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(torch.zeros(1 << 20, dtype=torch.uint8), "NHD")
    with pytest.raises(ArgumentError, match=r"kv_indptr is None\. Make the wrapper with use_cuda_graph=True"):
        plan_inputs(wrapper)
