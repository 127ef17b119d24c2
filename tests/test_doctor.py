"""onelaunch doctor: its findings, and which to fix first."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from onelaunch import ToolchainError, torch_version
from onelaunch.build import toolchain
from onelaunch.cache.store import Store
from onelaunch.cli.main import app
from onelaunch.inspect import doctor
from onelaunch.load import loader


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(loader, "_loaded", {})
    store = Store(tmp_path / "cache")
    monkeypatch.setattr(loader, "default_store", lambda: store)
    return store


def test_a_machine_that_can_build(store: Store) -> None:
    result = CliRunner().invoke(app, ["doctor"], env={"ONELAUNCH_LOCK_TIMEOUT": "7"})
    assert result.exit_code == 0, result.output
    assert "ONELAUNCH_RETRY" not in result.output
    assert re.search("^ok    ONELAUNCH_LOCK_TIMEOUT +'7'", result.output, re.M)
    lines = {line[6:].split("  ")[0]: line for line in result.output.splitlines()}
    for name in ("Python", "torch", "host compiler", "ninja", "cache", "a kernel for the CPU"):
        assert lines[name].startswith("ok"), lines[name]
    assert "built in " in lines["a kernel for the CPU"]
    assert ", ran" in lines["a kernel for the CPU"]


@pytest.mark.parametrize("level", ["note", "fix"])
def test_as_json(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = doctor.Row("ninja", level, "none", "install it")
    monkeypatch.setattr(doctor, "examine", lambda: [row])
    result = CliRunner().invoke(app, ["doctor", "--json"])
    facts = json.loads(result.stdout)
    assert facts["rows"] == [dataclasses.asdict(row)]
    assert facts["ok"] is (level == "note")
    assert result.exit_code == int(level == "fix")


def test_the_first_thing_to_fix(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*args: Any) -> Any:
        raise ToolchainError("A host C++ compiler was not found.")

    monkeypatch.setattr(toolchain, "find_host_compiler", missing)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "onelaunch: fix this first: host compiler is not usable: A host C++ compiler was not found." in result.output


def test_a_cache_that_others_can_write(store: Store) -> None:
    store.root.mkdir()
    store.root.chmod(0o777)
    (row,) = doctor._cache()
    assert row.level == "fix"
    assert "can be written by others" in row.origin


def test_an_old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        toolchain.find_toolkit()
    except ToolchainError:
        pytest.skip("no CUDA toolkit")
    rows = {row.name: row for row in doctor._versions("none", {"driver": "470.82"})}
    assert rows["nvcc with driver"].level == "fix"
    assert "or later" in rows["nvcc with driver"].origin
    rows = {row.name: row for row in doctor._versions("11.8", {"driver": "999.1"})}
    assert rows["nvcc with driver"].level == "ok"
    assert rows["nvcc with torch"].level == "note"


def test_a_torch_that_is_too_old_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        raise ToolchainError("torch is 2.9.1, and onelaunch needs 2.11 or later.")

    monkeypatch.setattr(torch_version, "check", check)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 1
    assert "onelaunch: fix this first: torch is not usable: torch is 2.9.1, and onelaunch needs 2.11" in result.stderr
