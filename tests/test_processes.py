"""Several processes on one cache: locks end with their holder, leftovers are swept, clear() runs beside readers."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from entries import KEY, published
from onelaunch import StoreError
from onelaunch.cache import collect, files, lock, staging, tiers
from onelaunch.cache.store import TAG, Store
from processes import until

pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture
def fork() -> Iterator[Callable[[Callable[[], Any]], int]]:
    """Starts forked children, which are killed at the end."""
    started = []

    def start(work: Callable[[], Any]) -> int:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work()
                status = 0
            finally:
                os._exit(status)
        started.append(child)
        return child

    yield start
    for child in started:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            continue


# --------------------------------------------------------------------------------------------------------- locks


def test_a_lock_keeps_others_out_and_leaves_no_file(store: Store, fork: Any, tmp_path: Path) -> None:
    """Locks of other keys stay free. Eight waiting processes get the lock in turn, although each removes the file."""
    log = tmp_path / "log"

    def hold() -> None:
        with store.lock(KEY) as held:
            assert held.held
            with open(log, "a", buffering=1) as file:
                file.write("+\n")
                time.sleep(0.05)
                file.write("-\n")

    with store.lock(KEY) as mine:
        assert mine.held
        children = [fork(hold) for _ in range(8)]
        with store.lock("8" * 64) as other:
            assert other.held
        time.sleep(0.3)
        assert not log.exists(), "two held one lock"
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    assert log.read_text() == "+\n-\n" * 8
    assert list((store.root / "locks").iterdir()) == []


def test_the_lock_of_a_removed_file_is_none(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """This happens if the holder ends after another process opened the lock file and before that process locks it."""
    path, real, removed = store.folder("locks") / f"{KEY}.lock", lock.try_lock, []

    def after_removal(descriptor: int) -> bool | None:
        if not removed:
            removed.append(path.unlink())
        return real(descriptor)

    monkeypatch.setattr(lock, "try_lock", after_removal)
    with store.lock(KEY) as held:
        assert held.held
        assert path.exists(), "without the file, other processes would lock a new one"


def test_a_wait_that_takes_too_long_is_given_up(
    store: Store, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """For example, a lock server may keep the lock of a host that is gone."""
    monkeypatch.setenv(lock.TIMEOUT_VARIABLE, "0.2")
    with open(store.folder("locks") / f"{KEY}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with store.lock(KEY) as held:
            assert not held.held
    said = capfd.readouterr().err
    assert "gave up the wait for" in said
    assert "its holder didn't say who it is" in said
    assert lock.TIMEOUT_VARIABLE in said
    monkeypatch.setenv(lock.TIMEOUT_VARIABLE, "soon")
    with pytest.raises(StoreError, match="is 'soon'; it must be a number of seconds"), store.lock(KEY):
        pass


def test_a_forked_child_leaves_what_its_parent_holds(store: Store) -> None:
    """The child leaves the `with` blocks too. The parent's lock, lock file and staging folder must stay."""
    with store.lock(KEY) as held, store.staging() as stage:
        child = os.fork()
        if child == 0:
            try:
                with lock.hold(store.root / "locks" / f"{'8' * 64}.lock", "", lambda: False):
                    assert not held.held
                held.phase("nothing")
                raise KeyError
            except KeyError:
                pass
        if child:
            assert os.waitpid(child, 0)[1] == 0
            assert held.held
            assert stage.is_dir()
    if child == 0:
        os._exit(0)
    assert not stage.exists()
    assert list((store.root / "locks").iterdir()) == []


def test_lock_files_of_killed_processes_are_swept(store: Store, fork: Any) -> None:
    folder = store.folder("locks")
    (folder / f"{'1' * 64}.lock").write_text('{"host": "elsewhere", "pid": 1}')
    (folder / "somebody's.lock").write_text("")
    (folder / f"{'2' * 64}.lock").symlink_to(store.root / TAG)
    with store.lock(KEY):

        def sweep() -> None:
            gone = Store(store.root).sweep()
            assert gone == [folder / f"{'1' * 64}.lock"], gone

        assert os.waitpid(fork(sweep), 0)[1] == 0
        assert {path.name for path in folder.iterdir()} == {
            f"{KEY}.lock",
            "somebody's.lock",
            f"{'2' * 64}.lock",
        }
    assert (store.root / TAG).is_file()


def test_a_lock_file_that_cant_be_opened(store: Store) -> None:
    """A lock only avoids duplicate work, so the build goes on without it."""
    (store.folder("locks") / f"{KEY}.lock").mkdir()
    with store.lock(KEY) as held:
        assert not held.held
        held.phase("compiling")


# ------------------------------------------------------------------------------------------------ temporary stores


def test_temporary_stores_of_dead_processes_are_swept(tmp_path: Path, fork: Any) -> None:
    """Killed processes and forked workers end without clean-up. Stores of live processes stay."""
    parent = tmp_path / "temporary"

    def use(end: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            published(tiers.fallback("It rains"))
        (tmp_path / f"{end}.{os.getpid()}").touch()
        if end != "exits":
            time.sleep(600)

    children = {end: fork(lambda end=end: use(end)) for end in ("is killed", "exits", "lives")}
    until(lambda: all((tmp_path / f"{end}.{pid}").exists() for end, pid in children.items()), "all stores")
    os.kill(children["is killed"], signal.SIGKILL)
    for end in ("is killed", "exits"):
        os.waitpid(children[end], 0)
    (parent / "onelaunch-notes").mkdir()
    with pytest.warns(UserWarning, match="It rains; builds go to"):
        mine = tiers.fallback("It rains").root
    left = {path.name for path in parent.iterdir()} - {mine.name, "onelaunch-notes"}
    assert [name.split(".")[-2] for name in left] == [str(children["lives"])]


def test_a_temporary_store_goes_with_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit: list[Any] = []
    monkeypatch.setattr("atexit.register", lambda *call: at_exit.append(call))
    with pytest.warns(UserWarning, match="It rains; builds go to"):
        first = tiers.fallback("It rains")
    assert tiers.fallback("It rains") is first
    ((remove, *arguments),) = at_exit
    child = os.fork()
    if child == 0:  # the store is the parent's: the child neither removes nor uses it
        remove(*arguments)
        unused = first.root.is_dir() and tiers.tiers(first) == [first]
        os._exit(0 if unused and tiers.fallback("It snows").root != first.root else 1)
    assert os.waitpid(child, 0)[1] == 0
    remove(*arguments)
    assert not first.root.exists()
    remove(*arguments)


def test_folders_of_failed_builds_are_bounded(tmp_path: Path) -> None:
    old, young = staging.failed_folder(), staging.failed_folder()
    (old / "build.log").write_text("")
    os.utime(old, (0, 0))
    (tmp_path / "temporary" / "other").mkdir()
    os.utime(tmp_path / "temporary" / "other", (0, 0))
    new = staging.failed_folder()
    assert set((tmp_path / "temporary").iterdir()) == {young, new, tmp_path / "temporary" / "other"}


# ------------------------------------------------------------------------------------------------------ all at once


def test_clear_beside_users(store: Store, fork: Any, tmp_path: Path) -> None:
    """Reads, publishes and clears run at once. There is no warning and no error, and every entry found is complete."""
    keys = [str(number) * 64 for number in range(4)]
    end = time.monotonic() + 1.5

    def use(work: Callable[[Store, str], Any]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            own, rounds = Store(store.root), 0
            while time.monotonic() < end or rounds < 8:
                for key in keys:
                    work(own, key)
                    rounds += 1
        (tmp_path / f"done.{os.getpid()}").write_text(json.dumps(rounds))

    def read(own: Store, key: str) -> None:
        own.find(key)
        own.stamp(key)

    def build(own: Store, key: str) -> None:
        with own.lock(key) as held:
            assert held.held
            published(own, key)

    works = [read, build, lambda own, key: collect.clear(own), read, build, lambda own, key: own.sweep()]
    children = [fork(lambda work=work: use(work)) for work in works]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(works)
    assert all(int((tmp_path / f"done.{child}").read_text()) >= 8 for child in children)
    assert store.listed("damaged") == []
    assert files.size_of(store.root) > 0
