"""A run of `onelaunch bench`: every implementation checked, timed and recorded, case by case."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from onelaunch.cache import files

from .cases import Case
from .contenders import CONTENDERS, warmed
from .host import host_rows
from .implementation import Implementation, Unsupported, sentence_of
from .meter import Meter
from .parts import part_rows
from .scene import Call, Scene
from .selection import Selected
from .sglang_modules import version
from .verdicts import verdicts


class Record:
    """What a run measured so far. It is written to a file after every case, so that an interrupted run loses little.

    Args:
        path: the JSON file; None keeps it in memory.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {
            **facts,
            "titles": {},
            "complete": False,
            "rows": [],
            "host": [],
            "parts": [],
            "verdicts": [],
        }

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        if self.path is not None:
            files.replace(self.path, json.dumps(self.data, indent=1) + "\n", 0o644)


def measure_one(meter: Meter, scene: Scene, case: Case, implementation: Implementation) -> dict[str, Any]:
    """Checks one implementation on one case, eagerly and in a graph, then times it.

    Returns:
        ``status`` "ok" with the figures, of each column the fastest variant's, and a ``reason`` where a variant failed;
        otherwise "wrong", "failed" or "left out", with the ``reason``.
    """

    row: dict[str, Any] = {"implementation": implementation.name, "status": "ok"}
    columns = case.width if implementation.whole or case.extent == "full" else scene.longest
    if implementation.limit is not None and case.batch * columns * case.backends > implementation.limit:
        return {**row, "status": "left out", "reason": "it would take too long"}
    best: dict[str, list[float]] = {}
    try:
        calls = implementation.variants(scene, case)
    except Unsupported as error:
        return {**row, "status": "left out", "reason": str(error)}
    except Exception as error:  # of any kind: the other implementations are still measured
        return {**row, "status": "failed", "reason": sentence_of(error)}
    for call in calls:
        try:
            fault = implementation.check(scene, case, call) or _fault_in_graph(meter, scene, case, implementation, call)
            if fault:
                return {**row, "status": "wrong", "reason": fault}
            device, host = meter.eager_us(call)
            samples = {"warm": meter.warm_us(call), "cold": meter.cold_us(call), "eager": device, "host": host}
        except Exception as error:
            row["reason"] = sentence_of(error)  # the other variants still count
            continue
        for column, took in samples.items():
            if column not in best or statistics.median(took) < statistics.median(best[column]):
                best[column] = took
    if not best:
        return {**row, "status": "failed"}
    for column, took in best.items():
        row[f"{column}_us"] = round(statistics.median(took), 3)
        low, _, high = statistics.quantiles(took, n=4, method="inclusive")
        row[f"{column}_quartiles"] = [round(low, 3), round(high, 3)]
    return row


def _fault_in_graph(meter: Meter, scene: Scene, case: Case, implementation: Implementation, call: Call) -> str:
    """The first word that a call writes wrong in a graph, or ""."""
    implementation.poison(scene)  # before the capture, too: calls that take turns start again with the first
    replay = meter.capture([call])
    implementation.poison(scene)
    replay()
    meter.synchronize()
    return implementation.fault(scene, case)


def measure_case(
    meter: Meter,
    selected: Selected,
    traced: Sequence[int] = (),
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """Measures every implementation of a case: a row each.

    Args:
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
        reason = f"no buffers: {sentence_of(error)}"
        for name in selected.names:
            rows.append({**facts, "implementation": name, "status": "failed", "reason": reason})
            report(rows[-1])
        return rows
    for name in selected.names:
        row = {**facts, **measure_one(meter, scene, case, CONTENDERS[name])}
        # These write page_indices only.
        fewest = scene.live if case.extent == "live" else case.batch * case.width
        moved = {**dict.fromkeys(("ideal", "listed"), 4 * fewest * (1 + case.backends)), "empty": 0}
        row["bytes"] = moved.get(name, scene.bytes(case.extent))
        if row["status"] == "ok" and name == "onelaunch":
            row["config"] = scene.plan(case.extent).config.settings()
        rows.append(row)
        report(row)
    return rows


def run_bench(
    selected: Sequence[Selected],
    meter: Meter,
    record: Record,
    *,
    traces: Mapping[str, Sequence[int]] | None = None,
    host: bool = True,
    parts: Sequence[str] = (),
    seconds: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures the selected cases, and records the results.

    Args:
        traces: lengths of requests, by the name of the trace.
        host: measure host time too.
        parts: shapes on which parts of a refresh are measured alone, after the cases.
        seconds: start no case, and no part, after this many seconds.
        say: called with lines of progress.
    """

    began = time.monotonic()
    data = record.data
    data["machine"] = meter.machine()
    names = list(dict.fromkeys(name for one in selected for name in one.names))
    data["titles"] = {name: CONTENDERS[name].title for name in names}
    data["sglang"] = version()
    say(f"building {', '.join(names)}")
    data["not_built"] = warmed([one.case for one in selected], names, meter.device)
    for failure in data["not_built"]:
        say(f"not built: {failure}")
    say(f"{time.monotonic() - began:.0f} s: built")
    if host:
        data["host"] = host_rows(meter)
    record.write()
    left_out = set[tuple[str, str]]()
    for number, one in enumerate(selected):
        spent = time.monotonic() - began
        if seconds is not None and spent > seconds:
            data["not_begun"] = [str(left.case) for left in selected[number:]]
            say(f"{spent:.0f} s: {len(data['not_begun'])} cases aren't begun any more, for --seconds {seconds:g}")
            break

        def report(row: Mapping[str, Any], place: str = f"[{number + 1}/{len(selected)}]") -> None:
            found = f"{row['cold_us']:.2f} us" if row["status"] == "ok" else f"{row['status']}: {row['reason']}"
            if row["status"] == "left out":
                if (row["implementation"], found) in left_out:
                    return
                left_out.add((row["implementation"], found))
            say(f"{place} {time.monotonic() - began:.0f} s: {row['label']} {row['implementation']}: {found}")

        data["rows"] += measure_case(meter, one, (traces or {}).get(one.case.kind, ()), report)
        data["verdicts"] = verdicts(data["rows"], data["host"], data["parts"])
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
        for row in part_rows(meter, parts):
            data["parts"].append(row)
            record.write()
            spent = time.monotonic() - began
            of = f"{row['part']}, N={row['backends']}, {row['shape']}"
            say(f"{spent:.0f} s: {of}: {row['warm_us'] or row['reason']}")
            if seconds is not None and spent > seconds:
                data["complete"] = False
                say(f"no more parts are begun, for --seconds {seconds:g}")
                break
    data["verdicts"] = verdicts(data["rows"], data["host"], data["parts"])
    data["seconds"] = round(time.monotonic() - began, 1)
    record.write()
    return data
