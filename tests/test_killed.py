"""Processes that are killed at any line of a load: the next one builds, and sweeps all that they left."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import onelaunch
import pytest
from onelaunch import KernelConfig
from onelaunch.build import compile as compiler
from onelaunch.cache import staging, tiers
from onelaunch.cache import store as stores
from onelaunch.cache.store import OWN_NAMES, TAG, Store
from onelaunch.load import loader

SMALL = KernelConfig(fields=("cache_seqlens",), target="cpu")
OTHER = SMALL.replace(num_backends=2)
ROOMS = re.compile(re.escape(str(Path(str(onelaunch.__file__)).parent)) + "/(cache|load)/")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(tiers, "_fallback", None)
    monkeypatch.setattr(stores, "_warned", set())
    monkeypatch.setattr(loader, "_loaded", {})


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler would leave, at once."""
    known = {config.symbol: loader.load(config) for config in (SMALL, OTHER)}
    monkeypatch.setattr(loader, "_loaded", {})

    def copies(recipe: Any, tools: Any, *, stage: Path, **bounds: Any) -> compiler.Build:
        kernel = known[recipe.symbol]
        for name in kernel.manifest["files"]:
            (stage / name).write_bytes((kernel.path.parent / name).read_bytes())
        return compiler.Build(kernel.path.name, str(kernel.manifest["source_file"]), "", 0.0, {}, {})

    monkeypatch.setattr(compiler, "build", copies)


def traced(work: Callable[[], Any], die_at: int) -> int:
    """Lines of the rooms that a child runs in work; at one of them it kills itself, as the kernel would."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        lines = 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal lines
            if not ROOMS.match(frame.f_code.co_filename):
                return None
            if event == "line":
                lines += 1
                if lines == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        try:
            sys.settrace(trace)
            work()
            sys.settrace(None)
            os.write(writer, json.dumps(lines).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read()
    status = os.waitpid(child, 0)[1]
    assert (os.WTERMSIG(status) == signal.SIGKILL) == (not said), status
    return int(said or 0)


def left_in(root: Path) -> list[Path]:
    """What isn't of the cache's own form, and what belongs to living processes alone."""
    store = Store(root)
    own = {path for name in OWN_NAMES if name not in ("staging", "locks") for path in store.listed(name)}
    inside = [path for name in OWN_NAMES if (root / name).is_dir() for path in (root / name).iterdir()]
    beside = [path for path in root.iterdir() if path.name not in {TAG, *OWN_NAMES}] if root.is_dir() else []
    return [path for path in (*inside, *beside) if path not in own]


@pytest.mark.parametrize("count", [25, pytest.param(500, marks=pytest.mark.long)])
def test_what_killed_processes_leave_is_swept(
    count: int, made: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At equally spaced lines from the first to the last: of a first build, of a second one, and of a load."""
    root, whole = tmp_path / "cache", tmp_path / "whole"
    lines = traced(lambda: loader.load(SMALL, store=Store(whole)), 0)
    assert lines > 500
    left = 0
    for number in range(count):
        # Every fifth begins with no cache at all; the others meet what was left by those before.
        if number % 5 == 0 and root.exists():
            root.rename(tmp_path / f"cache-{number}")
        config = (SMALL, OTHER)[number % 2]
        at = 1 + number * (lines - 1) // max(1, count - 1)
        traced(lambda config=config: loader.load(config, store=Store(root)), at)
        left += len(left_in(root))
        # Whoever comes next finds it or builds it, and doesn't wait for the dead.
        if number % 5 == 4:
            began = time.monotonic()
            assert traced(lambda: [loader.load(config, store=Store(root)) for config in (SMALL, OTHER)], 0)
            assert time.monotonic() - began < 60
    assert left > 0, "nothing was killed halfway"
    # As if the last of them had died a while ago.
    monkeypatch.setattr(staging.time, "time", lambda now=time.time: now() + 3600)
    for cache in (root, *tmp_path.glob("cache-*")):
        store = Store(cache)
        store.sweep()
        assert left_in(cache) == []
        assert store.is_marked
        for entry in store.entries():
            assert entry.key == cache.joinpath("entries", entry.key).name
        assert store.listed("damaged") == []
    assert list((tmp_path / "temporary").iterdir()) == []
