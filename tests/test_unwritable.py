"""A cache that can't be written: read-only, in a file's place, on a full disk, or on one that runs no programs.

What is in it is used without a word. What it lacks is built in a private temporary folder, with one warning; the
command refuses instead, because the build would be lost at once.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from compilers import REAL, compiler_that
from onelaunch import CompileError, StoreError
from onelaunch.build import compile as compiler
from onelaunch.build.key import Recipe
from onelaunch.cache import tiers, trust
from onelaunch.cache.store import Store
from onelaunch.load import find, loader, pack
from processes import mounted, read_only
from usable import SMALL, assert_usable, forget, leftovers

pytestmark = pytest.mark.usefixtures("fresh_process")
OTHER, THIRD = SMALL.replace(num_backends=2), SMALL.replace(num_backends=3)

ELSEWHERE = "builds go to {} and are lost when this process ends. "
CURE = "Set ONELAUNCH_CACHE_DIR to a folder that this process may write and that has room."


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """An empty store, which is also onelaunch.bind's."""
    store = Store(tmp_path / "cache")
    monkeypatch.setattr(loader, "default_store", lambda: store)
    return store


@contextmanager
def silent() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ------------------------------------------------------------------------------------------------------ read-only


def test_a_folder_that_is_read_only(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def content() -> list[tuple[str, int]]:
        return sorted((str(path), path.stat().st_mtime_ns) for path in store.root.rglob("*"))

    kernel = loader.load(SMALL, store=store)
    before = content()
    with read_only(store.root):
        loader._loaded.clear()
        with silent():
            assert loader.load(SMALL, store=Store(store.root)).path == kernel.path
        with pytest.warns(UserWarning, match="can't be used") as caught:
            other = loader.load(OTHER, store=store)
        with silent():
            third = loader.load(THIRD, store=Store(store.root))
        (warning,) = caught
        temporary = tiers.writable(store)
        assert re.fullmatch(
            rf"The cache folder {store.root} can't be used \(.+\); {ELSEWHERE.format(temporary.root)}{CURE}",
            str(warning.message),
        )
        assert tiers.tiers(store) == [store, temporary]
        assert temporary.root.parent == tmp_path / "temporary"
        for path in (temporary.root, other.path, third.path):
            assert path.is_relative_to(temporary.root)
            assert path.stat().st_mode & 0o077 == 0
        # Without its note the entry is found by its key.
        loader._loaded.clear()
        with silent(), monkeypatch.context() as patch:
            patch.setattr(find, "by_note", lambda *args: None)
            assert loader.load(SMALL, store=store).path == kernel.path
        assert content() == before
    assert tiers.writable(store) is store


def test_the_command_refuses_a_read_only_folder(tmp_path: Path) -> None:
    """In one sentence: a build placed elsewhere would be lost at once."""
    cache = tmp_path / "cache"
    words, missing = ("build", "--set", SMALL.settings()), ("--set", OTHER.settings())
    sentence = f"The cache folder {cache} can't be used (Permission denied). {CURE}"

    def onelaunch(*words: str) -> tuple[int, list[str], list[str]]:
        command = [sys.executable, "-m", "onelaunch.cli.main", *words]
        environment = {**os.environ, "ONELAUNCH_CACHE_DIR": str(cache)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()

    loader.load(SMALL, store=Store(cache))
    (tmp_path / "pack").write_bytes(pack.to_bytes(Store(cache).entries()))
    with read_only(cache):
        assert onelaunch("build", *missing) == (2, [], [f"onelaunch: {sentence}"])
        code, rows, _ = onelaunch(*words, *missing)
        assert (code, rows[-1].split(", in ")[0]) == (2, "0 built, 1 there before, 1 failed")
        assert any(row.startswith("failed ") and row.endswith(sentence) for row in rows)
        # A build that exists already needs no room.
        code, (row,), errors = onelaunch(*words)
        assert (code, errors) == (0, [])
        assert Path(row.split()[-1]).is_relative_to(cache)
    shutil.rmtree(cache / "entries")
    with read_only(cache):
        assert onelaunch("cache", "unpack", str(tmp_path / "pack")) == (2, [], [f"onelaunch: {sentence}"])
    assert onelaunch("cache", "unpack", str(tmp_path / "pack"))[0] == 0


def test_a_folder_whose_place_is_taken(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of the prebuilt folder causes no build and no warning; without a temporary folder the error names both.

    A cache that can be written needs no folder for temporary files.
    """
    (tmp_path / "file").write_text("")
    below = Store(tmp_path / "file" / "cache")
    kernel = loader.load(SMALL, store=store)
    loader._loaded.clear()
    with silent():
        assert (below.find(kernel.key), below.read_note("r"), list(below.entries())) == (None, None, [])
        with monkeypatch.context() as patch:
            patch.setenv(tiers.PREBUILT_VARIABLE, str(store.root))
            assert loader.load(SMALL, store=below).path == kernel.path
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path / "file"))
        with pytest.raises(StoreError, match=r"file/cache can.t be used .*, and no folder for temporary files"):
            loader.load(OTHER, store=below)
        with silent():
            assert loader.load(OTHER, store=store).path.is_relative_to(store.root)
    monkeypatch.setenv(trust.CACHE_VARIABLE, str(below.place))
    with pytest.warns(UserWarning, match=r"file/cache can't be used \(Not a directory\); builds go to") as caught:
        assert loader.load(THIRD, store=Store()).path.is_relative_to(tmp_path / "temporary")
    assert len(caught) == 1


def test_a_file_system_that_runs_no_programs(tmp_path: Path) -> None:
    with mounted(tmp_path / "noexec", "size=32m,noexec") as folder:
        with pytest.raises(CompileError, match=r"mounted noexec: set ONELAUNCH_CACHE_DIR") as caught:
            loader.load(SMALL, store=Store(folder / "cache"))
        assert not caught.value.lasting
        # An entry that was built elsewhere and copied there can't be loaded either.
        good = Store(tmp_path / "good")
        loader.load(SMALL, store=good)
        loader._loaded.clear()
        subprocess.run(["cp", "-a", str(good.root), str(folder / "copy")], check=True)
        with pytest.raises(StoreError, match=r"can't be loaded: .*mounted noexec"):
            loader.load(SMALL, store=Store(folder / "copy"))


# ------------------------------------------------------------------------------------------------------ a full disk

SPARED = (
    r"^The cache folder \S+ can't (be used|take a build) \((No space left on device|its disk is full)\); "
    + ELSEWHERE.format(r"\S+")
    + re.escape(CURE)
    + "$"
)
FULL = r"The disk is full: free some space, or set ONELAUNCH_CACHE_DIR to a folder on another disk\."


def test_a_disk_that_is_really_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ballast file on a small disk shrinks until a build fits."""
    said = []
    with mounted(tmp_path / "disk", "size=4m") as disk:
        store = Store(disk / "cache")
        monkeypatch.setattr(loader, "default_store", lambda: store)
        for free_pages in (0, 3, 8, 12, 20, 40, 100):
            forget(monkeypatch)
            with open(disk / "ballast", "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    os.ftruncate(file.fileno(), max(0, file.tell() - 4096 * free_pages))
            with warnings.catch_warnings(record=True) as warned:
                warnings.simplefilter("always")
                kernel = loader.load(SMALL, store=store)
            (disk / "ballast").unlink()
            if kernel.path.is_relative_to(disk):
                break
            assert leftovers(store) == []
            assert store.stored_keys() == []
            assert kernel.path.is_relative_to(tmp_path / "temporary")
            (warning,) = warned
            said.append(str(warning.message))
        assert_usable(store)
    assert len(said) > 3, said
    for message in said:
        assert re.search(SPARED, message), message
        assert str(disk) in message
    assert len({message.split(" (")[1] for message in said}) >= 2, said


def test_the_temporary_folders_disk_is_full_too(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler says so, in the cache and in the temporary folder. The failure isn't remembered."""
    does = '[ "$step" = compile ] && { set -- $(echo "$@" | sed "s|-o [^ ]*|-o /dev/full|"); exec "$real" "$@"; }'
    monkeypatch.setenv("CXX", str(compiler_that(does, tmp_path)))
    with (
        pytest.warns(UserWarning, match=r"can't take a build \(its disk is full\); builds go to "),
        pytest.raises(
            CompileError, match=rf"(?s){FULL}.*No space left on device|No space left on device.*{FULL}"
        ) as caught,
    ):
        loader.load(SMALL, store=store)
    assert "No space left on device" in str(caught.value)
    assert not caught.value.lasting
    monkeypatch.setenv("CXX", str(REAL))
    assert_usable(store)


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
            forget(patch)
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
