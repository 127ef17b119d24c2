"""A run of `onelaunch bench`: every implementation checked, timed and recorded, case by case."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onelaunch.cache import files

from .baselines import IMPLEMENTATIONS, Implementation, Unsupported, warmed
from .cases import Case
from .host import host_rows
from .meter import Meter
from .scene import Call, Scene
from .selection import Selected
from .verdicts import verdicts


class Record:
    """What a run measured so far. It is written to a file after every case, so that an interrupted run loses little.

    Args:
        path: the JSON file; None keeps it in memory.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {**facts, "complete": False, "ceiling": {}, "rows": [], "host": [], "verdicts": []}

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        if self.path is not None:
            files.replace(self.path, json.dumps(self.data, indent=1) + "\n", 0o644)


def measure_one(meter: Meter, scene: Scene, case: Case, implementation: Implementation) -> dict[str, Any]:
    """Checks one implementation on one case, eagerly and in a graph, then times it.

    Returns:
        ``status`` "ok" with the figures; else "wrong", "failed" or "left out", and the ``reason``.
    """

    row: dict[str, Any] = {"implementation": implementation.name, "status": "ok"}
    columns = case.width if implementation.whole or case.extent == "full" else scene.longest
    if implementation.limit is not None and case.batch * columns * case.backends > implementation.limit:
        return {**row, "status": "left out", "reason": "it would take too long"}
    try:
        best: tuple[float, Sequence[Call], float] | None = None
        variants = implementation.calls(scene, case)
        last = scene.sets - 1
        for calls in variants:
            fault = implementation.check(scene, case, calls[0], 0)
            estimate = meter.estimate_us(calls)
            replay, count = meter.capture(
                calls[::-1], estimate
            )  # reversed, so that even a small graph has the last set
            if implementation.checked:
                scene.poison(last, **({} if implementation.first_sums else {"first_sums": 0}))
            replay()
            meter.synchronize()
            fault = fault or implementation.fault(scene, case, last)
            if fault:
                return {**row, "status": "wrong", "reason": fault}
            took = meter.graph_us(replay, count)
            if best is None or took < best[0]:
                best = took, calls, estimate
            del replay
        assert best is not None
        row["graph_us"] = best[0]
        row["eager_us"], row["host_us"] = meter.eager_us(best[1], best[2])
    except Unsupported as error:
        return {**row, "status": "left out", "reason": str(error)}
    except Exception as error:  # of any kind: the other implementations are still measured
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return {**row, "status": "failed", "reason": f"{type(error).__name__}: {first}"}
    return row


def measure_case(
    meter: Meter,
    selected: Selected,
    ceiling: float,
    traced: Sequence[int] = (),
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Measures every implementation of a case: a row each, with bytes, share of the ceiling and ratio to the ideal.

    Args:
        ceiling: gigabytes per second.
        traced: lengths of the case's trace.
        report: called with each row as it is done.
    """

    case = selected.case
    lengths = case.lengths(traced)
    facts = {"case": asdict(case), "shape": case.shape, "label": str(case), "series": selected.series}
    rows: list[dict[str, Any]] = []
    try:
        scene = meter.scene(case, lengths)
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        reason = f"no buffers: {type(error).__name__}: {first}"
        for name in selected.names:
            rows.append({**facts, "implementation": name, "status": "failed", "reason": reason})
            report(rows[-1])
        return rows
    ideal: float | None = None
    for name in selected.names:
        row = {**facts, **measure_one(meter, scene, case, IMPLEMENTATIONS[name])}
        # These write page_indices only.
        fewest = scene.live if case.extent == "live" else case.batch * case.width
        moved = {**dict.fromkeys(("ideal", "listed"), 4 * fewest * (1 + case.backends)), "empty": 0}
        row["bytes"] = moved.get(name, scene.bytes(case.extent))
        row["sets"] = scene.sets
        if row["status"] == "ok":
            if name == "onelaunch":
                row["config"] = scene.plans(case.extent)[0].config.settings()
            row["gbps"] = row["bytes"] / row["graph_us"] / 1e3
            row["share"] = row["gbps"] / ceiling if ceiling else None
            ideal = row["graph_us"] if name == "ideal" else ideal
            row["ratio"] = row["graph_us"] / ideal if ideal else None
        rows.append(row)
        report(row)
    return rows


def ceilings(meter: Meter) -> dict[str, float]:
    """Gigabytes per second of a large copy, and of a large ideal fan-out to three places; the larger is the ceiling."""
    case = Case(32, 2**20, width=2**20, page_size=1)
    scene = meter.scene(case, [case.length] * case.batch)
    row = measure_one(meter, scene, case, IMPLEMENTATIONS["ideal"])
    fan_out = 16 * scene.live / row["graph_us"] / 1e3 if row["status"] == "ok" else 0.0
    return {"copy_gbps": meter.copy_gbps(), "fan_out_gbps": fan_out}


def run_bench(
    selected: Sequence[Selected],
    meter: Meter,
    record: Record,
    *,
    traces: Mapping[str, Sequence[int]] | None = None,
    host: bool = True,
    seconds: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures the selected cases, and records the results.

    Args:
        traces: lengths of requests, by the name of the trace.
        host: measure host time too.
        seconds: begin no case after that many.
        say: called with lines of progress.
    """

    began = time.monotonic()
    data = record.data
    data["machine"] = meter.machine()
    names = list(dict.fromkeys(name for one in selected for name in one.names))
    say(f"building {', '.join(names)}")
    data["not_built"] = warmed([one.case for one in selected], names, meter.device)
    for failure in data["not_built"]:
        say(f"not built: {failure}")
    say(f"{time.monotonic() - began:.0f} s: built")
    try:
        data["ceiling"] = ceilings(meter) if selected else {}
    except Exception as error:
        say(f"no ceiling: {type(error).__name__}: {error}")
    if host:
        data["host"] = host_rows(meter)
    record.write()
    for number, one in enumerate(selected):
        spent = time.monotonic() - began
        if seconds is not None and spent > seconds:
            data["not_begun"] = [str(left.case) for left in selected[number:]]
            say(f"{spent:.0f} s: {len(data['not_begun'])} cases aren't begun any more, for --seconds {seconds:g}")
            break

        def report(row: Mapping[str, Any], place: str = f"[{number + 1}/{len(selected)}]") -> None:
            found = f"{row['graph_us']:.2f} us" if row["status"] == "ok" else f"{row['status']}: {row['reason']}"
            say(f"{place} {time.monotonic() - began:.0f} s: {row['label']} {row['implementation']}: {found}")

        ceiling = max(data["ceiling"].values(), default=0.0)
        data["rows"] += measure_case(meter, one, ceiling, (traces or {}).get(one.case.kind, ()), report)
        data["verdicts"] = verdicts(data["rows"], data["host"])
        record.write()
        try:
            meter.synchronize()
        except Exception as error:
            # The CUDA context is lost, and everything after it would fail with the same message.
            data["lost"] = f"the device was lost in {one.case}: {error}"
            say(data["lost"])
            break
    else:
        data["complete"] = True
    data["verdicts"] = verdicts(data["rows"], data["host"])
    data["seconds"] = round(time.monotonic() - began, 1)
    record.write()
    return data
