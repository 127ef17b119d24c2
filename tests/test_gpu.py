"""What only a GPU can show: one launch and nothing else, CUDA graphs, streams, other devices, memory beyond 2^31."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onelaunch
import pytest
import torch
from onelaunch import PRESETS, JitPolicyError, MetadataBuffers
from onelaunch.build import toolchain
from onelaunch.cache.store import Store
from onelaunch.load import loader
from onelaunch.spec import reference
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent / "gpu"))
import cases

pytestmark = pytest.mark.gpu
POISON = -858993460


def buffers(bs: int, width: int, device: torch.device, page_size: int = 64) -> MetadataBuffers:
    def new(*shape: int) -> Tensor:
        return torch.full(shape, POISON, dtype=torch.int32, device=device)

    return MetadataBuffers(
        cache_seqlens=new(bs),
        cu_seqlens_k=new(bs + 1),
        page_indices=new(bs, width),
        nsa_cache_seqlens=new(bs),
        nsa_cu_seqlens_k=new(bs + 1),
        real_page_table=new(bs, -(-width // page_size)),
    )


def inputs(bs: int, width: int, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randint(0, 2**30, (bs + 1, width), dtype=torch.int32, generator=generator).to(device)
    lengths = torch.randint(0, width + 9, (bs,), generator=generator).to(device)
    rows = (torch.randperm(bs, generator=generator) + 1).to(device)
    return lengths, rows, pool


def assert_equal(backends: list[MetadataBuffers], expected: list[MetadataBuffers]) -> None:
    for index, (backend, wanted) in enumerate(zip(backends, expected, strict=True)):
        for (field, got), (_, want) in zip(backend.items(), wanted.items(), strict=True):
            assert torch.equal(got, want), f"backends[{index}].{field.name}"


@pytest.mark.parametrize("shape", cases.SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_agrees_with_the_reference(name: str, shape: tuple[int, int]) -> None:
    cases.run(PRESETS[name], *shape, torch.device("cuda", 0))


@pytest.mark.parametrize("extent", ["live", "full"])
def test_graph_replays_follow_the_inputs(extent: str) -> None:
    device = torch.device("cuda", 0)
    bs, width = 40, 1031
    lengths, rows, pool = inputs(bs, width, device)
    backends = [buffers(bs, width, device) for _ in range(3)]
    plan = onelaunch.bind(backends, req_to_token=pool, extent=extent)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(lengths, rows)
    for seed in range(1, 6):
        new_lengths, new_rows, new_pool = inputs(bs, width, device, seed)
        lengths.copy_(new_lengths)
        rows.copy_(new_rows)
        pool.copy_(new_pool)
        for backend in backends:
            for _, tensor in backend.items():
                tensor.fill_(POISON)
        graph.replay()
        expected = [buffers(bs, width, device) for _ in range(3)]
        reference.refresh(expected, lengths, rows, pool, index_topk=2048, page_size=64, extent=extent)
        assert_equal(backends, expected)


def test_graphs_of_several_batch_sizes_share_the_destinations() -> None:
    device = torch.device("cuda", 0)
    width = 777
    lengths, rows, pool = inputs(64, width, device)
    backends = [buffers(64, width, device) for _ in range(2)]
    plan = onelaunch.bind(backends, req_to_token=pool)
    graphs = {}
    for bs in (64, 31, 7, 1):
        graphs[bs] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[bs]):
            plan.run(lengths[:bs], rows[:bs])
    for bs in (7, 64, 1, 31):
        for backend in backends:
            for _, tensor in backend.items():
                tensor.fill_(POISON)
        graphs[bs].replay()
        expected = [buffers(64, width, device) for _ in range(2)]
        reference.refresh(expected, lengths[:bs], rows[:bs], pool, index_topk=2048, page_size=64, extent="live")
        assert_equal(backends, expected)


def test_a_capture_refuses_a_kernel_that_isnt_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither built nor loaded while a graph is captured; the capture is abandoned, and the next one works."""
    store = Store(tmp_path / "cache")
    monkeypatch.setattr(loader, "default_store", lambda: store)
    config = onelaunch.KernelConfig(fields=("cache_seqlens",), num_backends=2)
    archs = toolchain.architectures(torch.cuda.current_device())
    counts = torch.zeros(8, device="cuda")
    counts.add_(0)  # torch's own kernel is loaded before any capture
    torch.cuda.synchronize()

    def captured() -> tuple[torch.cuda.CUDAGraph, loader.Kernel]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            counts.add_(1)
            kernel = onelaunch.specialize(config)
        return graph, kernel

    sentence = "isn't loaded yet and a CUDA graph is being captured. Bind the plan, or call once, before the capture"
    with pytest.raises(JitPolicyError, match=re.escape(sentence)) as caught:
        captured()
    assert str(caught.value).endswith(loader.build_command(config, archs))
    assert not store.root.exists(), "something was built"
    assert not torch.cuda.is_current_stream_capturing()
    torch.cuda.synchronize()
    assert counts.tolist() == [0] * 8, "what was captured ran"
    # Built, yet not loaded by this process: refused all the same.
    kernel = onelaunch.specialize(config)
    loader._loaded.clear()
    with pytest.raises(JitPolicyError, match=re.escape(sentence)):
        captured()
    # Loaded before the capture, it is no matter.
    assert onelaunch.specialize(config).key == kernel.key
    graph, again = captured()
    assert again.key == kernel.key
    graph.replay()
    assert counts.tolist() == [1] * 8


def refresh_by_plan(device: torch.device) -> Callable[[], object]:
    lengths, rows, pool = inputs(33, 517, device)
    plan = onelaunch.bind([buffers(33, 517, device) for _ in range(3)], req_to_token=pool)
    return lambda: plan.run(lengths, rows)


def refresh_by_lists(device: torch.device) -> Callable[[], object]:
    lengths, rows, pool = inputs(33, 517, device)
    b = [buffers(33, 517, device) for _ in range(3)]
    lists = [
        [getattr(x, name) for x in b]
        for name in (
            "cache_seqlens",
            "cu_seqlens_k",
            "page_indices",
            "nsa_cache_seqlens",
            "nsa_cu_seqlens_k",
            "real_page_table",
        )
    ]
    return lambda: onelaunch.fused_metadata_precompute_and_broadcast_cuda(
        lengths, rows, pool, *lists, max_len=517, nsa_index_topk=2048, real_page_size=64
    )


def precompute(device: torch.device) -> Callable[[], object]:
    lengths, rows, pool = inputs(33, 517, device)
    return lambda: onelaunch.precompute_decode_metadata_cuda(
        lengths, rows, pool, max_len=517, nsa_index_topk=2048, real_page_size=64
    )


def copy(device: torch.device) -> Callable[[], object]:
    source = precompute(device)()
    assert isinstance(source, MetadataBuffers)
    targets = [buffers(33, 517, device) for _ in range(3)]
    return lambda: onelaunch.fused_metadata_copy_cuda(source, targets)


@pytest.mark.parametrize("make", [refresh_by_plan, refresh_by_lists, precompute, copy])
def test_a_call_is_one_kernel_and_nothing_else(make: Callable[[torch.device], Callable[[], object]]) -> None:
    call = make(torch.device("cuda", 0))
    keep = [call() for _ in range(3)]
    torch.cuda.synchronize()

    def recorded(times: int) -> tuple[list[str], Counter[str]]:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as made:
            keep.extend(call() for _ in range(times))
            torch.cuda.synchronize()
        events = list(made.events())
        on_device = [e.name for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
        runtime = Counter(e.name for e in events if e.name.startswith("cuda"))
        return on_device, runtime

    _, without = recorded(0)  # the synchronizations of the test and of the profiler itself
    on_device, runtime = recorded(4)
    assert len(on_device) == 4, on_device
    assert all("onelaunch_" in name for name in on_device), on_device
    runtime.subtract(without)
    forbidden = ("Synchronize", "Memcpy", "Memset", "Malloc", "Free", "Event")
    extra = {name: n for name, n in runtime.items() if n > 0 and any(word in name for word in forbidden)}
    assert not extra, extra


@pytest.mark.parametrize("make", [refresh_by_plan, refresh_by_lists, copy])
def test_a_call_allocates_nothing(make: Callable[[torch.device], Callable[[], object]]) -> None:
    call = make(torch.device("cuda", 0))
    call()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        call()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_the_launch_is_on_the_current_stream() -> None:
    device = torch.device("cuda", 0)
    lengths, rows, pool = inputs(8, 300, device)
    target = [buffers(8, 300, device)]
    plan = onelaunch.bind(target, req_to_token=pool)
    late = torch.zeros_like(lengths)
    plan.run(late, rows)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        late.copy_(lengths)
        plan.run(late, rows)
    # Nothing has happened yet on the stream, so a launch on another one would already have written zeros.
    assert not stream.query()
    torch.cuda.synchronize()
    expected = [buffers(8, 300, device)]
    reference.refresh(expected, lengths, rows, pool, index_topk=2048, page_size=64, extent="live")
    assert_equal(target, expected)


def test_tensors_on_a_device_that_is_not_the_current_one() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    for current, used in ((0, 1), (1, 0)):
        device = torch.device("cuda", used)
        with torch.cuda.device(current):
            lengths, rows, pool = inputs(33, 517, device)
            target = [buffers(33, 517, device) for _ in range(3)]
            plan = onelaunch.bind(target, req_to_token=pool)
            plan.run(lengths, rows)
            with torch.cuda.stream(torch.cuda.Stream(device=device)):
                plan.run(lengths, rows)
            assert torch.cuda.current_device() == current
            torch.cuda.synchronize(device)
            expected = [buffers(33, 517, device) for _ in range(3)]
            reference.refresh(expected, lengths, rows, pool, index_topk=2048, page_size=64, extent="live")
            assert_equal(target, expected)
            with pytest.raises(onelaunch.ArgumentError, match="req_to_token is on cuda"):
                onelaunch.bind(target, req_to_token=pool.to(f"cuda:{current}"))


def test_plans_on_two_devices_side_by_side() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    made = []
    for index in (0, 1):
        device = torch.device("cuda", index)
        lengths, rows, pool = inputs(20, 400, device, seed=index)
        target = [buffers(20, 400, device)]
        made.append((onelaunch.bind(target, req_to_token=pool), lengths, rows, pool, target))
    for _ in range(5):
        for plan, lengths, rows, _, _ in made:
            plan.run(lengths, rows)
    for index, (_, lengths, rows, pool, target) in enumerate(made):
        torch.cuda.synchronize(index)
        expected = [buffers(20, 400, pool.device)]
        reference.refresh(expected, lengths, rows, pool, index_topk=2048, page_size=64, extent="live")
        assert_equal(target, expected)


ROW_MODES: dict[str, dict[str, Any]] = {
    "verify": {"mode": "target_verify", "next_n": 4},
    "extend": {"mode": "draft_extend", "next_n": 3},
    "variable": {"mode": "draft_extend", "extend": "variable"},
    "offsets": {"seqlen_offsets": (1, 2, 3)},
}


def row_buffers(bs: int, rows: int, width: int, device: torch.device) -> MetadataBuffers:
    """Buffers of requests and rows; table rows are whole 16-byte words apart."""
    whole = buffers(rows, width, device)
    stride = -(-width // 4) * 4
    whole.page_indices = torch.full((rows, stride), POISON, dtype=torch.int32, device=device)[:, :width]
    whole.seqlens_expanded = torch.full((rows,), POISON, dtype=torch.int32, device=device)
    whole.cache_seqlens = torch.full((bs,), POISON, dtype=torch.int32, device=device)
    whole.cu_seqlens_k = torch.full((bs + 1,), POISON, dtype=torch.int32, device=device)
    return whole


@pytest.mark.parametrize("mode", ROW_MODES.values(), ids=ROW_MODES)
def test_graph_replays_of_every_mode_follow_the_inputs(mode: dict[str, Any]) -> None:
    device = torch.device("cuda", 0)
    bs, width = 40, 1031
    lengths, rows, pool = inputs(bs, width, device)
    extends = torch.zeros(bs, dtype=torch.int64, device=device) if "extend" in mode else None
    backends = [row_buffers(bs, 4 * bs if "mode" in mode else bs, width, device) for _ in range(3)]
    plan = onelaunch.bind(backends, req_to_token=pool, **mode)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(lengths, rows, extends)
    facts: dict[str, Any] = {k: v for k, v in mode.items() if k != "extend"}
    facts |= {"index_topk": 2048, "page_size": 64, "extent": "live"}
    for seed in range(1, 6):
        new_lengths, new_rows, new_pool = inputs(bs, width, device, seed)
        lengths.copy_(new_lengths)
        rows.copy_(new_rows)
        pool.copy_(new_pool)
        if extends is not None:
            extends.copy_(torch.randint(0, 5, (bs,), generator=torch.Generator().manual_seed(seed)))
        for backend in backends:
            for _, tensor in backend.items():
                tensor.fill_(POISON)
        graph.replay()
        expected = [row_buffers(bs, 4 * bs if "mode" in mode else bs, width, device) for _ in range(3)]
        reference.refresh(expected, lengths, rows, pool, extend_seq_lens=extends, **facts)
        assert_equal(backends, expected)


def test_a_checked_plan_is_captured_and_tells_after_the_replay() -> None:
    device = torch.device("cuda", 0)
    lengths, rows, pool = inputs(300, 517, device)
    lengths.clamp_(max=517)
    plan = onelaunch.bind([buffers(300, 517, device)], req_to_token=pool, checked=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run(lengths, rows)
    graph.replay()
    plan.check()
    rows[217] = 301
    graph.replay()
    with pytest.raises(onelaunch.ArgumentError, match=r"req_pool_indices\[217\] is 301"):
        plan.check()
    rows[217] = 1
    graph.replay()
    plan.check()


@pytest.mark.parametrize("mode", [{}, ROW_MODES["verify"], ROW_MODES["variable"]], ids=str)
def test_64_backends_of_65536_requests(mode: dict[str, Any]) -> None:
    """No cap on either: the running sums carry over 256 chunks, and 64 backends' addresses travel by value."""
    device = torch.device("cuda", 0)
    bs, width, n = 65_536, 12, 64
    per_request = mode.get("next_n", 1)
    lengths, rows, pool = inputs(bs, width, device)
    extends = torch.arange(bs, device=device) % 3 if "extend" in mode else None
    count = bs * per_request if extends is None else int(extends.sum())
    fields = {"cu_seqlens_k": "bs", "nsa_cu_seqlens_k": "rows", "page_indices": "table"}

    def new() -> MetadataBuffers:
        shapes = {"bs": (bs + 1,), "rows": (count + 1,), "table": (count, width)}
        return MetadataBuffers(
            **{name: torch.full(shapes[of], POISON, dtype=torch.int32, device=device) for name, of in fields.items()}
        )

    target = [new() for _ in range(n)]
    plan = onelaunch.bind(target, req_to_token=pool, **mode)
    plan.run(lengths, rows, extends)
    expected = new()
    facts: dict[str, Any] = {k: v for k, v in mode.items() if k != "extend"}
    facts |= {"index_topk": 2048, "page_size": 64, "extent": "live"}
    reference.refresh([expected], lengths, rows, pool, extend_seq_lens=extends, **facts)
    for backend in target:
        assert_equal([backend], [expected])


@pytest.mark.parametrize("mode", [{}, ROW_MODES["verify"], ROW_MODES["offsets"]], ids=str)
def test_a_context_of_a_million_tokens(mode: dict[str, Any]) -> None:
    device = torch.device("cuda", 0)
    width, bs = 2**20 + 3, 5
    lengths, rows, pool = inputs(bs, width, device)
    lengths.copy_(torch.tensor([width, width - 1, 1, 0, 777_777]))
    count = bs * mode.get("next_n", 1)
    target = [row_buffers(bs, count, width, device) for _ in range(3)]
    onelaunch.bind(target, req_to_token=pool, **mode).run(lengths, rows)
    expected = [row_buffers(bs, count, width, device) for _ in range(3)]
    facts: dict[str, Any] = {"index_topk": 2048, "page_size": 64, "extent": "live", **mode}
    reference.refresh(expected, lengths, rows, pool, **facts)
    assert_equal(target, expected)


@pytest.mark.parametrize("mode", [{}, *ROW_MODES.values()], ids=["decode", *ROW_MODES])
def test_pool_rows_beyond_two_to_the_31_elements(mode: dict[str, Any]) -> None:
    device = torch.device("cuda", 0)
    width = 163_911
    rows_needed = 2**31 // width + 3
    free, _ = torch.cuda.mem_get_info()
    if free < (rows_needed + 100) * width * 4:
        pytest.skip("needs 9 GB of free device memory")
    pool = torch.empty((rows_needed, width), dtype=torch.int32, device=device)
    chosen = torch.tensor([rows_needed - 1, 2**31 // width + 1, 5], device=device)
    pool[chosen] = torch.randint(0, 2**30, (3, width), dtype=torch.int32, device=device)
    lengths = torch.tensor([width, 100_000, 7], device=device)
    extends = torch.tensor([2, 0, 3], device=device) if "extend" in mode else None
    count = 5 if extends is not None else 3 * mode.get("next_n", 1)
    target = [row_buffers(3, count, width, device) for _ in range(3)]
    onelaunch.bind(target, req_to_token=pool, **mode).run(lengths, chosen, extends)
    expected = [row_buffers(3, count, width, device) for _ in range(3)]
    facts: dict[str, Any] = {k: v for k, v in mode.items() if k != "extend"}
    facts |= {"index_topk": 2048, "page_size": 64, "extent": "live"}
    reference.refresh(expected, lengths, chosen, pool, extend_seq_lens=extends, **facts)
    assert_equal(target, expected)


def test_destinations_beyond_two_to_the_31_elements() -> None:
    device = torch.device("cuda", 0)
    width, bs = 163_911, 2**31 // 163_911 + 2
    free, _ = torch.cuda.mem_get_info()
    if free < 2 * bs * width * 4:
        pytest.skip("needs 18 GB of free device memory")
    pool = torch.randint(0, 2**30, (4, width), dtype=torch.int32, device=device)
    table = torch.full((bs, width), POISON, dtype=torch.int32, device=device)
    lengths = torch.full((bs,), 5, device=device)
    lengths[-1] = width
    rows = torch.arange(bs, device=device) % 4
    onelaunch.bind([MetadataBuffers(page_indices=table)], req_to_token=pool).run(lengths, rows)
    assert torch.equal(table[-1], pool[rows[-1]])
    assert torch.equal(table[:-1, :5], pool[rows[:-1], :5])
    assert bool((table[:-1, 5:] == POISON).all())


def test_a_million_columns_of_64_backends() -> None:
    """A pool of a million-token context, read beyond 2^31 elements, to 64 backends."""
    device = torch.device("cuda", 0)
    width, n = 2**20 + 1, 64
    rows_needed = 2**31 // width + 3
    free, _ = torch.cuda.mem_get_info()
    if free < 4 * width * (rows_needed + 2 * 3 * n + 8):
        pytest.skip("needs 11 GB of free device memory")
    pool = torch.empty((rows_needed, width), dtype=torch.int32, device=device)
    chosen = torch.tensor([rows_needed - 1, 0, 2**31 // width + 1], device=device)
    pool[chosen] = torch.randint(0, 2**30, (3, width), dtype=torch.int32, device=device)
    lengths = torch.tensor([width, 65, width - 3], device=device)
    target = [buffers(3, width, device) for _ in range(n)]
    plan = onelaunch.bind(target, req_to_token=pool)
    plan.run(lengths, chosen)
    assert plan.launches == 1
    expected = [buffers(3, width, device)]
    reference.refresh(expected, lengths, chosen, pool, index_topk=2048, page_size=64, extent="live")
    assert_equal(target, expected * n)
