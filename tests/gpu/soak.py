"""An hour of simulated serving in minutes: requests come, are preempted and finish, pages and pool rows are reused.

On a GPU the refreshes are replays of CUDA graphs, one captured for each batch size, picked in random order.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onelaunch
import torch
from onelaunch import MetadataBuffers
from onelaunch.cli.lab.replay.checker import Checker
from onelaunch.cli.lab.replay.serving import ServingSimulation
from onelaunch.cli.lab.replay.simulated import allocate
from onelaunch.cli.lab.replay.traces import Trace
from onelaunch.spec import reference

CAPTURED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
PAGE_SIZE = 64
INDEX_TOPK = 2048


def soak(
    trace: Path,
    backends: int | Sequence[int],
    device: torch.device,
    *,
    max_batch: int,
    context_len: int,
    check_every: int = 1,
    max_steps: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Serves a whole trace as fast as its steps go, and checks every destination of every ``check_every``-th step.

    Args:
        backends: how many, or how many each of several plans has; these all refresh at every step.
        max_batch: requests at once; requests are admitted as soon as there is room, whenever they arrived.
        context_len: longer prompts are clipped to it.
        max_steps: stop early.

    Returns:
        Counts, the first wrong element if there is one, and how much memory was added after the first tenth.
    """
    counts = [backends] if isinstance(backends, int) else backends
    random = np.random.default_rng(seed)
    simulation = ServingSimulation(
        Trace.load(trace),
        max_batch=max_batch,
        context_len=context_len,
        num_backends=max(counts),
        page_size=PAGE_SIZE,
        step_ms=1e6,
        preempt_probability=0.002,
        seed=seed,
        device=device,
    )
    pool = simulation.req_to_token
    targets = [[allocate(max_batch, pool.shape[1], PAGE_SIZE, device) for _ in range(count)] for count in counts]
    plans = [onelaunch.bind(t, req_to_token=pool, index_topk=INDEX_TOPK, page_size=PAGE_SIZE) for t in targets]
    # Graphs read their inputs here; on the CPU a plan does.
    seq_lens = torch.ones(max_batch, dtype=torch.int64, device=device)
    rows = torch.zeros(max_batch, dtype=torch.int64, device=device)
    graphs: dict[int, torch.cuda.CUDAGraph] = {}
    if device.type == "cuda":
        for size in (size for size in CAPTURED if size <= max_batch):
            graphs[size] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[size]):
                for plan in plans:
                    plan.run(seq_lens[:size], rows[:size])
    size = 0

    def refresh_reference(shadow: list[MetadataBuffers]) -> None:
        reference.refresh(
            shadow,
            seq_lens[:size],
            rows[:size],
            pool,
            index_topk=INDEX_TOPK,
            page_size=PAGE_SIZE,
            extent="live",
        )

    # What is right doesn't depend on the number of backends, so it is worked out once for all of them.
    checker = Checker([buffers for each in targets for buffers in each], refresh_reference)
    steps = 0
    sizes: set[int] = set()
    start = time.perf_counter()
    memory: list[int] = []
    for step in simulation:
        if max_steps is not None and steps >= max_steps:
            break
        allowed = [s for s in graphs if s <= step.requests] if graphs else [step.requests]
        size = int(random.choice(allowed))
        # Some of the running requests, in any order.
        chosen = torch.from_numpy(random.permutation(step.requests)[:size]).to(device)
        seq_lens[:size] = step.seq_lens[chosen]
        rows[:size] = step.req_pool_indices[chosen]
        checked = steps % check_every == 0
        if checked:
            checker.before(steps)
        if graphs:
            graphs[size].replay()
        else:
            for plan in plans:
                plan.run(seq_lens[:size], rows[:size])
        if checked:
            checker.after(steps)
        steps += 1
        sizes.add(size)
        if steps % 100 == 0:
            memory.append(_memory(device))
    settled = memory[len(memory) // 10 :]
    return {
        "steps": steps,
        "checked_steps": checker.steps,
        "elements_checked": checker.elements,
        "mismatches": checker.mismatches,
        "first_mismatch": str(checker.first) if checker.first else None,
        "finished": simulation.finished,
        "preemptions": simulation.preemptions,
        "batch_sizes": len(sizes),
        "memory_added": max(settled) - settled[0] if settled else 0,
        "seconds": round(time.perf_counter() - start, 1),
    }


def _memory(device: torch.device) -> int:
    """Bytes in use: of the device's allocator, or the largest resident size of the process so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
