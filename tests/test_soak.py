"""Both traces in full through the plan on the CPU; tests/gpu/run.py soaks CUDA graphs the same way."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from onelaunch.cli.lab.replay.traces import Trace

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "gpu"))
import soak  # noqa: E402


# The second's prompts are longer: clipped to as little, they leave too few requests to preempt.
@pytest.mark.parametrize(("name", "context_len"), [("azure_2023_conversation", 1024), ("mooncake_conversation", 2048)])
def test_serving_under_load(name: str, context_len: int) -> None:
    trace = HERE / "data" / "full" / f"{name}.csv"
    done = soak.soak(trace, (1, 3), torch.device("cpu"), max_batch=256, context_len=context_len)
    assert done["mismatches"] == 0, done["first_mismatch"]
    assert done["checked_steps"] == done["steps"]
    assert done["finished"] == len(Trace.load(trace))
    assert done["preemptions"] > 100
    assert done["memory_added"] < 64 * 2**20
