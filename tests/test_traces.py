"""Thousands of requests of two serving traces, replayed on the CPU with every destination of every step compared.

tests/gpu/run.py replays the whole traces on a GPU.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from onelaunch.cli.main import app

FULL = Path(__file__).parent / "data" / "full"


# The prompts of the second are longer: clipped to as little, they leave too few requests to preempt.
@pytest.mark.long
@pytest.mark.parametrize(("name", "context_len"), [("azure_2023_conversation", 1024), ("mooncake_conversation", 2048)])
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
