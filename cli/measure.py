"""Timing on a GPU: calls captured in a CUDA graph over rotating buffer sets, medians of many replays."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import onelaunch
import torch
from onelaunch import MetadataBuffers, loader, toolchain
from onelaunch import compile as compiler
from onelaunch.render import render_baseline
from torch import Tensor


def graph_microseconds(calls: Sequence[Callable[[], object]], *, replays: int = 60, rounds: int = 1) -> float:
    """Microseconds of GPU time a call: a graph of all calls in turn, the median over replays.

    Args:
        calls: one call a buffer set; a dozen or more spread the cost of a replay.
        replays: timed replays, after a few that aren't.
        rounds: how often the graph holds the whole sequence.
    """
    cuda: Any = torch.cuda  # its classes have no annotations
    stream = cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(rounds):
            for call in calls:
                call()
    for _ in range(3):
        graph.replay()
    times: list[float] = []
    for _ in range(replays):
        start, end = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times) * 1000 / (len(calls) * rounds)


def host_microseconds(call: Callable[[], object], *, batches: int = 30, calls: int = 50) -> float:
    """Microseconds of host time a call, without waiting for the GPU: the median over batches of calls."""
    for _ in range(20):
        call()
    torch.cuda.synchronize()
    times = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls)
        torch.cuda.synchronize()
    return statistics.median(times) * 1e6


@cache
def baseline(name: str, call_words: tuple[str, ...] = (), words: int = 0, **facts: Any) -> ModuleType:
    """A kernel to compare with, built as onelaunch's own kernels are: same recipe, same binding, same store."""
    digest = hashlib.sha256(repr((name, sorted(facts.items()))).encode()).hexdigest()[:8]
    symbol = f"onelaunch_baseline_{name}_{digest}"
    source, binding = render_baseline(name, symbol, call_words, words, **facts)
    archs = toolchain.architectures(torch.cuda.current_device())
    tools = compiler.find_tools("cuda")
    material = (source, binding, compiler.flags("cuda", archs), tools.versions())
    key = hashlib.sha256(repr(material).encode()).hexdigest()
    store = loader.default_store()
    entry = store.find(key)
    if entry is not None:
        return loader.import_module(entry)
    entry, _, module = loader.obtain(loader.Recipe(key, symbol, source, binding, archs, {}), tools, store)
    return module or loader.import_module(entry)


class Scene:
    """Buffers and inputs of one shape, in several sets, so that a repeated call doesn't find its data in L2.

    Args:
        lengths: tokens of each request.
        backends: N.
        width: table width; the row stride of req_to_token and of every page_indices.
        page_size: P.
        sets: how many.
    """

    def __init__(self, lengths: Sequence[int], backends: int, width: int, page_size: int, sets: int) -> None:
        self.lengths, self.backends, self.width, self.page_size, self.sets = lengths, backends, width, page_size, sets
        bs = len(lengths)
        device = torch.device("cuda", torch.cuda.current_device())
        generator = torch.Generator(device=device).manual_seed(1)

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=device)

        self.inputs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.buffers: list[list[MetadataBuffers]] = []
        for _ in range(sets):
            pool = torch.randint(0, 2**30, (bs + 1, width), dtype=torch.int32, device=device, generator=generator)
            seq_lens = torch.tensor(lengths, dtype=torch.int64, device=device)
            rows = torch.randperm(bs, device=device, generator=generator) + 1
            self.inputs.append((seq_lens, rows, pool))
            self.buffers.append(
                [
                    MetadataBuffers(
                        cache_seqlens=new(bs),
                        cu_seqlens_k=new(bs + 1),
                        page_indices=new(bs, width),
                        nsa_cache_seqlens=new(bs),
                        nsa_cu_seqlens_k=new(bs + 1),
                        real_page_table=None if page_size == 1 else new(bs, -(-width // page_size)),
                    )
                    for _ in range(backends)
                ]
            )

    @property
    def live(self) -> int:
        """Live words of page_indices, one backend."""
        return sum(min(length, self.width) for length in self.lengths)

    def bytes(self, extent: str = "live") -> int:
        """Bytes that one refresh must move: the tables read once, everything written N times."""
        bs = len(self.lengths)
        columns = [min(length, self.width) if extent == "live" else self.width for length in self.lengths]
        pages = 0 if self.page_size == 1 else sum(-(-c // self.page_size) for c in columns)
        return 4 * (sum(columns) + self.backends * (sum(columns) + pages + 4 * bs + 2)) + 16 * bs

    def plans(self, extent: str = "live", **facts: Any) -> list[onelaunch.Plan]:
        """A plan a set."""
        from onelaunch import plan

        return [
            plan.make_plan(
                buffers,
                pool,
                mode="decode",
                index_topk=2048,
                page_size=self.page_size,
                extent=extent,
                max_len=None,
                seq_lens_dtype=torch.int64,
                req_pool_indices_dtype=torch.int64,
                launch_shape=facts,
            )
            for buffers, (_, _, pool) in zip(self.buffers, self.inputs, strict=True)
        ]

    def refresh_calls(self, extent: str = "live", **facts: Any) -> list[Callable[[], object]]:
        """A call a set, of onelaunch's plan."""
        calls: list[Callable[[], object]] = []
        for plan, (seq_lens, rows, _) in zip(self.plans(extent, **facts), self.inputs, strict=True):
            calls.append(lambda plan=plan, s=seq_lens, r=rows: plan.run(s, r))  # type: ignore[misc]
        return calls

    def ideal_calls(self, extent: str = "live", unroll: int = 4) -> list[Callable[[], object]]:
        """A call a set, of the ideal fan-out of as many words: contiguous, aligned, one read and N writes."""
        words = self.live if extent == "live" else self.width * len(self.lengths)
        module = baseline("ideal", ("vectors",), self.backends + 2, num_backends=self.backends, unroll=unroll)
        vectors = words // 4
        calls: list[Callable[[], object]] = []
        for buffers, (_, _, pool) in zip(self.buffers, self.inputs, strict=True):
            targets = [b.page_indices.data_ptr() for b in buffers if b.page_indices is not None]
            run = module.bind([pool.data_ptr(), *targets]).run
            calls.append(
                lambda run=run: run(vectors, torch._C._cuda_getCurrentRawStream(0))  # type: ignore[misc]
            )
        return calls
