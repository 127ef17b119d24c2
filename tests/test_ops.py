"""The functions inside torch.compile: one graph, the same bytes as in eager mode, and torch's own operator checks."""

from __future__ import annotations

import inspect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import forked
import onelaunch
import pytest
import support
import torch
from onelaunch import ArgumentError, MetadataBuffers
from onelaunch.run import ops, refresh
from support import SIX_FIELDS, Poisoned, assert_same, assert_untouched
from torch import Tensor

pytestmark = pytest.mark.usefixtures("quick_builds")
OPS = torch.ops.onelaunch
WIDTH, TOPK = 141, 100
ROOM = 7

# What precompute_decode_metadata_cuda allocates.
ALLOCATED = (*SIX_FIELDS, "seqlens_expanded")


@pytest.fixture(autouse=True)
def _no_graph_is_left_behind() -> None:
    # The import takes seconds. Every worker imports this file, but few run its tests.
    import torch._dynamo.testing
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()


@dataclass
class Case:
    """Five requests and two poisoned backends."""

    seq_lens: Tensor
    req_pool_indices: Tensor
    req_to_token: Tensor
    backends: list[Poisoned]
    page_size: int

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.seq_lens, self.req_pool_indices, self.req_to_token

    @property
    def buffers(self) -> list[MetadataBuffers]:
        return support.buffers_of(self.backends)

    @property
    def numbers(self) -> dict[str, int]:
        return {"nsa_index_topk": TOPK, "real_page_size": self.page_size}

    def lists(self) -> list[list[Tensor] | None]:
        """The destinations as the function takes them."""
        named = [[getattr(b, name) for b in self.buffers] for name in SIX_FIELDS]
        return [None if tensors[0] is None else tensors for tensors in named]

    def expected(self, extent: str = "full", max_len: int | None = None, more: int = 0) -> MetadataBuffers:
        return support.expected_refresh(
            self.backends,
            self.seq_lens + more,
            self.req_pool_indices,
            self.req_to_token,
            page_size=self.page_size,
            index_topk=TOPK,
            extent=extent,
            max_len=max_len,
        )


def make(device: torch.device, fields: Sequence[str] = SIX_FIELDS, page_size: int = 64) -> Case:
    return Case(
        support.vector([3, 0, 64, 141, 139], torch.int64, device),
        support.vector([1, 2, 3, 3, 8], torch.int64, device),
        support.token_pool(9, WIDTH, device=device),
        [support.destination(fields, ROOM, WIDTH, page_size, device=device) for _ in range(2)],
        page_size,
    )


def broadcast(lists: Sequence[Any], *inputs: Tensor, **numbers: Any) -> Tensor:
    """A step with torch operations before and after the function; all must be in one graph."""
    seq_lens, req_pool_indices, req_to_token = inputs
    onelaunch.fused_metadata_precompute_and_broadcast_cuda(
        seq_lens + 1, req_pool_indices, req_to_token, *lists, extent="live", **numbers
    )
    return lists[0][0] * 2


# ------------------------------------------------------------------------------------------------ torch's checks


@pytest.mark.parametrize("fields", [SIX_FIELDS, ("cache_seqlens", "page_indices")], ids=["six", "two"])
def test_torch_accepts_the_broadcast(fields: tuple[str, ...], device: torch.device) -> None:
    case = make(device, fields)
    torch.library.opcheck(
        OPS.fused_metadata_precompute_and_broadcast_cuda.default,
        (*case.inputs, *case.lists()),
        {**case.numbers, "max_len": 130, "extent": "live"},
    )


@pytest.mark.parametrize("page_size", [64, 1])
def test_torch_accepts_the_precomputation_and_the_copy(page_size: int, device: torch.device) -> None:
    case = make(device, ALLOCATED, page_size)
    source, destination = (ops._pack(b) for b in case.buffers)
    assert len(source[0]) == len(ALLOCATED) - (page_size == 1)  # with pages of one token two fields are one tensor
    torch.library.opcheck(
        OPS.precompute_decode_metadata_cuda.default,
        (*case.inputs, *source),
        {**case.numbers, "max_len": WIDTH},
    )
    ops.precompute(case.buffers[0], *case.inputs, **case.numbers, max_len=WIDTH)
    assert_same(case.backends[:1], case.expected())
    for numbers in ({}, {"bs": 4, "max_len": 130, "real_page_size": page_size}):
        torch.library.opcheck(OPS.fused_metadata_copy_cuda.default, (*source, *destination), numbers)
    ops.copy(case.buffers[0], case.buffers[1:], bs=5)
    assert_same(case.backends, case.expected())


def test_an_operation_that_hides_a_write_would_be_caught() -> None:
    """Shows that the two tests above can fail: opcheck rejects a schema that doesn't declare one list as written."""
    case = make(torch.device("cpu"))
    schema = str(OPS.fused_metadata_precompute_and_broadcast_cuda.default._schema).partition("::")[2]
    assert "Tensor(c!)[]? page_indices_list" in schema
    with torch.library._scoped_library("onelaunch_test", "FRAGMENT") as library:
        library.define(schema.replace("Tensor(c!)[]?", "Tensor[]?"))
        name = "fused_metadata_precompute_and_broadcast_cuda"
        library.impl(name, onelaunch.fused_metadata_precompute_and_broadcast_cuda, "CompositeExplicitAutograd")
        library.impl(name, lambda *args, **kwargs: None, "Meta")
        with pytest.raises(Exception, match="page_indices_list"):
            torch.library.opcheck(
                torch.ops.onelaunch_test.fused_metadata_precompute_and_broadcast_cuda.default,
                (*case.inputs, *case.lists()),
                {**case.numbers, "max_len": 130},
                test_utils="test_schema",
            )


def test_the_operation_takes_what_the_function_takes() -> None:
    schema = OPS.fused_metadata_precompute_and_broadcast_cuda.default._schema
    parameters = inspect.signature(onelaunch.fused_metadata_precompute_and_broadcast_cuda).parameters.values()
    spelled = {"mode": "forward_mode"}  # torch passes a ``mode`` of its own to operations
    assert [(a.name, a.kwarg_only, a.default_value) for a in schema.arguments] == [
        (spelled.get(p.name, p.name), p.kind is p.KEYWORD_ONLY, None if p.default is p.empty else p.default)
        for p in parameters
    ]
    assert [a.name for a in schema.arguments if a.is_write] == [p.name for p in parameters if p.name.endswith("_list")]


# ------------------------------------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("fields", [SIX_FIELDS, ("cache_seqlens", "page_indices")], ids=["six", "two"])
def test_a_broadcast_is_part_of_the_graph(backend: str, fields: tuple[str, ...], device: torch.device) -> None:
    case = make(device, fields)
    compiled = torch.compile(broadcast, backend=backend, fullgraph=True)
    out = compiled(case.lists(), *case.inputs, **case.numbers, max_len=130)
    expected = case.expected("live", 130, more=1)
    assert_same(case.backends, expected)
    assert expected.cache_seqlens is not None
    assert torch.equal(out.cpu(), expected.cache_seqlens * 2)


def test_what_the_backends_share_stays_shared(device: torch.device) -> None:
    """Both backends share one table, and their lengths are two halves of one tensor."""
    case = make(device, ("cache_seqlens", "page_indices", "nsa_cache_seqlens"))
    first, second = case.buffers
    second.page_indices = first.page_indices
    case.backends[1].storages["page_indices"] = case.backends[0].storages["page_indices"]
    both, _ = support.guarded(2 * ROOM, device=device)
    first.cache_seqlens, second.cache_seqlens = both[:ROOM], both[ROOM:]
    compiled = torch.compile(broadcast, backend="aot_eager", fullgraph=True)
    compiled(case.lists(), *case.inputs, **case.numbers, max_len=WIDTH)
    expected = case.expected("live", more=1)
    assert expected.cache_seqlens is not None
    assert torch.equal(both.cpu(), expected.cache_seqlens.repeat(2))
    first.cache_seqlens = second.cache_seqlens = None
    assert_same(case.backends, expected)


def two_steps(
    destinations: list[MetadataBuffers], *inputs: Tensor, out: MetadataBuffers | None, **numbers: int
) -> MetadataBuffers:
    made = onelaunch.precompute_decode_metadata_cuda(*inputs, **numbers, out=out)
    onelaunch.fused_metadata_copy_cuda(
        made,
        destinations,
        max_len=numbers["max_len"],
        real_page_size=numbers["real_page_size"],
        bs=inputs[0].numel(),
    )
    return made


@pytest.mark.parametrize("page_size", [64, 1])
@pytest.mark.parametrize("given", [False, True], ids=["new", "out"])
def test_precompute_and_copy_are_part_of_the_graph(given: bool, page_size: int, device: torch.device) -> None:
    case = make(device, ALLOCATED, page_size)
    source = support.destination(ALLOCATED, ROOM, WIDTH, page_size, device=device)
    compiled = torch.compile(two_steps, backend="aot_eager", fullgraph=True)
    out = source.buffers if given else None
    made = compiled(case.buffers, *case.inputs, out=out, max_len=WIDTH, **case.numbers)
    expected = case.expected()
    assert_same(case.backends, expected)
    if given:
        assert made is out
        assert_same([source], expected)
    else:
        assert made.seqlens_expanded is made.cache_seqlens
        assert (made.real_page_table is made.page_indices) == (page_size == 1)
        for field, tensor in made.items():
            assert torch.equal(tensor.cpu(), getattr(expected, field.name)[: tensor.shape[0]]), field.name


def test_a_batch_and_a_bound_that_change_take_one_more_graph(device: torch.device) -> None:
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(broadcast, backend=counter, fullgraph=True)
    for bs, max_len in ((5, 130), (4, 131), (3, 132), (2, 133), (5, 140)):
        case = make(device)
        case.seq_lens, case.req_pool_indices = case.seq_lens[:bs], case.req_pool_indices[:bs]
        compiled(case.lists(), *case.inputs, **case.numbers, max_len=max_len)
        assert_same(case.backends, case.expected("live", max_len, more=1))
    assert counter.frame_count == 2


@pytest.mark.long
def test_inductor_writes_to_the_destinations_themselves(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copying there and back would cost more than the launch. An eager call that finds the same plan excludes it."""
    import torch._inductor.config

    case = make(device)
    refresh.plans.clear()
    compiled = torch.compile(broadcast, backend="inductor", fullgraph=True)
    # Compile in this process: workers would first import torch. Precompiling torch's headers would take half a minute.
    with torch._inductor.config.patch(compile_threads=1, cpp_cache_precompile_headers=False):
        compiled(case.lists(), *case.inputs, **case.numbers, max_len=130)
    assert_same(case.backends, case.expected("live", 130, more=1))
    monkeypatch.setattr(refresh.bind, "make_plan", lambda *args, **kwargs: pytest.fail("it made another plan"))
    broadcast(case.lists(), *case.inputs, **case.numbers, max_len=130)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_graph_refuses_what_eager_refuses(backend: str, device: torch.device) -> None:
    compiled = torch.compile(broadcast, backend=backend, fullgraph=True)
    case = make(device)
    with pytest.raises(ArgumentError, match=r"max_len is 142; allowed: 0 to 141"):
        compiled(case.lists(), *case.inputs, **case.numbers, max_len=142)
    lists = case.lists()
    assert lists[1] is not None
    lists[1].pop()
    with pytest.raises(ArgumentError, match="cu_seqlens_k_list has 1 tensors and cache_seqlens_list has 2"):
        compiled(lists, *case.inputs, **case.numbers, max_len=WIDTH)
    assert_untouched(case.backends)


# ------------------------------------------------------------------------------------------------ Plan.run


def test_a_plan_runs_between_two_graphs(device: torch.device) -> None:
    case = make(device)
    plan = onelaunch.bind(case.buffers, req_to_token=case.req_to_token, index_topk=TOPK)

    def step(seq_lens: Tensor) -> Tensor:
        plan.run(seq_lens + 1, case.req_pool_indices)
        destination = case.buffers[0].cache_seqlens
        assert destination is not None
        return destination[:5] * 2 + seq_lens

    compiled = torch.compile(step, backend=(counter := torch._dynamo.testing.CompileCounter()))
    for launches in range(1, 13):
        case.seq_lens = (case.seq_lens + 7 * launches) % WIDTH
        out = compiled(case.seq_lens)
        assert plan.launches == launches
        assert torch.equal(out, (case.seq_lens + 1) * 2 + case.seq_lens)
    assert_same(case.backends[1:], case.backends[0].buffers)
    assert counter.frame_count == 2
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert [reason for reason in breaks if "Plan.run can't be in a graph" in reason]


def test_a_plan_in_a_full_graph_is_refused_with_what_to_do() -> None:
    case = make(torch.device("cpu"))
    plan = onelaunch.bind(case.buffers, req_to_token=case.req_to_token, index_topk=TOPK)
    compiled = torch.compile(plan.run, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="fused_metadata_precompute_and_broadcast_cuda can"):
        compiled(*case.inputs[:2])
    assert_untouched(case.backends)


# ------------------------------------------------------------------------------------------------ cost


def test_neither_the_import_nor_an_eager_call_loads_the_compiler() -> None:
    script = """
import sys
before = set(sys.modules)
import torch
import onelaunch.run.api
assert torch.ops.onelaunch.fused_metadata_copy_cuda.default
source, destination = (onelaunch.MetadataBuffers(cache_seqlens=torch.tensor(values)) for values in ([1], [2]))
try:
    onelaunch.fused_metadata_copy_cuda(source, destination)
except onelaunch.ArgumentError:  # int64; no kernel is built
    pass
print(*(name for name in set(sys.modules) - before if name.startswith(("torch._dynamo", "torch._inductor"))))
"""
    out, _ = forked.Child(script, dict(os.environ)).finish()
    assert out.strip() == ""
