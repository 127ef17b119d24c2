"""onelaunch bench: the refresh and everything that it is compared with, side by side in one run."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer
from onelaunch.cache import files
from onelaunch.errors import ArgumentError, ConfigError

from ..common import sentence
from .report import need_matplotlib, plot, print_tables, verdicts

if TYPE_CHECKING:
    import torch

    from .baselines import Implementation
    from .scene import Call, Case, Scene

QUICK_SHAPES = ("1x4k", "64x8k", "128x32k", "256x4k")
QUICK_NAMES = ("ideal", "onelaunch", "triton", "torch-copies")
# Measured on these shapes alone, unless shapes are asked for.
FEW_NAMES = ("empty", "torch-compile")
SERIES_NAMES = ("ideal", "onelaunch", "triton")
# Shapes with one long request among short ones.
RAGGED = ("64x2k", "256x2k")
# Batch sizes of the requests that are drawn from a trace.
TRACED = (64, 256)


class Meter(Protocol):
    """What bench needs of a device; measure.Meter is the one there is outside of tests."""

    device: torch.device

    def machine(self) -> dict[str, Any]: ...
    def scene(self, case: Case, lengths: Sequence[int]) -> Scene: ...
    def synchronize(self) -> None: ...
    def estimate_us(self, calls: Sequence[Call]) -> float: ...
    def capture(self, calls: Sequence[Call], estimate_us: float) -> tuple[Callable[[], None], int]: ...
    def graph_us(self, replay: Callable[[], None], count: int) -> float: ...
    def eager_us(self, calls: Sequence[Call], estimate_us: float) -> tuple[float, float]: ...
    def host_us(self, pieces: dict[str, Call]) -> dict[str, float]: ...
    def copy_gbps(self) -> float: ...


# ---- what is measured ------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Selected:
    """A case and what is measured on it. ``series`` names the figure's curve that it belongs to, if any."""

    case: Case
    names: tuple[str, ...]
    series: str = ""


def select(
    names: Sequence[str],
    *,
    shapes: Sequence[str] = (),
    backends: Sequence[int] = (),
    pages: Sequence[int] = (),
    extents: Sequence[str] = (),
    widths: Sequence[str] = (),
    traces: Sequence[str] = (),
    quick: bool = False,
    everything: bool = False,
    series: bool = False,
) -> list[Selected]:
    """The cases of a run, what matters most first: a run that is cut keeps that.

    Args:
        names: implementations.
        shapes, backends, pages, extents, widths: any of them given asks for their whole product, with the defaults
            for the others. A width is "live" (the longest request), "wide" (an engine's table) or a number.
        traces: names of traces, to draw lengths from.
        quick: four shapes, and the implementations that matter most.
        everything: the product of all shapes, 1, 3 and 7 backends, both widths, page sizes and extents, and both
            kinds of lengths.
        series: the curves of the figure too.

    Raises:
        ConfigError: a shape or a width can't be read, or a number is too small.
    """
    from .scene import SHAPES, Case, parse_shape, wide_enough

    given = shapes or backends or pages or extents or widths
    if everything:
        shapes, backends, pages = shapes or SHAPES, backends or (1, 3, 7), pages or (64, 1)
        extents, widths = extents or ("live", "full"), widths or ("wide", "live")
    elif quick:
        shapes, names = shapes or QUICK_SHAPES, [name for name in names if name in QUICK_NAMES]
    shapes = shapes or SHAPES
    for name, numbers in (("--n", backends), ("--page-size", pages)):
        for number in numbers:
            if number < 1:
                raise ConfigError(f"{name} is {number}; allowed: 1 or more.")
    for extent in extents:
        if extent not in ("live", "full"):
            raise ConfigError(f"--extent is {extent!r}; allowed: 'live', 'full'.")

    def product(
        of: Sequence[str], widths: Sequence[str] = ("wide",), extents: Sequence[str] = ("live",), kind: str = "uniform"
    ) -> Iterable[Case]:
        for n, page, extent, width, shape in itertools.product(backends or (3,), pages or (64,), extents, widths, of):
            batch, length = parse_shape(shape)
            yield Case(batch, length, n, _width(width, length), page, extent, kind)  # type: ignore[arg-type]

    cases = list(product(shapes, widths or ("wide",), extents or ("live",)))
    if everything or not (given or quick):
        cases += product(RAGGED, kind="one-long")
    if not (given or quick or everything):
        cases += product(("64x8k",), ("live",))
        cases += product(("64x8k", "256x4k", "128x32k", "16x130k"), ("live",), ("full",))
        cases += product(("64x8k",), ("wide",), ("full",))
        cases += [case.replace(page_size=1) for case in product(("64x8k",))]
    for trace in traces:
        for n in backends or (3,):
            cases += [Case(batch, _width("wide", 1), n, kind=trace) for batch in TRACED]
    # Compiling anew for a shape takes seconds, and an empty kernel takes as long everywhere.
    few = [Case(batch, length, width=wide_enough(length)) for batch, length in map(parse_shape, QUICK_SHAPES)]

    def names_for(case: Case) -> tuple[str, ...]:
        return tuple(n for n in names if n not in FEW_NAMES or given or everything or case in few)

    selected = [Selected(case, names_for(case)) for case in dict.fromkeys(cases)]
    if series:
        curves = tuple(name for name in names if name in SERIES_NAMES)
        for width in (4096 + 71, 8192 + 71, 16384 + 71, 32768 + 71, 65536 + 71, 163_911):
            selected.append(Selected(Case(32, 4096, width=width), curves, "width"))
        selected += [Selected(Case(64, 8192, n), curves, "N") for n in (1, 2, 3, 5, 7)]
        selected += [Selected(Case(2**power, 4096), curves, "batch") for power in range(10)]
    return selected


def _width(text: str, length: int) -> int:
    from .scene import wide_enough

    if text == "live":
        return length
    if text == "wide":
        return wide_enough(length)
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--width is {text!r}; allowed: 'live', 'wide', or a number of columns.")
    return int(text)


# ---- measuring -------------------------------------------------------------------------------------------------------
class Record:
    """What a run found so far, kept in a file after every case, so that a run that is cut keeps what it has.

    Args:
        path: the JSON file; None keeps it in memory.
    """

    def __init__(self, path: Path | None, facts: Mapping[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {**facts, "complete": False, "ceiling": {}, "rows": [], "host": [], "verdicts": []}

    def keep(self) -> None:
        """Writes the file, whole or not at all."""
        if self.path is not None:
            files.replace(self.path, json.dumps(self.data, indent=1) + "\n", 0o644)


def measure_one(meter: Meter, scene: Scene, case: Case, implementation: Implementation) -> dict[str, Any]:
    """One implementation on one case: checked eagerly and in a graph, then timed.

    Returns:
        ``status`` "ok" with the figures; else "wrong", "failed" or "left out", and the ``reason``.
    """
    from .baselines import Unsupported

    row: dict[str, Any] = {"implementation": implementation.name, "status": "ok"}
    columns = case.width if implementation.whole or case.extent == "full" else scene.longest
    if implementation.limit is not None and case.batch * columns * case.backends > implementation.limit:
        return {**row, "status": "left out", "reason": "it would take too long"}
    try:
        best: tuple[float, Sequence[Call], float] | None = None
        variants = implementation.calls(scene, case)
        last = scene.sets - 1
        for calls in variants:
            fault = implementation.check(scene, case, calls[0], 0)
            estimate = meter.estimate_us(calls)
            replay, count = meter.capture(calls[::-1], estimate)  # the last set is in the graph, however few it holds
            if implementation.checked:
                scene.poison(last, **({} if implementation.first_sums else {"first_sums": 0}))
            replay()
            meter.synchronize()
            fault = fault or implementation.fault(scene, case, last)
            if fault:
                return {**row, "status": "wrong", "reason": fault}
            took = meter.graph_us(replay, count)
            if best is None or took < best[0]:
                best = took, calls, estimate
            del replay
        assert best is not None
        row["graph_us"] = best[0]
        row["eager_us"], row["host_us"] = meter.eager_us(best[1], best[2])
    except Unsupported as error:
        return {**row, "status": "left out", "reason": str(error)}
    except Exception as error:  # of any kind: one implementation's failure must not take the others' figures along
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return {**row, "status": "failed", "reason": f"{type(error).__name__}: {first}"}
    return row


def measure_case(
    meter: Meter,
    selected: Selected,
    ceiling: float,
    traced: Sequence[int] = (),
    report: Callable[[dict[str, Any]], None] = lambda row: None,
) -> list[dict[str, Any]]:
    """A row an implementation, with what follows from the figures: bytes, share of the ceiling, ratio to the ideal.

    Args:
        ceiling: gigabytes a second.
        traced: lengths of the case's trace.
        report: called with each row as it is done.
    """
    from .baselines import IMPLEMENTATIONS

    case = selected.case
    lengths = case.lengths(traced)
    facts = {"case": asdict(case), "shape": case.shape, "label": str(case), "series": selected.series}
    rows: list[dict[str, Any]] = []
    try:
        scene = meter.scene(case, lengths)
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        reason = f"no buffers: {type(error).__name__}: {first}"
        for name in selected.names:
            rows.append({**facts, "implementation": name, "status": "failed", "reason": reason})
            report(rows[-1])
        return rows
    ideal: float | None = None
    for name in selected.names:
        row = {**facts, **measure_one(meter, scene, case, IMPLEMENTATIONS[name])}
        # These move the words of page_indices alone.
        fewest = scene.live if case.extent == "live" else case.batch * case.width
        moved = {**dict.fromkeys(("ideal", "listed"), 4 * fewest * (1 + case.backends)), "empty": 0}
        row["bytes"] = moved.get(name, scene.bytes(case.extent))
        row["sets"] = scene.sets
        if row["status"] == "ok":
            if name == "onelaunch":
                row["config"] = scene.plans(case.extent)[0].config.settings()  # the launch shape may be a tuned one
            row["gbps"] = row["bytes"] / row["graph_us"] / 1e3
            row["share"] = row["gbps"] / ceiling if ceiling else None
            ideal = row["graph_us"] if name == "ideal" else ideal
            row["ratio"] = row["graph_us"] / ideal if ideal else None
        rows.append(row)
        report(row)
    return rows


def ceilings(meter: Meter) -> dict[str, float]:
    """Gigabytes a second that a large copy and a large ideal fan-out to three places reach; the larger counts."""
    from .baselines import IMPLEMENTATIONS
    from .scene import Case

    case = Case(32, 2**20, width=2**20, page_size=1)
    scene = meter.scene(case, [case.length] * case.batch)
    row = measure_one(meter, scene, case, IMPLEMENTATIONS["ideal"])
    fan_out = 16 * scene.live / row["graph_us"] / 1e3 if row["status"] == "ok" else 0.0
    return {"copy_gbps": meter.copy_gbps(), "fan_out_gbps": fan_out}


# ---- host time -------------------------------------------------------------------------------------------------------
HOST = {
    "nothing": "an empty Python function",
    "binding": "a call of the binding that launches nothing",
    "stream": "the lookup of the current stream",
    "raw": "an empty kernel launched through the binding, its stream known",
    "raw+stream": "the same with the lookup of the stream",
    "kernel": "our kernel launched through the binding, all words and the stream known",
    "run": "the binding's run: arguments compared with the last call's, stream lookup, launch",
    "plan.run": "Plan.run, which calls that",
    "broadcast": "fused_metadata_precompute_and_broadcast_cuda with six lists",
    "precompute": "precompute_decode_metadata_cuda into given buffers",
    "copy": "fused_metadata_copy_cuda to all backends",
}


def host_pieces(scene: Scene, page_size: int) -> dict[str, Call]:
    """What a call's host time is made of, each as a call of its own; see HOST."""
    import onelaunch
    import torch
    from onelaunch.run.refresh import LISTS

    from .baselines import kernel, target_of
    from .scene import INDEX_TOPK

    cuda, index = scene.device.type == "cuda", scene.device.index or 0
    seq_lens, rows, pool = scene.inputs[0]
    backends = scene.buffers[0]
    bound = scene.plans()[0]
    bound.run(seq_lens, rows)
    nothing = kernel("empty", "cpu").bind([0]).launch
    raw = kernel("empty", target_of(scene.device)).bind([0]).launch
    words, stream = bound._check(seq_lens, rows, None, None), 0
    if cuda:  # pragma: gpu
        stream = torch._C._cuda_getCurrentRawStream(index)
    # Of a plan of its own: run() would have to check again what it is called with after each launch.
    launch, run = scene.plans()[0]._bound.launch, bound._bound.run
    lengths, sums, tables, nsa_lengths, nsa_sums, pages = ([getattr(b, name) for b in backends] for name in LISTS[:6])
    # Spelled out as an engine does: "*lists" or "**numbers" would take half a microsecond or more of its own.
    width, topk = scene.width, INDEX_TOPK
    computed = onelaunch.precompute_decode_metadata_cuda(
        seq_lens, rows, pool, max_len=width, nsa_index_topk=topk, real_page_size=page_size
    )
    pieces: dict[str, Call] = {
        "nothing": lambda: None,
        "binding": lambda: nothing(0),
        "raw": lambda: raw(stream),
        "kernel": lambda: launch(*words, stream),
        "run": lambda: run(bound, seq_lens, rows, None, None),
        "plan.run": lambda: bound.run(seq_lens, rows),
        "broadcast": lambda: onelaunch.fused_metadata_precompute_and_broadcast_cuda(
            seq_lens,
            rows,
            pool,
            lengths,
            sums,
            tables,
            nsa_lengths,
            nsa_sums,
            pages,
            max_len=width,
            nsa_index_topk=topk,
            real_page_size=page_size,
            extent="live",
        ),
        "precompute": lambda: onelaunch.precompute_decode_metadata_cuda(
            seq_lens, rows, pool, max_len=width, nsa_index_topk=topk, real_page_size=page_size, out=computed
        ),
        "copy": lambda: onelaunch.fused_metadata_copy_cuda(computed, backends),
    }
    if cuda:  # pragma: gpu
        pieces["stream"] = lambda: torch._C._cuda_getCurrentRawStream(index)
        pieces["raw+stream"] = lambda: raw(torch._C._cuda_getCurrentRawStream(index))
    for call in pieces.values():
        call()
    return {name: pieces[name] for name in HOST if name in pieces}


def host_rows(meter: Meter, backends: int = 3) -> list[dict[str, Any]]:
    """Microseconds of host time by piece, on a small shape that the GPU keeps up with."""
    from .scene import Case

    case = Case(8, 1024, backends, width=4167)
    try:
        took = meter.host_us(host_pieces(meter.scene(case, case.lengths()), case.page_size))
    except Exception as error:
        return [{"piece": "all", "what": f"failed: {type(error).__name__}: {error}", "us": None}]
    rows = [{"piece": name, "what": HOST[name], "us": us} for name, us in took.items()]
    parts = (
        ("of which the launch", "raw less binding: cudaLaunchKernelEx of nothing", "raw", ("binding",)),
        (
            "of which the parameters",
            "kernel less raw: integers converted, a larger block, the grid",
            "kernel",
            ("raw",),
        ),
        (
            "of which the checks",
            "run less kernel: arguments compared, the stream",
            "run",
            ("kernel",),
        ),
        ("of which Python", "plan.run less run", "plan.run", ("run",)),
    )
    for part, what, whole, without in parts:
        rows.append({"piece": part, "what": what, "us": took[whole] - sum(took.get(name, 0.0) for name in without)})
    return rows


# ---- the command -----------------------------------------------------------------------------------------------------
def run_bench(
    selected: Sequence[Selected],
    meter: Meter,
    record: Record,
    *,
    traces: Mapping[str, Sequence[int]] | None = None,
    host: bool = True,
    seconds: float | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measures everything selected and keeps it in the record.

    Args:
        traces: lengths by the names that cases have as their kind.
        host: measure host time too.
        seconds: begin no case after that many.
        say: gets a line of progress.
    """
    from .baselines import warmed

    began = time.monotonic()
    data = record.data
    data["machine"] = meter.machine()
    names = list(dict.fromkeys(name for one in selected for name in one.names))
    say(f"building {', '.join(names)}")
    data["not_built"] = warmed([one.case for one in selected], names, meter.device)
    for failure in data["not_built"]:
        say(f"not built: {failure}")
    say(f"{time.monotonic() - began:.0f} s: built")
    try:
        data["ceiling"] = ceilings(meter) if selected else {}
    except Exception as error:
        say(f"no ceiling: {type(error).__name__}: {error}")
    if host:
        data["host"] = host_rows(meter)
    record.keep()
    for number, one in enumerate(selected):
        spent = time.monotonic() - began
        if seconds is not None and spent > seconds:
            data["not_begun"] = [str(left.case) for left in selected[number:]]
            say(f"{spent:.0f} s: {len(data['not_begun'])} cases aren't begun any more, for --seconds {seconds:g}")
            break

        def report(row: Mapping[str, Any], place: str = f"[{number + 1}/{len(selected)}]") -> None:
            found = f"{row['graph_us']:.2f} us" if row["status"] == "ok" else f"{row['status']}: {row['reason']}"
            say(f"{place} {time.monotonic() - began:.0f} s: {row['label']} {row['implementation']}: {found}")

        ceiling = max(data["ceiling"].values(), default=0.0)
        data["rows"] += measure_case(meter, one, ceiling, (traces or {}).get(one.case.kind, ()), report)
        data["verdicts"] = verdicts(data["rows"], data["host"])
        record.keep()
        try:
            meter.synchronize()
        except Exception as error:
            # The context is lost, and whatever came after would fail with the same message.
            data["lost"] = f"the device was lost in {one.case}: {error}"
            say(data["lost"])
            break
    else:
        data["complete"] = True
    data["verdicts"] = verdicts(data["rows"], data["host"])
    data["seconds"] = round(time.monotonic() - began, 1)
    record.keep()
    return data


def numbers(option: str, text: str | None) -> list[int]:
    """The whole numbers of a comma list.

    Raises:
        ConfigError: one isn't a number.
    """
    parts = parts_of(text)
    for part in parts:
        if not part.isdigit():
            raise ConfigError(f"{option} is {text!r}; it must be whole numbers, such as 1,3,7.")
    return [int(part) for part in parts]


def parts_of(text: str | None) -> list[str]:
    """The parts of a comma list."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def bench(
    shapes: Annotated[str | None, typer.Option(help="Batch x longest request, such as 64x8k,128x32k.")] = None,
    n: Annotated[str | None, typer.Option("--n", help="Numbers of backends, such as 1,3,7; default 3.")] = None,
    page_size: Annotated[str | None, typer.Option(help="Tokens a page, such as 64,1; default 64.")] = None,
    extent: Annotated[str | None, typer.Option(help="live,full; default live.")] = None,
    width: Annotated[str | None, typer.Option(help="Table widths: live, wide (163911) or columns.")] = None,
    only: Annotated[str | None, typer.Option(help="Implementations, such as onelaunch,ideal,triton.")] = None,
    trace: Annotated[list[Path] | None, typer.Option(help="Draw lengths from this trace too; may be repeated.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Four shapes, four implementations.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Every shape, N, page size, width and extent.")] = False,
    series: Annotated[bool, typer.Option("--series", help="Time against width, N and batch, for --plot.")] = False,
    host: Annotated[bool, typer.Option("--host", help="Host time alone, and where it goes.")] = False,
    seconds: Annotated[float | None, typer.Option(help="Begin no case after that many seconds.")] = None,
    json_to: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Keep everything, case by case.")
    ] = None,
    plot_to: Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the figure (PNG).")] = None,
    read: Annotated[Path | None, typer.Option("--from", metavar="FILE", help="Show what --json kept.")] = None,
) -> None:
    """Measure the refresh side by side with everything it is compared with, on the current CUDA device.

    Every implementation is checked against the reference before it is timed: in a CUDA graph over rotating buffers
    (median of many replays), call by call, and on the host.

    \b
    Examples:
      onelaunch bench --json bench.json
      onelaunch bench --shapes 64x8k --n 1,3,7 --only onelaunch,ideal
      onelaunch bench --from bench.json --plot bench.png
    """
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 150)  # a log has no edge to wrap at

    def run() -> None:
        if plot_to is not None:
            need_matplotlib()  # known before anything is measured
        if read is not None:
            if any(
                (shapes, n, page_size, extent, width, only, trace, quick, everything, series, host, seconds, json_to)
            ):
                raise ConfigError(
                    "--from shows all that an earlier run kept, so only --plot goes with it. Leave the others out."
                )
            data = _read(read)
        else:
            names = _names(only)
            traces = {path.stem: path for path in trace or ()}
            selected = select(
                names,
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
            from .scene import trace_lengths

            lengths = {name: trace_lengths(path) for name, path in traces.items()}
            meter = device_meter("onelaunch bench")
            from onelaunch import __version__

            record = Record(json_to, {"onelaunch": __version__})
            if json_to is not None:
                record.keep()  # a file that can't be written is known before anything is measured
            data = run_bench(
                [] if host else selected,
                meter,
                record,
                traces=lengths,
                seconds=seconds,
                say=lambda line: typer.echo(line, err=True),
            )
        print_tables(data, console)
        if plot_to is not None:
            plot(data, plot_to)

    sentence(run)


def device_meter(verb: str) -> Meter:
    """The meter of the current CUDA device.

    Raises:
        ArgumentError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise ArgumentError(
            f"{verb} measures on a CUDA device, and there is none here. Run it on a machine with a GPU."
        )
    from .measure import Meter  # pragma: gpu

    return Meter()  # pragma: gpu


def _names(only: str | None) -> list[str]:
    from .baselines import IMPLEMENTATIONS

    names = parts_of(only) or list(IMPLEMENTATIONS)
    for name in names:
        if name not in IMPLEMENTATIONS:
            raise ConfigError(f"--only names {name!r}; allowed: {', '.join(IMPLEMENTATIONS)}.")
    # In the order of the table: the ideal first, for the others' ratio to it.
    return [name for name in IMPLEMENTATIONS if name in names]


def _read(path: Path) -> dict[str, Any]:
    try:
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        for name in ("onelaunch", "complete", "ceiling", "rows", "host"):
            data[name]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--from {path} isn't what --json writes: {error}. Name such a file.") from error
    data["verdicts"] = verdicts(data["rows"], data["host"])
    return data
