"""Built kernels as one file, for hosts that have no compiler: what they need is checked where they arrive."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..build import binary
from ..cache.store import MANIFEST, Entry, Store
from ..cache.trust import restrict
from ..errors import ConfigError, StoreError
from ..spec.config import KernelConfig
from . import loader

FORMAT = 1
INDEX = "onelaunch-pack.json"
# Nothing that onelaunch builds comes near these.
_MOST_FILES = 100_000
_MOST_BYTES = 256 * 2**20
_MEMBER = re.compile(r"entries/([0-9a-f]{64})/([A-Za-z0-9_][A-Za-z0-9_.+-]*)")


@dataclass(frozen=True)
class Unpacked:
    """What unpack did.

    Attributes:
        entries: what is in the store now.
        refused: (symbol or key, reason) of what can't run here.
    """

    entries: tuple[Entry, ...]
    refused: tuple[tuple[str, str], ...]


def pack(entries: Iterable[Entry], file: BinaryIO) -> list[Entry]:
    """Writes entries, with an index first that says what each needs. Equal entries give equal bytes.

    Raises:
        StoreError: there is no entry.
    """
    packed = sorted(entries, key=lambda entry: entry.key)
    if not packed:
        raise StoreError("There is nothing to pack: build something first, with `onelaunch build`.")
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
            for name in (MANIFEST, *sorted(entry.manifest["files"])):
                _add(archive, f"entries/{entry.key}/{name}", (entry.path / name).read_bytes())
    return packed


def unpack(file: BinaryIO, store: Store) -> Unpacked:
    """Puts a pack's entries into a store, from where they are loaded whichever compilers are here.

    The code in a pack runs as this user: unpack only what comes from somebody you trust. Paths, sizes and sums are
    checked, so that a damaged pack puts nothing anywhere.

    Raises:
        StoreError: it isn't a pack, or it is damaged.
    """
    try:
        folders = _read(file)
    except (OSError, tarfile.TarError, EOFError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"The pack can't be read: {error}. Was it written by `onelaunch cache pack`?") from error
    home = store.writable()
    entries, refused = [], []
    here = binary.host()
    for key, files in sorted(folders.items()):
        manifest = _verified(key, files)
        archs = tuple(str(arch) for arch in manifest["archs"])
        reason = binary.misfit(manifest.get("requires", {}), archs, here) or _other_source(manifest)
        if reason is not None:
            refused.append((str(manifest.get("symbol", key[:16])), reason))
            continue
        entry = home.find(key)
        if entry is None:
            with home.staging() as stage:
                for name, data in files.items():
                    (stage / name).write_bytes(data)
                    restrict(stage / name)
                entry = home.place_folder(stage, key)
        loader.note(home, KernelConfig.from_dict(manifest["config"]), archs, {"key": key, "adopted": True})
        entries.append(entry)
    return Unpacked(tuple(entries), tuple(refused))


def to_bytes(entries: Iterable[Entry]) -> bytes:
    """pack, in memory."""
    file = io.BytesIO()
    pack(entries, file)
    return file.getvalue()


def from_bytes(data: bytes, store: Store) -> Unpacked:
    """unpack, from memory."""
    return unpack(io.BytesIO(data), store)


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o600
    archive.addfile(member, io.BytesIO(data))


def _read(file: BinaryIO) -> dict[str, dict[str, bytes]]:
    """Every file by key and name. Nothing is extracted: names are matched, contents stay in memory."""
    folders: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=file, mode="r:gz") as archive:
        for number, member in enumerate(archive):
            if number > _MOST_FILES or member.size > _MOST_BYTES:
                raise ValueError(f"{member.name!r} is too much for a pack")
            content = archive.extractfile(member) if member.isreg() else None
            if content is None:
                raise ValueError(f"{member.name!r} isn't a plain file")
            data = content.read()
            if number == 0:
                index = json.loads(data) if member.name == INDEX else {}
                if index.get("format") != FORMAT:
                    raise ValueError(f"its format is {index.get('format')!r}, and this onelaunch reads {FORMAT}")
                continue
            found = _MEMBER.fullmatch(member.name)
            if found is None:
                raise ValueError(f"{member.name!r} isn't the path of a file in an entry")
            folders.setdefault(found[1], {})[found[2]] = data
    missing = {str(known["key"]) for known in index["entries"]} ^ set(folders) if folders else {"everything"}
    if missing:
        raise ValueError(f"its index and its contents differ in {', '.join(sorted(missing))}")
    return folders


def _verified(key: str, files: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        manifest: dict[str, Any] = json.loads(files[MANIFEST])
        if manifest["key"] != key or set(manifest["files"]) != set(files) - {MANIFEST}:
            raise ValueError("its manifest is another's")
        for name, known in manifest["files"].items():
            if hashlib.sha256(files[name]).hexdigest() != known["sha256"] or len(files[name]) != known["size"]:
                raise ValueError(f"{name} isn't the file that was packed")
        if manifest["module_file"] not in manifest["files"] or not isinstance(manifest["archs"], list):
            raise ValueError("its manifest isn't complete")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"The pack is damaged: entry {key[:16]}: {error}. Pack it again.") from error
    return manifest


def _other_source(manifest: Mapping[str, Any]) -> str | None:
    """Whether this onelaunch emits what was compiled, as the end of a sentence if not."""
    made_of = manifest.get("ingredients", {})
    try:
        here = loader.ingredients(KernelConfig.from_dict(manifest["config"]), manifest["archs"], {})
    except (ConfigError, KeyError, TypeError) as error:
        return f"its configuration isn't one of this onelaunch: {error}"
    for name in ("source", "binding"):
        if made_of.get(name) != here[name]:
            if loader.is_edited(manifest):
                return "its source was edited by hand, and $ONELAUNCH_OVERRIDE_DIR has no such edit here"
            return "another version of onelaunch emitted its source; pack it with the version that is installed here"
    return None


def read_file(path: Path, store: Store) -> Unpacked:
    """unpack, from a path.

    Raises:
        StoreError: the file can't be read, or isn't a pack.
    """
    try:
        with open(path, "rb") as file:
            return unpack(file, store)
    except OSError as error:
        raise StoreError(f"{path} can't be unpacked: {error.strerror}.") from error
