"""The store alone, without a compiler: what is published is found, and what is left behind is swept."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import stat
import time
from pathlib import Path

import pytest
from entries import FACTS, FILES, KEY, fill, published
from onelaunch import StoreError
from onelaunch.cache import files, lock, staging, tiers, trust
from onelaunch.cache import store as stores
from onelaunch.cache.manifest import MANIFEST, Entry, key_of
from onelaunch.cache.store import CACHE_VARIABLE, KEPT_SUFFIXES, Store

pytestmark = pytest.mark.usefixtures("fresh_process", "warnings_are_errors")


# ------------------------------------------------------------------------------------------------------- the root


def test_the_root_is_the_named_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order: argument, variable, the user's cache folder. Each is made with mode 0700, and only when it is needed."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "named"))
    requested = Store(tmp_path / "a" / "b" / "requested")
    assert Store().root == tmp_path / "named"
    monkeypatch.setenv(CACHE_VARIABLE, "~/x")
    assert Store().root == tmp_path / "home" / "x"
    monkeypatch.setenv(CACHE_VARIABLE, "")
    assert Store().root == tmp_path / "home" / ".cache" / "onelaunch"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert Store().root == tmp_path / "home" / ".cache" / "onelaunch"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert Store().root == tmp_path / "xdg" / "onelaunch"
    assert not (tmp_path / "a").exists(), "made before it was needed"
    before = os.umask(0)
    try:
        with requested.staging():
            for folder in (tmp_path / "a", tmp_path / "a" / "b", requested.root, requested.root / "staging"):
                assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder
    finally:
        os.umask(before)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("~nobody-of-that-name/x", "ONELAUNCH_CACHE_DIR is '~nobody-of-that-name/x', and no such user's home folder"),
        ("/tmp/\udcff", r"ONELAUNCH_CACHE_DIR is '/tmp/\udcff', which can't be written as UTF-8"),
    ],
)
def test_a_path_that_cant_be_used_is_a_sentence(text: str, sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, text)
    with pytest.raises(StoreError) as caught:
        Store().find(KEY)
    assert str(caught.value).startswith(sentence)
    with pytest.raises(StoreError, match="has a NUL character"):
        Store(Path("/tmp/a\0b")).find(KEY)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            OSError(28, "No space left on device", "/x/y"),
            "The kernel cache /x/y can't be used: No space left on device. "
            "The disk is full: free some space, or set ONELAUNCH_CACHE_DIR to a folder on another disk.",
        ),
        (
            OSError(30, "Read-only file system"),
            "The kernel cache folder can't be used: Read-only file system. "
            "Set ONELAUNCH_CACHE_DIR to a folder that this process may write.",
        ),
        (
            OSError("odd"),
            "The kernel cache folder can't be used: odd. "
            "Set ONELAUNCH_CACHE_DIR to a folder that this process may write.",
        ),
    ],
)
def test_the_error_for_an_unusable_file(error: OSError, sentence: str, store: Store) -> None:
    assert str(store.unusable(error)) == sentence
    store.root  # noqa: B018
    assert str(store.unusable(error)) == sentence.replace("cache folder can't", f"cache {store.root} can't")


# ------------------------------------------------------------------------------------------------------- entries


def test_what_is_published_is_what_is_found(store: Store) -> None:
    """The manifest is sorted, readable JSON. Besides it, an entry keeps only files with one of KEPT_SUFFIXES."""
    assert store.find(KEY) is None
    assert list(store.entries()) == []
    with store.staging() as stage:
        fill(stage, {**FILES, "main.o": b"gone", "x.d": b"gone", ".ninja_deps": b"gone", "noext": b"gone"})
        (stage / "stubs").mkdir()
        (stage / "stubs" / "libc10.so").write_bytes(b"gone")
        (stage / "link.so").symlink_to(store.root)
        for path in stage.glob("*.*"):
            if not path.is_symlink():
                path.chmod(0o666)
        first = store.publish(stage, KEY, {**FACTS, "note": "ünï"})
    assert not stage.exists()
    assert {path.name for path in first.path.iterdir()} == {MANIFEST, *FILES}
    assert {path.suffix for path in first.path.iterdir()} == {*KEPT_SUFFIXES}
    assert {stat.S_IMODE(path.stat().st_mode) for path in first.path.iterdir()} == {0o600}
    found = store.find(KEY)
    assert found == first == Entry(KEY, store.root / "entries" / KEY, found.manifest)
    sums = {n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in FILES.items()}
    assert found.manifest == {**FACTS, "note": "ünï", "key": KEY, "files": sums}
    assert found.module_path.read_bytes() == FILES["m.so"]
    assert found.source == "int x;\n"
    assert found.size == sum(map(len, FILES.values()))
    text = (found.path / MANIFEST).read_text(encoding="utf-8")
    assert list(json.loads(text)) == sorted({*found.manifest, "sum"})
    assert text.endswith("\n}\n")
    # Only folders named by a key are entries.
    published(store, "a" * 64)
    (store.root / "entries" / "a-note").mkdir()
    assert [entry.key for entry in store.entries()] == [KEY, "a" * 64]
    assert [store.find(key) for key in ("", "../entries", "a\0b", "A" * 64)] == [None] * 4


def test_an_entry_of_something_else_is_a_miss(store: Store) -> None:
    """A wrong note may lead to another key: the entry's configuration and architectures must be the requested ones."""
    published(store)
    for expect in ({}, {"config": {"num_backends": 3}, "archs": ("100a",)}, {"archs": ["90a", "100a"]}):
        assert store.find(KEY, expect) is not None, expect
    for expect in ({"config": {"num_backends": 2}}, {"config": {}}, {"archs": ("90a", "89")}, {"symbol": "k"}):
        assert store.find(KEY, expect) is None, expect
    assert store.find(KEY) is not None, "an entry of another configuration isn't damaged"


def test_the_key_is_made_of_its_ingredients(store: Store) -> None:
    made_of = {"source": "x", "archs": ["90a"]}
    assert published(store, key_of(made_of), ingredients=made_of).key == key_of(made_of)
    with pytest.raises(ValueError, match="its key isn't made of its ingredients"):
        published(store, KEY, ingredients=made_of)
    # A copy of another entry's folder under this entry's name is damaged.
    shutil.copytree(store.root / "entries" / key_of(made_of), store.root / "entries" / KEY)
    with pytest.warns(UserWarning, match=f"is damaged .it is the manifest of {key_of(made_of)}"):
        assert store.find(KEY) is None


def test_every_file_is_on_the_disk_before_the_entry_is_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut shows either no entry or a whole one: files, manifest and folder are synced, then renamed."""
    with store.staging():
        pass
    done: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append(f"-> {Path(new).name}"), rename(old, new))[1])
    before = len(os.listdir("/proc/self/fd"))
    with store.staging() as stage:
        store.publish(fill(stage), KEY, FACTS)
        assert done == [*sorted(FILES), MANIFEST, stage.name, f"-> {KEY}", "entries"]
    assert len(os.listdir("/proc/self/fd")) == before, "descriptors are left open"


def test_another_process_was_first(store: Store) -> None:
    first = published(store)
    with store.staging() as stage:
        second = store.publish(fill(stage, {**FILES, "m.so": b"another"}), KEY, FACTS)
        assert stage.exists()
    assert not stage.exists()
    assert second == first
    assert second.read("m.so") == FILES["m.so"]


def test_an_entry_that_cant_be_put_in_place(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed rename raises its error. An entry that can't be read back after several tries points at the disk."""
    with store.staging() as stage, monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda old, new: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
        with pytest.raises(OSError, match="cross-device"):
            store.publish(fill(stage), KEY, FACTS)
    assert store.find(KEY) is None
    looked: list[str] = []
    monkeypatch.setattr(Store, "find", lambda self, key: looked.append(key))
    monkeypatch.setattr(stores, "_VISIBLE_AFTER_SECONDS", (0.0, 0.0, 0.0))
    with pytest.raises(StoreError) as caught:
        published(store)
    assert str(caught.value) == (
        f"The entry {store.root}/entries/{KEY} can't be read back after it was published. Was it removed meanwhile? Is "
        f"the disk of {store.root} failing, or out of sync with another host's? Set {CACHE_VARIABLE} to a folder on a "
        "local disk."
    )
    assert looked == [KEY] * 3


# ------------------------------------------------------------------------------------------- staging, locks, notes


def test_staging_folders_are_private_and_go(store: Store) -> None:
    with store.staging() as one, store.staging() as two:
        assert one != two
        for path in (one, two):
            assert path.parent == store.root / "staging"
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
            assert re.fullmatch(rf"{re.escape(socket.gethostname())}\.{os.getpid()}\.[0-9a-f]{{12}}", path.name)
        (one / "sub").mkdir()
        (one / "sub" / "file").write_text("")
    assert list((store.root / "staging").iterdir()) == []
    with pytest.raises(KeyError, match="inside"), store.staging() as three:
        raise KeyError("inside")
    assert not three.exists()
    with store.staging() as four:
        four.rmdir()
        # A store sweeps once. Later leftovers wait for the next process.
        (store.root / "staging" / "nowhere.1.0123456789ab").mkdir()
        os.utime(store.root / "staging" / "nowhere.1.0123456789ab", (0, 0))
        with store.staging():
            assert (store.root / "staging" / "nowhere.1.0123456789ab").exists()
        with Store(store.root).staging():
            assert not (store.root / "staging" / "nowhere.1.0123456789ab").exists()


HERE, END = "here.example", "0123456789ab"
SWEPT = {
    # name, seconds since its last change, whether it is locked (None: locks can't be queried), whether it is removed
    "of a dead process": (f"{HERE}.77.{END}", 0, False, True),
    "locked by another container's process of that number": (f"{HERE}.77.{END}", 9e9, True, False),
    "of a live process that was about to lock it": (f"{HERE}.1.{END}", 600, False, False),
    "of a number that somebody else has by now": (f"{HERE}.1.{END}", 601, False, True),
    "of a dead number, without locks": (f"{HERE}.77.{END}", 600, None, False),
    "of a dead number, without locks, long ago": (f"{HERE}.77.{END}", 601, None, True),
    "of a live process, without locks": (f"{HERE}.1.{END}", 9e9, None, False),
    "of another host": (f"node.example.77.{END}", 86_400, False, False),
    "of another host, long ago": (f"node.example.77.{END}", 86_401, False, True),
    "of nobody": (f"{HERE}.x.{END}", 9e9, False, False),
    "somebody's own": ("release-1.0", 9e9, False, False),
}


@pytest.mark.parametrize("kind", SWEPT)
def test_a_sweep_takes_what_nobody_builds_in(kind: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    name, age, locked, goes = SWEPT[kind]
    folder = store.folder("staging")
    path = folder / name
    path.mkdir()
    (path / "half.so").write_text("")
    os.utime(path, (0, 1e9))
    (folder / f"{HERE}.77.{END[::-1]}").symlink_to(path)
    with monkeypatch.context() as patch:
        patch.setattr(socket, "gethostname", lambda: HERE)
        patch.setattr(staging, "_is_alive", lambda pid: pid == 1)
        patch.setattr(lock, "try_lock", lambda descriptor: None if locked is None else not locked)
        patch.setattr(time, "time", lambda: 1e9 + age)
        opened = len(os.listdir("/proc/self/fd"))
        assert store.sweep() == ([path] if goes else [])
        assert len(os.listdir("/proc/self/fd")) == opened
    assert path.exists() != goes
    assert (folder / f"{HERE}.77.{END[::-1]}").is_symlink(), "a symbolic link is neither followed nor removed"


def test_a_sweep_leaves_what_another_user_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless all users who can write there are trusted."""
    path = tmp_path / f"nowhere.77.{END}"
    path.mkdir()
    os.utime(path, (0, 0))
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert staging.sweep(tmp_path) == []
    monkeypatch.setenv(trust.SHARED_VARIABLE, "1")
    assert staging.sweep(tmp_path) == [path]


def test_whether_a_process_lives() -> None:
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    assert not staging._is_alive(child)
    assert staging._is_alive(os.getpid())
    assert staging._is_alive(1), "a process of another user is alive too"
    assert staging._is_alive(10**30), "no process can have this number, so it counts as alive"


def test_a_use_is_stamped_once_an_hour(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.used(KEY) == 0.0
    entry = published(store)
    path = store.root / "stamps" / KEY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for age, stamped in ((3599, False), (3600, True)):
        os.utime(path, (0, 1e9))
        monkeypatch.setattr(time, "time", lambda age=age: 1e9 + age)
        store.stamp(KEY)
        assert (path.stat().st_mtime > 1e9) == stamped
        assert store.used(KEY) == path.stat().st_mtime
    path.unlink()
    os.utime(entry.path, (0, 2e9))
    assert store.used(KEY) == 2e9
    Store(store.root, read_only=True).stamp(KEY)
    assert not path.exists()
    # A symbolic link in the stamp's place is not followed, and failing to write a stamp raises nothing.
    path.symlink_to(store.root / "elsewhere")
    os.utime(path, (0, 0), follow_symlinks=False)
    store.stamp(KEY)
    assert not (store.root / "elsewhere").exists()


def test_a_note_is_what_was_noted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.read_note("r") is None
    store.write_note("r", {"key": KEY, "ünï": [1]})
    assert store.read_note("r") == {"key": KEY, "ünï": [1]}
    assert store.read_note("other") is None
    (path,) = (store.root / "index").iterdir()
    assert path.name == "r.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    # Failing to write a note raises nothing and keeps the old note.
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        store.write_note("r", {"key": "new"})
    assert store.read_note("r") == {"key": KEY, "ünï": [1]}
    assert list((store.root / "index").iterdir()) == [path]
    Store(store.root, read_only=True).write_note("r", {})
    Store(path / "below a file").write_note("r", {})
    for text in (b"", b"{", b"[1]", b"3", b"null", b"\xff", b"[" * 100_000):
        path.write_bytes(text)
        assert store.read_note("r") is None, text
    path.chmod(0o602)
    with pytest.raises(StoreError, match="can be written by others"):
        store.read_note("r")
    monkeypatch.setenv(trust.SHARED_VARIABLE, "1")
    before = os.umask(0o027)
    try:
        store.write_note("shared", {"key": KEY})
    finally:
        os.umask(before)
    assert stat.S_IMODE((store.root / "index" / "shared.json").stat().st_mode) == 0o640


def test_a_file_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary file is in the same folder, since a rename across file systems isn't atomic."""
    moved: list[tuple[Path, Path]] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append((Path(old), Path(new))), replace(old, new))[1])
    files.replace(tmp_path / "f", b"\0\xff", 0o640)
    ((old, new),) = moved
    assert old.parent == new.parent == tmp_path
    assert (tmp_path / "f").read_bytes() == b"\0\xff"
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o640


# ---------------------------------------------------------------------------------------- tiers, and what can't be


def test_prebuilt_folders_in_their_order(tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tiers.PREBUILT_VARIABLE, raising=False)
    assert tiers.tiers(store) == [store]
    names = [str(tmp_path / name) for name in ("b", "missing", "a b")]
    for name in (names[0], names[2]):
        Path(name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(tiers.PREBUILT_VARIABLE, ":".join([*names[:2], "~/a b", ""]))
    with pytest.warns(UserWarning, match="passed over") as caught:
        found = tiers.tiers(store)
    assert [str(w.message) for w in caught] == [
        f"ONELAUNCH_PREBUILT names {names[1]}, which isn't a folder; it is passed over."
    ]
    assert [(tier.place, tier.read_only) for tier in found[:2]] == [(names[0], True), (names[2], True)]
    assert found[2:] == [store]
    tiers.prebuilt()  # warns once


@pytest.mark.parametrize("part", ["staging", "locks", "stamps"])
@pytest.mark.parametrize("how", ["written by others", "a link", "a file"])
def test_a_part_that_others_could_have_written(part: str, how: str, store: Store, tmp_path: Path) -> None:
    """A bad folder without code loses only its own function. Without staging, builds go to the temporary store."""
    entry = published(store)
    path = store.folder(part)
    if how == "written by others":
        path.chmod(0o777)
    else:
        shutil.rmtree(path)
        path.symlink_to(tmp_path) if how == "a link" else path.write_text("")
    assert store.find(KEY) == entry
    if part == "staging":
        with pytest.warns(UserWarning, match="builds go to"):
            assert tiers.writable(store) is not store
        return
    assert tiers.writable(store) is store
    with store.lock(KEY) as held:
        assert held.held == (part != "locks")
    assert published(store, "8" * 64).key == "8" * 64
