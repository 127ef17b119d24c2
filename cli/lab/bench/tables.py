"""A run of `onelaunch bench` as text: verdicts, every row, host time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

HEADINGS = ("case", "implementation", "graph us", "eager us", "host us", "MB", "GB/s", "ceiling", "x ideal", "x ours")


def lines(data: Mapping[str, Any]) -> Iterator[str]:
    """The run as lines of any length: in a narrow terminal they wrap, and nothing is cut."""
    machine = data.get("machine", {})
    yield f"onelaunch {data['onelaunch']} on {', '.join(f'{k} {v}' for k, v in machine.items())}"
    if not data["complete"]:
        yield "The run was interrupted: these are its results up to then."
    if data["verdicts"]:
        yield ""
        yield from _verdicts(data["verdicts"])
    if data["rows"]:
        yield ""
        yield from _rows(data["rows"], data["ceiling"])
    if data["host"]:
        yield ""
        host = [(_number(row["us"], 3), row["piece"], row["what"]) for row in data["host"]]
        yield from _columns([("host us", "part", "what"), *host], right=(0,))


def _verdicts(verdicts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    failed = sum(row["holds"] is False for row in verdicts)
    judged = sum(row["holds"] is not None for row in verdicts)
    yield f"{judged - failed} of {judged} targets are met"
    words = {True: "yes", False: "NO", None: "–"}
    table = [(words[row["holds"]], row["item"], row["of"], row["target"], row["measured"]) for row in verdicts]
    yield from _columns([("met", "item", "case", "target", "measured"), *table])


def _rows(rows: Sequence[Mapping[str, Any]], ceiling: Mapping[str, float]) -> Iterator[str]:
    if ceiling:
        measured = ", ".join(f"{name.removesuffix('_gbps').replace('_', ' ')} {v:,.0f}" for name, v in ceiling.items())
        yield f"ceiling, GB/s: {measured}"
    # A case may also be part of a series: each row is compared with ours of the same series.
    ours = {
        (row["label"], row["series"]): row["graph_us"]
        for row in rows
        if row["implementation"] == "onelaunch" and row["status"] == "ok"
    }
    table: list[Sequence[str]] = [HEADINGS]
    before = ""
    for row in rows:
        if row["status"] != "ok":
            continue
        case = row["label"] + (f" ({row['series']})" if row["series"] else "")
        own = ours.get((row["label"], row["series"]))
        table.append(
            (
                case if case != before else "",
                row["implementation"],
                _number(row["graph_us"]),
                _number(row["eager_us"]),
                _number(row["host_us"]),
                _number(row["bytes"] / 1e6),
                _number(row["gbps"], 0),
                f"{100 * row['share']:.0f} %" if row["share"] else "–",
                _number(row["ratio"]),
                _number(row["graph_us"] / own if own else None),
            )
        )
        before = case
    yield from _columns(table, right=range(2, len(HEADINGS)))
    for row in rows:
        if row["status"] != "ok":
            yield f"{row['label']} {row['implementation']}: {row['status']}: {row['reason']}"


def _number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    """The rows in columns as wide as their widest cell; those in ``right`` are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()
