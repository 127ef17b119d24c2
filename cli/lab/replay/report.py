"""Shows a replay: a progress bar while it runs, then its summary."""

from __future__ import annotations

import sys

import click

from .options import ReplayOptions
from .serving import ServingSimulation
from .simulated import run_replay
from .summary import Distribution, ReplaySummary


def run_with_progress(options: ReplayOptions) -> ReplaySummary:
    """Replays a trace; where standard error is a terminal, with a progress bar."""
    if not sys.stderr.isatty():
        return run_replay(options)
    with click.progressbar(length=options.max_steps or 1, label="replay", file=sys.stderr) as bar:

        def on_step(steps: int, simulation: ServingSimulation, requests: int) -> None:
            # A limit of steps is usually reached long before the requests are done.
            bar.length = options.max_steps or requests
            bar.label = f"step {steps}, {len(simulation.running)} running, {simulation.waiting} waiting"
            bar.update((simulation.finished if options.max_steps is None else steps) - bar.pos)

        return run_replay(options, on_step)


def print_summary(summary: ReplaySummary, to_stderr: bool) -> None:
    """Prints the summary, a line for each value."""

    def spread(of: Distribution, unit: str) -> str:
        return f"{of.min} min, {of.median} median, {of.p95} p95, {of.max} max {unit}"

    checked = "(nothing was checked)"
    if summary.verified_steps:
        checked = f"of {summary.elements_checked:,} elements in {summary.verified_steps:,} checked steps"
    rows = [
        ("trace", f"{summary.trace}: {summary.finished:,} of {summary.requests:,} requests finished"),
        ("device", f"{summary.device}, {summary.backends} backends, extent {summary.extent}"),
        ("steps", f"{summary.steps:,}, {summary.queued_steps:,} with requests waiting"),
        ("launches", f"{summary.launches:,}"),
        ("batch", spread(summary.batch, "requests")),
        ("length", spread(summary.length, "tokens")),
        ("prompts clipped", f"{summary.clipped_prompts:,}"),
        ("preemptions", f"{summary.preemptions:,}"),
        ("bytes written", f"{summary.bytes_written:,}"),
        *_tiles(summary),
        *_times(summary),
        ("mismatches", f"{summary.mismatches:,} {checked}"),
    ]
    if summary.first_mismatch:
        rows.append(("first mismatch", str(summary.first_mismatch)))
    for name, value in rows:
        colour = ("red" if summary.mismatches else "green") if name == "mismatches" else None
        click.secho(f"{name:<16}  {value}", fg=colour, err=to_stderr)


def _tiles(summary: ReplaySummary) -> list[tuple[str, str]]:
    """What verified writes save."""
    if summary.tiles is None or summary.tiles_written is None:
        return []
    share = summary.tiles_written / max(1, summary.tiles)
    return [("tiles written", f"{summary.tiles_written:,} of {summary.tiles:,} ({share:.1%})")]


def _times(summary: ReplaySummary) -> list[tuple[str, str]]:
    """The times of a GPU. On a CPU they depend on the number of threads more than on the code, so they aren't shown."""
    if summary.refresh_us is None or summary.torch_us is None:
        return [("time", "not measured")]
    if summary.device == "cpu":
        return [("time", "not shown: times on a CPU say nothing about a GPU")]
    return [
        (
            "refresh, a step",
            f"{summary.refresh_us:,.1f} us until the device is done (median of {summary.timed_steps:,})",
        ),
        ("PyTorch, a step", f"{summary.torch_us:,.1f} us ({summary.torch_us / summary.refresh_us:.1f} times)"),
    ]
