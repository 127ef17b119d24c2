"""The replay itself: one refresh of all backends in each step of a simulated serving run, checked and timed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from itertools import islice

import numpy as np
import onelaunch
import torch
from onelaunch import MetadataBuffers
from onelaunch.errors import ArgumentError
from onelaunch.inspect.traffic import traffic
from onelaunch.spec import reference
from torch import Tensor

from .checker import Checker
from .options import SAMPLE_EVERY, TIME_EVERY, TIME_PHASE, Extent, ReplayOptions, Verify, Writes
from .pool import row_width
from .serving import ServingSimulation, Step
from .summary import Distribution, ReplaySummary
from .tiles import TileCounter
from .traces import Trace

OnStep = Callable[[int, "ServingSimulation", int], None]


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


def allocate(max_batch: int, width: int, page_size: int, device: torch.device) -> MetadataBuffers:
    """One backend's destinations for ``max_batch`` requests, with tables as wide as the pool, filled with -1."""

    def new(*shape: int) -> Tensor:
        return torch.full(shape, -1, dtype=torch.int32, device=device)

    return MetadataBuffers(
        cache_seqlens=new(max_batch),
        cu_seqlens_k=new(max_batch + 1),
        page_indices=new(max_batch, width),
        nsa_cache_seqlens=new(max_batch),
        nsa_cu_seqlens_k=new(max_batch + 1),
        # With pages of one token it would equal page_indices, which engines then use for both.
        real_page_table=new(max_batch, -(-width // page_size)) if page_size > 1 else None,
    )


def _device(choice: str) -> torch.device:
    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise ArgumentError("--device cuda: PyTorch sees no CUDA device. Take --device cpu, or auto.")
    return torch.device("cuda" if choice != "cpu" and available else "cpu")


def _check_memory(options: ReplayOptions, device: torch.device) -> None:
    """Refuses what can't fit in memory before anything is allocated: the system would end the process instead."""
    words = row_width(options.context_len, options.backends + 1, options.page_size) * (options.max_batch + 1)
    # The pool, and two sets of destinations; on the host two arrays of 64-bit page numbers.
    needed = 4 * words * (1 + 2 * options.backends) + 16 * (options.pages or 0)
    if device.type == "cuda":  # pragma: gpu
        room = torch.cuda.mem_get_info(device)[0]
    else:
        room = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > room:
        raise ArgumentError(
            f"The replay needs {needed / 2**30:,.0f} GiB, and there are {room / 2**30:,.0f}. Lower --max-batch "
            f"({options.max_batch}), --context-len ({options.context_len}), --backends ({options.backends}) or --pages."
        )


def run_replay(options: ReplayOptions, on_step: OnStep | None = None) -> ReplaySummary:
    """Replay a trace: one refresh of all backends in each step of a simulated serving run.

    Args:
        options: what to replay.
        on_step: called after each step with the number of steps so far, the simulation, and the number of
            requests to be served.

    Raises:
        ArgumentError: an option is out of range or needs too much memory, the trace isn't one, or there is no such
            device.
    """
    for name, value in (
        ("--requests", options.requests),
        ("--max-steps", options.max_steps),
        ("--index-topk", options.index_topk),
        ("--backends", options.backends),
    ):
        if value is not None and value < 1:
            raise ArgumentError(f"{name} is {value}; it must be 1 or more.")
    device = _device(options.device)
    _check_memory(options, device)
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
        return [allocate(options.max_batch, pool.shape[1], options.page_size, device) for _ in range(options.backends)]

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
        writes=options.writes.value,
    )
    verified = options.writes is Writes.verified
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

    # The shadow shows which tiles change, in steps that aren't checked, too.
    checker = None if options.verify is Verify.none and not verified else Checker(ours, run_reference, verified)
    counter = TileCounter(checker.table) if checker and verified else None
    check_every = 1 if options.verify is Verify.every else SAMPLE_EVERY
    launches_before = plan.launches
    batch_counts = np.zeros(options.max_batch + 1, np.int64)
    length_counts = np.zeros(options.context_len + 1, np.int64)
    our_us: list[float] = []
    their_us: list[float] = []
    bytes_written = steps = 0

    for step in islice(simulation, options.max_steps):
        checked = options.verify is not Verify.none and step.number % check_every == 0
        if checker and (checked or verified):
            checker.before(step.number)
        if checker and counter:
            ends = torch.full_like(step.seq_lens, step.max_len) if full else step.seq_lens
            counter.count(checker.table, ends)
        if step.number % TIME_EVERY == TIME_PHASE:
            timed = [(run_ours, our_us), (run_theirs, their_us)]
            # They take turns to go first: the second finds the pool's rows in the cache.
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
        # An error of the last launches is raised here, before the summary.
        torch.cuda.synchronize(device)

    return ReplaySummary(
        trace=options.trace.name,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        backends=options.backends,
        extent=options.extent.value,
        writes=options.writes.value,
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
        tiles=counter.tiles if counter else None,
        tiles_written=counter.changed if counter else None,
        elements_checked=checker.elements if checker else 0,
        mismatches=checker.mismatches if checker else 0,
        first_mismatch=checker.first if checker else None,
        refresh_us=float(np.median(our_us)) if our_us else None,
        torch_us=float(np.median(their_us)) if their_us else None,
    )


def _microseconds(run: Callable[[], None], device: torch.device) -> float:
    """Wall time of ``run``, in microseconds, until the device has finished it."""
    if device.type == "cuda":  # pragma: gpu
        torch.cuda.synchronize(device)
    start = time.perf_counter_ns()
    run()
    if device.type == "cuda":  # pragma: gpu
        torch.cuda.synchronize(device)
    return (time.perf_counter_ns() - start) / 1000
