"""Faults in the build path: each is reported in one sentence, and the next load of the same configuration works."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onelaunch
import pytest
import torch
from compilers import REAL, compiler_that
from onelaunch import CompileError, KernelConfig, MetadataBuffers, StoreError, ToolchainError
from onelaunch.build import compile as compiler
from onelaunch.build import diagnosis, toolchain, toolkit
from onelaunch.build.key import Recipe
from onelaunch.cache import failures, tiers
from onelaunch.cache.store import MANIFEST, Store
from onelaunch.load import loader
from onelaunch.run import refresh

SMALL = KernelConfig(fields=("cache_seqlens",), target="cpu")
SMALL_CUDA = KernelConfig(fields=("cache_seqlens",))
PAST, FUTURE = 1_000_000, 4_000_000_000  # January 1970 and October 2096, in seconds since the epoch


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, which is also onelaunch.bind's."""
    store = Store(tmp_path / "cache")
    monkeypatch.setattr(loader, "default_store", lambda: store)
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.delenv(failures.RETRY_VARIABLE, raising=False)
    no_fallback(monkeypatch)
    return store


def no_fallback(patch: pytest.MonkeyPatch) -> None:
    """As in a fresh process: without a fallback store, and without earlier warnings."""
    patch.setattr(tiers, "_fallback", None)
    patch.setattr("onelaunch.log._warned", set())


def leftovers(store: Store) -> list[str]:
    """What a build must not leave behind: staging folders, and entries without a manifest."""
    entries = store.root / "entries"
    staging = store.root / "staging"
    return [
        *(str(path) for path in (staging.iterdir() if staging.is_dir() else ())),
        *(str(path) for path in (entries.iterdir() if entries.is_dir() else ()) if not (path / MANIFEST).is_file()),
    ]


def assert_usable(store: Store) -> loader.Kernel:
    """The same configuration is built (or found), computes the right result, and loads again into an empty memory."""
    assert leftovers(store) == []
    for _ in range(2):
        loader._loaded.clear()
        refresh.plans.clear()
        out = torch.full((4,), -1, dtype=torch.int32)
        plan = onelaunch.bind([MetadataBuffers(cache_seqlens=out)], req_to_token=torch.zeros(1, 1, dtype=torch.int32))
        plan.run(torch.tensor([5, 6]), torch.tensor([0, 0]))
        assert out.tolist() == [5, 6, -1, -1]
        assert plan.kernel.path.is_relative_to(store.root)
    assert leftovers(store) == []
    assert [entry.key for entry in store.entries()] == [plan.kernel.key]
    return plan.kernel


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes $CXX a script that first runs some shell text; see compiler_that()."""

    def write(does: str) -> Path:
        path = compiler_that(does, tmp_path)
        monkeypatch.setenv("CXX", str(path))
        return path

    return write


def refused(store: Store, monkeypatch: pytest.MonkeyPatch, *texts: str, lasting: bool = False) -> CompileError:
    """Loads SMALL, which must fail to compile; the store is right again once the fake compiler is gone.

    A lasting failure is remembered: it is raised again at once, and compiled again when that is requested.
    """
    with pytest.raises(CompileError) as caught:
        loader.load(SMALL, store=store)
    error, message = caught.value, str(caught.value)
    for text in texts:
        assert re.search(text, message), message
    assert leftovers(store) == []
    assert error.lasting is lasting, message
    assert str(error.log) in message
    source = error.source.read_text()
    assert (failures.recall(store, error.key) is not None) is lasting
    # The compiler that the fake one wraps: another one would give another key.
    monkeypatch.setenv("CXX", str(REAL))
    if lasting:
        remembered(store, error, monkeypatch)
    kernel = assert_usable(store)
    assert error.key == kernel.key
    assert source.startswith(kernel.source)
    assert failures.recall(store, kernel.key) is None
    return error


def remembered(store: Store, error: CompileError, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same call raises the same error without a compiler, until another try is requested."""
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "build", lambda *args, **kwargs: pytest.fail("it was compiled again"))
        with pytest.raises(CompileError) as again:
            loader.load(SMALL, store=store)
    assert str(again.value).startswith(f"{error} This build failed on ")
    assert str(again.value).endswith(
        f" and is not retried until its inputs change; use `onelaunch build --retry` or {failures.RETRY_VARIABLE}=1."
    )
    assert (again.value.key, again.value.log, again.value.source) == (error.key, error.log, error.source)
    assert again.value.command == error.command
    # A record that a wrong clock dated in the future doesn't block --retry.
    record = failures.folder(store, error.key) / failures.RECORD
    record.write_text(json.dumps({**json.loads(record.read_text()), "when": FUTURE}))
    with monkeypatch.context() as patch:
        patch.setenv(failures.RETRY_VARIABLE, "1")
        assert loader.load(SMALL, store=store).key == error.key
    assert not failures.folder(store, error.key).exists()


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


def test_no_host_compiler(store: Store, no_tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ToolchainError, match=r"A host C\+\+ compiler was not found") as caught:
        loader.load(SMALL, store=store)
    assert "Install GCC (the package g++) or set CXX to a compiler." in str(caught.value)
    monkeypatch.undo()
    monkeypatch.setattr(loader, "default_store", lambda: store)
    assert_usable(store)


def test_no_nvcc(store: Store, no_tools: None) -> None:
    with pytest.raises(ToolchainError, match=r"A CUDA toolkit, 12\.8 or newer and complete, was not found") as caught:
        loader.load(SMALL_CUDA, ("90a",), store)
    assert "Install the CUDA toolkit" in str(caught.value)
    assert "pip install" in str(caught.value)
    assert leftovers(store) == []


@pytest.mark.nvcc
def test_nvcc_is_gone_and_comes_back(store: Store, request: pytest.FixtureRequest) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolkit, "_nvcc_candidates", lambda: iter([("a test", "/no/nvcc")]))
        toolchain.reset()
        request.addfinalizer(toolchain.reset)
        with pytest.raises(ToolchainError, match="there is no program '/no/nvcc'"):
            loader.load(SMALL_CUDA, ("90a",), store)
    toolchain.reset()
    assert loader.load(SMALL_CUDA, ("90a",), store).path.is_file()
    assert leftovers(store) == []


def test_what_was_built_outlives_the_compiler(store: Store, no_tools: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host without a compiler takes a stored build of the same source; without one the error names the compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(REAL))
        patch.setenv("PATH", os.defpath)
        kernel = loader.load(SMALL, store=store)
    assert assert_usable(store).key == kernel.key
    shutil.rmtree(kernel.path.parent)
    loader._loaded.clear()
    with pytest.raises(ToolchainError, match=r"A host C\+\+ compiler was not found"):
        loader.load(SMALL, store=store)


def test_the_compiler_goes_during_the_build(
    store: Store, fake: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = fake("")
    assert toolchain.find_tools("cpu").compiler.path == script
    script.unlink()
    refused(store, monkeypatch, "didn't compile: .*not found")


# ------------------------------------------------------------------------------------------- a compiler that fails

SPARED = (
    r"^The cache folder \S+ can't (be used|take a build) \((No space left on device|its disk is full)\); builds go to "
    r"\S+ and are lost when this process ends\. "
    r"Set ONELAUNCH_CACHE_DIR to a folder that this process may write and that has room\.$"
)
FULL = r"The disk is full: free some space, or set ONELAUNCH_CACHE_DIR to a folder on another disk\."

FAILURES: dict[str, tuple[str, tuple[str, ...]]] = {
    "the disk is full": (
        '[ "$step" = compile ] && { set -- $(echo "$@" | sed "s|-o [^ ]*|-o /dev/full|"); exec "$real" "$@"; }',
        (FULL, "No space left on device"),
    ),
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
    "it refuses the source": ("echo 'main.cpp:3:5: error: no such type' >&2; exit 1", ("no such type",)),
}


@pytest.mark.parametrize("fault", FAILURES)
def test_a_compiler_that_fails(
    fault: str, store: Store, fake: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a failure that the source caused is remembered."""
    text, expected = FAILURES[fault]
    fake(text)
    if fault == "the disk is full":
        # The build is tried again in a temporary folder, where the fake compiler fails again.
        with pytest.warns(UserWarning, match=r"can't take a build \(its disk is full\); builds go to "):
            refused(store, monkeypatch, *expected)
        return
    refused(store, monkeypatch, *expected, lasting=fault == "it refuses the source")


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


# ------------------------------------------------------------------------------------------------------ a full disk

WRITES = {
    "mkdir": Path,
    "write_text": Path,
    "rename": os,
    "read_bytes": Path,
    "chmod": Path,
    "open": os,
    "fsync": os,
}


def full_at(call: int, write: str, store: Store, patch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """Makes one call of a function below the store's folder fail as on a full disk. Returns whether it was reached."""
    real: Callable[..., Any] = getattr(WRITES[write], write)
    seen = 0

    def full(what: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        if write == "fsync" or str(what).startswith(str(store.root)):
            seen += 1
            if seen == call:
                # OSError of fsync names no file, as that of a write.
                names = () if write == "fsync" else (str(what),)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), *names)
        return real(what, *args, **kwargs)

    patch.setattr(WRITES[write], write, full)
    return lambda: seen >= call


@pytest.mark.parametrize("write", WRITES)
def test_the_disk_fills_at_any_write(write: str, store: Store) -> None:
    """Fails the first, second, … call of each function in turn. Each failure is reported and leaves nothing behind.

    A build that can't be stored goes to a temporary folder with one warning. Only notes may be lost silently.
    """
    told = []
    for call in range(1, 40):
        loader._loaded.clear()
        shutil.rmtree(store.root, ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            no_fallback(patch)
            met = full_at(call, write, store, patch)
            patch.setattr(compiler, "build", a_build_of_nothing)
            patch.setattr(loader, "import_entry", lambda entry, *_: entry)
            said = [""]
            try:
                kernel = loader.load(SMALL, store=store)
                if not kernel.path.is_relative_to(store.root):
                    assert tiers._fallback is not None
                    assert kernel.path.is_relative_to(tiers._fallback[1].root)
                    assert leftovers(tiers._fallback[1]) == []
                    said = [str(warning.message) for warning in warned]
            except StoreError as error:
                said = [str(error)]
        assert leftovers(store) == []
        if said != [""]:
            told += said
            assert len(said) == 1, said
        else:
            assert warned == [], [str(warning.message) for warning in warned]
            assert [entry.key for entry in store.entries()], "the failure was not reported and nothing was built"
        if not met():
            break
    else:
        pytest.fail("the function still makes more calls")
    assert told, "no call failed"
    for message in told:
        assert re.search(rf"{FULL}|{SPARED}", message), message
        assert str(store.root) in message
    shutil.rmtree(store.root, ignore_errors=True)
    loader._loaded.clear()
    assert_usable(store)


def a_build_of_nothing(recipe: Recipe, tools: Any, *, stage: Path, **_: Any) -> compiler.Build:
    """Stands in for compiler.build: leaves the files of a build and runs no compiler."""
    for file in (f"{recipe.module}.so", "main.cpp", "build.ninja", "main.o"):
        (stage / file).write_text("x")
    return compiler.Build(f"{recipe.module}.so", "main.cpp", "c++ -c", 1.0, {}, {})


ON_A_SMALL_DISK = """
import json, os, pathlib, sys, warnings
import torch, onelaunch
from onelaunch import KernelConfig, MetadataBuffers, StoreError, CompileError
from onelaunch.load import loader
from onelaunch import log
from onelaunch.cache import store, tiers
small = KernelConfig(fields=("cache_seqlens",), target="cpu")
disk = pathlib.Path(sys.argv[1])
cache = store.Store(disk / "cache")
loader.default_store = lambda: cache
cache.root
said = []
for free_pages in (0, 3, 8, 12, 20, 40, 100):
    with open(disk / "ballast", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            os.ftruncate(file.fileno(), max(0, file.tell() - 4096 * free_pages))
    loader._loaded.clear()
    tiers._fallback = None
    log._warned.clear()
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            kernel = loader.load(small, store=cache)
        if kernel.path.is_relative_to(disk):
            break
        assert kernel.path.is_relative_to(tiers._fallback[1].root)
        (warning,) = warned
        said.append([free_pages, "spared", str(warning.message)])
    except (StoreError, CompileError) as error:
        said.append([free_pages, type(error).__name__, str(error)])
    finally:
        (disk / "ballast").unlink()
    for folder in ("staging", "entries"):
        assert not (disk / "cache" / folder).exists() or list((disk / "cache" / folder).iterdir()) == [], free_pages
tiers._fallback = None
loader._loaded.clear()
out = torch.full((4,), -1, dtype=torch.int32)
plan = onelaunch.bind([MetadataBuffers(cache_seqlens=out)], req_to_token=torch.zeros(1, 1, dtype=torch.int32))
plan.run(torch.tensor([5, 6]), torch.tensor([0, 0]))
assert plan.kernel.path.is_relative_to(disk)
print(json.dumps([said, out.tolist()]))
"""


def mounted(folder: Path, options: str, command: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell command in its own namespaces, with a tmpfs mounted on the folder."""
    folder.mkdir()
    probe = ["unshare", "--user", "--map-root-user", "--mount"]
    mount = f"mount -t tmpfs -o {options} tmpfs {shlex.quote(str(folder))}"
    if shutil.which("unshare") is None or subprocess.run([*probe, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this system gives no namespace to mount a small disk in; the simulated faults ran")
    return subprocess.run([*probe, "sh", "-c", f"{mount} && {command}"], capture_output=True, text=True, check=False)


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    """A tmpfs and a ballast file that shrinks until a build fits."""
    disk = tmp_path / "disk"
    script = tmp_path / "script.py"
    script.write_text(ON_A_SMALL_DISK)
    done = mounted(disk, "size=4m,mode=700", shlex.join([sys.executable, str(script), str(disk)]))
    assert done.returncode == 0, done.stderr
    said, out = json.loads(done.stdout)
    assert out == [5, 6, -1, -1]
    assert len(said) > 3, said
    for free, kind, message in said:
        assert kind == "spared", (free, kind, message)
        assert re.search(SPARED, message), (free, kind, message)
        assert str(disk) in message
    assert len({message.split(" (")[1] for _, _, message in said}) >= 2, said


def test_neither_the_cache_nor_a_temporary_folder_can_be_written(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names both. A cache that can be written needs no folder for temporary files."""
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "file"))
    with pytest.raises(StoreError, match=r"file/cache can.t be used .*, and no folder for temporary files"):
        loader.load(SMALL, store=Store(tmp_path / "file" / "cache"))
    assert loader.load(SMALL, store=store).path.is_file()


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
