"""Processes killed at any call while they use the cache: the next one builds, and removes their leftovers."""

from __future__ import annotations

import json
import os
import re
import shutil
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
from onelaunch.cache import collect, files, tiers
from onelaunch.cache.store import OWN_NAMES, TAG, Store
from onelaunch.load import loader, pack

SMALL = KernelConfig(fields=("cache_seqlens",), target="cpu")
OTHER = SMALL.replace(num_backends=2)
ROOMS = re.compile(re.escape(str(Path(str(onelaunch.__file__)).parent)) + "/(cache|load)/")


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(tiers, "_fallback", None)
    monkeypatch.setattr("onelaunch.log._warned", set())
    monkeypatch.setattr(loader, "_loaded", {})


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the compiler by a copy of finished files, to save time."""
    known = {config.symbol: loader.load(config) for config in (SMALL, OTHER)}
    monkeypatch.setattr(loader, "_loaded", {})

    def copies(recipe: Any, tools: Any, *, stage: Path, **bounds: Any) -> compiler.Build:
        kernel = known[recipe.symbol]
        for name in kernel.manifest["files"]:
            (stage / name).write_bytes((kernel.path.parent / name).read_bytes())
        return compiler.Build(kernel.path.name, str(kernel.manifest["source_file"]), "", 0.0, {}, {})

    monkeypatch.setattr(compiler, "build", copies)


def traced(work: Callable[[], Any], die_at: int) -> int:
    """Runs ``work`` in a child that kills itself at the call ``die_at``. Returns the child's calls, 0 if it died.

    A profile function counts calls, also of C functions, and returns. A trace function would see lines, but coverage
    uses that hook.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        calls = 0

        def profile(frame: FrameType, event: str, _: Any) -> None:
            nonlocal calls
            if ROOMS.match(frame.f_code.co_filename):
                calls += 1
                if calls == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.setprofile(profile)
            work()
            sys.setprofile(None)
            os.write(writer, json.dumps(calls).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read()
    status = os.waitpid(child, 0)[1]
    assert (os.WTERMSIG(status) == signal.SIGKILL) == (not said), status
    return int(said or 0)


def left_in(root: Path) -> list[Path]:
    """Files outside the cache's own layout, and files that only living processes may have."""
    store = Store(root)
    own = {path for name in OWN_NAMES if name not in ("staging", "locks") for path in store.listed(name)}
    inside = [path for name in OWN_NAMES if (root / name).is_dir() for path in (root / name).iterdir()]
    beside = [path for path in root.iterdir() if path.name not in {TAG, *OWN_NAMES}] if root.is_dir() else []
    return [path for path in (*inside, *beside) if path not in own]


# What is built first, and the work during which the child is killed.
SITUATIONS: dict[str, tuple[KernelConfig | None, Callable[[Store, bytes], Any]]] = {
    "a build, and the cache is made": (None, lambda store, data: loader.load(SMALL, store=store)),
    "a build": (SMALL, lambda store, data: loader.load(OTHER, store=store)),
    "a load": (SMALL, lambda store, data: loader.load(SMALL, store=store)),
    "an unpack": (OTHER, lambda store, data: pack.from_bytes(data, store)),
    "a clear": (SMALL, lambda store, data: collect.clear(store)),
}


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("count", [4, pytest.param(120, marks=pytest.mark.long)])
def test_what_killed_processes_leave_is_swept(
    count: int, situation: str, made: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills children at equally spaced calls from the first to the last."""
    before, work = SITUATIONS[situation]
    data = pack.to_bytes([loader.entry_of(loader.load(SMALL))])
    loader._loaded.clear()
    template = tmp_path / "template"
    if before is not None:
        traced(lambda: loader.load(before, store=Store(template)), 0)

    def cache(name: str) -> Store:
        if template.exists():
            shutil.copytree(template, tmp_path / name)
        return Store(tmp_path / name)

    # The number of calls varies a little with the length of the path.
    calls = traced(lambda: work(cache("whole"), data), 0) - 30
    caches, left = [], 0
    for number in range(count):
        caches.append(store := cache(f"cache-{number}"))
        at = 1 + number * (calls - 1) // (count - 1)
        assert traced(lambda store=store: work(store, data), at) == 0, "it wasn't killed"
        left += len(left_in(store.root))
        # The next process finds or builds the kernel, and doesn't wait for the dead one.
        if number % 4 == 3:
            began = time.monotonic()
            assert traced(lambda store=store: loader.load(SMALL, store=Store(store.root)), 0)
            assert time.monotonic() - began < 300, "it waited for the dead process"
    assert left > 0 or "build" not in situation
    # As if the last of them had died an hour ago.
    monkeypatch.setattr(files.time, "time", lambda now=time.time: now() + 3600)
    for store in caches:
        store.sweep()
        assert left_in(store.root) == []
        assert store.is_marked or not store.root.exists() or list(store.root.iterdir()) == []
        assert len(list(store.entries())) == len(store.stored_keys())
        assert store.listed("damaged") == []
    assert list((tmp_path / "temporary").iterdir()) == []
