"""Built kernels in one file, for hosts without a compiler: a gzipped tar, verified as a whole before any of it is used.

The format, version 2: first a member ``onelaunch-pack.json``, {"format", "entries": [{"key", "symbol", "archs",
"requires", "compilers"}]}, then ``entries/<key>/<file>`` for each file of each entry, its manifest first.
"""

from __future__ import annotations

import gzip
import io
import json
import re
import tarfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..build import binary
from ..cache import manifest
from ..cache.manifest import FILE_NAME, KEY, MANIFEST, Entry
from ..cache.store import Store
from ..cache.tiers import writable
from ..errors import ConfigError, StoreError
from ..spec.config import KernelConfig
from . import loader

FORMAT = 2
INDEX = "onelaunch-pack.json"
# A pack is verified in memory. A kernel has a few megabytes, so some hundreds fit.
MAX_BYTES = 2**30
_MEMBER = re.compile(rf"entries/({KEY.pattern})/({FILE_NAME.pattern})")
# The errors that gzip, tarfile and json may raise for a damaged or foreign file.
_UNREADABLE = (
    OSError,
    EOFError,
    zlib.error,
    tarfile.TarError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)


@dataclass(frozen=True)
class Unpacked:
    """The result of unpack().

    Attributes:
        entries: the entries that are in the store now.
        refused: (symbol or key, reason) for each entry that can't run here.
    """

    entries: tuple[Entry, ...]
    refused: tuple[tuple[str, str], ...]


def pack(entries: Iterable[Entry], file: BinaryIO) -> list[Entry]:
    """Writes an index with each entry's requirements, then the entries. Equal entries give equal bytes.

    Raises:
        StoreError: there is no entry, the entries are too large for a pack, or one changed after it was found.
    """
    packed = sorted(entries, key=lambda entry: entry.key)
    if not packed:
        raise StoreError("There is nothing to pack: build something first, with `onelaunch build`.")
    if (total := sum(entry.size for entry in packed)) > MAX_BYTES // 2:
        raise StoreError(f"The entries have {total} bytes and a pack holds {MAX_BYTES // 2}; name fewer keys.")
    index = {
        "format": FORMAT,
        "entries": [
            {name: entry.manifest.get(name) for name in ("key", "symbol", "archs", "requires", "compilers")}
            for entry in packed
        ],
    }
    with (
        gzip.GzipFile(fileobj=file, mode="wb", mtime=0, filename="") as compressed,
        tarfile.open(fileobj=compressed, mode="w") as archive,
    ):
        _add(archive, INDEX, json.dumps(index, indent=1, sort_keys=True).encode())
        for entry in packed:
            _add(archive, f"entries/{entry.key}/{MANIFEST}", manifest.encode(entry.manifest))
            for name in sorted(entry.manifest["files"]):
                try:
                    _add(archive, f"entries/{entry.key}/{name}", entry.read(name))
                except (OSError, ValueError) as error:
                    raise StoreError(f"The entry {entry.path} changed while it was packed: {error}.") from error
    return packed


def unpack(file: BinaryIO, store: Store) -> Unpacked:
    """Puts a pack's entries into a store. They are loaded whatever compilers this host has.

    The code in a pack runs as this user: unpack only files that you trust. The whole file is read and verified first,
    so a damaged pack changes nothing.

    Raises:
        StoreError: it isn't a pack, it is damaged or too large, or the store can't be written.
    """
    try:
        folders = _read(file)
    except _UNREADABLE as error:
        text = str(error) or type(error).__name__
        raise StoreError(f"The pack can't be read: {text}. Was it written by `onelaunch cache pack`?") from error
    manifests = {key: _verified(key, files) for key, files in sorted(folders.items())}
    here = binary.host()
    reasons = {key: _misfit(facts, here) for key, facts in manifests.items()}
    refused = [(str(manifests[key].get("symbol", key[:16])), reason) for key, reason in reasons.items() if reason]
    try:
        entries = [_put(manifests[key], folders[key], store) for key, reason in reasons.items() if not reason]
    except OSError as error:
        raise store.unusable(error) from error
    return Unpacked(tuple(entries), tuple(refused))


def to_bytes(entries: Iterable[Entry]) -> bytes:
    """pack, in memory."""
    file = io.BytesIO()
    pack(entries, file)
    return file.getvalue()


def from_bytes(data: bytes, store: Store) -> Unpacked:
    """unpack, from memory."""
    return unpack(io.BytesIO(data), store)


def read_file(path: Path, store: Store) -> Unpacked:
    """unpack, from a path.

    Raises:
        StoreError: the file can't be opened; and see unpack.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except OSError as error:
        raise StoreError(f"{path} can't be unpacked: {error.strerror}.") from error
    with file:
        return unpack(file, store)


class _Bounded(io.RawIOBase):
    """The decompressed bytes of a pack, up to MAX_BYTES: a few kilobytes of gzip can expand to gigabytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._source = gzip.GzipFile(fileobj=file, mode="rb")
        self._room = MAX_BYTES

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._source.read(min(size, 2**20) if size >= 0 else 2**20)
        self._room -= len(data)
        if self._room < 0:
            raise ValueError(f"it holds more than {MAX_BYTES} bytes")
        return data


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o600
    archive.addfile(member, io.BytesIO(data))


def _read(file: BinaryIO) -> dict[str, dict[str, bytes]]:
    """All files, by key and name. Nothing is extracted: names are checked, contents stay in memory."""
    folders: dict[str, dict[str, bytes]] = {}
    index: Any = None
    stream = _Bounded(file)
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for member in archive:
            content = archive.extractfile(member) if member.isreg() else None
            if content is None:
                raise ValueError(f"{member.name!r} isn't a plain file")
            data = content.read()
            if index is None:
                index = json.loads(data) if member.name == INDEX else {}
                if index.get("format") != FORMAT:
                    raise ValueError(f"its format is {index.get('format')!r}, and this onelaunch reads {FORMAT}")
                continue
            found = _MEMBER.fullmatch(member.name)
            if found is None or found[2] in folders.get(found[1], {}):
                raise ValueError(f"{member.name!r} isn't the path of a file in an entry")
            folders.setdefault(found[1], {})[found[2]] = data
    # To the end, where gzip checks its own checksum.
    while stream.read():
        pass
    missing = {str(known["key"]) for known in index["entries"]} ^ set(folders) if folders else {"everything"}
    if missing:
        raise ValueError(f"its index and its contents differ in {', '.join(sorted(missing))}")
    return folders


def _verified(key: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        facts = manifest.decode(files[MANIFEST], key)
        if set(facts["files"]) != set(files) - {MANIFEST}:
            raise ValueError("its files aren't those of its manifest")
        for name in facts["files"]:
            manifest.check_file(facts, name, files[name])
        for name in ("archs", "config", "ingredients", "requires"):
            if name not in facts:
                raise ValueError(f"its manifest has no {name!r}")
    except (ValueError, KeyError) as error:
        raise StoreError(f"The pack is damaged: entry {key[:16]}: {error}. Pack it again.") from error
    return facts


def _put(facts: Mapping[str, Any], files: Mapping[str, bytes], store: Store) -> Entry:
    key = str(facts["key"])
    home = writable(store, key)
    entry = home.find(key)
    if entry is None:
        with home.staging() as stage:
            for name in facts["files"]:
                (stage / name).write_bytes(files[name])
            entry = home.publish(stage, key, facts)
    config = KernelConfig.from_dict(facts["config"])
    loader.note(home, config, tuple(facts["archs"]), {"key": key, "adopted": True})
    return entry


def _misfit(facts: Mapping[str, Any], here: Mapping[str, Any]) -> str | None:
    """The reason why an entry can't be used here, as the end of a sentence; None if there is none."""
    archs = tuple(str(arch) for arch in facts["archs"])
    return binary.misfit(facts["requires"], archs, here) or _other_source(facts)


def _other_source(facts: Mapping[str, Any]) -> str | None:
    """The reason, as the end of a sentence, if this onelaunch emits another source than was compiled; else None."""
    made_of = facts["ingredients"]
    try:
        here = loader.ingredients(KernelConfig.from_dict(facts["config"]), facts["archs"], {})
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        return f"its configuration isn't one of this onelaunch: {error}"
    for name in ("source", "binding"):
        if made_of.get(name) != here[name]:
            if loader.is_edited(facts):
                return "its source was edited by hand, and $ONELAUNCH_OVERRIDE_DIR has no such edit here"
            return "another version of onelaunch emitted its source; pack it with the version that is installed here"
    return None
