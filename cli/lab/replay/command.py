"""The options of `onelaunch replay`. Modules that import torch are imported when it runs, not for its help."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from onelaunch.cli.output import check_writable, write_whole
from onelaunch.errors import ArgumentError

from ..extra import need
from .options import SAMPLE_EVERY, DeviceChoice, Extent, ReplayOptions, Verify, Writes

if TYPE_CHECKING:
    from .summary import ReplaySummary


@click.command()
@click.argument("trace", type=click.Path(path_type=Path))
@click.option(
    "--device", type=click.Choice(DeviceChoice), default=DeviceChoice.auto, help="auto takes the GPU if there is one."
)
@click.option("--backends", default=ReplayOptions.backends, help="Draft backends, each with its own buffers.")
@click.option("--max-batch", default=ReplayOptions.max_batch, help="Requests that run at once.")
@click.option(
    "--context-len", default=ReplayOptions.context_len, help="Maximum tokens of a request; longer prompts are clipped."
)
@click.option("--requests", type=int, help="Serve only this many requests.")
@click.option("--max-steps", type=int, help="Stop after this many steps.")
@click.option(
    "--verify",
    type=click.Choice(Verify),
    default=Verify.sample,
    help=f"Which steps to compare with the reference; sample is every {SAMPLE_EVERY}th.",
)
@click.option("--page-size", default=ReplayOptions.page_size, help="Tokens in a KV page.")
@click.option("--index-topk", default=ReplayOptions.index_topk, help="Tokens that sparse attention selects.")
@click.option(
    "--extent",
    type=click.Choice(Extent),
    default=Extent.live,
    help="Write the live columns, or all columns up to the longest request.",
)
@click.option(
    "--writes",
    type=click.Choice(Writes),
    default=Writes.all,
    help="Write all, or only the tiles that changed; then the tables hold what earlier steps left.",
)
@click.option("--pages", type=int, show_default="half of what full contexts need", help="KV pages in the pool.")
@click.option("--step-ms", default=ReplayOptions.step_ms, help="Simulated milliseconds per step.")
@click.option(
    "--preempt-probability",
    default=ReplayOptions.preempt_probability,
    help="Probability that a request loses its pages after a step.",
)
@click.option(
    "--pad-batch", default=ReplayOptions.pad_batch, help="Pad batches to a multiple of this, as captured graphs need."
)
@click.option("--seed", default=ReplayOptions.seed, help="Seed of all random choices.")
@click.option("--json", "json_to", metavar="FILE", help="Write the summary as JSON; - is standard output.")
def replay(json_to: str | None, **settings: Any) -> None:
    """Serve a request trace in simulation, refresh the draft backends at each step, check every destination.

    TRACE is a CSV file with the columns arrival_ms, input_tokens and output_tokens.

    Exits with 1 if a destination is wrong or a step took more than one launch, with 2 if an option or the
    trace can't be used.

    \b
    Examples:
      onelaunch replay trace.csv
      onelaunch replay trace.csv --max-batch 8 --max-steps 100 --verify every
      onelaunch replay trace.csv --extent full --json -
    """
    need("numpy", "onelaunch replay")
    # Imported here for start-up time: the replay needs torch; and because numpy is optional.
    from .report import print_summary, run_with_progress

    options = ReplayOptions(**settings)

    if json_to is not None and json_to != "-":
        with _named(json_to):
            check_writable(Path(json_to))  # fails before the work
    summary = run_with_progress(options)
    if json_to is not None:
        _write_json(summary, json_to)
    # Standard output is one JSON document or the summary, never both.
    print_summary(summary, to_stderr=json_to == "-")
    if summary.mismatches or summary.launches != summary.steps:
        raise click.exceptions.Exit(1)


def _write_json(summary: ReplaySummary, target: str) -> None:
    text = json.dumps(summary.to_dict(), indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    with _named(target):
        write_whole(Path(target), text)


@contextlib.contextmanager
def _named(target: str) -> Iterator[None]:
    """An OSError inside becomes a sentence about --json."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ArgumentError(
            f"--json {target} can't be written: {reason}. Name a file in a folder that exists."
        ) from error
