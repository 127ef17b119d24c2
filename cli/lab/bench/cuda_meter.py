"""Timing on a GPU: in a CUDA graph with caches warm and cold, call by call, and on the host."""

from __future__ import annotations

import gc
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from .cases import Case
from .scene import Call, Scene

# Calls in a graph: enough that the cost of a replay, about 3 us, adds little to each. Even, for calls that take turns.
_WARM_CALLS, _COLD_CALLS = 128, 32
# Fewer calls if they would take longer than this.
_GRAPH_US = 30_000.0
# Eager calls between two synchronizations: their launches must fit the queue, or the host waits for the GPU.
_EAGER_CALLS = 16
# What is read and written between two calls with cold caches: more than an L2 cache holds (50 MB in an H100, 60 in an
# H200).
_FLUSHED_BYTES = 96 * 2**20


class CudaMeter:
    """The current CUDA device.

    Args:
        seconds: how long each kind of timing takes, about; with cold caches twice as long.
    """

    def __init__(self, seconds: float = 0.03) -> None:
        self.seconds = seconds
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._cuda: Any = torch.cuda  # its classes have no annotations
        self._stream = self._cuda.Stream()
        self._flushed = torch.zeros(_FLUSHED_BYTES // 4, dtype=torch.int32, device=self.device)
        self._flushes: dict[int, Callable[[], None]] = {}

    def machine(self) -> dict[str, Any]:
        """The device, and the versions of driver, torch, CUDA and Python."""
        properties = torch.cuda.get_device_properties(self.device)
        driver = ""
        if program := shutil.which("nvidia-smi"):
            query = [program, "--query-gpu=driver_version,clocks.sm,clocks.mem", "--format=csv,noheader"]
            driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
        return {
            "device": properties.name,
            "sm_count": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "driver_and_clocks": driver,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": sys.version.split()[0],
        }

    def scene(self, case: Case, lengths: Sequence[int]) -> Scene:
        """Buffers for a case."""
        gc.collect()
        torch.cuda.empty_cache()
        return Scene(lengths, case.backends, case.width, case.page_size, self.device)

    def synchronize(self) -> None:
        """Waits for the device; an error of an earlier launch is raised here."""
        torch.cuda.synchronize(self.device)

    def capture(self, calls: Sequence[Call]) -> Callable[[], None]:
        """A CUDA graph of calls that were made before: the function that replays it."""
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(self._cuda.current_stream())
        with torch.cuda.graph(graph, stream=self._stream):
            for call in calls:
                call()
        return graph.replay

    def warm_us(self, call: Call) -> list[float]:
        """A call in a graph of nothing but such calls: caches hold what the last one left."""
        count = self._count(call, _WARM_CALLS)
        replay = self.capture([call] * count)
        return [took / count for took in self._samples([replay], self.seconds)[0]]

    def cold_us(self, call: Call) -> list[float]:
        """A call in a graph that reads and writes 96 MiB before each, less the time of a graph that only does that."""
        count = self._count(call, _COLD_CALLS)
        if count not in self._flushes:
            self._flush()
            self._flushes[count] = self.capture([self._flush] * count)
        both = self.capture([self._flush, call] * count)
        with_call, without = self._samples([both, self._flushes[count]], 2 * self.seconds)
        return [(took - flush) / count for took, flush in zip(with_call, without, strict=True)]

    def eager_us(self, call: Call) -> tuple[list[float], list[float]]:
        """Calls one after the other on a stream, without a graph: time on the device, and on the host."""
        count = self._count(call, _EAGER_CALLS)
        device: list[float] = []
        host: list[float] = []
        began = time.perf_counter()
        while len(device) < 6 or (time.perf_counter() - began < self.seconds and len(device) < 200):
            on_host, on_device = self._eager([call] * count)
            device.append(on_device)
            host.append(on_host)
        return device[1:], host[1:]

    def host_us(self, pieces: dict[str, Call], rounds: int = 40, calls: int = 50) -> dict[str, float]:
        """Microseconds of host time per call of each: medians of batches, in turn so that all see the same load."""
        times: dict[str, list[float]] = {name: [] for name in pieces}
        gc.collect()
        gc.disable()
        try:
            for turn in range(rounds + 3):
                for name, call in pieces.items():
                    start = time.perf_counter()
                    for _ in range(calls):
                        call()
                    took = time.perf_counter() - start
                    self.synchronize()
                    if turn >= 3:
                        times[name].append(took / calls * 1e6)
        finally:
            gc.enable()
        return {name: statistics.median(took) for name, took in times.items()}

    def _flush(self) -> None:
        self._flushed.add_(1)

    def _count(self, call: Call, max_calls: int) -> int:
        """An even number of calls, as many as take up to _GRAPH_US."""
        took = min(self._eager([call] * 2)[1] for _ in range(2))
        return max(2, min(max_calls, int(_GRAPH_US / took)) // 2 * 2)

    def _samples(self, replays: Sequence[Callable[[], None]], seconds: float) -> list[list[float]]:
        """Microseconds of GPU time of the replays, in turn so that all see the same clocks: a list for each."""
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        times: list[list[float]] = [[] for _ in replays]
        warm = 3
        began = time.perf_counter()
        while len(times[0]) < warm + 7 or (time.perf_counter() - began < seconds and len(times[0]) < 300):
            for replay, took in zip(replays, times, strict=True):
                start.record()
                replay()
                end.record()
                end.synchronize()
                took.append(start.elapsed_time(end) * 1000)
        return [took[warm:] for took in times]

    def _eager(self, calls: Sequence[Call]) -> tuple[float, float]:
        """Microseconds a call, on the host and on the device."""
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        self.synchronize()
        start.record()
        began = time.perf_counter()
        for call in calls:
            call()
        host = time.perf_counter() - began
        end.record()
        end.synchronize()
        return host * 1e6 / len(calls), start.elapsed_time(end) * 1000 / len(calls)
