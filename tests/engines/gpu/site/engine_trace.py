"""Reads launches and copies of one engine step, by span and by name, from a trace of torch's profiler."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator
from typing import Any

_KINDS = (
    ("graphs", "graphlaunch"),
    ("kernels", "launchkernel"),
    ("copies", "memcpy"),
    ("copies", "memset"),
    ("waits", "synchronize"),
)
# A generic torch kernel names its operation in its template arguments.
_FUNCTOR = re.compile(r"(\w*(?:Functor|_kernel_impl|_kernel_cuda|launch_clamp_scalar|CopyFunctor)\w*)")


def launches(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts kernel launches and copies through CUDA's API in each of the probe's spans, for the middle profiled step.

    A graph's launch counts as one, under "graphs".
    """
    step = _middle_step(events)
    found: dict[str, Any] = {}
    for span in _spans(events) if step else ():
        if not _within(span, step):
            continue
        count: collections.Counter[str] = collections.Counter()
        for call in _calls(events, span["tid"]):
            if _within(call, span) and (kind := _kind(call)):
                count[kind] += 1
        found[_name(span)] = dict(count)
    return found


def seams(events: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Counts what is launched before each of a step's graphs, by name: the engine's preparation and the metadata.

    "draft" begins with the step, "verify" after the draft's graph, "draft-extend" with the span "extend". Each ends
    at a graph's launch or, without a graph, after its metadata. Values are numbers of launches and copies.
    """
    step = _middle_step(events)
    if not step:
        return {}
    names = {
        e["args"]["correlation"]: e["name"] for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    }
    operators = [e for e in events if e.get("cat") == "cpu_op" and e["tid"] == step["tid"] and _within(e, step)]
    calls = sorted((c for c in _calls(events, step["tid"]) if _within(c, step)), key=lambda c: c["ts"])
    graphs = [c["ts"] for c in calls if _kind(c) == "graphs"]
    spans = {_name(span): span for span in _spans(events) if _within(span, step)}
    windows = {"draft": (step["ts"], graphs[0]), "verify": (graphs[0], graphs[1])} if len(graphs) > 1 else {}
    if "extend" in spans:
        extend = spans["extend"]
        metadata = spans.get("draft-extend", extend)
        end = next((ts for ts in graphs if _holds(extend, ts)), metadata["ts"] + metadata["dur"])
        windows["draft-extend"] = (extend["ts"], end)
    found: dict[str, dict[str, int]] = {}
    for seam, (first, end) in windows.items():
        count: collections.Counter[str] = collections.Counter()
        for call in calls:
            if first <= call["ts"] < end and _kind(call) in ("kernels", "copies"):
                kernel = names.get(call.get("args", {}).get("correlation"), call["name"])
                count[_label(kernel, [o for o in operators if _holds(o, call["ts"])])] += 1
        found[seam] = dict(sorted(count.items()))
    return found


def _middle_step(events: list[dict[str, Any]]) -> dict[str, Any] | None:
    steps = sorted((span for span in _spans(events) if _name(span) == "step"), key=lambda span: span["ts"])
    return steps[len(steps) // 2] if steps else None


def _spans(events: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for event in events:
        if event.get("cat") == "user_annotation" and str(event.get("name", "")).startswith("probe "):
            yield event


def _name(span: dict[str, Any]) -> str:
    return str(span["name"]).removeprefix("probe ")


def _calls(events: list[dict[str, Any]], thread: Any) -> Iterator[dict[str, Any]]:
    return (e for e in events if e.get("cat") in ("cuda_runtime", "cuda_driver") and e["tid"] == thread)


def _kind(call: dict[str, Any]) -> str:
    name = call["name"].lower()
    return next((kind for kind, part in _KINDS if part in name), "")


def _holds(span: dict[str, Any], time: float) -> bool:
    return bool(span["ts"] <= time < span["ts"] + span["dur"])


def _within(event: dict[str, Any], span: dict[str, Any]) -> bool:
    return _holds(span, event["ts"])


def _label(kernel: str, operators: list[dict[str, Any]]) -> str:
    """The operator that launched a kernel or copy, followed by its name without arguments."""
    kernel = kernel.replace("(anonymous namespace)::", "")
    functor = _FUNCTOR.findall(kernel) if kernel.startswith("void at::native") else []
    short = functor[-1] if functor else re.split(r"[<(]", kernel.removeprefix("void "))[0].strip()
    outermost = min(operators, key=lambda operator: operator["ts"], default=None)
    return f"{outermost['name']}: {short}" if outermost else short
