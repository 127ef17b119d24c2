"""A run of `onelaunch bench` as text: the summary, verdicts, every row, host time."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .summary import columns, narrow, number, summary, title

HEADINGS = ("case", "implementation", "cold us", "warm us", "eager us", "host us", "x ideal", "x ours")


def lines(data: Mapping[str, Any], brief: bool = False) -> Iterator[str]:
    """The run as lines of any length: in a narrow terminal they wrap, and nothing is cut.

    Args:
        brief: the summary alone; the rest is in the JSON.
    """
    machine = data.get("machine", {})
    if not brief:
        yield f"onelaunch {data['onelaunch']} on {', '.join(f'{k} {v}' for k, v in machine.items())}"
    if not data["complete"]:
        left = len(data.get("not_begun", ()))
        why = f"Cases that weren't begun, for --seconds: {left}." if left else "The run was interrupted."
        yield f"{why} These are its results up to then."
    if table := summary(data):
        yield ""
        yield from textwrap.wrap(title(data), 80)
        for part in narrow(table):
            yield ""
            yield from columns(part, right=range(1, len(part[0])))
    if brief:
        return
    if data["verdicts"]:
        yield ""
        yield from _verdicts(data["verdicts"])
    if data["rows"]:
        yield ""
        yield from _rows(data["rows"])
    if data.get("parts"):
        yield ""
        yield from _parts(data["parts"])
    if data["host"]:
        yield ""
        host = [(_us(row["us"]), row["piece"], row["what"]) for row in data["host"]]
        yield from columns([("host us", "part", "what"), *host], right=(0,))


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    failed = sum(row["holds"] is False for row in verdicts)
    yield f"{len(verdicts) - failed} of {len(verdicts)} of onelaunch's own targets are met"
    words = {True: "yes", False: "NO"}
    table = [(words[row["holds"]], row["item"], row["of"], row["target"], row["measured"]) for row in verdicts]
    yield from columns([("met", "item", "case", "target", "measured"), *table])


def _rows(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield "Each time is a median with its quartiles; the ratios are of cold caches, within a case."
    done = [row for row in rows if row["status"] == "ok"]

    # A case may also be part of a series: each row is compared with those of the same series.
    def cold(name: str) -> dict[tuple[str, str], float]:
        return {(row["label"], row["series"]): row["cold_us"] for row in done if row["implementation"] == name}

    ours, ideal = cold("onelaunch"), cold("ideal")
    table: list[Sequence[str]] = [HEADINGS]
    before = ""
    for row in done:
        case = row["label"] + (f" ({row['series']})" if row["series"] else "")
        place = row["label"], row["series"]
        table.append(
            (
                case if case != before else "",
                row["implementation"],
                *(_spread(row, column) for column in ("cold", "warm", "eager", "host")),
                _ratio(row["cold_us"], ideal.get(place)),
                _ratio(row["cold_us"], ours.get(place)),
            )
        )
        before = case
    yield from columns(table, right=range(2, len(HEADINGS)))
    for row in rows:
        if row["status"] != "ok":
            yield f"{row['label']} {row['implementation']}: {row['status']}: {row['reason']}"
        elif "reason" in row:
            yield f"{row['label']} {row['implementation']}: one of its variants failed: {row['reason']}"


def _parts(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        "Parts alone, in a CUDA graph: us with caches warm / cold. The same fields declared by a user; the engine's "
        "kernel as called, and its best form."
    )
    names = ("ours", "declared", "engine", "engine-best", "floor")
    table: list[Sequence[str]] = [("part", "N", "shape", *names)]
    for row in parts:
        cells = [
            f"{number(row['warm_us'].get(name))} / {number(row['cold_us'].get(name))}"
            if name in row["warm_us"]
            else "–"
            for name in names
        ]
        table.append((row["part"], str(row["backends"]), row["shape"], *cells))
    yield from columns(table, right=range(1, len(table[0])))
    yield from dict.fromkeys(f"{row['part']}: {row['reason']}" for row in parts if row["reason"])


def _spread(row: Mapping[str, Any], column: str) -> str:
    low, high = row[f"{column}_quartiles"]
    return f"{number(row[f'{column}_us'])} ({number(low)}–{number(high)})"


def _ratio(took: float, other: float | None) -> str:
    return f"{took / other:.2f}" if other else "–"


def _us(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
