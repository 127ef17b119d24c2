"""onelaunch tune: every launch shape on a user's own shapes, and the best one kept for bind to use."""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from onelaunch import files
from onelaunch.errors import ConfigError

from .bench import device_meter, numbers, parts_of
from .common import sentence

if TYPE_CHECKING:
    from onelaunch import KernelConfig

    from .bench import Meter
    from .scene import Case

THREADS, UNROLL, BLOCKS = (128, 256, 512), (1, 2, 4), (2, 4, 8, 16)
# So many of the best are measured a second time: the smallest of many measurements is smaller than what it stands for.
_FINALISTS = 4


@dataclass(frozen=True)
class Load:
    """What a server's step looks like: a case, and the tokens of each of its requests."""

    case: Case
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return str(self.case)


def loads(
    shapes: Sequence[str], lengths: Sequence[int], *, backends: int, page_size: int, extent: str, width: int | None
) -> list[Load]:
    """The loads that the options name: shapes as bench knows them, and one batch of given lengths.

    Raises:
        ConfigError: there is nothing to measure, or a request is longer than the table is wide.
    """
    from .scene import SHAPES, Case, parse_shape, wide_enough

    if width is not None and width < 1:
        raise ConfigError(f"--width is {width}; allowed: 1 or more.")
    out = []
    for batch, length in map(parse_shape, shapes or (() if lengths else SHAPES)):
        case = Case(batch, length, backends, width or wide_enough(length), page_size, extent)  # type: ignore[arg-type]
        out.append(Load(case, tuple(case.lengths())))
    if lengths:
        case = Case(
            len(lengths),
            max(lengths),
            backends,
            width or wide_enough(max(lengths)),
            page_size,
            extent,  # type: ignore[arg-type]
            kind="given",
        )
        out.append(Load(case, tuple(lengths)))
    for load in out:
        if load.case.length > load.case.width:
            raise ConfigError(f"--width is {load.case.width}, and {load} has a request of {load.case.length} tokens.")
    return out


def launch_shapes(threads: Sequence[int], unroll: Sequence[int], blocks: Sequence[int]) -> list[dict[str, int]]:
    """Every combination, as facts of a configuration."""
    from onelaunch.tuning import FACTS

    wanted = itertools.product(threads or THREADS, unroll or UNROLL, blocks or BLOCKS)
    return [dict(zip(FACTS, shape, strict=True)) for shape in wanted]


def sweep(
    meter: Meter,
    load: Load,
    shapes: Sequence[Mapping[str, int]],
    default: Mapping[str, int],
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Microseconds of every launch shape on one load; the best, and the default, measured a second time.

    Returns:
        A row a shape: its facts, ``graph_us`` (of the last measurement), ``again`` whether it was measured twice; or
        ``reason``, where it didn't run or was wrong.
    """
    scene = meter.scene(load.case, load.lengths)
    rows: list[dict[str, Any]] = []
    replays: dict[int, tuple[Callable[[], None], int]] = {}
    for number, shape in enumerate(shapes):
        row: dict[str, Any] = {**shape, "again": False}
        rows.append(row)
        try:
            calls = scene.refresh_calls(load.case.extent, **shape)
            scene.poison(0)
            calls[0]()
            if fault := scene.fault(0, load.case.extent):
                row["reason"] = f"wrong: {fault}"
                continue
            replays[number] = meter.capture(calls, meter.estimate_us(calls))
            row["graph_us"] = meter.graph_us(*replays[number])
        except Exception as error:
            row["reason"] = f"{type(error).__name__}: {error}"
    ranked = sorted(replays, key=lambda number: rows[number].get("graph_us", float("inf")))
    finalists = {*ranked[:_FINALISTS], *(n for n in replays if dict(shapes[n]) == dict(default))}
    for _ in range(2):
        for number in finalists:
            if "graph_us" not in rows[number]:
                continue
            took = meter.graph_us(*replays[number])
            rows[number]["second"] = min(took, rows[number].get("second", took))
    for number in finalists:
        if "second" in rows[number]:
            rows[number].update(graph_us=rows[number].pop("second"), again=True)
    say(f"{load}: {len(ranked)} launch shapes measured")
    return rows


def choose(swept: Mapping[str, Sequence[Mapping[str, Any]]], default: Mapping[str, int]) -> dict[str, Any]:
    """The shape whose worst distance from the best of each load is smallest, and how far off the default is.

    Args:
        swept: rows of sweep by load.

    Returns:
        ``winner``; and by load ``best``, ``best_us``, ``default_us``, ``winner_us`` and the distances of the last two.

    Raises:
        ConfigError: no shape ran on all loads.
    """
    by_shape: dict[tuple[int, ...], dict[str, float]] = {}
    for label, rows in swept.items():
        for row in rows:
            if "graph_us" in row:
                by_shape.setdefault(tuple(row[name] for name in default), {})[label] = row["graph_us"]
    best = {
        label: min((times[label], shape) for shape, times in by_shape.items() if label in times)
        for label in swept
        if any(label in times for times in by_shape.values())
    }
    whole = {shape: times for shape, times in by_shape.items() if len(times) == len(swept)}
    if not whole:
        reasons = sorted({row["reason"] for rows in swept.values() for row in rows if "reason" in row})
        raise ConfigError(f"No launch shape ran on every load: {'; '.join(reasons) or 'there was none to try'}.")

    def distance(shape: tuple[int, ...], label: str) -> float:
        return whole[shape][label] / best[label][0] - 1

    def rank(shape: tuple[int, ...]) -> tuple[float, float]:
        distances = [distance(shape, label) for label in swept]
        return max(distances), statistics.fmean(distances)

    winner = min(whole, key=rank)
    usual = tuple(default.values())
    table = {
        label: {
            "best": dict(zip(default, best[label][1], strict=True)),
            "best_us": best[label][0],
            "winner_us": whole[winner][label],
            "winner_off": distance(winner, label),
            "default_us": whole[usual][label] if usual in whole else None,
            "default_off": distance(usual, label) if usual in whole else None,
        }
        for label in swept
    }
    return {"winner": dict(zip(default, winner, strict=True)), "loads": table}


def print_choice(choice: Mapping[str, Any], default: Mapping[str, int], console: Any) -> None:
    """The choice as a table."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("load", "best", "us", "heuristic us", "off", "winner us", "off"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("load", "best") else "right")
    for label, row in choice["loads"].items():
        known = row["default_us"] is not None
        table.add_row(
            label,
            spelled(row["best"]),
            f"{row['best_us']:.2f}",
            f"{row['default_us']:.2f}" if known else "–",
            f"{100 * row['default_off']:.1f} %" if known else "–",
            f"{row['winner_us']:.2f}",
            f"{100 * row['winner_off']:.1f} %",
        )
    console.print(table)
    offs = [row["default_off"] for row in choice["loads"].values() if row["default_off"] is not None]
    if offs:
        verdict = "holds" if max(offs) <= 0.05 else "doesn't hold"
        console.print(
            f"heuristic {spelled(default)}: at most {100 * max(offs):.1f} % off the best; the target of 5 % {verdict}"
        )
    console.print(f"winner {spelled(choice['winner'])}")


def spelled(shape: Mapping[str, int]) -> str:
    """256 threads, unroll 2, 8 blocks."""
    return f"{shape['threads']} threads, unroll {shape['unroll']}, {shape['blocks_per_sm']} blocks"


def build_all(config: KernelConfig, shapes: Sequence[Mapping[str, int]], archs: tuple[str, ...]) -> list[str]:
    """Builds every shape in child processes; what failed, in sentences."""
    from onelaunch import prebuild

    jobs = prebuild.distinct([prebuild.Job(config.replace(**shape), archs) for shape in shapes])
    done = prebuild.build_all(jobs, prebuild.workers(None, len(jobs)))
    return [one.error for one in done if one.error]


def run_tune(
    meter: Meter,
    wanted: Sequence[Load],
    shapes: Sequence[Mapping[str, int]],
    *,
    json_to: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Builds, sweeps and chooses; nothing is kept in the store.

    Args:
        json_to: gets every row, load by load.

    Returns:
        machine, default, rows by load, and the choice.
    """
    from onelaunch import toolchain, tuning

    from .baselines import target_of

    machine = meter.machine()
    case = wanted[0].case
    config = load_config(case, target_of(meter.device))
    default = tuning.heuristic(machine.get("sm_count", 1), max(load.case.batch for load in wanted))
    shapes = [dict(shape) for shape in shapes]
    if default not in shapes:
        shapes.append(default)
    if config.equal_rows:  # one kernel, whatever blocks_per_sm is
        shapes = list({(shape["threads"], shape["unroll"]): shape for shape in [*shapes, default]}.values())
    archs = toolchain.architectures(meter.device.index) if config.target == "cuda" else ()
    data: dict[str, Any] = {"machine": machine, "config": config.settings(), "default": default, "rows": {}}
    if json_to is not None:  # a file that can't be written is known before anything is built
        files.replace(json_to, json.dumps(data, indent=1) + "\n", 0o644)
    say(f"building {len(shapes)} launch shapes of {config.symbol}")
    for error in build_all(config, shapes, archs):
        say(error)
    for load in wanted:
        data["rows"][str(load)] = sweep(meter, load, shapes, default, say)
        data.setdefault("cases", {})[str(load)] = {**asdict(load.case), "lengths": load.lengths}
        if json_to is not None:
            files.replace(json_to, json.dumps(data, indent=1) + "\n", 0o644)
    data["choice"] = choose(data["rows"], default)
    if json_to is not None:
        files.replace(json_to, json.dumps(data, indent=1) + "\n", 0o644)
    return data


def load_config(case: Case, target: Any = "cuda") -> KernelConfig:
    """What bind specializes a Scene's buffers of a case to, with the default launch shape."""
    from onelaunch import KernelConfig

    from .scene import INDEX_TOPK

    return KernelConfig(
        num_backends=case.backends,
        page_size=case.page_size,
        extent=case.extent,
        index_topk=INDEX_TOPK,
        target=target,
    )


def tune(
    config: Annotated[str | None, typer.Argument(help="A preset, for its backends, page size and extent.")] = None,
    shapes: Annotated[str | None, typer.Option(help="Batch x longest request, such as 64x8k; default nine.")] = None,
    lengths: Annotated[str | None, typer.Option(help="The tokens of each request of one batch.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="Backends; default 3.")] = None,
    page_size: Annotated[int | None, typer.Option(help="Tokens a page; default 64.")] = None,
    extent: Annotated[str | None, typer.Option(help="live or full; default live.")] = None,
    width: Annotated[int | None, typer.Option(help="Columns of the tables; default 163911 or what it takes.")] = None,
    threads: Annotated[str | None, typer.Option(help="Threads a block to try; default 128,256,512.")] = None,
    unroll: Annotated[str | None, typer.Option(help="16-byte accesses a thread to try; default 1,2,4.")] = None,
    blocks: Annotated[str | None, typer.Option(help="Blocks a multiprocessor to try; default 2,4,8,16.")] = None,
    keep: Annotated[bool, typer.Option("--keep/--no-keep", help="Keep the winner in the cache, for bind.")] = True,
    json_to: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Every measurement.")] = None,
) -> None:
    """Try every launch shape on your shapes, on the current CUDA device, and keep the best for bind to use.

    It is a kernel of its own: a server that is frozen or has no compiler needs it built, with
    onelaunch build PRESET --set threads=...,unroll=...,blocks_per_sm=... or by a bind on a machine that knows of it.

    \b
    Examples:
      onelaunch tune
      onelaunch tune nsa-decode-7 --shapes 32x4k,64x8k --width 40000
      onelaunch tune --lengths 130000,900,1200,4000 --n 5 --no-keep
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 150)

    def run() -> None:
        from onelaunch import loader, tuning
        from onelaunch.config import PRESETS, preset

        base = preset(config) if config else PRESETS["nsa-decode-3"]
        wanted = loads(
            parts_of(shapes),
            numbers("--lengths", lengths),
            backends=n or base.num_backends,
            page_size=page_size or base.page_size,
            extent=extent or base.extent,
            width=width,
        )
        case = wanted[0].case
        kernel = load_config(case)  # refuses what no kernel can have
        expected = base.replace(num_backends=case.backends, page_size=case.page_size, extent=case.extent)
        if tuning.family(expected) != tuning.family(kernel):
            raise ConfigError(
                f"{config} has other fields, dtypes or alignment than tune has buffers for; it tunes decode refreshes "
                "of int32 tables with 64-bit inputs and all default fields, such as nsa-decode-3."
            )
        tried = launch_shapes(numbers("--threads", threads), numbers("--unroll", unroll), numbers("--blocks", blocks))
        for shape in tried:
            kernel.replace(**shape)
        meter = device_meter("onelaunch tune")
        data = run_tune(meter, wanted, tried, json_to=json_to, say=lambda line: typer.echo(line, err=True))
        print_choice(data["choice"], data["default"], console)
        if keep:
            facts = {"loads": data["choice"]["loads"]}
            store = loader.default_store()
            path = tuning.remember(store, data["machine"]["device"], kernel, data["choice"]["winner"], facts)
            console.print(f"kept for {data['machine']['device']} in {path}", soft_wrap=True)

    sentence(run)
