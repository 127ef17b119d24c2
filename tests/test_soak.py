"""A part of the soak that tests/gpu/soak.py runs in full on a GPU: here through the plan, on the CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "gpu"))
import soak  # noqa: E402


@pytest.mark.parametrize("backends", [3, 7])
@pytest.mark.parametrize("trace", ["azure_2023_conversation", "mooncake_conversation"])
def test_serving_under_load(trace: str, backends: int) -> None:
    done = soak.soak(
        HERE / "data" / f"{trace}.csv",
        backends,
        torch.device("cpu"),
        max_batch=96,
        context_len=2048,
        check_every=3,
        max_steps=300,
    )
    assert done["mismatches"] == 0, done["first_offence"]
    assert done["checked_steps"] == 100
    assert done["finished"] > 50
    assert done["preemptions"] > 10
    assert done["memory_added"] < 64 * 2**20
