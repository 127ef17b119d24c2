"""Builds ahead of time: matrices, bounds, time-outs, and one failure among many."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from typing import Any

import pytest
from onelaunch import PRESETS, ConfigError, KernelConfig
from onelaunch.build import toolchain
from onelaunch.cache import failures
from onelaunch.cache.store import Store
from onelaunch.cli.main import app
from onelaunch.load import loader, prebuild
from onelaunch.load.prebuild import Job
from typer.testing import CliRunner

SMALL = [KernelConfig(fields=("cache_seqlens",), target="cpu", num_backends=n) for n in (1, 2, 3)]
REAL = toolchain.find_host_compiler().path


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("ONELAUNCH_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv(prebuild.JOBS_VARIABLE, raising=False)
    monkeypatch.setattr(loader, "_loaded", {})
    store = Store()
    monkeypatch.setattr(loader, "default_store", lambda: store)
    return store


def verb(*words: str) -> Any:
    return CliRunner().invoke(app, ["build", *words])


def test_a_matrix_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "kernels.toml"
    file.write_text("""
[[build]]
preset = "nsa-decode-3"
archs = ["90a", "100a"]
set = { page_size = [16, 64], extent = ["live", "full"] }

[[build]]
target = "cpu"
set = { fields = "cache_seqlens+cu_seqlens_k", num_backends = 2 }
""")
    jobs = prebuild.read_matrix(file)
    three = PRESETS["nsa-decode-3"]
    assert jobs == [
        *(
            Job(three.replace(page_size=page, extent=extent), ("90a", "100a"))
            for page in (16, 64)
            for extent in ("live", "full")
        ),
        Job(KernelConfig(fields=("cache_seqlens", "cu_seqlens_k"), num_backends=2, target="cpu")),
    ]
    for text, sentence in (
        ("[[build]]\nprset = 'x'", "has prset; allowed: preset, set, target, archs"),
        ("[[build]]\npreset = 'x'", "the preset's name is 'x'"),
        ("[[build]]\nset = { page_sise = 3 }", "page_sise"),
        ("builds = 1", r"must hold tables \[\[build\]\]"),
        ("[[build", "can't be read"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=sentence):
            prebuild.read_matrix(file)


def test_workers_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    monkeypatch.setattr(prebuild, "_available_bytes", lambda: 100 * prebuild.WORKER_BYTES)
    assert prebuild.workers(None, 100) == 8
    assert prebuild.workers(None, 3) == 3
    assert prebuild.workers(16, 100) == 16
    monkeypatch.setenv(prebuild.JOBS_VARIABLE, "2")
    assert prebuild.workers(None, 100) == 2
    monkeypatch.setattr(prebuild, "_available_bytes", lambda: prebuild.WORKER_BYTES // 2)
    assert prebuild.workers(16, 100) == 1
    for value in ("none", "0"):
        monkeypatch.setenv(prebuild.JOBS_VARIABLE, value)
        with pytest.raises(ConfigError, match=f"MAX_JOBS is '{value}'; it must be a whole number, 1 or more"):
            prebuild.workers(None, 1)
    monkeypatch.delenv(prebuild.JOBS_VARIABLE)
    with pytest.raises(ConfigError, match="--jobs is 0"):
        prebuild.workers(0, 1)


def test_several_are_built_in_children_whatever_the_policy(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(loader.POLICY_VARIABLE, "error")
    words = [word for config in SMALL[:2] for word in ("--set", config.settings())]
    result = verb(*words, "--jobs", "2")
    assert result.exit_code == 0, result.output
    assert "2 built, 0 there before, 0 failed" in result.output
    assert len(store.stored_keys()) == 2
    # A second time there is nothing to do, and the kernels are found by this process, which may not build.
    assert "0 built, 2 there before, 0 failed" in verb(*words, "--jobs", "1").output
    assert loader.load(SMALL[0]).path.is_file()


def fake_compiler(folder: Path, action: str) -> Path:
    """A compiler that does something else for kernels of two backends."""
    path = folder / "bin" / "c++"
    path.parent.mkdir()
    symbol = SMALL[1].symbol
    path.write_text(
        f'#!/bin/sh\ncase "$*" in *-c*) if grep -q {symbol} main.cpp; then {action}; fi;; esac\nexec {REAL} "$@"\n'
    )
    path.chmod(0o755)
    return path


def test_one_that_hangs_is_ended_with_its_compiler(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others are built. Time is over when the compiler hangs, however busy the machine is."""
    compiler = fake_compiler(tmp_path, f"echo $$ > {tmp_path}/new; mv {tmp_path}/new {tmp_path}/pid; sleep 600")
    monkeypatch.setenv("CXX", str(compiler))
    line, end = prebuild._Worker._line, time.monotonic() + 300

    def hangs() -> bool:
        with contextlib.suppress(FileNotFoundError):
            pid = (tmp_path / "pid").read_text().strip()
            return " Z " not in Path(f"/proc/{pid}/stat").read_text()
        return False

    def until_it_hangs(self: prebuild._Worker, timeout: float) -> bytes:
        while True:
            try:
                return line(self, 0.1)
            except TimeoutError:
                if hangs() or time.monotonic() > end:
                    raise

    monkeypatch.setattr(prebuild._Worker, "_line", until_it_hangs)
    words = [word for config in SMALL for word in ("--set", config.settings())]
    result = verb(*words, "--jobs", "1", "--timeout", "77")
    assert result.exit_code == 2
    *rows, summary = result.output.splitlines()
    assert [row.startswith("failed") for row in rows] == [False, True, False]
    assert f"{SMALL[1].symbol} wasn't built in 77 s; --timeout sets how long it may take" in rows[1]
    assert summary.startswith("2 built, 0 there before, 1 failed, in ")
    assert len(store.stored_keys()) == 2
    assert (tmp_path / "pid").exists()
    assert not hangs()
    # It isn't a failure that would repeat itself: nothing is remembered, no lock is left, and it is compiled again.
    compiler.write_text(f'#!/bin/sh\nexec {REAL} "$@"\n')
    key = loader.content_key(SMALL[1], (), loader.toolchain.find_tools("cpu").versions())
    assert failures.recall(store, key) is None
    assert loader.load(SMALL[1]).key == key
    assert list((store.root / "staging").iterdir()) == []


def test_a_worker_that_doesnt_start(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prebuild, "START_SECONDS", 0.0)
    (done,) = prebuild.build_all([Job(SMALL[0])], 1)
    assert done.error == f"The worker for {SMALL[0].symbol} didn't start in 0 s."


def test_one_that_fails_is_in_the_summary_and_remembered(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = fake_compiler(tmp_path, "echo 'main.cpp:1: error: no such luck'; exit 1")
    monkeypatch.setenv("CXX", str(compiler))
    words = [word for config in SMALL[:2] for word in ("--set", config.settings())]
    result = verb(*words, "--jobs", "1")
    assert result.exit_code == 2
    assert "1 built, 0 there before, 1 failed" in result.output
    assert "no such luck" in result.output
    assert "It failed so on" in verb(*words, "--jobs", "1").output
    # The compiler is mended: only --retry finds out.
    compiler.write_text(f'#!/bin/sh\nexec {REAL} "$@"\n')
    result = verb("--set", SMALL[1].settings(), "--retry")
    assert result.exit_code == 0, result.output
    assert failures.RETRY_VARIABLE not in os.environ


def test_a_worker_that_is_killed(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by the kernel, for want of memory: it is said, another worker takes the rest, and nothing is remembered."""
    killing = fake_compiler(tmp_path, "kill -9 $(cut -d' ' -f6 /proc/$$/stat); sleep 600")  # its session's first
    monkeypatch.setenv("CXX", str(killing))
    killed, other = prebuild.build_all([Job(SMALL[1]), Job(SMALL[2])], 1)
    assert f"The worker that built {SMALL[1].symbol} ended by signal 9" in killed.error
    assert killed.error.endswith("If memory ran out, build fewer at once with --jobs.")
    assert other.built
    assert list((store.root / "failed").glob("*")) == []
