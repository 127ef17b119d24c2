"""Builds ahead of time: matrices, limits on parallel builds, time-outs, and one failure among many builds."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from compilers import REAL, compiler_that, hanging, only_of, running
from onelaunch import PRESETS, ConfigError, KernelConfig
from onelaunch.build import process, toolchain
from onelaunch.cache import failures
from onelaunch.cache.store import Store
from onelaunch.cli.main import app
from onelaunch.load import loader, prebuild
from onelaunch.load.prebuild import Job
from processes import runs, until

SMALL = [KernelConfig(fields=("cache_seqlens",), target="cpu", num_backends=n) for n in (1, 2, 3)]


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
        ("[[build]]\npreset = 'x'", "There is no preset 'x'"),
        ("[[build]]\nset = { page_sise = 3 }", "page_sise"),
        ("builds = 1", r"must hold tables \[\[build\]\]"),
        ("[[build", "can't be read"),
        ("build = [1]", r"\[\[build\]\] is 1; it must be a table"),
        ("[[build]]\npreset = 7", "has preset = 7; write preset = "),
        ("[[build]]\nset = 'x'", "has set = 'x'; write set = "),
        ("[[build]]\narchs = '90a'", "has archs = '90a'; write archs = "),
        ("[[build]]\nset = { page_size = " + "9" * 5000 + " }", "can't be read"),
        ("x = " + "[" * 20_000, "can't be read"),
        (b"[[build]]\nset = '\xff'", "can't be read"),
        ("[[build]]\nset = { " + ", ".join(f"k{i} = {list(range(99))}" for i in range(4)) + " }", "96059601 builds"),
    ):
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
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
    for value in ("none", "0", "²", "9" * 5000):
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
    # The second run has nothing to build. This process, whose policy forbids builds, finds the kernels.
    assert "0 built, 2 there before, 0 failed" in verb(*words, "--jobs", "1").output
    assert loader.load(SMALL[0]).path.is_file()


def test_one_that_hangs_is_ended_with_its_compiler(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other kernels are still built. The time-out fires once the compiler hangs, however busy the machine is."""
    monkeypatch.setenv("CXX", str(compiler_that(only_of(SMALL[1].symbol, hanging(tmp_path)), tmp_path)))
    line = process._Builder._line

    def hangs() -> bool:
        return any(runs(pid) for pid in running(tmp_path))

    def until_it_hangs(self: process._Builder, deadline: float | None) -> Any:
        while deadline is not None:
            try:
                return line(self, time.monotonic() + 0.1)
            except TimeoutError:
                if hangs() or self.killed:
                    raise
        return line(self, None)

    monkeypatch.setattr(process._Builder, "_line", until_it_hangs)
    words = [word for config in SMALL for word in ("--set", config.settings())]
    result = verb(*words, "--jobs", "1", "--timeout", "77")
    assert result.exit_code == 2
    *rows, summary = result.stdout.splitlines()
    assert [row.startswith("failed") for row in rows] == [False, True, False]
    assert f"{SMALL[1].symbol} wasn't built in 77 s; --timeout sets how long it may take" in rows[1]
    assert summary.startswith("2 built, 0 there before, 1 failed, in ")
    assert len(store.stored_keys()) == 2
    assert running(tmp_path) != []
    until(lambda: not hangs(), "the compiler's end")
    # No failure is recorded and no lock is held, so the kernel can be compiled at once.
    monkeypatch.setenv("CXX", str(REAL))
    key = loader.content_key(SMALL[1], (), toolchain.find_tools("cpu").versions())
    assert failures.recall(store, key) is None
    assert loader.load(SMALL[1]).key == key
    assert list((store.root / "staging").iterdir()) == []


def test_one_that_fails_is_in_the_summary_and_remembered(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuses = only_of(SMALL[1].symbol, "echo 'main.cpp:1: error: no such luck'; exit 1")
    monkeypatch.setenv("CXX", str(compiler_that(refuses, tmp_path)))
    words = [word for config in SMALL[:2] for word in ("--set", config.settings())]
    result = verb(*words, "--jobs", "1")
    assert result.exit_code == 2
    assert "1 built, 0 there before, 1 failed" in result.output
    assert "no such luck" in result.output
    assert "and is not retried until its inputs change" in verb(*words, "--jobs", "1").output
    # The compiler works again, but only --retry tries it.
    monkeypatch.setenv("CXX", str(REAL))
    result = verb("--set", SMALL[1].settings(), "--retry")
    assert result.exit_code == 0, result.output
    assert list((store.root / "failed").rglob(failures.RECORD)) == []
    assert failures.RETRY_VARIABLE not in os.environ
