"""Timing on a GPU: calls captured in a CUDA graph over rotating buffer sets, medians of many replays."""

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

# Calls in a graph: enough that the cost of a replay, about 3 us, adds little to each. (With 24 calls, each took 0.13 us
# longer than with 384.)
_GRAPH_CALLS = 128
# Fewer calls if they would take longer than this.
_GRAPH_US = 30_000.0
# Eager calls between two synchronizations: their launches must fit the queue, or the host waits for the GPU.
_EAGER_CALLS = 16
# Bytes that other sets read and write before a set is used again: more than the 50 MB of an H200's L2 cache.
_ROTATED_BYTES = 160e6
_MAX_SETS = 24
_MAX_BYTES = 24e9


class CudaMeter:
    """The current CUDA device.

    Args:
        seconds: how long the replays of one graph are timed.
    """

    def __init__(self, seconds: float = 0.15) -> None:
        self.seconds = seconds
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._cuda: Any = torch.cuda  # its classes have no annotations
        self._stream = self._cuda.Stream()

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
        """Buffers for a case: enough sets that none is still in a cache when it is used again, if memory allows."""
        gc.collect()
        torch.cuda.empty_cache()
        live = sum(lengths) if case.extent == "live" else case.batch * case.width
        rotated = int(_ROTATED_BYTES // (4 * live * (1 + case.backends))) + 1
        held = 4 * (case.batch + 1) * case.width * (1 + case.backends) * 1.1
        free = torch.cuda.mem_get_info(self.device)[0]
        fit = int(min(_MAX_BYTES, free / 3) // held)
        sets = max(2, min(max(6, rotated), _MAX_SETS, fit))
        return Scene(lengths, case.backends, case.width, case.page_size, sets, self.device)

    def synchronize(self) -> None:
        """Waits for the device; an error of an earlier launch is raised here."""
        torch.cuda.synchronize(self.device)

    def estimate_us(self, calls: Sequence[Call]) -> float:
        """Roughly how long one call takes, after it has run before."""
        return min(self._eager(calls[:1])[1] for _ in range(2))

    def capture(self, calls: Sequence[Call], estimate_us: float) -> tuple[Callable[[], None], int]:
        """A CUDA graph of the calls in turn: the function that replays it, and how many calls it holds."""
        count = max(1, min(_GRAPH_CALLS, int(_GRAPH_US / estimate_us)))
        self._stream.wait_stream(self._cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for call in calls[:count]:
                call()
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            for number in range(count):
                calls[number % len(calls)]()
        return graph.replay, count

    def graph_us(self, replay: Callable[[], None], count: int) -> float:
        """Microseconds of GPU time per call: the median over replays, after a few that aren't timed."""
        start, end = (self._cuda.Event(enable_timing=True) for _ in range(2))
        times: list[float] = []
        warm = 3
        began = time.perf_counter()
        while len(times) < warm + 5 or (time.perf_counter() - began < self.seconds and len(times) < 300):
            start.record()
            replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
            if len(times) >= warm + 2 and time.perf_counter() - began > 5 * self.seconds:
                break  # slow calls vary little: more replays would change nothing
        return statistics.median(times[warm:]) * 1000 / count

    def eager_us(self, calls: Sequence[Call], estimate_us: float) -> tuple[float, float]:
        """Microseconds per call without a graph: on the device from first to last, and on the host until it returns."""
        count = max(1, min(_EAGER_CALLS, int(_GRAPH_US / estimate_us)))
        turns = [calls[number % len(calls)] for number in range(count)]
        took: list[tuple[float, float]] = []
        began = time.perf_counter()
        while len(took) < 3 or (time.perf_counter() - began < self.seconds / 3 and len(took) < 60):
            took.append(self._eager(turns))
        host, device = zip(*took[1:], strict=True)
        return statistics.median(device), statistics.median(host)

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

    def copy_gbps(self) -> float:
        """Gigabytes per second that a large copy on the device reads and writes."""
        size = 2**29
        source = torch.randint(0, 2**30, (size // 4,), dtype=torch.int32, device=self.device)
        target = torch.empty_like(source)
        calls: list[Call] = [lambda: target.copy_(source)]
        calls[0]()
        replay, count = self.capture(calls, 250.0)
        return 2 * size / self.graph_us(replay, count) / 1e3

    def _eager(self, calls: Sequence[Call]) -> tuple[float, float]:
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
