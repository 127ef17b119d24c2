"""Finds the build of a configuration: by an earlier process's note, which needs no rendering, or by its key."""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from typing import Any

from ..build import compile as compiler
from ..build import key, toolchain
from ..cache.manifest import Entry
from ..cache.store import Store
from ..cache.tiers import tiers
from ..emit import override
from ..errors import ToolchainError
from ..spec.config import KernelConfig

# The folders of the package that determine a configuration's source, and how it is compiled.
_ROOMS = ("spec", "emit", "build")


@dataclass(frozen=True)
class Request:
    """A request for the kernel of a configuration.

    Attributes:
        config: the configuration.
        archs: GPU architectures; () on the CPU target.
        edit: its hand-edited source, None if there is none.
    """

    config: KernelConfig
    archs: tuple[str, ...]
    edit: override.Edited | None

    @classmethod
    def of(cls, config: KernelConfig, archs: tuple[str, ...]) -> Request:
        """A request with the hand-edited source, if there is one.

        Raises:
            StoreError: $ONELAUNCH_OVERRIDE_DIR can't be read, or another user could have written there.
        """
        return cls(config, archs, override.edited(config))

    @property
    def digest(self) -> str:
        """The name of its note, 64 hex digits. It covers the package files instead of the source that they emit."""
        flags = compiler.flags(self.config.target, self.archs)
        material = [
            self.config.key,
            package_digest(),
            *flags,
            platform.machine(),
            self.edit.digest if self.edit else "",
        ]
        return hashlib.sha256("\n".join(material).encode()).hexdigest()

    @property
    def expect(self) -> dict[str, Any]:
        """The values that its build's manifest must have, see Store.find."""
        edited = self.edit.digest if self.edit else ""
        return {"config": self.config.to_dict(), "archs": list(self.archs), "edited": edited}

    def recipe(self, versions: Mapping[str, str]) -> key.Recipe:
        """The recipe of its build. Renders; see key.recipe."""
        return key.recipe(self.config, self.archs, versions, self.edit)


def by_note(request: Request, store: Store, any_compiler: bool = False) -> tuple[Entry, Store] | None:
    """The entry that an earlier process noted for a request, and its store.

    A note has {"key", "compilers"}, and is valid for these compiler versions. A note with "adopted", and any note in a
    folder of $ONELAUNCH_PREBUILT, is valid for all versions: a user put that entry there on purpose.

    Raises:
        StoreError: another user could have written the note or the entry.
        OSError: this process has no room to read it.
    """
    for tier in tiers(store):
        noted = tier.read_note(request.digest)
        if noted is None:
            continue
        holds = any_compiler or tier.read_only or noted.get("adopted")
        if not holds and noted.get("compilers") != _versions(request.config):
            continue
        # A note has no checksum, so the entry's manifest must match the request.
        if (entry := tier.find(str(noted.get("key")), request.expect)) is not None:
            return entry, tier
    return None


def by_key(content_key: str, store: Store) -> tuple[Entry, Store] | None:
    """The entry of a key, and its store.

    Raises:
        StoreError: another user could have written it.
        OSError: this process has no room to read it.
    """
    for tier in tiers(store):
        if (entry := tier.find(content_key)) is not None:
            return entry, tier
    return None


def note(request: Request, store: Store, noted: Mapping[str, Any]) -> None:
    """Notes a key for a request, and for each single architecture of it that has no separate build."""
    if store.read_only:
        return
    store.write_note(request.digest, noted)
    for arch in request.archs if len(request.archs) > 1 else ():
        single = Request(request.config, (arch,), request.edit)
        known = store.read_note(single.digest)
        if known is None or known.get("key") not in store.stored_keys():
            store.write_note(single.digest, noted)


@functools.cache
def package_digest() -> str:
    """sha256 (hex) of all files of the package that determine what is compiled.

    Raises:
        ToolchainError: one can't be read.
    """
    digest = hashlib.sha256()
    package = importlib.resources.files("onelaunch")
    try:
        for file in _files(*(package / room for room in _ROOMS), importlib.resources.files("onelaunch.templates")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    except OSError as error:
        raise ToolchainError(
            f"A file of onelaunch itself can't be read: {error.filename}: {error.strerror}. Install onelaunch again."
        ) from error
    return digest.hexdigest()


def _files(*folders: Traversable) -> Iterator[Traversable]:
    for folder in folders:
        for item in sorted(folder.iterdir(), key=lambda item: item.name):
            if not item.is_dir():
                yield item
            elif item.name != "__pycache__":
                yield from _files(item)


def _versions(config: KernelConfig) -> dict[str, str] | None:
    try:
        return toolchain.find_tools(config.target).versions()
    except ToolchainError:
        return None
