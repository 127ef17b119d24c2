"""A run of `onelaunch bench` as a figure."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onelaunch.errors import ConfigError


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
    # Imported here because matplotlib is optional.
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
