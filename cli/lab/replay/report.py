"""How a replay is shown: a progress bar while it runs, then its summary."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .options import ReplayOptions
from .serving import ServingSimulation
from .simulated import run_replay
from .summary import Distribution, ReplaySummary


def run_with_progress(options: ReplayOptions, console: Console) -> ReplaySummary:
    """Replays a trace; on a terminal with a progress bar."""
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task("starting", total=None)

        def on_step(steps: int, simulation: ServingSimulation, requests: int) -> None:
            # A limit of steps is usually reached long before the requests are done.
            if options.max_steps is None:
                done, total = simulation.finished, requests
            else:
                done, total = steps, options.max_steps
            progress.update(
                task,
                completed=done,
                total=total,
                description=f"step {steps}, {len(simulation.running)} running, {simulation.waiting} waiting",
            )

        return run_replay(options, on_step if console.is_terminal else None)


def print_summary(summary: ReplaySummary, console: Console) -> None:
    """The summary as a table; in plain text, without lines, where the output isn't a terminal."""

    def spread(of: Distribution, unit: str) -> str:
        return f"{of.min} min, {of.median} median, {of.p95} p95, {of.max} max {unit}"

    def microseconds(value: float | None) -> str:
        return "not timed" if value is None else f"{value:,.1f} us"

    good = summary.mismatches == 0
    verdict = f"{summary.mismatches}"
    if summary.verified_steps:
        verdict += f" of {summary.elements_checked:,} elements in {summary.verified_steps:,} checked steps"
    else:
        verdict += " (nothing was checked)"
    speedup = ""
    if summary.refresh_us and summary.torch_us:
        speedup = f" ({summary.torch_us / summary.refresh_us:.1f} times)"

    rows: list[tuple[str, str | Text]] = [
        ("trace", f"{summary.trace}: {summary.finished:,} of {summary.requests:,} requests finished"),
        ("device", f"{summary.device}, {summary.backends} backends, extent {summary.extent}"),
        ("steps", f"{summary.steps:,}, {summary.queued_steps:,} with requests waiting"),
        ("launches", f"{summary.launches:,}"),
        ("batch", spread(summary.batch, "requests")),
        ("length", spread(summary.length, "tokens")),
        ("prompts clipped", f"{summary.clipped_prompts:,}"),
        ("preemptions", f"{summary.preemptions:,}"),
        ("bytes written", f"{summary.bytes_written:,}"),
        ("refresh, a step", f"{microseconds(summary.refresh_us)} (median of {summary.timed_steps:,})"),
        ("PyTorch, a step", microseconds(summary.torch_us) + speedup),
        ("mismatches", Text(verdict, style="green" if good else "bold red")),
    ]
    if summary.first_offence:
        rows.append(("first mismatch", str(summary.first_offence)))
    if console.is_terminal:
        table = Table(box=box.SIMPLE, show_header=False)
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, value if isinstance(value, Text) else Text(value))
        console.print(table)
    else:
        # One line a fact, of any length: a table would be folded at a width that nobody set.
        for name, value in rows:
            console.print(f"{name:<16}  {value}", markup=False, highlight=False, soft_wrap=True)
