"""A run of `onelaunch bench` as a figure: bars of four shapes, and time against length."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onelaunch.errors import ConfigError

from ..extra import need
from .cases import short
from .selection import QUICK_NAMES, QUICK_SHAPES, SERIES_NAMES
from .summary import name_of, number, usual

# A colour for each contender, distinguishable with colour blindness too (after Okabe and Ito).
_COLOURS = dict(zip(QUICK_NAMES, ("#999999", "#D55E00", "#E69F00", "#CC79A7", "#0072B2", "#009E73"), strict=True))
_TEXT = 15  # points; the figure is read at half its size
_CUT = 1.25  # the longest bar is drawn at most this many times as long as the second


def need_matplotlib() -> None:
    """Raises ConfigError where it isn't installed."""
    need("matplotlib", "--plot", "; or measure with --json FILE, and draw it elsewhere with --from FILE --plot")


def plot(data: Mapping[str, Any], path: Path) -> None:
    """Draws the figure: microseconds on the device with cold caches by shape and, if it was measured, by length.

    Raises:
        ConfigError: there is nothing to draw, matplotlib isn't installed, or the file can't be written.
    """
    need_matplotlib()
    # Imported here because matplotlib is optional.
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    done = [row for row in data["rows"] if row["status"] == "ok"]
    bars = [row for row in done if usual(row) and row["implementation"] in QUICK_NAMES]
    shapes = [shape for shape in QUICK_SHAPES if any(row["shape"] == shape for row in bars)]
    curves = [row for row in done if row["series"] == "length"]
    if not shapes:
        raise ConfigError(
            f"--plot draws the shapes {', '.join(QUICK_SHAPES)} with 3 backends and pages of 64, of which none was "
            "measured. Measure with --quick, or without options."
        )
    figure = Figure(figsize=(14, 7.2 if curves else 4.4), layout="constrained")
    device = data.get("machine", {}).get("device", "an unknown device")
    title = f"µs to refresh the metadata of 3 backends on an {device}, in a CUDA graph, caches cold\n"
    title += "requests × tokens of the longest; each shape has its own scale, and a bar with a gap is cut off"
    figure.suptitle(title, fontsize=_TEXT)
    grid = figure.add_gridspec(2 if curves else 1, 12, height_ratios=(4, 2.2) if curves else None)
    names = [name for name in QUICK_NAMES if any(row["implementation"] == name for row in bars)]
    span = 12 // len(shapes)
    for place, shape in enumerate(shapes):
        axes = figure.add_subplot(grid[0, place * span : (place + 1) * span])
        took = {row["implementation"]: row["cold_us"] for row in bars if row["shape"] == shape}
        _draw_bars(axes, names, took)
        batch, length = shape.split("x")
        axes.set_title(f"{batch} × {length}", fontsize=_TEXT)
        axes.set_yticks(range(len(names)), [name_of(n, data) if place == 0 else "" for n in names], fontsize=_TEXT)
    if curves:
        _draw_curves(figure.add_subplot(grid[1, :]), curves, data)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--plot {path} can't be written: {error}. Name a .png file in a folder that exists."
        ) from error


def _draw_bars(axes: Any, names: list[str], took: Mapping[str, float]) -> None:
    """Horizontal bars of one shape, the time beside each; every shape has a scale of its own, from 0.

    A bar is cut, and shown to be, where it would make the others too short to compare.
    """
    *_, second, first = 0.0, *sorted(took.values())
    end = min(first, _CUT * (second or first))
    for y, name in enumerate(names):
        if name not in took:
            axes.text(0, y, " not measured", va="center", fontsize=_TEXT - 3, color="#666666")
            continue
        drawn = min(took[name], end)
        axes.barh(y, drawn, color=_COLOURS[name], height=0.78)
        if drawn < took[name]:
            x = (0.8 * end, 0.84 * end)
            axes.fill([x[0], x[1], x[1] + 0.03 * end, x[0] + 0.03 * end], [y + 0.5, y - 0.5, y - 0.5, y + 0.5], "white")
        weight = "bold" if name.startswith("onelaunch") else "normal"
        axes.text(drawn, y, f" {number(took[name])}", va="center", fontsize=_TEXT, fontweight=weight)
    axes.set_xlim(0, 1.36 * end)
    axes.set_ylim(len(names) - 0.45, -0.55)  # the first name on top
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "bottom"]].set_visible(False)


def _draw_curves(axes: Any, rows: list[Mapping[str, Any]], data: Mapping[str, Any]) -> None:
    """Time against the longest request's length, a line for each contender, named at its end."""
    lengths = sorted({row["case"]["length"] for row in rows})
    for name in SERIES_NAMES:
        points = {row["case"]["length"]: row["cold_us"] for row in rows if row["implementation"] == name}
        if not points:
            continue
        x = sorted(points)
        axes.plot(x, [points[length] for length in x], marker="o", linewidth=2.5, color=_COLOURS[name])
        label = f"  {name_of(name, data)}: {number(points[x[-1]])}"
        axes.text(x[-1], points[x[-1]], label, va="center", fontsize=_TEXT, color=_COLOURS[name])
    axes.set_xlim(0, 1.45 * lengths[-1])
    axes.set_ylim(0, None)
    axes.set_xticks([length for length in lengths if length >= lengths[-1] / 16])
    axes.set_xticklabels([short(length) for length in lengths if length >= lengths[-1] / 16])
    axes.tick_params(labelsize=_TEXT - 2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_ylabel("µs", fontsize=_TEXT)
    axes.set_xlabel(f"tokens of the longest of {rows[0]['case']['batch']} requests", fontsize=_TEXT)
