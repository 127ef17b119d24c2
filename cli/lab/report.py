"""What a run of onelaunch bench is shown as: verdicts, tables and the figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onelaunch.errors import ConfigError


# ---- verdicts --------------------------------------------------------------------------------------------------------
def verdicts(rows: Sequence[Mapping[str, Any]], host: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at and what was measured: ``item``, ``of``, ``target``, ``measured``, and whether it ``holds``.

    ``holds`` is None where there is nothing to hold.
    """
    from .scene import WIDE

    out: list[dict[str, Any]] = []

    def say(item: str, of: str, target: str, measured: str, holds: bool | None) -> None:
        out.append({"item": item, "of": of, "target": target, "measured": measured, "holds": holds})

    by_case: dict[str, dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok" and not row["series"]:  # a series may have a case that is judged, too
            by_case.setdefault(row["label"], {})[row["implementation"]] = row
    for label, found in by_case.items():
        ours, ideal = found.get("onelaunch"), found.get("ideal")
        if ours is None:
            continue
        case, took = ours["case"], ours["graph_us"]
        usual = case["backends"] == 3 and case["page_size"] == 64
        wide_live = usual and case["extent"] == "live" and case["width"] >= WIDE
        if ideal and wide_live:
            floor = ideal["graph_us"]
            measured = f"{took:.2f} us, ideal {floor:.2f}, ratio {took / floor:.2f}"
            if "listed" in found:
                listed = found["listed"]["graph_us"]
                measured += f"; tiles listed in advance {listed:.2f}, ratio {listed / floor:.2f}"
            if case["kind"] != "uniform":
                say("2 ragged", label, "at most 1.3 of the ideal", measured, took <= 1.3 * floor)
            elif floor > 5:
                say("2 live", label, "at most 1.15 of the ideal", measured, took <= 1.15 * floor)
            elif floor >= 2:
                say("2 live", label, "at most 1.25 of the ideal", measured, took <= 1.25 * floor)
            else:
                say("2 live", label, "at most 0.5 us above the ideal", measured, took <= floor + 0.5)
        if ideal and usual and case["extent"] == "full":
            share = ours["gbps"] / ideal["gbps"]
            say("3 full", label, "at least 85 % of the ideal's bandwidth", f"{100 * share:.0f} %", share >= 0.85)
        if "runtime" in found:
            theirs = found["runtime"]["graph_us"]
            say(
                "8 runtime arguments",
                label,
                "reported as it falls",
                f"{theirs:.2f} us, {theirs / took:.2f} of ours",
                None,
            )
        if not (usual and case["extent"] == "live" and case["kind"] == "uniform"):
            continue
        for name, least, where in (
            ("triton", 1.4 if ideal and ideal["graph_us"] > 5 else 2.5, wide_live),
            ("torch-copies-wide", 20.0, wide_live and ours["shape"] == "64x8k"),
            ("torch-copies", 20.0, wide_live and ours["shape"] == "64x8k"),
            ("single-block", 100.0, ours["shape"] == "64x8k" and case["width"] == 8192),
        ):
            if where and name in found:
                times = found[name]["graph_us"] / took
                measured = f"{found[name]['graph_us']:.2f} us, {times:.1f} times"
                say(f"4 {name}", label, f"at least {least:g} times faster", measured, times >= least)
    took_by = {row["piece"]: row["us"] for row in host if row["us"] is not None}
    run, raw = took_by.get("plan.run"), took_by.get("raw")
    if run and raw:
        say("5 host", "plan.run", "at most 1.3 raw launches", f"{run:.2f} us, {run / raw:.2f}", run <= 1.3 * raw)
    for name in ("broadcast", "precompute", "copy"):
        if run and name in took_by:
            over = took_by[name] - run
            say("5 host", name, "at most 4 us above plan.run", f"{took_by[name]:.2f} us, {over:+.2f}", over <= 4)
    return out


# ---- printing --------------------------------------------------------------------------------------------------------
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
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=True)
    return table


def need_matplotlib() -> None:
    """Raises ConfigError where it isn't installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib, which isn't installed. Install it with: pip install 'onelaunch[bench]'; or "
            "measure with --json FILE, and draw it elsewhere with --from FILE --plot."
        ) from None


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Draws the figure: time by shape, and, where they were measured, against width, N and batch.

    Raises:
        ConfigError: matplotlib isn't installed, or the file can't be written.
    """
    need_matplotlib()
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    done = [row for row in data["rows"] if row["status"] == "ok"]
    series = [name for name in ("width", "N", "batch") if any(row["series"] == name for row in done)]
    figure = Figure(figsize=(11, 4.5 if not series else 8.5), layout="constrained")
    grid = figure.add_gridspec(2 if series else 1, max(1, len(series)))
    shapes = figure.add_subplot(grid[0, :])
    main = [row for row in done if not row["series"]]
    labels = list(dict.fromkeys(row["label"] for row in main))
    for name in dict.fromkeys(row["implementation"] for row in main):
        points = {row["label"]: row["graph_us"] for row in main if row["implementation"] == name}
        x = [i for i, label in enumerate(labels) if label in points]
        shapes.plot(x, [points[labels[i]] for i in x], marker="o", linestyle=":", label=name)
    shapes.set(yscale="log", ylabel="microseconds a call, in a graph", title=data.get("machine", {}).get("device", ""))
    shapes.set_xticks(range(len(labels)), labels, rotation=30, ha="right", fontsize=7)
    shapes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    keys = {"width": "width", "N": "backends", "batch": "batch"}
    for place, name in enumerate(series):
        axes = figure.add_subplot(grid[1, place])
        rows = [row for row in done if row["series"] == name]
        for implementation in dict.fromkeys(row["implementation"] for row in rows):
            points = {
                row["case"][keys[name]]: row["graph_us"] for row in rows if row["implementation"] == implementation
            }
            axes.plot(sorted(points), [points[x] for x in sorted(points)], marker="o", label=implementation)
        fixed = rows[0]["case"]
        titles = {
            "width": f"table width, {fixed['batch']} requests of up to {fixed['length']}",
            "N": f"backends, {rows[0]['shape']}",
            "batch": f"requests of up to {fixed['length']} tokens",
        }
        axes.set(xlabel=titles[name], ylim=(0, None), xscale="linear" if name == "N" else "log")
        if name == "N":
            axes.set_xticks(sorted({row["case"]["backends"] for row in rows}))
        axes.legend(fontsize=7)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--plot {path} can't be written: {error}. Name a .png file in a folder that exists."
        ) from error
