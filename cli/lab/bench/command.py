"""The options of `onelaunch bench`. Modules that import torch are imported when it runs, not for its help."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import onelaunch
from onelaunch.errors import ArgumentError, ConfigError

from .cases import SHAPES, trace_lengths
from .figure import need_matplotlib, plot
from .selection import Selected, numbers, parts_of, select
from .tables import lines
from .verdicts import verdicts

if TYPE_CHECKING:
    from .meter import Meter


@click.command()
@click.option("--shapes", metavar="LIST", help="Batch x longest request, such as 64x8k,128x32k.")
@click.option("--n", metavar="LIST", help="Numbers of backends, such as 1,3,7; default 3.")
@click.option("--page-size", metavar="LIST", help="Tokens per page, such as 64,1; default 64.")
@click.option("--extent", metavar="LIST", help="live,full; default live.")
@click.option("--width", metavar="LIST", help="Table widths: live, wide (163911) or columns.")
@click.option("--only", metavar="LIST", help="Implementations, such as onelaunch,ideal,triton.")
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    multiple=True,
    help="Also draw lengths from this trace; may be repeated.",
)
@click.option("--quick", is_flag=True, help="Four shapes and the main contenders; print only the summary.")
@click.option("--all", "everything", is_flag=True, help="Every shape, N, page size, width and extent.")
@click.option("--series", is_flag=True, help="Time against length too, for --plot.")
@click.option("--host", is_flag=True, help="Host time alone, and its parts.")
@click.option("--parts", is_flag=True, help="Parts alone: flattened indices, pages, tokens, schedules.")
@click.option("--seconds", type=float, help="Start no case after this many seconds.")
@click.option(
    "--json", "json_to", type=click.Path(path_type=Path), metavar="FILE", help="Write all results, case by case."
)
@click.option("--plot", "plot_to", type=click.Path(path_type=Path), metavar="FILE", help="Draw the figure (PNG).")
@click.option("--from", "read", type=click.Path(path_type=Path), metavar="FILE", help="Show an earlier run's --json.")
def bench(
    shapes: str | None,
    n: str | None,
    page_size: str | None,
    extent: str | None,
    width: str | None,
    only: str | None,
    trace: tuple[Path, ...],
    quick: bool,
    everything: bool,
    series: bool,
    host: bool,
    parts: bool,
    seconds: float | None,
    json_to: Path | None,
    plot_to: Path | None,
    read: Path | None,
) -> None:
    """Measure the refresh side by side with every baseline, on the current CUDA device.

    Every implementation is checked against the reference before it is timed: in a CUDA graph with warm and with cold
    caches, call by call, and on the host. SGLang's own kernels are measured too where sglang can be imported,
    and FlashMLA's schedule where SGLang's kernels (sgl_kernel) can.

    \b
    Examples:
      onelaunch bench --json bench.json
      onelaunch bench --shapes 64x8k --n 1,3,7 --only onelaunch,ideal
      onelaunch bench --from bench.json --plot bench.png
    """
    if plot_to is not None:
        need_matplotlib()  # fails before anything is measured
    if read is not None:
        others = shapes, n, page_size, extent, width, only, trace, everything, series, host, parts, seconds, json_to
        if any(others):
            raise ConfigError("--from shows an earlier run; only --plot and --quick go with it. Leave the others out.")
        data = _read(read)
    else:
        traces = {path.stem: path for path in trace}
        selected = select(
            _names(only),
            shapes=parts_of(shapes),
            backends=numbers("--n", n),
            pages=numbers("--page-size", page_size),
            extents=parts_of(extent),
            widths=parts_of(width),
            traces=list(traces),
            quick=quick,
            everything=everything,
            series=series,
        )
        alone = host or parts
        data = _measure(
            [] if alone else selected,
            traces,
            json_to,
            host=not parts or host,
            parts=(parts_of(shapes) or SHAPES) if parts or not (alone or quick or only) else (),
            seconds=seconds,
        )
    for line in lines(data, brief=quick):
        click.echo(line)
    if plot_to is not None:
        plot(data, plot_to)


def _measure(
    selected: Sequence[Selected],
    traces: Mapping[str, Path],
    json_to: Path | None,
    **how: Any,
) -> dict[str, Any]:
    # Imported here for start-up time: it needs torch.
    from .measuring import Record, run_bench

    lengths = {name: trace_lengths(path) for name, path in traces.items()}
    meter = device_meter("onelaunch bench")
    record = Record(json_to, {"onelaunch": onelaunch.__version__})
    record.write()  # fails before anything is measured
    return run_bench(
        selected,
        meter,
        record,
        traces=lengths,
        **how,
        say=lambda line: click.echo(line, err=True),
    )


def device_meter(verb: str) -> Meter:
    """The meter of the current CUDA device.

    Raises:
        ArgumentError: there is none.
    """
    # Imported here for start-up time.
    import torch

    if not torch.cuda.is_available():
        raise ArgumentError(
            f"{verb} measures on a CUDA device, and there is none here. Run it on a machine with a GPU."
        )
    from .cuda_meter import CudaMeter  # pragma: gpu

    return CudaMeter()  # pragma: gpu


def _names(only: str | None) -> list[str]:
    # Imported here for start-up time: it needs torch.
    from .contenders import CONTENDERS

    names = parts_of(only) or list(CONTENDERS)
    for name in names:
        if name not in CONTENDERS:
            raise ConfigError(f"--only names {name!r}; allowed: {', '.join(CONTENDERS)}.")
    return [name for name in CONTENDERS if name in names]


def _read(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in ("onelaunch", "titles", "complete", "rows", "host"):
            data[name]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"--from {path} isn't what --json writes: {error}. Name such a file.") from error
    data["verdicts"] = verdicts(data["rows"], data["host"], data.get("parts", ()))
    return data
