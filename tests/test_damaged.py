"""Damaged entries are set aside with one warning and built again; trouble with reading them is no damage."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from entries import FILES, KEY, published
from onelaunch.cache import manifest, trust
from onelaunch.cache.manifest import MANIFEST, Entry
from onelaunch.cache.store import Store

pytestmark = pytest.mark.usefixtures("fresh_process", "warnings_are_errors")


def write(entry: Entry, name: str, data: bytes | None) -> None:
    (entry.path / name).unlink()
    if data is not None:
        (entry.path / name).write_bytes(data)


def rewrite(entry: Entry, **changes: Any) -> None:
    """Writes a manifest with wrong facts and a correct checksum, so that only the facts can reveal the damage."""
    facts = {name: value for name, value in {**entry.manifest, **changes}.items() if value is not None}
    write(entry, MANIFEST, manifest.encode(facts))


def list_file(entry: Entry, name: str) -> None:
    """Adds a file of that name to the entry, and lists it correctly in the manifest."""
    (entry.path / name).parent.mkdir(exist_ok=True)
    (entry.path / name).write_bytes(FILES["m.so"])
    known = entry.manifest["files"]
    rewrite(entry, files={**known, name: known["m.so"]})


def link(entry: Entry) -> None:
    (entry.path / "m.so").rename(entry.path.parent.parent.parent / "elsewhere.so")
    (entry.path / "m.so").symlink_to(entry.path.parent.parent.parent / "elsewhere.so")


def into_a_file(entry: Entry) -> None:
    shutil.rmtree(entry.path)
    entry.path.write_text("")


def into_a_fifo(entry: Entry) -> None:
    (entry.path / "m.so").unlink()
    os.mkfifo(entry.path / "m.so", 0o600)


NOT_PUBLISHED = f"({MANIFEST} isn't the file that was published)"
DAMAGES: dict[str, tuple[Callable[[Entry], None], str]] = {
    "longer": (lambda e: write(e, "m.so", FILES["m.so"] + b"x"), "(m.so isn't the file that was published)"),
    "of equal length": (lambda e: write(e, "m.so", b"\x7fELF objecT"), "(m.so isn't the file that was published)"),
    "a file is missing": (lambda e: write(e, "c.cu", None), "(c.cu is missing)"),
    "the manifest is missing": (lambda e: write(e, MANIFEST, None), f"({MANIFEST} is missing)"),
    "a link": (link, "symbolic link"),
    "a fifo": (into_a_fifo, "(m.so isn't a plain file)"),
    "a file in its place": (into_a_file, "Not a directory"),
    "no JSON": (lambda e: write(e, MANIFEST, b"{"), "Expecting property name"),
    "no text": (lambda e: write(e, MANIFEST, b"\xff\xfe\xff"), "decode"),
    "a number": (lambda e: write(e, MANIFEST, b"3"), NOT_PUBLISHED),
    "deep": (lambda e: write(e, MANIFEST, b"[" * 100_000), "nested too deep"),
    "endless": (lambda e: write(e, MANIFEST, b" " * (manifest.MAX_MANIFEST_BYTES + 1)), "is longer than"),
    "no sum": (lambda e: write(e, MANIFEST, json.dumps(dict(e.manifest)).encode()), NOT_PUBLISHED),
    "of another key": (lambda e: rewrite(e, key="6" * 64), f"(it is the manifest of {'6' * 64})"),
    "no files": (lambda e: rewrite(e, files=None), "(its manifest has no 'files')"),
    "a list of files": (lambda e: rewrite(e, files=["m.so"]), "('files' in its manifest is list; it must be dict)"),
    "no symbol": (lambda e: rewrite(e, symbol=None), "(its manifest has no 'symbol')"),
    "archs of numbers": (lambda e: rewrite(e, archs=[90]), "(90 in its manifest's 'archs' must be str)"),
    "needs of numbers": (lambda e: rewrite(e, requires={"glibc": 2}), "(2 in its manifest's 'requires' must be str)"),
    "archs of another type": (lambda e: rewrite(e, archs="90a"), "('archs' in its manifest is str; it must be list)"),
    "a file of another folder": (lambda e: list_file(e, "sub/x.so"), "('sub/x.so' isn't the name of a file in it)"),
    "a hidden file": (lambda e: list_file(e, ".x.so"), "('.x.so' isn't the name of a file in it)"),
    "no such object": (lambda e: rewrite(e, module_file="x.so"), "(its manifest doesn't list 'x.so')"),
    "no such source": (lambda e: rewrite(e, source_file="../x"), "(its manifest doesn't list '../x')"),
    "no sizes": (lambda e: rewrite(e, files={"m.so": {}}), "(its manifest has no size and sum of m.so)"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_set_aside_once_and_built_again(kind: str, store: Store) -> None:
    hurt, reason = DAMAGES[kind]
    entry, other = published(store), published(store, "7" * 64)
    hurt(entry)
    with pytest.warns(UserWarning, match="is damaged") as caught:
        assert store.find(KEY) is None
    (warning,) = caught
    assert warning.filename == __file__, "the warning points at the caller"
    text = str(warning.message)
    assert text.startswith(f"The cache entry {entry.path} is damaged (")
    assert text.endswith("); it is set aside and built again.")
    assert reason in text
    assert not os.path.lexists(entry.path)
    (aside,) = store.listed("damaged")
    assert aside.name.startswith(KEY[:16])
    # The next look-up is silent, the neighbouring entry is intact, and the key can be published again.
    assert store.find(KEY) is None
    assert [e.key for e in store.entries()] == [other.key]
    assert published(store).manifest == entry.manifest


def test_entries_of_an_earlier_version_are_set_aside_with_one_warning(store: Store) -> None:
    for key in (KEY, "7" * 64):
        entry = published(store, key)
        write(entry, MANIFEST, json.dumps({**entry.manifest, "schema": 1}).encode())
    with pytest.warns(UserWarning, match="has entries of an earlier version; they are set aside.$") as caught:
        assert list(store.entries()) == []
    assert len(caught) == 1
    assert len(store.listed("damaged")) == 2


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)], ids=["one of each byte", "all"])
def test_every_flipped_bit_is_noticed(every: bool, store: Store) -> None:
    """Of an entry's files and its manifest. The entry is set aside, not used; nothing raises."""
    small = {"m.so": b"\x7fELF", "main.cpp": b"int x;\n"}
    chosen = random.Random(0)
    entry = published(store, content=small)
    sizes = {path.name: path.stat().st_size for path in entry.path.iterdir()}
    flips = [(name, at) for name, size in sizes.items() for at in range(size)]
    assert len(flips) > 300
    for name, at in flips:
        path = entry.path / name
        whole = path.read_bytes()
        for bit in range(8) if every else [chosen.randrange(8)]:
            data = bytearray(whole)
            data[at] ^= 1 << bit
            path.write_bytes(data)
            with pytest.warns(UserWarning, match="is damaged"):
                assert store.find(KEY) is None, (name, at, bit)
            (aside,) = store.listed("damaged")
            aside.rename(entry.path)
        path.write_bytes(whole)
    assert store.find(KEY) == entry


def test_damage_that_cant_be_set_aside(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The damage is still reported. In a prebuilt folder it is reported once, and the entry stays where it is."""
    entry = published(store)
    write(entry, "m.so", b"")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda self, to: (_ for _ in ()).throw(OSError(30, "Read-only file system")))
        with pytest.warns(UserWarning, match="is damaged"):
            assert store.find(KEY) is None
    prebuilt = Store(store.root, read_only=True)
    with pytest.warns(UserWarning, match="is damaged .* passed over"):
        assert prebuilt.find(KEY) is None
    assert prebuilt.find(KEY) is None
    assert entry.path.exists()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOMEM, errno.EIO, errno.ESTALE])
def test_trouble_with_reading_is_no_damage(number: int, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed read, for example in a process with too many open files, keeps the entry; the error names the cause."""
    published(store)

    def none(path: Path, *_: Any) -> bytes:
        raise OSError(number, os.strerror(number), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(trust, "read", none)
        with pytest.raises(OSError, match=os.strerror(number)):
            store.find(KEY)
    assert store.find(KEY) is not None
    assert store.listed("damaged") == []


def test_an_entry_that_is_exchanged_under_a_reader(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cache clear` and a new build exchange an entry. A reader gets the new entry or none, with no damage warning."""
    published(store)
    read = trust.read
    exchanges = ["another", "none"]

    def exchanging(path: Path, *others: Any) -> bytes:
        if path.name == "m.so" and exchanges:
            then = exchanges.pop(0)
            shutil.rmtree(store.root / "entries" / KEY)
            if then == "another":
                with monkeypatch.context() as patch:
                    patch.setattr(trust, "read", read)
                    published(store, note="another")
        return read(path, *others)

    monkeypatch.setattr(trust, "read", exchanging)
    assert store.find(KEY) is None, "exchanged at the first look, gone at the second"
    exchanges.append("another")
    published(store)
    found = store.find(KEY)
    assert found is not None
    assert found.manifest["note"] == "another"
    assert store.listed("damaged") == []
