"""`onelaunch replay`: a simulated serving run, its metadata refreshed through a plan and checked."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from onelaunch.errors import ArgumentError

from ..common import check_writable, sentence, write_whole

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from onelaunch import MetadataBuffers
    from onelaunch.cli.lab.serving import ServingSimulation, Step
    from rich.console import Console
    from torch import Tensor

# In mode "sample". The timed steps lie between the checked ones, which leave the caches full of other things.
SAMPLE_EVERY = 16
TIME_EVERY = 16
TIME_PHASE = 8


class DeviceChoice(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Verify(StrEnum):
    every = "every"
    sample = "sample"
    none = "none"


class Extent(StrEnum):
    live = "live"
    full = "full"


@dataclass(frozen=True)
class ReplayOptions:
    """What to replay, and how. The fields are the options of the command.

    ``requests`` and ``max_steps`` limit the run; None is no limit. ``pages`` is the size of the KV pool in
    pages; None leaves it to the simulation.
    """

    trace: Path
    device: DeviceChoice = DeviceChoice.auto
    backends: int = 3
    max_batch: int = 64
    context_len: int = 16384
    requests: int | None = None
    max_steps: int | None = None
    verify: Verify = Verify.sample
    page_size: int = 64
    index_topk: int = 2048
    extent: Extent = Extent.live
    pages: int | None = None
    step_ms: float = 30.0
    preempt_probability: float = 0.0
    pad_batch: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Offence:
    """The first element that was wrong: where, what it held and what the reference says."""

    step: int
    backend: int
    field: str
    index: tuple[int, ...]
    got: int
    expected: int

    def __str__(self) -> str:
        place = ", ".join(map(str, self.index))
        return (
            f"step {self.step}, backend {self.backend}: {self.field}[{place}] is {self.got}, "
            f"the reference says {self.expected}"
        )


@dataclass(frozen=True)
class Distribution:
    """Spread of a whole number over the run."""

    min: int
    median: int
    p95: int
    max: int

    @classmethod
    def of_counts(cls, counts: NDArray[np.int64]) -> Distribution:
        """From how often each number occurred: int64 [largest number + 1], not all zero."""
        import numpy as np

        below = np.cumsum(counts)
        # The smallest number that at least this share of all occurrences doesn't exceed.
        ranks = [1, *(max(1, -(-int(below[-1]) * percent // 100)) for percent in (50, 95)), int(below[-1])]
        low, median, p95, high = (int(i) for i in np.searchsorted(below, ranks))
        return cls(low, median, p95, high)


@dataclass(frozen=True)
class ReplaySummary:
    """What a replay did and saw.

    Attributes:
        trace, device, backends, extent, verify, page_size, index_topk, seed: what was replayed, and how.
        requests: requests of the trace that were to be served; ``finished`` of them were.
        clipped_prompts: requests whose prompt was clipped to the context length.
        preemptions: times that a request lost its pages and queued again.
        queued_steps: steps before which a request waited for a place in the batch or for pages.
        steps: refreshes. ``launches`` is what the plan counts; it must be the same number.
        verified_steps, timed_steps: of these, how many were checked and how many were timed.
        batch, length: requests in a step, and tokens of a request in a step; padding requests aren't counted.
        bytes_written: bytes that the refreshes had to write, in all backends.
        elements_checked: destination elements compared, those that had to stay untouched among them.
        mismatches: elements that weren't what the reference says.
        first_offence: the first of them, None if there is none.
        refresh_us, torch_us: median microseconds from call to completion on the device, for the plan and for
            the same refresh in tensor operations; None if no step was timed.
    """

    trace: str
    device: str
    backends: int
    extent: str
    verify: str
    page_size: int
    index_topk: int
    seed: int
    requests: int
    finished: int
    clipped_prompts: int
    preemptions: int
    queued_steps: int
    steps: int
    launches: int
    verified_steps: int
    timed_steps: int
    batch: Distribution
    length: Distribution
    bytes_written: int
    elements_checked: int
    mismatches: int
    first_offence: Offence | None
    refresh_us: float | None
    torch_us: float | None

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON takes it."""
        return dataclasses.asdict(self)


OnStep = Callable[[int, "ServingSimulation", int], None]


# -------------------------------------------------------------------------------------- the way engines go


def refresh_with_tensor_ops(
    destinations: list[MetadataBuffers],
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    *,
    max_len: int,
    index_topk: int,
    page_size: int,
) -> None:
    """The refresh as engines write it in PyTorch: compute each field once, copy it into each backend.

    All columns below ``max_len`` are written, as with extent "full". Arguments as in ``plan.run``; the
    destinations have every field but seqlens_expanded, and no real_page_table if pages hold one token.
    """
    import torch

    bs = len(seq_lens)
    cache = seq_lens.to(torch.int32)
    cumulative = torch.cumsum(cache, 0, dtype=torch.int32)
    table = req_to_token[req_pool_indices, :max_len]
    nsa = cache.clamp(max=index_topk)
    nsa_cumulative = torch.cumsum(nsa, 0, dtype=torch.int32)
    tables = [table] if page_size == 1 else [table, table[:, ::page_size] // page_size]
    for buffers in destinations:
        for destination, source in (
            (buffers.cache_seqlens, cache),
            (buffers.nsa_cache_seqlens, nsa),
        ):
            assert destination is not None
            destination[:bs].copy_(source)
        for destination, source in (
            (buffers.cu_seqlens_k, cumulative),
            (buffers.nsa_cu_seqlens_k, nsa_cumulative),
        ):
            assert destination is not None
            destination[1 : bs + 1].copy_(source)
        for destination, source in zip((buffers.page_indices, buffers.real_page_table), tables, strict=False):
            assert destination is not None
            destination[:bs, : source.shape[1]].copy_(source)


# ------------------------------------------------------------------------------------------------ checking


class Checker:
    """Compares what a refresh wrote with what the reference writes, over the whole buffers.

    Before a checked step the destinations are filled with a value that no refresh writes, and so are shadow
    buffers, which the reference then refreshes: one backend's, as all backends get the same. Filled anew each
    time, because tables change little from step to step: an element that the plan forgot would otherwise still
    hold the right value.

    Attributes:
        steps, elements: what was checked.
        mismatches: wrong elements.
        first: the first wrong element, or None.
    """

    def __init__(self, real: list[MetadataBuffers], refresh: Callable[[list[MetadataBuffers]], None]) -> None:
        """``real`` are of one shape; ``refresh`` applies the reference for the current step to what it is given."""
        import torch

        self._real = real
        self._shadow = _like(real[0], torch.empty_like)
        self._refresh = refresh
        self.steps = 0
        self.elements = 0
        self.mismatches = 0
        self.first: Offence | None = None

    def before(self, step: int) -> None:
        """Prepare the destinations, and the shadow with what each of them must hold after ``step``."""
        # Negative, so neither a length nor a slot; another one each time, so that nothing old passes for it.
        poison = -1 - step % 2**30
        for buffers in (*self._real, self._shadow):
            for _, tensor in buffers.items():
                tensor.fill_(poison)
        self._refresh([self._shadow])

    def after(self, step: int) -> None:
        """Compare."""
        import torch

        self.steps += 1
        for backend, real in enumerate(self._real):
            for (field, got), (_, expected) in zip(real.items(), self._shadow.items(), strict=True):
                self.elements += got.numel()
                if torch.equal(got, expected):
                    continue
                places = (got != expected).nonzero()
                self.mismatches += len(places)
                if self.first is None:
                    index = tuple(places[0].tolist())
                    self.first = Offence(step, backend, field.name, index, int(got[index]), int(expected[index]))


def _like(buffers: MetadataBuffers, allocate: Callable[[Tensor], Tensor]) -> MetadataBuffers:
    return dataclasses.replace(buffers, **{field.name: allocate(tensor) for field, tensor in buffers.items()})


# ------------------------------------------------------------------------------------------------- the run


def _allocate(max_batch: int, width: int, page_size: int, device: torch.device) -> MetadataBuffers:
    """Destinations of one backend for ``max_batch`` requests, tables as wide as the pool; all elements -1."""
    import torch
    from onelaunch import MetadataBuffers

    def new(*shape: int) -> Tensor:
        return torch.full(shape, -1, dtype=torch.int32, device=device)

    return MetadataBuffers(
        cache_seqlens=new(max_batch),
        cu_seqlens_k=new(max_batch + 1),
        page_indices=new(max_batch, width),
        nsa_cache_seqlens=new(max_batch),
        nsa_cu_seqlens_k=new(max_batch + 1),
        # With pages of one token it would be page_indices once more; engines take that one for both.
        real_page_table=new(max_batch, -(-width // page_size)) if page_size > 1 else None,
    )


def _device(choice: str) -> torch.device:
    import torch

    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise ArgumentError("--device cuda: PyTorch sees no CUDA device. Take --device cpu, or auto.")
    return torch.device("cuda" if choice != "cpu" and available else "cpu")


def run_replay(options: ReplayOptions, on_step: OnStep | None = None) -> ReplaySummary:
    """Replay a trace: one refresh of all backends in each step of a simulated serving run.

    Args:
        options: what to replay.
        on_step: called after each step with the number of steps so far, the simulation, and the number of
            requests to be served.

    Raises:
        ArgumentError: an option is out of range, the trace isn't one, or there is no such device.
    """
    import numpy as np
    import onelaunch
    import torch
    from onelaunch.cli.lab.serving import ServingSimulation, Trace
    from onelaunch.inspect.traffic import traffic
    from onelaunch.spec import reference

    for name, value in (
        ("--requests", options.requests),
        ("--max-steps", options.max_steps),
        ("--index-topk", options.index_topk),
        ("--backends", options.backends),
    ):
        if value is not None and value < 1:
            raise ArgumentError(f"{name} is {value}; it must be 1 or more.")
    device = _device(options.device)
    trace = Trace.load(options.trace)
    if options.requests is not None:
        trace = trace.head(options.requests)
    simulation = ServingSimulation(
        trace,
        max_batch=options.max_batch,
        context_len=options.context_len,
        num_backends=options.backends,
        page_size=options.page_size,
        pages=options.pages,
        step_ms=options.step_ms,
        preempt_probability=options.preempt_probability,
        pad_batch=options.pad_batch,
        seed=options.seed,
        device=device,
    )
    pool = simulation.req_to_token

    def destinations() -> list[MetadataBuffers]:
        return [_allocate(options.max_batch, pool.shape[1], options.page_size, device) for _ in range(options.backends)]

    ours, theirs = destinations(), destinations()
    plan = onelaunch.bind(
        ours,
        req_to_token=pool,
        mode="decode",
        index_topk=options.index_topk,
        page_size=options.page_size,
        extent=options.extent.value,
        seq_lens_dtype=torch.int64,
        req_pool_indices_dtype=torch.int64,
    )
    full = options.extent is Extent.full
    step: Step

    def run_ours() -> None:
        if full:
            plan.run(step.seq_lens, step.req_pool_indices, max_len=step.max_len)
        else:
            plan.run(step.seq_lens, step.req_pool_indices)

    def run_theirs() -> None:
        refresh_with_tensor_ops(
            theirs,
            step.seq_lens,
            step.req_pool_indices,
            pool,
            max_len=step.max_len,
            index_topk=options.index_topk,
            page_size=options.page_size,
        )

    def run_reference(shadow: list[MetadataBuffers]) -> None:
        reference.refresh(
            shadow,
            step.seq_lens,
            step.req_pool_indices,
            pool,
            mode="decode",
            index_topk=options.index_topk,
            page_size=options.page_size,
            extent=options.extent.value,
            max_len=step.max_len if full else None,
        )

    checker = None if options.verify is Verify.none else Checker(ours, run_reference)
    check_every = 1 if options.verify is Verify.every else SAMPLE_EVERY
    launches_before = plan.launches
    batch_counts = np.zeros(options.max_batch + 1, np.int64)
    length_counts = np.zeros(options.context_len + 1, np.int64)
    our_us: list[float] = []
    their_us: list[float] = []
    bytes_written = steps = 0

    for step in islice(simulation, options.max_steps):
        checked = checker is not None and step.number % check_every == 0
        if checker and checked:
            checker.before(step.number)
        if step.number % TIME_EVERY == TIME_PHASE:
            timed = [(run_ours, our_us), (run_theirs, their_us)]
            # Taking turns: whoever goes second finds the rows of the pool in the cache.
            for run, times in timed if len(our_us) % 2 == 0 else reversed(timed):
                times.append(_microseconds(run, device))
        else:
            run_ours()
        if checker and checked:
            checker.after(step.number)

        steps += 1
        batch_counts[step.requests] += 1
        np.add.at(length_counts, step.lengths[: step.requests], 1)
        bytes_written += traffic(plan.config, step.lengths.tolist(), step.max_len).bytes_written
        if on_step:
            on_step(steps, simulation, len(trace))
    if device.type == "cuda":  # pragma: gpu
        # A fault of the last launches must show here, not after the summary.
        torch.cuda.synchronize(device)

    return ReplaySummary(
        trace=options.trace.name,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        backends=options.backends,
        extent=options.extent.value,
        verify=options.verify.value,
        page_size=options.page_size,
        index_topk=options.index_topk,
        seed=options.seed,
        requests=len(trace),
        finished=simulation.finished,
        clipped_prompts=simulation.clipped_prompts,
        preemptions=simulation.preemptions,
        queued_steps=simulation.queued_steps,
        steps=steps,
        launches=plan.launches - launches_before,
        verified_steps=checker.steps if checker else 0,
        timed_steps=len(our_us),
        batch=Distribution.of_counts(batch_counts),
        length=Distribution.of_counts(length_counts),
        bytes_written=bytes_written,
        elements_checked=checker.elements if checker else 0,
        mismatches=checker.mismatches if checker else 0,
        first_offence=checker.first if checker else None,
        refresh_us=float(np.median(our_us)) if our_us else None,
        torch_us=float(np.median(their_us)) if their_us else None,
    )


def _microseconds(run: Callable[[], None], device: torch.device) -> float:
    """Wall time of ``run`` until the device is done with it."""
    import torch

    if device.type == "cuda":  # pragma: gpu
        torch.cuda.synchronize(device)
    start = time.perf_counter_ns()
    run()
    if device.type == "cuda":  # pragma: gpu
        torch.cuda.synchronize(device)
    return (time.perf_counter_ns() - start) / 1000


# --------------------------------------------------------------------------------------------- the command


def replay(
    trace: Annotated[Path, typer.Argument(help="CSV with arrival_ms, input_tokens, output_tokens.")],
    device: Annotated[
        DeviceChoice, typer.Option(help="Where to run; auto takes the GPU if there is one.")
    ] = ReplayOptions.device,
    backends: Annotated[int, typer.Option(help="Draft backends, each with its own buffers.")] = ReplayOptions.backends,
    max_batch: Annotated[int, typer.Option(help="Requests that run at once.")] = ReplayOptions.max_batch,
    context_len: Annotated[
        int, typer.Option(help="Tokens of a request at most; longer prompts are clipped.")
    ] = ReplayOptions.context_len,
    requests: Annotated[int | None, typer.Option(help="Serve only the first so many requests.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Stop after so many steps.")] = None,
    verify: Annotated[
        Verify,
        typer.Option(help=f"Which steps to compare with the reference; sample is every {SAMPLE_EVERY}th."),
    ] = ReplayOptions.verify,
    page_size: Annotated[int, typer.Option(help="Tokens in a KV page.")] = ReplayOptions.page_size,
    index_topk: Annotated[int, typer.Option(help="Tokens that sparse attention selects.")] = ReplayOptions.index_topk,
    extent: Annotated[
        Extent,
        typer.Option(help="Write what the lengths make live, or all columns up to the longest."),
    ] = ReplayOptions.extent,
    pages: Annotated[
        int | None,
        typer.Option(help="KV pages in the pool.", show_default="half of what full contexts need"),
    ] = None,
    step_ms: Annotated[float, typer.Option(help="Simulated milliseconds a step takes.")] = ReplayOptions.step_ms,
    preempt_probability: Annotated[
        float, typer.Option(help="Chance of a request to lose its pages after a step.")
    ] = ReplayOptions.preempt_probability,
    pad_batch: Annotated[
        int, typer.Option(help="Pad batches to a multiple of this, as captured graphs need.")
    ] = ReplayOptions.pad_batch,
    seed: Annotated[int, typer.Option(help="Of all random choices.")] = ReplayOptions.seed,
    json_to: Annotated[
        str | None,
        typer.Option("--json", metavar="FILE", help="Write the summary as JSON; - is standard output."),
    ] = None,
) -> None:
    """Serve a request trace in simulation, refresh the draft backends at each step, check every destination.

    Exits with 1 if a destination is wrong or a step took more than one launch, with 2 if an option or the
    trace can't be used.

    \b
    Examples:
      onelaunch replay trace.csv
      onelaunch replay trace.csv --device cpu --max-batch 8 --max-steps 100 --verify every
      onelaunch replay trace.csv --extent full --json -
    """
    from rich.console import Console

    options = ReplayOptions(
        trace=trace,
        device=device,
        backends=backends,
        max_batch=max_batch,
        context_len=context_len,
        requests=requests,
        max_steps=max_steps,
        verify=verify,
        page_size=page_size,
        index_topk=index_topk,
        extent=extent,
        pages=pages,
        step_ms=step_ms,
        preempt_probability=preempt_probability,
        pad_batch=pad_batch,
        seed=seed,
    )
    errors = Console(stderr=True)

    def run() -> ReplaySummary:
        if json_to is not None and json_to != "-":
            with _told(json_to):
                check_writable(Path(json_to))  # before the work
        summary = _run_with_progress(options, errors)
        if json_to is not None:
            _write_json(summary, json_to)
        return summary

    summary: ReplaySummary = sentence(run)
    # Standard output is one JSON document or the table, never both.
    _print_summary(summary, errors if json_to == "-" else Console())
    if summary.mismatches or summary.launches != summary.steps:
        raise typer.Exit(1)


def _run_with_progress(options: ReplayOptions, console: Console) -> ReplaySummary:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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


def _write_json(summary: ReplaySummary, target: str) -> None:
    text = json.dumps(summary.to_dict(), indent=2) + "\n"
    if target == "-":
        sys.stdout.write(text)
        return
    with _told(target):
        write_whole(Path(target), text)


@contextlib.contextmanager
def _told(target: str) -> Iterator[None]:
    """Turns what keeps --json from being written into a sentence."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ArgumentError(
            f"--json {target} can't be written: {reason}. Name a file in a folder that exists."
        ) from error


def _print_summary(summary: ReplaySummary, console: Console) -> None:
    """The summary as a table; in plain text, without lines, where the output isn't a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

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
