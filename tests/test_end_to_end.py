"""What is kept of the real SGLang's runs on a GPU (`make engines-gpu`) shows what it is kept for."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

GPU = Path(__file__).parent / "engines" / "gpu"


@pytest.fixture(scope="module")
def run() -> Any:
    spec = importlib.util.spec_from_file_location("engines_gpu_run", GPU / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tokens() -> Any:
    return json.loads((GPU / "tokens.json").read_text())


def test_tokens_and_verify_steps_are_the_same_with_and_without(run: Any, tokens: Any) -> None:
    wanted: dict[str, set[str]] = {}
    for each in run.token_runs():
        wanted.setdefault(each.configuration, set()).add(each.kind)
    assert {configuration: set(kinds) for configuration, kinds in tokens.items()} == wanted
    for configuration, kinds in tokens.items():
        assert run.differences(kinds) == [], configuration
        for result in kinds.values():
            assert set(result["scenarios"]) == {"batch 16", "batch 1", "shrinking"}
            assert result["versions"]["sglang"] == "0.5.17"
            assert result["versions"]["gpu"]


def test_what_would_be_wrong_is_noticed(run: Any, tokens: Any) -> None:
    kinds = tokens["triton, 3 steps, page 1"]

    def found(kind: str, change: Any) -> list[str]:
        changed = copy.deepcopy(kinds)
        change(changed[kind])
        return run.differences(changed)

    assert "on: " in found("on", lambda r: r["scenarios"]["shrinking"][0].update(verify_steps=1))[0]
    assert "on: " in found("on", lambda r: r["scenarios"]["batch 1"][0].update(hash="0"))[0]
    assert "rounds differ" in found("off", lambda r: r["scenarios"]["batch 16"][1].update(hash="0"))[0]
    assert "isn't attached" in found("on", lambda r: r["probe"].update(attachments=[]))[0]
    assert "after the capture" in found("on", lambda r: r["probe"].update(built_or_bound_after_capture=["bind"]))[0]
    steps = kinds["off"]["scenarios"]["batch 1"][0]["verify_steps"]
    assert "same verify steps" in found(
        "spoiled", lambda r: r["scenarios"]["batch 1"][0].update(verify_steps=steps)
    )[0]  # fmt: skip
    assert found("on", lambda r: r.update(error=1)) == ["on: 1"]


def test_the_table_has_off_and_on_side_by_side(run: Any) -> None:
    times = json.loads((GPU / "times.json").read_text())
    lines = run.table(times).splitlines()
    assert len(lines) == 2 + 2 * len(times)
    for configuration, kinds in times.items():
        launches = kinds["on"]["probe"]["launches"]
        for role in run.ROLES:
            before, after = launches["off"].get(role, {}), launches["on"].get(role, {})
            assert after.get("kernels", 0) <= before.get("kernels", 0), (configuration, role)
