"""A plugin of SGLang that watches how an engine refreshes attention metadata; generate.py's engine loads it.

It times the methods that refresh metadata before a replay, and the copies into a graph's buffers before them, alike
with and without onelaunch, counts what they and the steps around them launch in three profiled steps, and spoils the
draft's table on request. Its variables:

PROBE_RESULT: where it writes what it saw, as JSON.
PROBE_PHASE: a file that names the current phase: "timed" or "profiled", followed by a state: "off" where onelaunch is
    detached, "backends" where it is attached to the attention backends alone, and "on", the default, where it is
    attached to the graph runners and the draft worker too. All states are compared in one process, because the speed
    of identical processes differs by up to 1.7 times. Read before each prefill.
PROBE_SPOIL: 1 zeroes the draft's table after each refresh.
"""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import engine_trace

BATCH = 16  # the batch size whose steps are timed and profiled
PROFILED_STEPS = range(4, 7)
_EAGLE = "sglang.srt.speculative.eagle_worker_v2.EAGLEWorkerV2"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
_METADATA = ("init_forward_metadata_out_graph", "init_forward_metadata")
_STATES = ("off", "backends", "on")
# These copy a batch into a graph's buffers: a function of the runner's module, or a method of its registry.
_COPIES, _FILL = "_grouped_foreach_copy_", "fill_from"
_EXTENSION = "_draft_extend_for_decode"  # the worker's draft extension, its preparation included


class Probe:
    """The hooks and the results in one scheduler process."""

    def __init__(self) -> None:
        self.phase, self.step = "", 0
        self.decoding = self.inside = self.full = False
        self.times: dict[str, dict[str, list[float]]] = {state: collections.defaultdict(list) for state in _STATES}
        self.started: float | None = None  # when the last decode step began
        self.addresses: list[tuple[int, int]] = []  # of seq_lens and req_pool_indices in draft refreshes
        self.lines: list[str] = []  # onelaunch's log lines
        self.after_capture: int | None = None  # number of log lines when the capture ended
        self.watched_lines: int | None = None  # number of log lines when onelaunch was first detached
        self.attachments: list[Any] = []  # to backends
        self.runners: dict[str, Any] = {}
        self.worker: Any = None  # the draft worker
        self.others: list[Any] = []  # what attach() returned for the runners and the worker
        self.roles: list[tuple[str, Any]] = []
        self.unwatched: list[tuple[Any, str, Any]] = []  # (object, attribute name, the object's own value)
        self.profiler: Any = None
        self.profile: dict[str, Any] = {}
        self.seams: dict[str, Any] = {}
        self.spoiled = 0

    # ------------------------------------------------------------------------------------------ what SGLang calls

    def made(self, result: Any, scheduler: Any) -> None:
        """Hook: runs after SGLang made its backends and onelaunch attached to them."""
        draft = scheduler.draft_worker.draft_worker
        self.roles = [
            ("draft", draft.draft_attn_backend),
            ("verify", scheduler.tp_worker.model_runner.attn_backend),
            ("draft-extend", draft.draft_extend_attn_backend),
        ]

    def captured(self, result: Any, scheduler: Any) -> None:
        """Hook: runs after SGLang captured its graphs."""
        draft = scheduler.draft_worker.draft_worker
        self.runners = {
            "draft": draft.cuda_graph_runner,
            "verify": scheduler.tp_worker.model_runner.decode_cuda_graph_runner,
            "draft-extend": draft.cuda_graph_runner_for_draft_extend,
        }
        self.worker = draft
        self.after_capture = len(self.lines)
        self._watch()

    def generation(self, original: Any, worker: Any, batch: Any, *arguments: Any, **keywords: Any) -> Any:
        """Hook: runs around each scheduler step, which is a prefill, or draft, verification and draft extension."""
        if not batch.forward_mode.is_decode():
            self.phase, self.step, self.started = Path(os.environ["PROBE_PHASE"]).read_text(), 0, None
            self._attach()
            self.write()
            return original(worker, batch, *arguments, **keywords)
        now = time.perf_counter()
        self.full = batch.batch_size() == BATCH
        if self.phase.startswith("timed") and self.full and self.started is not None:
            self.times[self.state]["step"].append(now - self.started)
        self.started = now if self.full else None
        self.step += 1
        if self.phase.startswith("profiled") and self.step == PROFILED_STEPS.start:
            self._begin_profile()
        self.decoding = True
        try:
            with self._span("step"):
                return original(worker, batch, *arguments, **keywords)
        finally:
            self.decoding = False
            if self.profiler is not None and self.step == PROFILED_STEPS.stop - 1:
                self._end_profile()

    # ------------------------------------------------------------------------------------------ watching

    @property
    def state(self) -> str:
        if self.others:
            return "on"
        return "backends" if any(attachment.attached for attachment in self.attachments) else "off"

    def _watch(self) -> None:
        for role, backend in self.roles:
            for name in _METADATA:
                self._replace(backend, name, self._metadata(role, backend, getattr(backend, name)))
        for role, runner in self.runners.items():
            if runner is not None:
                registry = getattr(runner, "buffer_registry", None)
                module = sys.modules[type(runner).__module__]
                owner, name = (module, _COPIES) if registry is None else (registry, _FILL)
                self._replace(owner, name, self._timed(f"{role} copies", getattr(owner, name)))
        extend = getattr(self.worker, _EXTENSION)

        def extension(*arguments: Any, **keywords: Any) -> Any:
            with self._span("extend"):
                return extend(*arguments, **keywords)

        self._replace(self.worker, _EXTENSION, extension)

    def _replace(self, owner: Any, name: str, mine: Any) -> None:
        self.unwatched.append((owner, name, vars(owner).get(name)))
        setattr(owner, name, mine)

    def _unwatch(self) -> None:
        for owner, name, own in reversed(self.unwatched):
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)
        self.unwatched = []

    def _attach(self) -> None:
        """Detaches or attaches onelaunch, as the state in the phase requires."""
        named = self.phase.rpartition(" ")[2]
        wanted = named if named in _STATES else "on"
        if not self.attachments or wanted == self.state:
            return
        if self.watched_lines is None:
            self.watched_lines = len(self.lines)
        self._unwatch()
        for attachment in reversed(self.others):
            attachment.detach()
        self.others = []
        if wanted == "off":
            for attachment in reversed(self.attachments):
                attachment.detach()
        elif self.state == "off":
            from onelaunch.integrations import sglang

            before, self.attachments[:] = list(self.attachments), []
            for attachment in before:
                sglang.attach(attachment.backend)  # install()'s hook records the attachment
        if wanted == "on":
            self._attach_others()
        self._watch()

    def _attach_others(self) -> None:
        from onelaunch.integrations import sglang

        for target in (*self.runners.values(), self.worker):
            if target is not None:
                with contextlib.suppress(Exception):  # a target that onelaunch doesn't serve
                    sglang.attach(target)

    def _timed(self, role: str, function: Any) -> Any:
        """The function, timed in decode steps unless another timed function calls it."""

        def timed(*arguments: Any, **keywords: Any) -> Any:
            if not self.decoding or self.inside:
                return function(*arguments, **keywords)
            self.inside = True
            try:
                with self._span(role):
                    start = time.perf_counter()
                    result = function(*arguments, **keywords)
                    taken = time.perf_counter() - start
            finally:
                self.inside = False
            if self.phase.startswith("timed") and self.full:
                self.times[self.state][role].append(taken)
            return result

        return timed

    def _metadata(self, role: str, backend: Any, method: Any) -> Any:
        timed = self._timed(role, method)

        def refresh(forward_batch: Any, *arguments: Any, **keywords: Any) -> Any:
            outermost = self.decoding and not self.inside
            result = timed(forward_batch, *arguments, **keywords)
            if role == "draft" and outermost:
                if self.phase.startswith("timed") and self.full:
                    inputs = forward_batch.seq_lens, forward_batch.req_pool_indices
                    self.addresses.append((inputs[0].data_ptr(), inputs[1].data_ptr()))
                if os.environ.get("PROBE_SPOIL") == "1":
                    self._spoil(backend, forward_batch.batch_size)
            return result

        return refresh

    def _spoil(self, backend: Any, batch_size: int) -> None:
        indices = getattr(backend, "cuda_graph_kv_indices", None)
        children = backend.attn_backends
        tables = (
            [child.decode_cuda_graph_metadata[batch_size].page_table for child in children]
            if indices is None
            else [indices]
        )
        for table in tables:
            table.zero_()
        self.spoiled += 1

    def _span(self, name: str) -> Any:
        if self.profiler is None:
            return contextlib.nullcontext()
        import torch

        return torch.profiler.record_function(f"probe {name}")

    def _begin_profile(self) -> None:
        import torch

        torch.cuda.synchronize()
        kinds = torch.profiler.ProfilerActivity
        self.profiler = torch.profiler.profile(activities=[kinds.CPU, kinds.CUDA])
        self.profiler.start()

    def _end_profile(self) -> None:
        import torch

        torch.cuda.synchronize()
        self.profiler.stop()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            self.profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        self.profile[self.state] = engine_trace.launches(events)
        self.seams[self.state] = engine_trace.seams(events)
        self.profiler = None
        self.write()

    def write(self) -> None:
        microseconds = {
            state: {
                role: {"calls": len(seconds)}
                | {name: round(_at(seconds, part) * 1e6, 1) for name, part in _PARTS.items()}
                for role, seconds in times.items()
            }
            for state, times in self.times.items()
            if times
        }
        found = {
            "host_us": microseconds,
            "launches": self.profile,
            "seams": self.seams,
            "addresses": recency(self.addresses),
            "onelaunch": self.lines[: self.after_capture],
            "built_or_bound_after_capture": []
            if self.after_capture is None
            else self.lines[self.after_capture : self.watched_lines],
            "attachments": [
                {"backend": type(a.backend).__name__, "launches": a.launches, "failed": a.failed}
                for a in (*self.attachments, *self.others)
            ],
            "spoiled": self.spoiled,
        }
        Path(os.environ["PROBE_RESULT"]).write_text(json.dumps(found, indent=1))


_PARTS = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9}


def _at(values: list[float], part: float) -> float:
    return sorted(values)[int(part * (len(values) - 1))]


def recency(addresses: list[tuple[int, int]]) -> dict[str, int]:
    """How many calls had the same addresses as one of the last 1, 4, 8 or 16 distinct address pairs."""
    seen: list[tuple[int, int]] = []
    hits = {"calls": len(addresses), "different": len(set(addresses)), "1": 0, "4": 0, "8": 0, "16": 0}
    for pair in addresses:
        for depth in (1, 4, 8, 16):
            hits[str(depth)] += pair in seen[-depth:]
        seen = [*(other for other in seen if other != pair), pair]
    return hits


class _Lines(logging.Handler):
    """Collects onelaunch's log lines."""

    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.INFO)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())


def install() -> None:
    """The plugin's entry point. It does nothing outside scheduler processes, because only these have backends."""
    if multiprocessing.current_process().name == "MainProcess" or "PROBE_RESULT" not in os.environ:
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    probe = Probe()
    HookRegistry.register(f"{_SCHEDULER}.init_all_attention_backends", probe.made, HookType.AFTER)
    HookRegistry.register(f"{_SCHEDULER}.init_all_cuda_graphs", probe.captured, HookType.AFTER)
    HookRegistry.register(f"{_EAGLE}.forward_batch_generation", probe.generation, HookType.AROUND)
    if os.environ.get("ONELAUNCH_SGLANG") == "1":
        from onelaunch.integrations import sglang

        attach = sglang.attach

        def recorded(*arguments: Any, **keywords: Any) -> Any:
            attachment = attach(*arguments, **keywords)
            kind = probe.attachments if hasattr(attachment.backend, _METADATA[0]) else probe.others
            kind.append(attachment)
            return attachment

        sglang.attach = recorded
        logger = logging.getLogger("onelaunch")
        logger.setLevel(logging.INFO)
        logger.addHandler(_Lines(probe.lines))
    if os.environ.get("ENGINES_GPU_FLASHINFER") == "1":
        # FlashInfer would choose FA3 for prefills on Hopper, but the bundle has FA2's modules.
        import flashinfer.prefill

        flashinfer.prefill.determine_attention_backend = lambda *arguments, **keywords: "fa2"
