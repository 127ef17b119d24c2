"""The store on its own, without a compiler, and how the loader uses it."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import socket
import stat
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onelaunch
import pytest
import torch
from onelaunch import KernelConfig, LaunchError, MetadataBuffers, StoreError, ToolchainError
from onelaunch.build import binary, toolchain
from onelaunch.build import compile as compiler
from onelaunch.cache import store as stores
from onelaunch.cache import trust
from onelaunch.cache.store import CACHE_VARIABLE, KEPT_SUFFIXES, MANIFEST, Entry, Store
from onelaunch.cli.lab.replay.pool import PagedAllocator
from onelaunch.errors import ArgumentError
from onelaunch.load import loader
from onelaunch.run import api, remembered
from onelaunch.run.copy_plan import CopyPlan
from onelaunch.run.destinations import Destinations

KEY = "5" * 64
FACTS = {"module_file": "m.so", "source_file": "main.cpp", "config": {"num_backends": 3}}
FILES = {"m.so": b"\x7fELF object", "main.cpp": b"int x;\n", "build.ninja": b"rule\n", "b.log": b"", "c.cu": b"//\n"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def fill(stage: Path, files: dict[str, bytes] = FILES) -> Path:
    for name, data in files.items():
        (stage / name).write_bytes(data)
    return stage


def published(store: Store, key: str = KEY, **facts: Any) -> Entry:
    with store.staging() as stage:
        return store.publish(fill(stage), key, {**FACTS, **facts})


@pytest.fixture(autouse=True)
def _no_warning_unless_expected() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# ------------------------------------------------------------------------------------------------------- the root


def test_the_root_is_the_folder_that_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An argument before the variable, the variable before the platform's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "named"))
    asked = Store(tmp_path / "a" / "b" / "asked")
    assert not (tmp_path / "a").exists(), "made before it was needed"
    assert asked.root == tmp_path / "a" / "b" / "asked"
    assert Store().root == tmp_path / "named"
    monkeypatch.setenv(CACHE_VARIABLE, "")
    assert Store().root == tmp_path / "xdg" / "onelaunch"
    monkeypatch.delenv(CACHE_VARIABLE)
    assert Store(None).root == tmp_path / "xdg" / "onelaunch"
    assert list(tmp_path.iterdir()) == [], "made before it was needed"
    for root in (asked.root, tmp_path / "named", tmp_path / "xdg" / "onelaunch"):
        with Store(root).staging():
            assert stat.S_IMODE(root.stat().st_mode) == 0o700
    # Asked once: a variable that changes later doesn't move a store.
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "other"))
    assert asked.root == tmp_path / "a" / "b" / "asked"


@pytest.fixture
def no_spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a fresh process, whose temporary stores are made below tmp_path."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(stores, "_spare", None)
    monkeypatch.setattr(stores, "_warned", set())


def spared(store: Store, root: Path, reason: str) -> None:
    """The store is replaced by a temporary one, the same each time, with one warning."""
    with pytest.warns(UserWarning, match="can't be used") as caught:
        temporary = store.writable()
    assert store.writable() is temporary
    (warning,) = caught
    assert str(warning.message) == (
        f"The cache folder {root} can't be used ({reason}); builds go to {temporary.root} and are lost when this "
        f"process ends. Set {CACHE_VARIABLE} to a folder that this process may write and that has room."
    )
    assert temporary.root.parent.name == "temporary"
    assert stat.S_IMODE(temporary.root.stat().st_mode) == 0o700
    assert stores.tiers(store) == [store, temporary]


def test_a_named_folder_that_cant_be_made(tmp_path: Path, no_spare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    store = Store()
    spared(store, tmp_path / "file" / "cache", "Not a directory")
    assert store.root == tmp_path / "file" / "cache"
    # A look is no reason to warn.
    assert store.find(KEY) is None
    assert store.read_index("r") is None
    assert list(store.entries()) == []


def test_a_root_that_may_not_be_written(tmp_path: Path, no_spare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "cache"
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: not (mode & os.W_OK and Path(path) == root) and access(path, mode)
    )
    with pytest.raises(PermissionError) as caught:
        trust.private(root)
    assert caught.value.errno == 13
    assert caught.value.strerror == "Permission denied"
    assert caught.value.filename == str(root)
    spared(Store(root), root, "Permission denied")


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
def test_how_an_unusable_file_is_told(error: OSError, sentence: str, store: Store) -> None:
    assert str(store.unusable(error)) == sentence
    store.root  # noqa: B018
    assert str(store.unusable(error)) == sentence.replace("cache folder can't", f"cache {store.root} can't")


# ------------------------------------------------------------------------------------------------------- entries


def test_what_is_published_is_what_is_found(store: Store) -> None:
    assert store.find(KEY) is None
    assert list(store.entries()) == []
    first = published(store)
    found = store.find(KEY)
    assert found is not None
    assert (found.key, found.path) == (first.key, first.path) == (KEY, store.root / "entries" / KEY)
    assert found.manifest == first.manifest
    assert found.manifest == {
        **FACTS,
        "key": KEY,
        "files": {n: {"size": len(d), "sha256": hashlib.sha256(d).hexdigest()} for n, d in FILES.items()},
    }
    assert found.module_path == found.path / "m.so"
    assert found.module_path.read_bytes() == FILES["m.so"]
    assert found.source == "int x;\n"
    assert [entry.key for entry in store.entries()] == [KEY]


def test_the_manifest_is_readable_text(store: Store) -> None:
    text = (published(store, note="ünï").path / MANIFEST).read_text(encoding="utf-8")
    assert text.endswith("}\n")
    assert text.startswith('{\n "config": {\n  "num_backends": 3\n }')
    assert list(json.loads(text)) == sorted(json.loads(text))


def test_only_what_a_person_reads_is_kept(store: Store) -> None:
    with store.staging() as stage:
        fill(stage)
        for name in ("main.o", "x.d", ".ninja_deps", "noext"):
            (stage / name).write_bytes(b"gone")
        (stage / "stubs").mkdir()
        (stage / "stubs" / "libc10.so").write_bytes(b"gone")
        (stage / "link").symlink_to(store.root)
        for path in stage.iterdir():
            if path.is_file():
                path.chmod(0o666)
        entry = store.publish(stage, KEY, FACTS)
    assert {path.name for path in entry.path.iterdir()} == {MANIFEST, *FILES}
    assert {path.suffix for path in entry.path.iterdir()} == {*KEPT_SUFFIXES, ".ninja"}
    for path in entry.path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert store.root.is_dir(), "a link was followed"


def test_every_file_is_on_the_disk_before_the_entry_is_there(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut shows either no entry or a whole one: files, manifest and folder are synced, then renamed."""
    done: list[str] = []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda old, new: (done.append(f"-> {Path(new).name}"), rename(old, new))[1])
    with store.staging() as stage:
        store.publish(fill(stage), KEY, FACTS)
        assert done == [*sorted(FILES), MANIFEST, stage.name, f"-> {KEY}", "entries"]
    assert len(os.listdir("/proc/self/fd")) < 500, "descriptors are left open"


def test_synced_files_are_closed(store: Store) -> None:
    before = len(os.listdir("/proc/self/fd"))
    published(store)
    assert len(os.listdir("/proc/self/fd")) == before


def test_another_process_was_first(store: Store) -> None:
    first = published(store)
    stamp = (first.path / MANIFEST).stat().st_ino
    with store.staging() as stage:
        second = store.publish(fill(stage, {**FILES, "m.so": b"another"}), KEY, FACTS)
        assert stage.exists()
    assert not stage.exists()
    assert second.manifest == first.manifest
    assert (second.path / MANIFEST).stat().st_ino == stamp


def test_an_entry_that_cant_be_put_in_place(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.staging() as stage, monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda old, new: (_ for _ in ()).throw(OSError(18, "Invalid cross-device link")))
        with pytest.raises(OSError, match="cross-device"):
            store.publish(fill(stage), KEY, FACTS)
    assert store.find(KEY) is None


def test_an_entry_that_cant_be_read_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Store, "find", lambda self, key: asked.append(key))
    monkeypatch.setattr(stores, "_VISIBLE_AFTER_SECONDS", (0.0, 0.0, 0.0))
    with pytest.raises(StoreError) as caught:
        published(store)
    assert str(caught.value) == (
        f"The entry {store.root}/entries/{KEY} can't be read back after it was published. Is the disk of {store.root} "
        f"failing or out of sync with another host's? Set {CACHE_VARIABLE} to a folder on a local disk."
    )
    # Another host's file system may show it only after a while.
    assert asked == [KEY] * 3


def damage(entry: Entry, name: str, data: bytes | None) -> None:
    (entry.path / name).unlink()
    if data is not None:
        (entry.path / name).write_bytes(data)


def edited(entry: Entry, **changes: Any) -> bytes:
    return json.dumps({**entry.manifest, **changes}).encode()


def listed(entry: Entry, name: str) -> None:
    """A file of that name is there, and in the manifest as it is."""
    (entry.path / name).parent.mkdir(exist_ok=True)
    (entry.path / name).write_bytes(FILES["m.so"])
    files = entry.manifest["files"]
    damage(entry, MANIFEST, edited(entry, files={**files, name: files["m.so"]}))


DAMAGES: dict[str, tuple[Callable[[Entry], None], str]] = {
    "longer": (lambda e: damage(e, "m.so", FILES["m.so"] + b"x"), "m.so isn't the file that was published"),
    "of equal length": (lambda e: damage(e, "m.so", b"\x7fELF objecT"), "m.so isn't the file that was published"),
    "of a wrong size in the manifest": (
        lambda e: damage(
            e, MANIFEST, edited(e, files={"m.so": {**e.manifest["files"]["m.so"], "size": len(FILES["m.so"]) + 1}})
        ),
        "m.so isn't the file that was published",
    ),
    "a file is missing": (lambda e: damage(e, "c.cu", None), f"{KEY}/c.cu is missing"),
    "the manifest is missing": (lambda e: damage(e, MANIFEST, None), f"{KEY}/{MANIFEST} is missing"),
    "of another key": (lambda e: damage(e, MANIFEST, edited(e, key="6" * 64)), f"it is the manifest of {'6' * 64}"),
    "no JSON": (lambda e: damage(e, MANIFEST, b"{"), "Expecting property name"),
    "no text": (lambda e: damage(e, MANIFEST, b"\xff\xfe\xff"), "decode"),
    "a number": (lambda e: damage(e, MANIFEST, b"3"), "not subscriptable"),
    "no key": (lambda e: damage(e, MANIFEST, b"{}"), "'key'"),
    "a list of files": (lambda e: damage(e, MANIFEST, edited(e, files=["m.so"])), "no attribute 'items'"),
    "a file of another folder": (lambda e: listed(e, "sub/x.so"), "('sub/x.so' isn't the name of a file in it)"),
    "a hidden file": (lambda e: listed(e, ".x.so"), "('.x.so' isn't the name of a file in it)"),
    "an object that isn't listed": (
        lambda e: damage(e, MANIFEST, edited(e, module_file="x.so")),
        "(its manifest doesn't list the shared object)",
    ),
    "no sizes": (lambda e: damage(e, MANIFEST, edited(e, files={"m.so": {}})), "'size'"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_seen_and_set_aside(kind: str, store: Store) -> None:
    hurt, reason = DAMAGES[kind]
    entry = published(store)
    other = published(store, "7" * 64)
    hurt(entry)
    with pytest.warns(UserWarning, match="is damaged") as caught:
        assert store.find(KEY) is None
    (warning,) = caught
    said = re.fullmatch(
        rf"The cache entry {re.escape(str(entry.path))} is damaged \((.*)\); it is set aside and built again\.",
        str(warning.message),
    )
    assert said is not None, warning.message
    assert reason in f"({said[1]})"
    assert not entry.path.exists()
    (aside,) = (store.root / "damaged").iterdir()
    assert re.fullmatch(rf"{KEY[:16]}\.\w{{8}}", aside.name)
    # The next look is silent, the neighbour is whole, and the key can be published again.
    assert store.find(KEY) is None
    assert [e.key for e in store.entries()] == [other.key]
    assert published(store).manifest == entry.manifest


def test_the_warning_points_at_who_asked(store: Store) -> None:
    damage(published(store), "m.so", b"")
    with pytest.warns(UserWarning, match="is damaged") as caught:
        store.find(KEY)
    assert caught[0].filename == __file__


def test_damage_that_cant_be_set_aside_is_still_told(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = published(store)
    damage(entry, "m.so", b"")
    monkeypatch.setattr(Path, "rename", lambda self, to: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
    with pytest.warns(UserWarning, match="is damaged"):
        assert store.find(KEY) is None


def test_a_link_to_the_object_is_not_followed(store: Store, tmp_path: Path) -> None:
    entry = published(store)
    (tmp_path / "elsewhere.so").write_bytes(FILES["m.so"])
    (entry.path / "m.so").unlink()
    (entry.path / "m.so").symlink_to(tmp_path / "elsewhere.so")
    with pytest.warns(UserWarning, match=r"is damaged \(.*symbolic links.*\); it is set aside and built again"):
        assert store.find(KEY) is None
    assert not entry.path.exists()
    assert (tmp_path / "elsewhere.so").read_bytes() == FILES["m.so"]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT])
def test_want_of_room_is_no_damage(number: int, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that can open no more files leaves a whole entry where it is, and says what it ran out of."""
    published(store)

    def none(path: Path) -> bytes:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(stores, "read", none)
        with pytest.raises(OSError, match=os.strerror(number)):
            store.find(KEY)
    assert store.find(KEY) is not None
    assert not (store.root / "damaged").exists()


@pytest.mark.parametrize("mask", [0o002, 0o000])
def test_a_umask_that_lets_others_write(mask: int, store: Store) -> None:
    """Whatever is made first, what the store makes is its user's alone, and is taken by the next look."""
    before = os.umask(mask)
    try:
        for use in (store.staging, lambda: store.lock(KEY)):
            with use():
                pass
            assert stat.S_IMODE(store.root.stat().st_mode) == 0o700
            shutil.rmtree(store.root)
        store.write_index("r", {"key": KEY})
        assert store.read_index("r") == {"key": KEY}
        entry = published(store)
        for path in (store.root, *store.root.iterdir(), entry.path):
            assert stat.S_IMODE(path.stat().st_mode) == 0o700, path
    finally:
        os.umask(before)
    assert store.find(KEY) is not None


@pytest.mark.parametrize(("mode", "told"), [(0o720, "720"), (0o702, "702"), (0o777, "777")])
def test_an_entry_that_others_may_write(mode: int, told: str, store: Store) -> None:
    entry = published(store)
    entry.path.chmod(mode)
    with pytest.raises(StoreError) as caught:
        store.find(KEY)
    assert str(caught.value) == (
        f"{entry.path} in the kernel cache can be written by others (mode {told}). Run: chmod go-w {entry.path} "
        f"or, if you trust everybody who can write there, set {trust.SHARED_VARIABLE}=1."
    )
    entry.path.chmod(0o755)
    assert store.find(KEY) is not None


def test_an_entry_of_another_user(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root's is taken, anybody else's isn't."""
    entry = published(store)
    lstat, owner = Path.lstat, 0

    def owned(self: Path) -> Any:
        status = lstat(self)
        return SimpleNamespace(st_mode=status.st_mode, st_uid=owner if self == entry.path else 7)

    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: 7)
        patch.setattr(Path, "lstat", owned)
        assert store.find(KEY) is not None
        owner = 7
        assert store.find(KEY) is not None
        owner = 1
        with pytest.raises(StoreError) as caught:
            store.find(KEY)
    assert str(caught.value) == (
        f"{entry.path} in the kernel cache belongs to user 1, and code from it would run as user 7. "
        f"Set {CACHE_VARIABLE} to a folder of your own, or, if you trust everybody who can write there, "
        f"set {trust.SHARED_VARIABLE}=1."
    )


def test_an_entry_that_is_a_link(store: Store, tmp_path: Path) -> None:
    entry = published(store)
    entry.path.rename(tmp_path / "elsewhere")
    entry.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError) as caught:
        store.find(KEY)
    assert str(caught.value) == (
        f"{entry.path} in the kernel cache is a symbolic link; replace it by the folder or file it leads to."
    )


def test_entries_are_those_with_the_name_of_a_key(store: Store) -> None:
    for key in ("b" * 64, "a" * 64):
        published(store, key)
    (store.root / "entries" / "a-note").mkdir()
    assert [entry.key for entry in store.entries()] == ["a" * 64, "b" * 64]
    damage(next(store.entries()), "m.so", b"")
    with pytest.warns(UserWarning, match="is damaged"):
        assert [entry.key for entry in store.entries()] == ["b" * 64]


# ------------------------------------------------------------------------------------------- staging, locks, index


def test_staging_folders_are_private_and_go(store: Store) -> None:
    with store.staging() as one, store.staging() as two:
        assert one != two
        for path in (one, two):
            assert path.parent == store.root / "staging"
            assert list(path.iterdir()) == []
            assert stat.S_IMODE(path.stat().st_mode) == 0o700
            host, pid, random = path.name.rsplit(".", 2)
            assert host
            assert int(pid) == os.getpid()
            assert re.fullmatch(r"[0-9a-f]{12}", random)
        (one / "sub").mkdir()
        (one / "sub" / "file").write_text("")
    assert list((store.root / "staging").iterdir()) == []
    with pytest.raises(KeyError, match="inside"), store.staging() as three:
        raise KeyError("inside")
    assert not three.exists()
    with store.staging() as four:
        four.rmdir()


HERE = "here.example"
SWEPT = {
    # name, seconds since it was touched, whether it is locked (None: locks can't be asked) -> whether it goes
    "of a dead process": (f"{HERE}.77.a", 0, False, True),
    "locked by another container's process of that number": (f"{HERE}.77.a", 9e9, True, False),
    "of a live process that was about to lock it": (f"{HERE}.1.a", 600, False, False),
    "of a number that somebody else has by now": (f"{HERE}.1.a", 601, False, True),
    "of a dead number, without locks": (f"{HERE}.77.a", 600, None, False),
    "of a dead number, without locks, long ago": (f"{HERE}.77.a", 601, None, True),
    "of a live process, without locks": (f"{HERE}.1.a", 9e9, None, False),
    "of another host": ("node.example.77.a", 86_400, False, False),
    "of another host, long ago": ("node.example.77.a", 86_401, False, True),
    "of no process": (f"{HERE}.x.a", 86_400, False, False),
    "of no process, long ago": (f"{HERE}.x.a", 86_401, False, True),
}


@pytest.mark.parametrize("kind", SWEPT)
def test_a_sweep_takes_what_nobody_builds_in(kind: str, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    name, age, locked, goes = SWEPT[kind]
    monkeypatch.setattr(socket, "gethostname", lambda: HERE)
    with store.staging():
        folder = store.root / "staging"
        path = folder / name
        path.mkdir()
        (path / "half.so").write_text("")
        os.utime(path, (0, 1e9))
        (folder / f"{HERE}.77.link").symlink_to(path)
        asked = []

        def is_held(descriptor: int) -> bool | None:
            asked.append(os.fstat(descriptor).st_ino)
            return locked

        monkeypatch.setattr(stores, "_alive", lambda pid: pid in (1, os.getpid()))
        monkeypatch.setattr(stores.locks, "is_held", is_held)
        opened = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(time, "time", lambda: 1e9 + age)
        inode = path.stat().st_ino
        gone = store.sweep()
        monkeypatch.undo()
        # The folder of this test's own staging() is there too: a live process, touched just now.
        assert (path in gone) == goes
        assert path.exists() != goes
        assert (inode in asked) == (name in (f"{HERE}.1.a", f"{HERE}.77.a"))
        assert folder / f"{HERE}.77.link" not in gone, "a link isn't followed, nor taken for a folder"
        assert len(os.listdir("/proc/self/fd")) == opened
    assert Store(store.root / "none").sweep() == []


def test_the_first_staging_of_a_store_sweeps(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once; and what another process removes at the same moment is no error."""
    with store.staging():
        pass
    (store.root / "staging" / "left").mkdir()
    with store.staging():
        assert (store.root / "staging" / "left").exists()
    monkeypatch.setattr(stores, "_abandoned", lambda path: path.name == "left" and path.rmdir() is None)
    with Store(store.root).staging() as mine:
        assert list(mine.parent.iterdir()) == [mine]


def test_whether_a_process_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    answers: list[type[OSError] | None] = [None, ProcessLookupError, PermissionError]

    def kill(pid: int, signal: int) -> None:
        asked.append((pid, signal))
        if (error := answers.pop(0)) is not None:
            raise error

    monkeypatch.setattr(os, "kill", kill)
    assert [stores._alive(77) for _ in range(3)] == [True, False, True]
    assert asked == [(77, 0)] * 3


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
    # Somebody's link is not followed, and a stamp that can't be written costs nothing.
    path.symlink_to(store.root / "elsewhere")
    os.utime(path, (0, 0), follow_symlinks=False)
    store.stamp(KEY)
    assert not (store.root / "elsewhere").exists()


def test_prebuilt_folders_in_their_order(
    tmp_path: Path, store: Store, no_spare: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(stores.PREBUILT_VARIABLE, raising=False)
    assert stores.tiers(store) == [store]
    names = [str(tmp_path / name) for name in ("b", "missing", "a b")]
    for name in (names[0], names[2]):
        Path(name).mkdir()
    monkeypatch.setenv(stores.PREBUILT_VARIABLE, ":".join([*names, ""]))
    with pytest.warns(UserWarning, match="passed over") as caught:
        found = stores.tiers(store)
    assert [str(w.message) for w in caught] == [
        f"ONELAUNCH_PREBUILT names {names[1]}, which isn't a folder; it is passed over."
    ]
    assert [(tier.place, tier.read_only) for tier in found[:2]] == [(names[0], True), (names[2], True)]
    assert found[2:] == [store]
    stores.prebuilt()  # says it once


def test_a_prebuilt_entry_that_is_damaged_stays_where_it_is(store: Store, no_spare: None) -> None:
    entry = published(store)
    damage(entry, "m.so", b"")
    prebuilt = Store(store.root, read_only=True)
    with pytest.warns(UserWarning, match="passed over") as caught:
        assert prebuilt.find(KEY) is None
    assert [str(w.message) for w in caught] == [
        f"The prebuilt entry {entry.path} is damaged (m.so isn't the file that was published); it is passed over."
    ]
    assert prebuilt.find(KEY) is None  # and says it once
    assert entry.path.exists()


def test_a_temporary_store_goes_with_its_process(no_spare: None, monkeypatch: pytest.MonkeyPatch) -> None:
    at_exit = []
    monkeypatch.setattr("atexit.register", lambda *call: at_exit.append(call))
    with pytest.warns(UserWarning, match="It rains; builds go to"):
        first = stores.spare("It rains")
    assert first.root.name.startswith("onelaunch-")
    ((remove, *arguments),) = at_exit
    mine = os.getpid()
    assert arguments == [first.root, mine]
    # In a forked child it is the parent's: not removed, not used.
    monkeypatch.setattr(os, "getpid", lambda: mine + 1)
    remove(*arguments)
    assert first.root.is_dir()
    assert first not in stores.tiers(first)[1:]
    with pytest.warns(UserWarning, match="It rains; builds go to"):
        second = stores.spare("It rains")
    assert second.root != first.root
    assert len(at_exit) == 2
    monkeypatch.setattr(os, "getpid", lambda: mine)
    (first.root / "entry").mkdir()
    remove(*arguments)
    assert not first.root.exists()
    remove(*arguments)  # gone already


def hold(root: str, key: str, held: Any, release: Any) -> None:
    with Store(Path(root)).lock(key):
        held.set()
        release.wait(30)


def test_a_lock_keeps_others_out_but_not_other_keys(store: Store) -> None:
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(str(store.root), KEY, held, release))
    process.start()
    try:
        assert held.wait(60)
        with store.lock("8" * 64):
            assert {path.name for path in (store.root / "locks").iterdir()} >= {f"{KEY}.lock"}
        entered = threading.Event()

        def enter() -> None:
            with store.lock(KEY):
                entered.set()

        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.3), "two held one lock"
        release.set()
        assert entered.wait(30)
        thread.join()
    finally:
        release.set()
        process.join()
    assert process.exitcode == 0


def test_the_index_says_what_was_noted(store: Store) -> None:
    assert store.read_index("r") is None
    store.write_index("r", {"key": KEY, "ünï": [1]})
    assert store.read_index("r") == {"key": KEY, "ünï": [1]}
    assert store.read_index("other") is None
    store.write_index("r", {"key": "new"})
    assert store.read_index("r") == {"key": "new"}
    assert [path.name for path in (store.root / "index").iterdir()] == ["r.json"]
    assert stat.S_IMODE((store.root / "index" / "r.json").stat().st_mode) == 0o600


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", "null", "\xff"])
def test_an_index_that_says_nothing(text: str, store: Store) -> None:
    store.write_index("r", {})
    (store.root / "index" / "r.json").write_bytes(text.encode("latin-1"))
    assert store.read_index("r") is None


def test_an_index_that_others_may_write(store: Store) -> None:
    """It leads to the key that is loaded, so it is held to the same rule."""
    store.write_index("r", {"key": KEY})
    (store.root / "index" / "r.json").chmod(0o602)
    with pytest.raises(StoreError, match="can be written by others"):
        store.read_index("r")


def test_an_index_is_replaced_within_its_folder(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename from another file system would not be one step."""
    moved: list[tuple[Path, Path]] = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (moved.append((Path(old), Path(new))), replace(old, new))[1])
    store.write_index("r", {"key": KEY})
    ((old, new),) = moved
    assert old.parent == new.parent == store.root / "index"


def test_a_shared_index_is_readable_as_the_umask_says(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(trust.SHARED_VARIABLE, "1")
    before = os.umask(0o027)
    try:
        store.write_index("r", {"key": KEY})
    finally:
        os.umask(before)
    assert stat.S_IMODE((store.root / "index" / "r.json").stat().st_mode) == 0o640
    assert store.read_index("r") == {"key": KEY}


def test_an_index_without_a_root_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    Store(tmp_path / "file").write_index("r", {"key": KEY})
    assert (tmp_path / "file").read_text() == ""


def test_an_index_that_cant_be_written_costs_only_time(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        store.write_index("r", {"key": KEY})
    assert store.read_index("r") is None


# ---------------------------------------------------------------------------------------------------- the loader

CONFIG = KernelConfig(fields=("cache_seqlens",), target="cpu")


@pytest.fixture
def fake_build(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Builds that take no compiler: the object is text, and its module this one."""
    built: list[str] = []

    def build(recipe: Any, tools: Any, *, stage: Path, **_: Any) -> compiler.Build:
        built.append(recipe.module)
        (stage / f"{recipe.module}.so").write_text(recipe.source)
        (stage / "main.cpp").write_text(recipe.source)
        usage = {"90a": {"registers": 8, "stack_bytes": 0, "shared_bytes": 0, "local_bytes": 0}}
        command = "c++ -c main.cpp"
        return compiler.Build(f"{recipe.module}.so", "main.cpp", command, 1.23456, usage, {"machine": "a test"})

    monkeypatch.setattr(compiler, "build", build)
    monkeypatch.setattr(loader, "import_module", lambda entry: sys)
    monkeypatch.setattr(loader, "_loaded", {})
    return built


def test_a_kernel_says_what_it_is(store: Store, fake_build: list[str]) -> None:
    kernel = loader.load(CONFIG, store=store)
    assert repr(kernel) == f"Kernel({CONFIG.symbol}, key={kernel.key[:16]}, archs=host)"
    assert kernel.resources["90a"]["registers"] == 8
    assert kernel.manifest["seconds"] == 1.235
    assert kernel.manifest["requires"] == {"machine": "a test"}
    assert kernel.source in kernel.path.read_text()
    two = loader.Kernel(CONFIG, kernel.key, kernel.path, ("90a", "100a"), {}, sys)
    assert repr(two).endswith("archs=90a+100a)")


@pytest.mark.parametrize("change", ["other compilers", "no compilers", "no JSON object"])
def test_a_note_that_doesnt_hold_is_looked_up_again(change: str, store: Store, fake_build: list[str]) -> None:
    """A note for other compilers, or a damaged one, leads to the key, and by it to the same entry: nothing is built."""
    first = loader.load(CONFIG, store=store)
    (index,) = (store.root / "index").iterdir()
    good = noted = json.loads(index.read_text())
    if change == "other compilers":
        noted = {**good, "compilers": {"host_compiler": "g++ 1"}}
    elif change == "no compilers":
        noted = {"key": good["key"]}
    else:
        noted = [good]
    index.write_text(json.dumps(noted))
    loader._loaded.clear()
    assert loader.load(CONFIG, store=store).key == first.key
    assert len(fake_build) == 1
    # And what was found is noted for the next process.
    assert json.loads(index.read_text()) == good


def test_an_index_that_leads_to_an_entry_that_is_gone(store: Store, fake_build: list[str]) -> None:
    kernel = loader.load(CONFIG, store=store)
    kernel.path.parent.rename(store.root / "gone")
    loader._loaded.clear()
    assert loader.load(CONFIG, store=store).path == kernel.path
    assert len(fake_build) == 2


def test_a_host_without_a_compiler(store: Store, fake_build: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the build that the index names, whatever compiler made it; without one it says what is missing."""
    kernel = loader.load(CONFIG, store=store)

    def none(target: str) -> toolchain.Tools:
        raise ToolchainError("there is no compiler")

    monkeypatch.setattr(toolchain, "find_tools", none)
    loader._loaded.clear()
    assert loader.load(CONFIG, store=store).key == kernel.key
    with pytest.raises(ToolchainError, match="there is no compiler"):
        loader.load(CONFIG.replace(num_backends=2), store=store)
    kernel.path.parent.rename(store.root / "gone")
    loader._loaded.clear()
    with pytest.raises(ToolchainError, match="there is no compiler"):
        loader.load(CONFIG, store=store)


def test_another_process_built_it_while_this_one_waited(
    store: Store, fake_build: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = loader.load(CONFIG, store=store)
    for path in (store.root / "index").iterdir():
        path.unlink()
    loader._loaded.clear()
    find, missed = Store.find, []

    def late(self: Store, key: str) -> Entry | None:
        if not missed:
            missed.append(key)
            return None
        return find(self, key)

    monkeypatch.setattr(Store, "find", late)
    assert loader.load(CONFIG, store=store).key == first.key
    assert missed == [first.key]
    assert len(fake_build) == 1


def test_the_default_store_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    loader.default_store.cache_clear()
    try:
        assert loader.default_store() is loader.default_store()
        assert loader.default_store().root == tmp_path / "cache"
    finally:
        loader.default_store.cache_clear()


# ------------------------------------------------------------------------------------- what only a GPU build reports

USAGE = """
Resource usage:
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]
 Function onelaunch_k:
  REG:40 STACK:0 SHARED:1056 LOCAL:16 CONSTANT[0]:4688 TEXTURE:0 SURFACE:0 SAMPLER:0

arch = sm_100a
 Function onelaunch_k:
  REG:38 STACK:8 SHARED:1060 LOCAL:0 CONSTANT[0]:4688 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_the_resources_that_cuobjdump_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toolkit's program is asked before PATH's, and none is no fault."""
    assert binary.resources(tmp_path / "m.so", None) == {}
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert binary.find_cuobjdump(tmp_path) is None
    assert binary.find_cuobjdump() is None
    for folder in ("bin", "path"):
        (tmp_path / folder).mkdir()
        program = tmp_path / folder / "cuobjdump"
        wanted = f"--dump-resource-usage {tmp_path}/m.so"
        program.write_text(f"#!/bin/sh\n[ \"$*\" = '{wanted}' ] && /bin/cat <<'X'\n{USAGE}\nX\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert binary.find_cuobjdump() == binary.find_cuobjdump(tmp_path / "none") == tmp_path / "path" / "cuobjdump"
    assert binary.find_cuobjdump(tmp_path) == tmp_path / "bin" / "cuobjdump"
    assert binary.resources(tmp_path / "other.so", binary.find_cuobjdump(tmp_path)) == {}
    assert binary.resources(tmp_path / "m.so", binary.find_cuobjdump(tmp_path)) == {
        "90a": {"registers": 40, "stack_bytes": 0, "shared_bytes": 1056, "local_bytes": 16, "spill_bytes": 16},
        "100a": {"registers": 38, "stack_bytes": 8, "shared_bytes": 1060, "local_bytes": 0, "spill_bytes": 8},
    }


# ---------------------------------------------------------------------------------------- calls that the module refuses


def buffers(width: int = 4) -> MetadataBuffers:
    return MetadataBuffers(cache_seqlens=torch.zeros(width, dtype=torch.int32))


def test_a_launch_that_is_refused() -> None:
    table = torch.zeros(1, 1, dtype=torch.int32)
    plan = onelaunch.bind([buffers()], req_to_token=table)
    copier = CopyPlan(buffers(), Destinations([buffers()], 1, lambda index, name: name), keep=True)
    lengths, rows = torch.tensor([5, 6]), torch.tensor([0, 0])

    def refuse(*arguments: object) -> None:
        raise RuntimeError("cudaErrorUnknown (999)")

    again = (plan, lambda: plan.run(lengths, rows))  # these tensors are known then
    plan._run = copier._run = refuse
    for bound, call in (again, again, (copier, lambda: copier.run(bs=2))):
        with pytest.raises(LaunchError, match=r"wasn't launched on cpu: cudaErrorUnknown \(999\)\.") as caught:
            call()
        assert bound.config.symbol in str(caught.value)
        assert bound.launches == 0


def test_a_kernel_that_cant_be_loaded_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(index: int) -> None:
        raise RuntimeError("no kernel image")

    kernel = SimpleNamespace(archs=("90a",), module=SimpleNamespace(prepare=prepare))
    monkeypatch.setattr(loader, "load", lambda config, archs: kernel)
    with pytest.raises(LaunchError, match=r"can't be loaded on cpu: no kernel image\. It was built for sm_90a\."):
        onelaunch.bind([buffers()], req_to_token=torch.zeros(1, 1, dtype=torch.int32))


def test_a_plan_says_what_it_is() -> None:
    plan = onelaunch.bind([buffers(5)], req_to_token=torch.zeros(1, 1, dtype=torch.int32))
    assert repr(plan) == f"Plan({plan.config.symbol}, device=cpu, capacity=5)"


def test_the_table_of_plans_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_MAX_PLANS", 2)
    source = buffers()
    targets = {name: buffers() for name in "abc"}
    made = []
    real = api.CopyPlan
    monkeypatch.setattr(api, "CopyPlan", lambda *args, **kwargs: (made.append(name), real(*args, **kwargs))[1])
    for name in ("a", "b", "a", "c", "a", "b"):
        onelaunch.fused_metadata_copy_cuda(source, targets[name])
    assert made == ["a", "b", "c", "b"], "a was used last when c came, so b went"


def test_a_row_that_grows_past_the_table() -> None:
    allocator = PagedAllocator(max_requests=1, width=8, page_size=4, pages=9, rng=np.random.default_rng(0))
    row = allocator.admit(4)
    with pytest.raises(ArgumentError, match=f"9 tokens don't fit row {row}: it is 8 wide"):
        allocator.grow(row, 9)
