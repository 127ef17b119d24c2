"""Processes that are killed or interrupted, at any call and at each step of a build.

Nothing that is half done is ever used, no failure is remembered, and the next process builds without waiting for the
dead one and removes what it left.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import onelaunch
import pytest
from click.testing import CliRunner
from compilers import REAL, compiler_that, hanging, only_of, running
from onelaunch import CompileError, KernelConfig
from onelaunch.build import compile as compiler
from onelaunch.cache import collect, failures, files
from onelaunch.cache.store import OWN_NAMES, TAG, Store
from onelaunch.cli.main import app
from onelaunch.load import loader, pack
from processes import LOAD, Children, finish, runs, until
from usable import SMALL, SMALL_CUDA

pytestmark = pytest.mark.usefixtures("fresh_process")
OTHER = SMALL.replace(num_backends=2)
ROOMS = re.compile(re.escape(str(Path(str(onelaunch.__file__)).parent)) + "/(cache|load)/")


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


# ---------------------------------------------------------------------------------------- one process of a build

FORKS = """
signing_build = compiler.build
def forking_build(*args, **kwargs):
    if os.fork() == 0:
        sign("forked")
        time.sleep(600)
        os._exit(0)
    return signing_build(*args, **kwargs)
compiler.build = forking_build
"""
HANGS_BEFORE_IT_PUBLISHES = """
def hang(*args):
    sign("hangs")
    time.sleep(600)
os.rename = hang
"""


@pytest.mark.parametrize("phase", ["compiling", "publishing"])
def test_a_process_that_is_killed_while_it_builds(phase: str, children: Children, tmp_path: Path) -> None:
    """The process that waits for it takes over, even if a child that the killed one forked lives on."""
    if phase == "compiling":
        compiles = str(compiler_that(hanging(tmp_path), tmp_path))
        builder = children.start(FORKS + LOAD, MADE="", CXX=compiles)
        until(lambda: running(tmp_path) != [], "the compiler")
    else:
        builder = children.start(FORKS + HANGS_BEFORE_IT_PUBLISHES + LOAD)
        children.wait_for("hangs")
    children.wait_for("forked")
    (forked,) = children.signed("forked")
    try:
        waiter = children.start(LOAD)
        children.wait_for("waiting")
        assert list((children.cache / "entries").glob("*")) == []
        (left,) = (children.cache / "staging").iterdir()
        builder.kill()
        builder.wait()
        result, said = finish(waiter)
        assert runs(forked)
    finally:
        os.kill(forked, signal.SIGKILL)
    assert result["works"]
    assert re.search(rf"waiting for .*pid {builder.pid}, holds it since .* and is {phase}\n", said), said
    assert said.count("onelaunch: building") == 1
    assert sorted(children.signed("building")) == sorted([builder.pid, waiter.pid])
    store = Store(children.cache)
    assert [entry.path for entry in store.entries()] == [Path(result["path"]).parent]
    assert not left.exists()
    assert [path for name in ("staging", "locks") for path in (store.root / name).iterdir()] == []
    assert list(store.root.glob(f"failed/*/{failures.RECORD}")) == []
    until(lambda: not any(runs(pid) for pid in running(tmp_path)), "the end of the compiler")


THE_COMPILER = r"The compiler was killed, most often because memory ran out: build fewer at once \(MAX_JOBS=1\)"
# What is killed when it builds OTHER: by what, and what the error says.
KILLED = {
    "the compiler": (only_of(OTHER.symbol, "kill -KILL $$"), THE_COMPILER),
    "the linker": (f'case "$out" in *{OTHER.symbol}*.so) kill -TERM $$;; esac', "didn't compile"),
    "ninja": (
        # The parent may be ninja or a shell that ninja started.
        only_of(
            OTHER.symbol,
            "parent=$PPID; grep -q ninja /proc/$parent/comm || parent=$(cut -d' ' -f4 /proc/$parent/stat);"
            " kill -KILL $parent; sleep 0.2; exit 1",
        ),
        "didn't compile",
    ),
    "the build's whole session": (
        only_of(OTHER.symbol, "kill -KILL $(cut -d' ' -f6 /proc/$$/stat); sleep 9"),
        "wasn't built, since its build process ended by signal 9.*If memory ran out, build fewer at once with --jobs",
    ),
}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, which is also the command's."""
    store = Store(tmp_path / "cache")
    monkeypatch.setattr(loader, "default_store", lambda: store)
    return store


@pytest.mark.parametrize("what", KILLED)
def test_a_compiler_that_is_killed(what: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's OOM killer does this. It is reported, and the other kernels are built."""
    does, sentence = KILLED[what]
    monkeypatch.setenv("CXX", str(compiler_that(does, tmp_path)))
    words = [word for config in (OTHER, SMALL) for word in ("--set", config.settings())]
    result = CliRunner().invoke(app, ["build", *words, "--jobs", "1"])
    assert result.exit_code == 2
    failed, good, summary = result.stdout.splitlines()
    assert re.search(rf"^failed .* {OTHER.symbol}  .*{sentence}", failed), failed
    assert SMALL.symbol in good
    assert summary.startswith("1 built, 0 there before, 1 failed, in ")
    assert [entry.manifest["symbol"] for entry in store.entries()] == [SMALL.symbol]
    assert_nothing_is_left(store)
    monkeypatch.setenv("CXX", str(REAL))
    assert loader.load(OTHER, store=store).built


def assert_nothing_is_left(store: Store) -> None:
    """No folder of a build, no lock, and no failure to remember."""
    assert left_in(store.root) == []
    assert list(store.root.glob(f"failed/*/{failures.RECORD}")) == []


@pytest.mark.nvcc
def test_the_host_compiler_is_killed_under_nvcc(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = compiler_that('case "$*" in *__CUDACC__*) kill -KILL $$;; esac', tmp_path)
    monkeypatch.setenv("CXX", str(killed))
    with pytest.raises(CompileError, match=THE_COMPILER):
        loader.load(SMALL_CUDA, ("90a",), store)
    assert_nothing_is_left(store)
    monkeypatch.setenv("CXX", str(REAL))
    assert loader.load(SMALL_CUDA, ("90a",), store).built


# ---------------------------------------------------------------------------------------------- interruptions


@pytest.mark.parametrize(
    ("number", "jobs"),
    [
        pytest.param(signal.SIGINT, 1, id="Ctrl-C, one build in the command's process"),
        pytest.param(signal.SIGINT, 2, id="Ctrl-C, two builds in workers and one that waits"),
        pytest.param(signal.SIGTERM, 1, id="SIGTERM"),
        pytest.param(signal.SIGHUP, 1, id="SIGHUP", marks=pytest.mark.long),
    ],
)
def test_a_signal_during_a_build(number: int, jobs: int, store: Store, tmp_path: Path) -> None:
    """A terminal or service manager signals the whole process group, but builds have sessions of their own."""
    settings = [f"--set={SMALL.replace(num_backends=n + 1).settings()}" for n in range(1 if jobs == 1 else 3)]
    command = subprocess.Popen(
        [sys.executable, "-m", "onelaunch.cli.main", "build", *settings, "--jobs", str(jobs)],
        env={
            **os.environ,
            "ONELAUNCH_CACHE_DIR": str(store.root),
            "CXX": str(compiler_that(hanging(tmp_path), tmp_path)),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        until(lambda: len(running(tmp_path)) == jobs or command.poll() is not None, "the compilers")
        assert command.poll() is None, command.communicate()
        os.killpg(command.pid, number)
        stdout, stderr = command.communicate(timeout=300)
    finally:
        if command.poll() is None:
            os.killpg(command.pid, signal.SIGKILL)
    assert command.returncode == (130 if number == signal.SIGINT else -number), stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert (stderr.splitlines()[-1] == "onelaunch: interrupted") == (number == signal.SIGINT)
    until(lambda: not any(runs(pid) for pid in running(tmp_path)), "the end of the compilers")
    assert len(running(tmp_path)) == jobs, "another build began"
    assert store.stored_keys() == []
    if number != signal.SIGINT:  # that process can't clean up, so the next one does
        store.sweep()
    assert_nothing_is_left(store)
