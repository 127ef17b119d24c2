"""An entry's manifest and its verification: no part of an entry is used unless a checksum covers it."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import trust

MANIFEST = "manifest.json"
# The reason why an entry of schema 1 is set aside: its manifest has no checksum.
EARLIER = "it was made by an earlier version"
# A manifest has a few kilobytes. The limit keeps a wrong file from filling the memory.
MAX_MANIFEST_BYTES = 2**22
KEY = re.compile("[0-9a-f]{64}")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
# The types of facts, and of the values in lists and dictionaries; {} of anything.
_REQUIRED = {"key": str, "symbol": str, "module": str, "module_file": str, "source_file": str, "files": dict}
_OPTIONAL = {
    "archs": list,
    "config": dict,
    "edited": str,
    "ingredients": dict,
    "compilers": dict,
    "resources": dict,
    "requires": dict,
}
_INSIDE = {"files": dict, "archs": str, "compilers": str, "resources": dict, "requires": str}


@dataclass(frozen=True)
class Entry:
    """A published build.

    Attributes:
        key: its key, 64 hex digits.
        path: its folder.
        manifest: the parsed manifest, without the sum.
    """

    key: str
    path: Path
    manifest: Mapping[str, Any]

    @property
    def module_path(self) -> Path:
        """The shared object. To load it, call module.import_entry."""
        return self.path / str(self.manifest["module_file"])

    @property
    def source(self) -> str:
        """The emitted source that was compiled."""
        return self.read(str(self.manifest["source_file"])).decode()

    @property
    def size(self) -> int:
        """Bytes of its files, without the manifest."""
        return sum(int(known["size"]) for known in self.manifest["files"].values())

    def open(self, name: str) -> int:
        """Opens a file of the entry, verifies what was opened, and returns the descriptor.

        Raises:
            ValueError: it isn't the file that was published.
            StoreError, OSError: see trust.open_file.
        """
        descriptor = trust.open_file(self.path / name)
        try:
            with open(descriptor, "rb", closefd=False) as file:
                check_file(self.manifest, name, file.read())
            os.lseek(descriptor, 0, os.SEEK_SET)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def read(self, name: str) -> bytes:
        """A file's verified bytes; errors as of open."""
        with open(self.open(name), "rb") as file:
            return file.read()


def key_of(ingredients: Mapping[str, Any]) -> str:
    """The key of a build: sha256 (hex) of its ingredients."""
    return hashlib.sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


def encode(facts: Mapping[str, Any]) -> bytes:
    """The bytes of the manifest file: canonical JSON, with a sha256 of everything else under "sum".

    Raises:
        ValueError: it has text that can't be written as UTF-8.
    """
    covered = _text(facts)
    return _text({**facts, "sum": hashlib.sha256(covered).hexdigest()})


def decode(data: bytes, key: str) -> dict[str, Any]:
    """The contents of a manifest file, without the sum.

    Raises:
        ValueError: it isn't the manifest of that key, byte for byte as encode wrote it.
    """
    try:
        facts: Any = json.loads(data)
        if isinstance(facts, dict) and "sum" not in facts and facts.get("schema") == 1:
            raise ValueError(EARLIER)
        whole = isinstance(facts, dict) and facts.pop("sum", None) is not None and encode(facts) == data
    except RecursionError:
        raise ValueError(f"{MANIFEST} is nested too deep") from None
    if not whole:
        raise ValueError(f"{MANIFEST} isn't the file that was published")
    check(facts, key)
    return dict(facts)


def check(facts: Mapping[str, Any], key: str) -> None:
    """Checks that a manifest is complete and belongs to a key.

    Raises:
        ValueError: the message says what is wrong.
    """
    for name, kind in (_REQUIRED | _OPTIONAL).items():
        if name in _REQUIRED and name not in facts:
            raise ValueError(f"its manifest has no {name!r}")
        if name in facts and not isinstance(facts[name], kind):
            raise ValueError(f"{name!r} in its manifest is {type(facts[name]).__name__}; it must be {kind.__name__}")
        inside = facts.get(name, ())
        for value in inside.values() if isinstance(inside, dict) else inside if isinstance(inside, list) else ():
            if not isinstance(value, _INSIDE.get(name, object)):
                raise ValueError(f"{value!r:.80} in its manifest's {name!r} must be {_INSIDE[name].__name__}")
    if facts["key"] != key:
        raise ValueError(f"it is the manifest of {facts['key']}")
    if "ingredients" in facts and key_of(facts["ingredients"]) != key:
        raise ValueError("its key isn't made of its ingredients")
    for name, known in facts["files"].items():
        if not FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise ValueError(f"{name!r} isn't the name of a file in it")
        if not {"size", "sha256"} <= set(known):
            raise ValueError(f"its manifest has no size and sum of {name}")
    for role in ("module_file", "source_file"):
        if facts[role] not in facts["files"]:
            raise ValueError(f"its manifest doesn't list {facts[role]!r}")


def check_file(facts: Mapping[str, Any], name: str, data: bytes) -> None:
    """Compares a file's bytes with the manifest.

    Raises:
        ValueError: it isn't the file that was published.
    """
    known = facts["files"][name]
    if len(data) != known["size"] or hashlib.sha256(data).hexdigest() != known["sha256"]:
        raise ValueError(f"{name} isn't the file that was published")


def satisfies(facts: Mapping[str, Any], expect: Mapping[str, Any]) -> bool:
    """Whether a manifest has the expected values. "archs" may have more than the expected ones."""
    wanted = json.loads(json.dumps(dict(expect)))  # tuples become lists, as in the manifest
    if not set(wanted.pop("archs", ())) <= set(facts.get("archs", ())):
        return False
    return all(name in facts and facts[name] == value for name, value in wanted.items())


def _text(facts: Mapping[str, Any]) -> bytes:
    try:
        return (json.dumps(facts, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        raise ValueError("its manifest has text that can't be written as UTF-8") from None
