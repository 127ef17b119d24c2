"""Loads a build's binding: exactly the bytes that were verified."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import itertools
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ..errors import StoreError
from . import manifest
from .manifest import Entry

_count = itertools.count(1)


class EntryChanged(StoreError):
    """An entry was removed or replaced after it was found. A new lookup finds, or builds, the current one."""


def import_entry(entry: Entry, expect: Mapping[str, Any] | None = None) -> ModuleType:
    """Loads an entry's binding, without ninja and without torch.

    The shared object is opened once. That open file is compared with the manifest's sum, and then loaded, so nothing
    that happens to the path in between matters. ``__file__`` of the module is the path.

    Args:
        entry: as Store.find returned it.
        expect: values that the manifest must have, see manifest.satisfies; None checks nothing.

    Raises:
        EntryChanged: the entry changed after it was found.
        StoreError: the entry isn't the expected one, or this host can't run it.
        OSError: the object can't be opened.
    """
    if expect is not None and not manifest.satisfies(entry.manifest, expect):
        raise StoreError(
            f"The entry {entry.path} isn't the build that was requested. Remove it, and it is built again."
        )
    name = str(entry.manifest["module"])
    try:
        descriptor = entry.open(str(entry.manifest["module_file"]))
    except (ValueError, FileNotFoundError) as error:
        raise EntryChanged(f"The entry {entry.path} changed while it was loaded: {error}. Load it again.") from error
    try:
        origin = _fresh_path(descriptor)
        # Without /proc the path is used. find has checked the folders above it.
        origin = origin if os.path.exists(origin) else str(entry.module_path)
        loader = importlib.machinery.ExtensionFileLoader(name, origin)
        module = importlib.util.module_from_spec(importlib.machinery.ModuleSpec(name, loader, origin=origin))
        loader.exec_module(module)
    except ImportError as error:
        reason = str(error)
        if "failed to map segment" in reason or "Operation not permitted" in reason:
            hint = "Its file system is mounted noexec: set ONELAUNCH_CACHE_DIR to a folder on another one."
        else:
            hint = f"Remove {entry.path}, and it is built here if there is a compiler."
        raise StoreError(f"The kernel {entry.module_path} can't be loaded: {reason}. {hint}") from error
    finally:
        os.close(descriptor)
    module.__file__ = str(entry.module_path)
    return module


def _fresh_path(descriptor: int) -> str:
    """A path of an open file that this process hasn't used before.

    Descriptor numbers recur, and glibc and Python don't look at the file again if they have loaded its name before. So
    the path encodes a counter: "/." is a one and "/" a zero, both of which the kernel ignores.
    """
    count = f"{next(_count):b}".replace("0", "/").replace("1", "/.")
    return f"/proc/self/fd{count}/{descriptor}"
