"""The summary: one table with a line for each contender, from one run on one GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .cases import WIDE
from .selection import QUICK_NAMES, QUICK_SHAPES

Row = Mapping[str, Any]


def title(data: Mapping[str, Any]) -> str:
    """The sentence above the table: what was measured, in which unit, on which GPU."""
    device = data.get("machine", {}).get("device", "an unknown device")
    return (
        f"µs to refresh the metadata of 3 backends on an {device}, medians of one run: on the device in a CUDA graph, "
        "with 96 MiB read and written before each call, as an engine's step does; on the device called eagerly; and on "
        "the host. 64 × 8k stands for 64 requests, the longest of 8k tokens."
    )


def usual(row: Row) -> bool:
    """Whether a row is of a case that the table and the figure show."""
    case = row["case"]
    return (
        not row["series"]
        and (case["backends"], case["page_size"], case["extent"], case["kind"]) == (3, 64, "live", "uniform")
        and case["width"] == WIDE
        and row["shape"] in QUICK_SHAPES
    )


def name_of(implementation: str, data: Mapping[str, Any]) -> str:
    """The name of a contender for people, SGLang's with its version."""
    text = str(data["titles"].get(implementation, implementation))
    return text.replace("SGLang", f"SGLang {data['sglang']}") if data.get("sglang") else text


def summary(data: Mapping[str, Any]) -> list[list[str]]:
    """The table, its headings first: a line for each contender, time on the device, called eagerly, and on the host.

    A contender that couldn't be measured has the reason in the second column, and no more. Empty if none of the shapes
    was measured.
    """
    rows = [row for row in data["rows"] if usual(row)]
    shapes = [shape for shape in QUICK_SHAPES if any(row["shape"] == shape for row in rows)]
    if not shapes:
        return []
    spelled = [shape.replace("x", " × ") for shape in shapes]
    headings = [f"{how} {shape}" for how in ("device", "eager") for shape in spelled]
    table = [["requests × longest", *headings, "host"]]
    for name in QUICK_NAMES:
        found = {row["shape"]: row for row in rows if row["implementation"] == name}
        if not found:
            continue
        done = {shape: row for shape, row in found.items() if row["status"] == "ok"}
        if not done:
            table.append([name_of(name, data), next(iter(found.values()))["reason"]])
            continue
        cells = [_us(done, shape, column) for column in ("cold_us", "eager_us") for shape in shapes]
        hosts = sorted(row["host_us"] for row in done.values())
        table.append([name_of(name, data), *cells, number(hosts[len(hosts) // 2])])
    return table


def narrow(table: Sequence[Sequence[str]]) -> list[list[list[str]]]:
    """The table as two that fit 80 columns: on the device with the host, then eager. Their headings name the shapes."""
    count = (len(table[0]) - 2) // 2
    headings, *rows = table
    shapes = [heading.removeprefix("device ") for heading in headings[1 : count + 1]]
    device = [["device", *shapes, "host"], *([*row[: count + 1], *row[2 * count + 1 :]] for row in rows)]
    eager = [["eager", *shapes], *([row[0], *row[count + 1 : -1]] for row in rows if len(row) > 2)]
    return [device, eager]


def _us(rows: Mapping[str, Row], shape: str, column: str) -> str:
    return number(rows[shape][column]) if shape in rows else "–"


def number(value: float | None) -> str:
    """Microseconds with three significant digits: 1.86, 17.2, 101."""
    if value is None:
        return "–"
    return f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"


def markdown(data: Mapping[str, Any]) -> list[str]:
    """The table as lines of Markdown."""
    headings, *rows = summary(data)
    lines = ["| " + " | ".join(headings) + " |", "|---" + "|--:" * (len(headings) - 1) + "|"]
    for row in rows:
        lines.append("| " + " | ".join([*row, *[""] * (len(headings) - len(row))]) + " |")
    return lines


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows as lines, in columns as wide as their widest cell; those in ``right`` are flush right.

    The last cell of a row that is shorter than the first row takes the room that it needs.
    """
    full = len(rows[0])
    widths = [0] * full
    for row in rows:
        for place, cell in enumerate(row if len(row) == full else row[:-1]):
            widths[place] = max(widths[place], len(cell))
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if place in right and len(row) == full else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
