"""generated/ is up to date, and every shipped kernel has evidence of a run on a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from onelaunch import PRESETS
from onelaunch.cli.generate import check_folder
from onelaunch.inspect.kernels import fingerprint
from support import ONE_DEVICE

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "gpu"))
import table  # noqa: E402
import travel  # noqa: E402

EVIDENCE, BENCH = (ROOT / "tests" / "gpu" / name for name in ("evidence.json", "bench.json"))
TRAVEL, TWO_DEVICES = (ROOT / "tests" / "gpu" / name for name in ("travel.json", "two_devices.json"))


def test_generated_is_up_to_date() -> None:
    difference = check_folder(ROOT / "generated")
    assert not difference, f"{difference}\nRun: onelaunch generate"


@pytest.mark.parametrize("name", PRESETS)
def test_every_shipped_kernel_has_run_on_a_gpu(name: str) -> None:
    evidence = json.loads(EVIDENCE.read_text(encoding="utf-8"))
    assert evidence["kernels"].get(name) == fingerprint(PRESETS[name]), (
        f"{EVIDENCE.relative_to(ROOT)} has no run of {name} as it is emitted now. On a machine with a GPU run: make gpu"
    )


def test_the_readme_shows_the_evidence() -> None:
    evidence, bench = (json.loads(path.read_text(encoding="utf-8")) for path in (EVIDENCE, BENCH))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == table.with_table(readme, evidence, bench), "Run: python tests/gpu/table.py"


def test_the_evidence_says_what_failed_and_what_was_not_run() -> None:
    """The sanitizers and the replays found nothing. Each failure has a reason; what wasn't run is named."""
    evidence = json.loads(EVIDENCE.read_text(encoding="utf-8"))
    suite, not_run = evidence["tests"], evidence.get("not_run", {})
    assert len(suite["failures"]) == suite["failed"]
    # Each failed test has passed since on a GPU with the same kernels, or has a reason, which may be an open question.
    assert {*suite["fixed"], *suite.get("reasons", {})} == {*suite["failures"]}
    assert suite["passed"] > 1000
    assert {"sanitizers", "replays"} - evidence.keys() == not_run.keys()
    if "sanitizers" in evidence:
        errors = {tool: run["errors"] for tool, run in evidence["sanitizers"].items()}
        assert errors == {"memcheck": 0, "racecheck": 0, "initcheck": 0, "synccheck": 0}
    replays = evidence.get("replays", {}).values()
    assert all(run["mismatches"] == 0 and run["elements_checked"] > 0 for run in replays)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert ("not run with these kernels yet: " in readme) == bool(not_run)


def test_what_one_gpu_skips_has_passed_on_two() -> None:
    two = json.loads(TWO_DEVICES.read_text(encoding="utf-8"))
    assert two["devices"] > 1
    assert two["failed"] == []
    skipped = json.loads(EVIDENCE.read_text(encoding="utf-8"))["tests"]["skipped"]
    names = {name for name, _, reason in (text.rpartition(": ") for text in skipped) if reason == ONE_DEVICE}
    assert names
    assert names <= set(two["passed"]), "On a machine with two GPUs run: python tests/gpu/run.py --two-devices"


def test_stored_kernels_have_travelled() -> None:
    """From a machine without a GPU to one without a compiler and with another Python. Their text may be older."""
    said = json.loads(TRAVEL.read_text(encoding="utf-8"))
    packed, ran = said["packed_on"], said["run_on"]
    assert packed["device"] is None
    assert ran["device"]
    assert packed["python"].split(".")[:2] != ran["python"].split(".")[:2]
    assert ran["host_compiler"] is ran["cuda_toolkit"] is None
    assert said["programs_started"] == []
    assert said["page_faults_of_children"] == 0, "a child process ran"
    assert set(said["kernels"]) == set(travel.KERNELS) <= set(PRESETS)
    assert all(kernel["shapes"] >= 5 for kernel in said["kernels"].values())
