"""A run of `onelaunch bench` as text: verdicts, every row, host time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table


def print_tables(data: Mapping[str, Any], console: Any) -> None:
    """The run as tables: every row, host time, verdicts."""

    def number(value: float | None, digits: int = 2) -> str:
        return "–" if value is None else f"{value:,.{digits}f}"

    machine = data.get("machine", {})
    console.print(f"onelaunch {data['onelaunch']} on {', '.join(f'{k} {v}' for k, v in machine.items())}")
    ceiling = data["ceiling"]
    if ceiling:
        said = ", ".join(f"{name.removesuffix('_gbps').replace('_', ' ')} {v:,.0f}" for name, v in ceiling.items())
        console.print(f"ceiling, GB/s: {said}")
    table = _table("case", "implementation")
    for heading in ("graph us", "eager us", "host us", "MB", "GB/s", "ceiling", "x ideal", "x ours"):
        table.add_column(heading, justify="right")
    ours = {
        row["label"]: row["graph_us"]
        for row in data["rows"]
        if row["implementation"] == "onelaunch" and row["status"] == "ok"
    }
    before = ""
    missing = []
    for row in data["rows"]:
        if row["status"] != "ok":
            missing.append(f"{row['label']} {row['implementation']}: {row['status']}: {row['reason']}")
            continue
        label = row["label"] + (f" ({row['series']})" if row["series"] else "")
        first, before = label if label != before else "", label
        took = row["graph_us"]
        table.add_row(
            first,
            row["implementation"],
            number(took),
            number(row["eager_us"]),
            number(row["host_us"]),
            number(row["bytes"] / 1e6),
            number(row["gbps"], 0),
            number(100 * row["share"], 0) + " %" if row["share"] else "–",
            number(row["ratio"]),
            number(took / ours[row["label"]]) if row["label"] in ours else "–",
        )
    if data["rows"]:
        console.print(table)
    for line in missing:
        console.print(line, highlight=False)
    if data["host"]:
        table = _table("host us", "piece", "what")
        for row in data["host"]:
            table.add_row(number(row["us"], 3), row["piece"], row["what"])
        console.print(table)
    if data["verdicts"]:
        table = _table("holds", "item", "of", "target", "measured")
        for row in data["verdicts"]:
            holds = {True: "yes", False: "NO", None: "–"}[row["holds"]]
            table.add_row(holds, row["item"], row["of"], row["target"], row["measured"])
        console.print(table)
    if not data["complete"]:
        console.print("The run was cut: this is what it had by then.")


def _table(*headings: str) -> Any:

    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table
