"""Faults in the build path: each is reported in one sentence, and the next load of the same configuration works."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onelaunch
import pytest
from compilers import REAL, compiler_that
from onelaunch import CompileError, KernelConfig, StoreError, ToolchainError, render
from onelaunch.build import compile as compiler
from onelaunch.build import diagnosis, toolchain, toolkit
from onelaunch.cache import failures
from onelaunch.cache.store import Store
from onelaunch.emit.binding import module_name
from onelaunch.load import loader
from processes import Children, finish
from usable import SMALL, SMALL_CUDA, assert_usable, forget, leftovers

RENDER = sys.modules["onelaunch.emit.render"]
OTHER = SMALL.replace(num_backends=2)
PAST, FUTURE = 1_000_000, 4_000_000_000  # January 1970 and October 2096, in seconds since the epoch


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, which is also onelaunch.bind's."""
    store = Store(tmp_path / "cache")
    monkeypatch.setattr(loader, "default_store", lambda: store)
    monkeypatch.delenv(failures.RETRY_VARIABLE, raising=False)
    forget(monkeypatch)
    return store


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes $CXX a script that first runs some shell text; see compiler_that()."""

    def write(does: str) -> Path:
        path = compiler_that(does, tmp_path)
        monkeypatch.setenv("CXX", str(path))
        return path

    return write


def refused(store: Store, monkeypatch: pytest.MonkeyPatch, *texts: str) -> None:
    """Loads SMALL, which must fail to compile; the store is right again once the fake compiler is gone."""
    with pytest.raises(CompileError) as caught:
        loader.load(SMALL, store=store)
    error, message = caught.value, str(caught.value)
    for text in texts:
        assert re.search(text, message), message
    assert str(error.log) in message
    assert not error.lasting, message
    assert failures.recall(store, error.key) is None
    source = error.source.read_text()
    # The compiler that the fake one wraps: another one would give another key.
    monkeypatch.setenv("CXX", str(REAL))
    kernel = assert_usable(store)
    assert error.key == kernel.key
    assert source.startswith(kernel.source)


# ---------------------------------------------------------------------------------------------- a missing compiler


@pytest.fixture
def no_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiler in any place where the toolchain looks for one."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolkit, "SYSTEM_ROOT", tmp_path / "empty")
    find_spec = toolkit.importlib.util.find_spec
    monkeypatch.setattr(
        toolkit.importlib.util, "find_spec", lambda name, *rest: None if name == "nvidia" else find_spec(name, *rest)
    )


def test_a_machine_without_a_host_compiler(store: Store, no_tools: None) -> None:
    """What was built is loaded, whichever compiler made it; the error for what wasn't says what to install."""

    def built() -> loader.Kernel:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CXX", str(REAL))
            patch.setenv("PATH", os.defpath)
            return loader.load(SMALL, store=store)

    def refused(config: KernelConfig) -> None:
        with pytest.raises(ToolchainError, match=r"A host C\+\+ compiler was not found") as caught:
            loader.load(config, store=store)
        assert "Install GCC (the package g++) or set CXX to a compiler." in str(caught.value)
        assert leftovers(store) == []

    refused(SMALL)
    kernel = built()
    assert assert_usable(store).key == kernel.key
    refused(OTHER)
    shutil.rmtree(kernel.path.parent)
    loader._loaded.clear()
    refused(SMALL)
    assert built().key == kernel.key
    assert_usable(store)


@pytest.mark.nvcc
def test_nvcc_is_gone_and_comes_back(store: Store, no_tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ToolchainError, match=r"A CUDA toolkit, 12\.8 or newer and complete, was not found"):
        loader.load(SMALL_CUDA, ("90a",), store)
    assert leftovers(store) == []
    monkeypatch.undo()
    loader._loaded.clear()
    assert loader.load(SMALL_CUDA, ("90a",), store).path.is_file()
    assert leftovers(store) == []


def test_the_compiler_goes_during_the_build(
    store: Store, fake: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = fake("")
    assert toolchain.find_tools("cpu").compiler.path == script
    script.unlink()
    refused(store, monkeypatch, "didn't compile: .*not found")


# ----------------------------------------------------------------------------------- a source that doesn't compile


def break_source(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RENDER, "render", lambda config: render(config) + "constexpr int mistake = luckless;\n")


BREAK_SOURCE = """
import onelaunch.emit.render as rendering
render = rendering.render
rendering.render = lambda config: render(config) + "constexpr int mistake = luckless;\\n"
"""
SAY_THE_ERROR = """
try:
    loader.load(CONFIG, store=store)
except errors.CompileError as error:
    print(json.dumps(str(error)))
"""


def test_a_source_that_doesnt_compile(
    store: Store, monkeypatch: pytest.MonkeyPatch, children: Children, builds: list[str]
) -> None:
    """The failure is remembered, also by the next process, until its inputs change or another try is requested."""
    with monkeypatch.context() as patch:
        break_source(patch)
        with pytest.raises(CompileError) as first:
            loader.load(SMALL, store=store)
        error, message = first.value, str(first.value)
        assert error.lasting
        assert "error: " in message, "the compiler's first error"
        for text in ("luckless", error.key[:16], str(error.log), str(error.source)):
            assert text in message
        assert "mistake = luckless" in error.log.read_text()
        assert error.source.read_text().startswith(render(SMALL) + "constexpr int mistake = luckless;\n")
        assert " -c " in error.command
        assert leftovers(store) == []
        assert store.stored_keys() == []
        with pytest.raises(CompileError) as second:
            loader.load(SMALL, store=store)
        said = str(second.value)
        assert said.startswith(f"{message} This build failed on ")
        assert said.endswith(
            " and is not retried until its inputs change; use `onelaunch build --retry` or "
            f"{failures.RETRY_VARIABLE}=1."
        )
        for name in ("key", "command", "log", "source"):
            assert getattr(second.value, name) == getattr(error, name)
        assert children.run(BREAK_SOURCE + SAY_THE_ERROR)[0] == said
        assert children.signed("building") == []
        assert builds == [module_name(SMALL.symbol)]
        # A record that a wrong clock dated in the future doesn't block another try.
        record = failures.folder(store, error.key) / failures.RECORD
        record.write_text(json.dumps({**json.loads(record.read_text()), "when": FUTURE}))
        monkeypatch.setenv(failures.RETRY_VARIABLE, "1")
        with pytest.raises(CompileError, match="luckless"):
            loader.load(SMALL, store=store)
        monkeypatch.delenv(failures.RETRY_VARIABLE)
        with pytest.raises(CompileError, match="luckless"):
            loader.load(OTHER, store=store)
        assert builds == [module_name(config.symbol) for config in (SMALL, SMALL, OTHER)]
    assert_usable(store)


def test_who_waited_for_a_build_that_failed_doesnt_repeat_it(children: Children) -> None:
    children.made = None
    code = BREAK_SOURCE + SAY_THE_ERROR
    started = [children.start(code, UNTIL_WAITING="2", ONELAUNCH_RETRY="1") for _ in range(3)]
    assert all("luckless" in finish(child)[0] for child in started)
    assert len(children.signed("building")) == 1


@pytest.mark.nvcc
def test_a_cuda_build_that_fails(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RENDER, "render", lambda config: render(config) + "__global__ int returns_something() {}\n")
    with pytest.raises(CompileError, match="error") as caught:
        loader.load(SMALL_CUDA, ("90a",), store)
    assert "nvcc" in caught.value.command
    assert "returns_something" in caught.value.source.read_text()


def test_a_link_that_fails(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles, but the object is incomplete: it is refused when it is loaded at the latest."""
    with monkeypatch.context() as patch:
        patch.setattr(
            RENDER, "render", lambda config: render(config).replace(f"{config.symbol}_launch", "other_launch")
        )
        with pytest.raises(CompileError, match=r"was built and can't be loaded: .*undefined symbol"):
            loader.load(SMALL, store=store)
    assert loader.load(SMALL, store=store).path.is_file()


# ------------------------------------------------------------------------------------------- a compiler that fails

FAILURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "it fails without a word": ("exit 1", ("didn't compile",)),
    "its words are no UTF-8": (r"printf 'c++: error: \377\n' >&2; exit 1", ("didn't compile: c\\+\\+: error: \ufffd",)),
    "the link makes garbage": (
        '[ "$step" = link ] && { head -c 4096 /dev/zero >"$out"; exit 0; }',
        ("was built and can't be loaded", "invalid ELF header"),
    ),
    "the link makes another library": (
        '[ "$step" = link ] && { echo | "$real" -shared -x c++ -o "$out" -; exit 0; }',
        ("was built and can't be loaded", "PyInit_"),
    ),
    "the objects are garbage": ('[ "$step" = compile ] && { echo garbage >"$out"; exit 0; }', ("didn't compile",)),
    "the staging folder vanishes": ('[ "$step" = link ] && rm -rf "$PWD"', ("didn't compile",)),
}


@pytest.mark.parametrize("fault", FAILURES)
def test_a_compiler_that_fails(
    fault: str, store: Store, fake: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a failure that the source caused is remembered."""
    text, expected = FAILURES[fault]
    fake(text)
    refused(store, monkeypatch, *expected)


VERDICTS = {
    "./main.cpp:12:3: error: 'x' was not declared in this scope": True,
    "main.cpp:12: error: no such luck": True,
    './cuda.cu(40): error: identifier "x" is undefined': True,
    "ptxas /proc/self/cwd/tmpxft_0.ptx, line 31; error   : Illegal operand type": True,
    "/usr/bin/ld: main.o: in function `f':\n./main.cpp:3: undefined reference to `onelaunch_launch'": True,
    "./main.cpp:3:10: fatal error: Python.h: No such file or directory": False,
    "./main.cpp:3:10: internal compiler error: Segmentation fault": False,
    "./main.cpp:3:10: error: x\nc++: fatal error: Killed signal terminated program cc1plus": False,
    "./main.cpp:3:10: error: x\nvirtual memory exhausted: Cannot allocate memory": False,
    "./main.cpp:3:10: error: x\n/tmp/cc.s: Fatal error: can't write: No space left on device": False,
    "c++: fatal error: cannot execute 'cc1plus': posix_spawnp: No such file or directory": False,
    "/usr/bin/ld: cannot open output file x.so: Permission denied": False,
    "/usr/bin/ld: cannot find -lrt: Too many open files": False,
    "ninja: error: unknown target": False,
    "ptxas fatal   : Memory allocation failure": False,
    "nvcc fatal   : Unsupported gpu architecture 'compute_999'": False,
    "FAILED: main.o": False,
    "": False,
}


@pytest.mark.parametrize("output", VERDICTS)
def test_what_is_a_verdict_on_the_source(output: str) -> None:
    """No list of passing causes would be complete, so only a compiler's or linker's own verdict is lasting."""
    assert diagnosis.is_lasting(f"ninja: Entering directory\n{output}\nninja: build stopped") is VERDICTS[output]


def test_a_log_that_cant_be_written_anywhere(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """For example, the cache and the temporary folder may be on one full disk."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    error = diagnosis.compile_error("failed", "./main.cpp:1:1: error: x", "s", "k" * 64, tmp_path / "file" / "f", True)
    assert "Its log can't be written anywhere" in str(error)
    assert error.log.read_text() == ""


def test_warnings_alone_are_no_fault(
    store: Store, fake: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    """They reach no stream of the process and don't affect the result."""
    fake("echo 'main.cpp:1:1: warning: error is a word in this warning [-Wsome]' >&2; echo chatter")
    kernel = assert_usable(store)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        f"onelaunch: building {kernel.config.symbol} for the CPU, because {store.root} has no build of it yet"
    ]


# --------------------------------------------------------------------------------------------- a folder that vanishes


@pytest.mark.parametrize("what", ["the staging folder", "the cache folder"])
def test_a_folder_vanishes_before_it_is_published(what: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    build = compiler.build

    def built_and_lost(*args: Any, stage: Path, **kwargs: Any) -> compiler.Build:
        done = build(*args, stage=stage, **kwargs)
        shutil.rmtree(stage if what == "the staging folder" else store.root)
        return done

    with monkeypatch.context() as patch:
        patch.setattr(compiler, "build", built_and_lost)
        with pytest.raises(StoreError, match="can't be used: No such file or directory"):
            loader.load(SMALL, store=store)
    store.root.mkdir(mode=0o700, exist_ok=True)
    assert_usable(store)


# -------------------------------------------------------------------------------------------------- a clock that jumps


def test_the_clock_goes_backwards(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reading is a day before the last. A kernel built under a later clock is still loaded."""
    now = FUTURE

    def backwards() -> int:
        nonlocal now
        now -= 86_400
        return now

    monkeypatch.setattr(time, "time", lambda: float(backwards()))
    monkeypatch.setattr(time, "time_ns", lambda: backwards() * 10**9)
    assert time.time() > time.time_ns() / 1e9
    assert assert_usable(store).manifest["seconds"] >= 0


@pytest.mark.parametrize("when", [PAST, FUTURE])
def test_the_compiler_writes_files_of_another_time(when: int, store: Store, fake: Callable[[str], Path]) -> None:
    """As if the clock moved between two steps of ninja."""
    script = fake(f'"$real" "$@" || exit; touch -d @{when} "$out"; exit 0')
    os.utime(script, (when, when))
    kernel = assert_usable(store)
    assert kernel.path.stat().st_mtime == when


@pytest.mark.parametrize("when", [PAST, FUTURE])
def test_a_cache_of_another_time(when: int, store: Store) -> None:
    """The age of a file causes neither a rebuild nor a stale kernel."""
    first = assert_usable(store)
    for path in [store.root, *store.root.rglob("*")]:
        os.utime(path, (when, when))
    loader._loaded.clear()
    onelaunch.freeze()
    assert assert_usable(store).key == first.key
    onelaunch.freeze("allow")
