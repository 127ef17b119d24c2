"""Thousands of requests of two serving traces, replayed with every destination of every step compared.

The tests use the command on the CPU, and plans as an engine has them: one for each captured batch size, all on slices
of the same destinations, run in random order, on a GPU from CUDA graphs. tests/gpu/run.py runs the command on the
whole traces on a GPU.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onelaunch
import pytest
import torch
from click.testing import CliRunner
from onelaunch import MetadataBuffers
from onelaunch.cli.lab.replay.checker import Checker
from onelaunch.cli.lab.replay.serving import ServingSimulation
from onelaunch.cli.lab.replay.simulated import allocate
from onelaunch.cli.lab.replay.traces import Trace
from onelaunch.cli.main import app
from onelaunch.spec import reference
from support import captured

FULL = Path(__file__).parent / "data" / "full"
# The second trace has longer prompts. Clipped to 1024 tokens, they would leave too few requests to preempt.
TRACES = [("azure_2023_conversation", 1024), ("mooncake_conversation", 2048)]
# Batch sizes that an engine captures.
CAPTURED = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
SETTINGS: dict[str, Any] = {"index_topk": 600, "page_size": 64, "extent": "live"}


@pytest.mark.long
@pytest.mark.parametrize(("name", "context_len"), TRACES)
def test_serving_under_load(name: str, context_len: int) -> None:
    options = ["--device", "cpu", "--max-batch", "256", "--context-len", str(context_len), "--requests", "4000"]
    options += ["--step-ms", "1e6", "--verify", "every", "--preempt-probability", "0.002", "--json", "-"]
    done = CliRunner().invoke(app, ["replay", str(FULL / f"{name}.csv"), *options])
    assert done.exit_code == 0, done.output
    summary = json.loads(done.stdout)
    assert summary["mismatches"] == 0, summary["first_mismatch"]
    assert summary["verified_steps"] == summary["steps"] == summary["launches"] > 100
    assert summary["finished"] == 4000
    assert summary["preemptions"] > 50


class Engine:
    """Two groups of backends and their plans for some captured batch sizes.

    The first group has a plan for each size, on the first rows of its destinations; the second has one plan for all.

    Attributes:
        seq_lens, rows: the inputs, at fixed addresses.
        destinations: those of all backends, for the largest batch.
        run: by batch size, the function that refreshes that many requests; on a GPU it replays a graph.
    """

    def __init__(self, pool: torch.Tensor, sizes: tuple[int, ...]) -> None:
        most, device = max(sizes), pool.device
        self.seq_lens, self.rows = (torch.zeros(most, dtype=torch.int64, device=device) for _ in range(2))
        groups = [[allocate(most, pool.shape[1], SETTINGS["page_size"], device) for _ in range(n)] for n in (3, 1)]
        self.destinations = [*groups[0], *groups[1]]
        whole = onelaunch.bind(groups[1], req_to_token=pool, **SETTINGS)
        self.run: dict[int, Callable[[], object]] = {}
        for size in sizes:
            own = onelaunch.bind([first_rows(buffers, size) for buffers in groups[0]], req_to_token=pool, **SETTINGS)
            assert own.capacity == size

            def refresh(size: int = size, own: onelaunch.Plan = own) -> None:
                for plan in (own, whole):
                    plan.run(self.seq_lens[:size], self.rows[:size])

            self.run[size] = refresh
        if device.type == "cuda":  # engines capture the largest batch first
            self.run = {size: captured(self.run[size]).replay for size in reversed(sizes)}


def first_rows(buffers: MetadataBuffers, size: int) -> MetadataBuffers:
    """The slices of the destinations for one captured batch size. Running sums have one element more."""
    slices = {field.name: tensor[: size + field.extra] for field, tensor in buffers.items()}
    return dataclasses.replace(buffers, **slices)


@pytest.mark.parametrize(
    ("target", "requests"),
    [
        pytest.param("cpu", 1000, id="cpu"),
        pytest.param("cpu", None, id="cpu-whole", marks=pytest.mark.long),
        pytest.param("cuda", None, id="cuda-whole", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize(("name", "context_len"), TRACES)
def test_captured_batches_in_random_order(name: str, context_len: int, target: str, requests: int | None) -> None:
    """Batches of any size follow one another, with requests in any order. No batch affects the next one's results."""
    trace = Trace.load(FULL / f"{name}.csv")
    trace = trace if requests is None else trace.head(requests)
    sizes = tuple(size for size in CAPTURED if requests is None or size <= 32)
    simulation = ServingSimulation(
        trace,
        max_batch=2 * max(sizes),  # so there are half as many pages as full contexts would need
        context_len=context_len,
        page_size=SETTINGS["page_size"],
        step_ms=1e6,  # so long a step that the next request has always arrived
        preempt_probability=0.002,
        device=target,
    )
    engine = Engine(simulation.req_to_token, sizes)
    size = 0

    def refresh_reference(shadow: list[MetadataBuffers]) -> None:
        reference.refresh(shadow, engine.seq_lens[:size], engine.rows[:size], simulation.req_to_token, **SETTINGS)

    checker = Checker(engine.destinations, refresh_reference)
    numbers = np.random.default_rng(7)
    replayed: Counter[int] = Counter()
    memory = []
    for step in simulation:
        size = int(numbers.choice([s for s in sizes if s <= step.requests]))
        chosen = torch.from_numpy(numbers.permutation(step.requests)[:size]).to(target)
        engine.seq_lens[:size] = step.seq_lens[chosen]
        engine.rows[:size] = step.req_pool_indices[chosen]
        checker.before(step.number)
        engine.run[size]()
        checker.after(step.number)
        replayed[size] += 1
        if target == "cuda":
            memory.append(torch.cuda.memory_allocated())
    assert checker.mismatches == 0, checker.first
    assert checker.steps == replayed.total() > 100
    assert set(replayed) == set(sizes)
    assert simulation.finished == len(trace)
    assert simulation.preemptions > 10
    # A leak in each step would add up; the steps' temporary tensors are freed.
    assert max(memory[-100:], default=0) <= max(memory[100:200], default=0) + 2**20
