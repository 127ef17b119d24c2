"""Tests that need a GPU: one launch and nothing else, CUDA graphs, streams, other devices, memory beyond 2^31."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onelaunch
import pytest
import support
import torch
from cases import STRATEGIES, Shape, batch
from checker import Scene, check
from onelaunch import JitPolicyError, KernelConfig, MetadataBuffers
from onelaunch.build import toolchain
from onelaunch.cache.store import Store
from onelaunch.load import loader
from support import POISON, assert_same, captured, poison
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
LIVE = STRATEGIES["live"]
# The number of rows, and so the shapes of the destinations, doesn't depend on the lengths.
SHAPE = batch(42, 1031, seed=1)


# ------------------------------------------------------------------------------------------------ graphs
# test_traces.py has graphs of several batch sizes on the same destinations, test_functions.py those of the functions.


@pytest.mark.parametrize("name", STRATEGIES)
def test_graph_replays_follow_the_inputs(name: str) -> None:
    """A graph captured once is replayed with other lengths, rows and tokens in the same memory."""
    scene = Scene(STRATEGIES[name], SHAPE, DEVICE)
    plan = scene.bind()
    graph = captured(lambda: scene.run(plan))
    for seed in range(2, 6):
        other = Scene(STRATEGIES[name], batch(42, 1031, page_size=seed, seed=seed), DEVICE)
        scene.take_inputs(other)
        poison(scene.backends)
        if scene.config.verified:
            plan.forget()  # because this test wrote to the destinations
        graph.replay()
        if "kv_indices" in scene.config.fields:  # its size is what the first lengths needed
            for buffers in other.expected:
                buffers.kv_indices = _first(buffers.kv_indices, scene.capacity)
        assert_same(scene.backends, other.expected)


def _first(indices: torch.Tensor | None, capacity: int) -> torch.Tensor:
    assert indices is not None
    first = torch.full((capacity,), POISON, dtype=indices.dtype, device=DEVICE)
    count = min(capacity, indices.numel())
    first[:count] = indices[:count]
    return first


def test_the_driver_names_the_architecture_that_torch_names() -> None:
    """Asked in a new process, which hasn't imported torch."""
    code = "import sys; from onelaunch.build.toolchain import *; print(current_architectures(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"{toolchain.architectures(torch.cuda.current_device())} False\n"


def test_a_capture_refuses_a_kernel_that_isnt_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is built or loaded while a graph is captured. That capture is abandoned, and the next one works."""
    store = Store(tmp_path / "cache")
    monkeypatch.setattr(loader, "default_store", lambda: store)
    config = KernelConfig(fields=("cache_seqlens",), num_backends=2)
    archs = toolchain.architectures(torch.cuda.current_device())
    counts = torch.zeros(8, device="cuda")
    counts.add_(0)  # torch's own kernel is loaded before any capture
    torch.cuda.synchronize()

    def capture() -> tuple[torch.cuda.CUDAGraph, loader.Kernel]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            counts.add_(1)
            kernel = onelaunch.specialize(config)
        return graph, kernel

    sentence = "isn't loaded yet and a CUDA graph is being captured. Bind the plan, or call once, before the capture"
    with pytest.raises(JitPolicyError, match=re.escape(sentence)) as caught:
        capture()
    assert str(caught.value).endswith(loader.build_command(config, archs))
    assert not store.root.exists(), "something was built"
    assert not torch.cuda.is_current_stream_capturing()
    torch.cuda.synchronize()
    assert counts.tolist() == [0] * 8, "captured work ran"
    # A kernel that is built but not loaded by this process is refused, too.
    kernel = onelaunch.specialize(config)
    loader._loaded.clear()
    with pytest.raises(JitPolicyError, match=re.escape(sentence)):
        capture()
    # A kernel loaded before the capture is accepted.
    assert onelaunch.specialize(config).key == kernel.key
    graph, again = capture()
    assert again.key == kernel.key
    graph.replay()
    assert counts.tolist() == [1] * 8


def test_a_checked_plan_is_captured_and_reports_after_the_replay() -> None:
    scene = Scene(STRATEGIES["checked"], batch(300, 517).within(517), DEVICE)
    plan: Any = scene.bind()
    graph = captured(lambda: scene.run(plan))
    graph.replay()
    plan.check()
    row = int(scene.req_pool_indices[217])
    scene.req_pool_indices[217] = 301
    graph.replay()
    with pytest.raises(onelaunch.ArgumentError, match=r"req_pool_indices\[217\] is 301"):
        plan.check()
    scene.req_pool_indices[217] = row
    graph.replay()
    plan.check()


def test_an_audit_is_captured_and_reports_after_the_replay() -> None:
    """In the graph of the refresh, after it, and in a graph of its own."""
    scene = Scene(LIVE, batch(300, 517).within(517), DEVICE)
    plan: Any = scene.bind(audit_every=1)
    graph = captured(lambda: scene.run(plan))
    assert plan._auditor.launches == 0, "a run that is captured doesn't audit"
    graph.replay()
    audit = captured(lambda: scene.run(plan, "audit"))
    audit.replay()
    plan.check()
    table = scene.destinations["page_indices"][2][0]
    request = int((scene.seq_lens > 5).nonzero()[-1])
    right = int(table[request, 5])
    table[request, 5] = right ^ 1
    audit.replay()
    torch.cuda.synchronize()
    assert int(plan._auditor._violation[0]) > 0
    with pytest.raises(onelaunch.AuditError) as caught:
        plan.check()
    error = caught.value
    assert (error.backend, error.field, error.row, error.column) == (2, "page_indices", request, 5)
    assert (error.found, error.expected) == (right ^ 1, right)
    graph.replay()
    audit.replay()
    plan.check()
    table.fill_(-3)  # every element differs; one is reported
    audit.replay()
    with pytest.raises(onelaunch.AuditError, match=r"page_indices.* is -3"):
        plan.check()


# ------------------------------------------------------------------------------------------------ one launch


def refresh_by_plan(scene: Scene) -> Callable[[], object]:
    plan = scene.bind()
    return lambda: scene.run(plan)


def audit_by_plan(scene: Scene) -> Callable[[], object]:
    plan = scene.bind(audit_every=0)
    return lambda: scene.run(plan, "audit")


def refresh_by_lists(scene: Scene) -> Callable[[], object]:
    lists = [[getattr(b.buffers, name) for b in scene.backends] for name in LIVE.fields]
    inputs = scene.seq_lens, scene.req_pool_indices, scene.req_to_token
    return lambda: onelaunch.fused_metadata_precompute_and_broadcast_cuda(
        *inputs, *lists, max_len=517, nsa_index_topk=2048, real_page_size=64
    )


def precompute(scene: Scene) -> Callable[[], object]:
    inputs = scene.seq_lens, scene.req_pool_indices, scene.req_to_token
    return lambda: onelaunch.precompute_decode_metadata_cuda(
        *inputs, max_len=517, nsa_index_topk=2048, real_page_size=64
    )


def copy(scene: Scene) -> Callable[[], object]:
    source = precompute(scene)()
    assert isinstance(source, MetadataBuffers)
    targets = support.buffers_of(scene.backends)
    return lambda: onelaunch.fused_metadata_copy_cuda(source, targets)


def schedule(scene: Scene) -> Callable[[], object]:
    out = torch.empty((133, 2), dtype=torch.int32, device=DEVICE)
    return lambda: onelaunch.paged_mqa_schedule(scene.seq_lens.unsqueeze(-1), 132, out=out)


Make = Callable[[Scene], Callable[[], object]]


@pytest.mark.parametrize("make", [refresh_by_plan, audit_by_plan, refresh_by_lists, precompute, copy, schedule])
@pytest.mark.parametrize("dtype", ["int64", "int32"])
def test_a_call_is_one_kernel_and_nothing_else(make: Make, dtype: str) -> None:
    """No conversion of the inputs, no copy of pointers, no second kernel, whatever the dtypes."""
    config = LIVE.replace(seq_lens_dtype=dtype, req_pool_indices_dtype=dtype)
    call = make(Scene(config, batch(33, 517, spare_rows=0), DEVICE))
    keep = [call() for _ in range(3)]
    torch.cuda.synchronize()

    def recorded(times: int) -> tuple[list[str], Counter[str]]:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as made:
            keep.extend(call() for _ in range(times))
            torch.cuda.synchronize()
        events = list(made.events())
        on_device = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        return on_device, Counter(e.name for e in events if e.name.startswith("cuda"))

    _, without = recorded(0)  # the synchronizations of the test and of the profiler itself
    on_device, runtime = recorded(4)
    assert len(on_device) == 4, on_device
    assert all("onelaunch_" in name for name in on_device), on_device
    runtime.subtract(without)
    forbidden = ("Synchronize", "Memcpy", "Memset", "Malloc", "Free", "Event")
    extra = {name: n for name, n in runtime.items() if n > 0 and any(word in name for word in forbidden)}
    assert not extra, extra


@pytest.mark.parametrize("make", [refresh_by_plan, audit_by_plan, refresh_by_lists, copy])
def test_a_call_allocates_nothing(make: Make) -> None:
    """An allocation would break captures. The tests above and test_functions.py replay graphs of these calls."""
    call = make(Scene(LIVE, batch(33, 517, spare_rows=0), DEVICE))
    call()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        call()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


# ------------------------------------------------------------------------------------------------ streams, devices


def test_the_launch_is_on_the_current_stream() -> None:
    scene = Scene(LIVE, batch(8, 300), DEVICE)
    plan: Any = scene.bind()
    late = torch.zeros_like(scene.seq_lens)
    plan.run(late, scene.req_pool_indices)
    torch.cuda.synchronize()
    poison(scene.backends)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(scene.seq_lens)
        plan.run(late, scene.req_pool_indices)
    # The stream still sleeps, so a launch on another stream would already have read zeros.
    assert not stream.query()
    torch.cuda.synchronize()
    scene.compare()


@pytest.mark.two_devices
def test_tensors_on_a_device_that_is_not_the_current_one() -> None:
    for current, used in ((0, 1), (1, 0)):
        device = torch.device("cuda", used)
        with torch.cuda.device(current):
            scene = Scene(LIVE, batch(33, 517), device)
            plan = scene.bind()
            scene.run(plan)
            with torch.cuda.stream(torch.cuda.Stream(device=device)):
                scene.run(plan)
            assert torch.cuda.current_device() == current
            torch.cuda.synchronize(device)
            scene.compare()
            elsewhere = scene.req_to_token.to(f"cuda:{current}")
            with pytest.raises(onelaunch.ArgumentError, match="req_to_token is on cuda"):
                onelaunch.bind(support.buffers_of(scene.backends), req_to_token=elsewhere)


@pytest.mark.two_devices
def test_plans_on_two_devices_side_by_side() -> None:
    scenes = [Scene(LIVE, batch(20, 400, seed=index), torch.device("cuda", index)) for index in (0, 1)]
    plans = [scene.bind() for scene in scenes]
    for _ in range(5):
        for scene, plan in zip(scenes, plans, strict=True):
            scene.run(plan)
    for index, scene in enumerate(scenes):
        torch.cuda.synchronize(index)
        scene.compare()


# ------------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("name", ["rows", "variable rows"])
def test_64_backends_of_65536_requests(name: str) -> None:
    """Neither has a limit here: running sums carry over 256 chunks, and 64 backends' addresses travel by value."""
    fields = ("cu_seqlens_k", "nsa_cu_seqlens_k", "page_indices")
    check(STRATEGIES[name].replace(num_backends=64, fields=fields), batch(65_536, 12, page_size=2), DEVICE)


@pytest.mark.parametrize("name", ["live", "rows", "offsets"])
def test_a_context_of_a_million_tokens(name: str) -> None:
    width = 2**20 + 3
    check(STRATEGIES[name], Shape("a million", (width, width - 1, 1, 0, 777_777), width=width), DEVICE)


def with_a_far_pool(scene: Scene) -> Scene:
    """Moves the scene's token rows into a larger pool, the first and the last row beyond 2^31 elements."""
    pool = scene.req_to_token
    width = pool.shape[1]
    needed = 2**31 // width + 3
    free, _ = torch.cuda.mem_get_info()
    if free < needed * width * 4 + 2 * 2**30:
        pytest.skip("needs 11 GB of free device memory")
    chosen = torch.arange(pool.shape[0], device=DEVICE)
    chosen[0], chosen[-1] = 2**31 // width + 1, needed - 1
    scene.req_to_token = torch.empty((needed, width), dtype=pool.dtype, device=DEVICE)
    scene.req_to_token[chosen] = pool
    scene.req_pool_indices = chosen[scene.req_pool_indices.long()].to(scene.req_pool_indices.dtype)
    return scene


@pytest.mark.parametrize("name", ["live", "equal rows", "rows", "variable rows", "offsets", "indices", "live words"])
def test_pool_rows_beyond_two_to_the_31_elements(name: str) -> None:
    shape = Shape("far", (163_911, 100_000, 7, 5), width=163_911, extends=(2, 0, 3, 1), max_indices=10**6)
    scene = with_a_far_pool(Scene(STRATEGIES[name].replace(req_to_token_dtype="int32"), shape, DEVICE))
    scene.run(scene.bind())
    scene.compare()


def test_a_million_columns_of_64_backends() -> None:
    """Reads a million-token pool beyond 2^31 elements, and writes to 64 backends."""
    width = 2**20 + 1
    shape = Shape("a million", (width, 65, width - 3), width=width)
    scene = with_a_far_pool(Scene(LIVE.replace(num_backends=64), shape, DEVICE))
    plan: Any = scene.bind()
    scene.run(plan)
    assert plan.launches == 1
    scene.compare()


def test_destinations_beyond_two_to_the_31_elements() -> None:
    width, bs = 163_911, 2**31 // 163_911 + 2
    free, _ = torch.cuda.mem_get_info()
    if free < 2 * bs * width * 4:
        pytest.skip("needs 18 GB of free device memory")
    pool = torch.randint(0, 2**30, (4, width), dtype=torch.int32, device=DEVICE)
    table: Tensor = torch.full((bs, width), POISON, dtype=torch.int32, device=DEVICE)
    lengths = torch.full((bs,), 5, device=DEVICE)
    lengths[-1] = width
    rows = torch.arange(bs, device=DEVICE) % 4
    onelaunch.bind([MetadataBuffers(page_indices=table)], req_to_token=pool).run(lengths, rows)
    assert torch.equal(table[-1], pool[rows[-1]])
    assert torch.equal(table[:-1, :5], pool[rows[:-1], :5])
    assert bool((table[:-1, 5:] == POISON).all())
