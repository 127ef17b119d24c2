"""Times a call that launches kernels and copies: on the device and on the host, eagerly and in a CUDA graph."""

from __future__ import annotations

import collections
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Counts(NamedTuple):
    """Repetitions: calls that are timed, calls that are profiled, calls captured in a graph, and graph replays."""

    calls: int = 300
    profiled: int = 20
    in_a_graph: int = 20
    replays: int = 100


ONCE = Counts(1, 1, 1, 1)
# The script that measures sets these.
counts = ONCE
DRY = False  # True without a GPU


def measured(call: Callable[[Any], Any], batch: Any, *, graph: bool = True) -> dict[str, Any]:
    """A call's times, also in a graph if requested. Each call gets its own copy of the batch, because it changes it."""
    for _ in range(3):
        call(copy.copy(batch))
    synchronize()
    batches = [copy.copy(batch) for _ in range(counts.calls)]
    host = []
    for each in batches:
        synchronize()
        start = time.perf_counter()
        call(each)
        host.append(time.perf_counter() - start)
    found: dict[str, Any] = {"eager_host_us": spread(host)}
    if not DRY:
        found |= profiled(call, batch)
    if graph and not DRY:
        found |= in_a_graph(call, batch)
    return found


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def profiled(call: Callable[[Any], Any], batch: Any) -> dict[str, Any]:
    """The kernels and copies of one call, by name, and their time on the device.

    The time is the median of the calls, because a copy from the host now and then takes much longer.
    """
    kinds = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA]) as profile:
        for _ in range(counts.profiled):
            call(copy.copy(batch))
        synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    device.sort(key=lambda event: event["ts"])
    names = collections.Counter(short(e["name"]) for e in device)
    each = len(device) // counts.profiled
    calls = [device[i * each : (i + 1) * each] for i in range(counts.profiled)]
    return {
        "launches": len(device) / counts.profiled,
        "names": {name: count / counts.profiled for name, count in sorted(names.items())},
        "eager_device_us": round(statistics.median(sum(e["dur"] for e in call) for call in calls), 2),
    }


def short(kernel: str) -> str:
    return kernel.replace("(anonymous namespace)::", "").removeprefix("void ").partition("(")[0][:90]


def in_a_graph(call: Callable[[Any], Any], batch: Any) -> dict[str, Any]:
    """Device time of a call, from a graph with many calls; host time of a replay, from a graph with one call."""
    try:
        many, one = captured(call, batch, counts.in_a_graph), captured(call, batch, 1)
    except RuntimeError as error:
        return {"graph_error": str(error).splitlines()[0]}
    device, host = [], []
    for _ in range(counts.replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        many.replay()
        end.record()
        end.synchronize()
        device.append(begin.elapsed_time(end) / 1e3 / counts.in_a_graph)
        start = time.perf_counter()
        one.replay()
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
    return {"graph_device_us": spread(device), "graph_host_us": spread(host)}


def captured(call: Callable[[Any], Any], batch: Any, times: int) -> Any:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    batches = [copy.copy(batch) for _ in range(times)]
    with torch.cuda.graph(graph):
        for each in batches:
            call(each)
    graph.replay()
    torch.cuda.synchronize()
    return graph


def spread(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        name: round(ordered[int(part * (len(ordered) - 1))] * 1e6, 2)
        for name, part in (("min", 0.0), ("median", 0.5), ("p90", 0.9))
    }


def guide_rows(seams: dict[str, Any]) -> str:
    """GUIDE.md's rows for the results of seams.py or vllm_seam.py: the engine's own sequence → ours; medians in µs."""
    return "\n".join(f"| {name} | {' | '.join(_cells(sides))} |" for name, sides in seams.items())


def _cells(sides: dict[str, Any]) -> Iterator[str]:
    places = {"launches": 0, "eager_host_us": 0, "eager_device_us": 1, "graph_device_us": 1, "graph_host_us": 0}
    for key, digits in places.items():
        found = [sides[side].get(key) for side in ("engine", "onelaunch")]
        if None in found:
            yield "not capturable"
            continue
        yield " → ".join(f"{each['median'] if isinstance(each, dict) else each:.{digits}f}" for each in found)
