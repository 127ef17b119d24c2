"""The stores that are searched for a build, and the temporary fallback store, if the user's cache can't be written."""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import StoreError
from ..log import warn_once
from ..variables import CACHE_VARIABLE, PREBUILT_VARIABLE
from . import files, staging
from .location import usable_path
from .lock import Lock
from .store import Store
from .trust import private

_PREFIX = "onelaunch-"

# The fallback store: the process that made it, the store, and the lock that keeps it from being swept.
_fallback: tuple[int, Store, Lock] | None = None
_may_fall_back = True


@contextlib.contextmanager
def outliving_this_process() -> Iterator[None]:
    """Within it no build goes to a temporary store: StoreError says why the user's cache can't take it.

    For commands whose only purpose is to fill the cache.
    """
    global _may_fall_back
    _may_fall_back = False
    try:
        yield
    finally:
        _may_fall_back = True


def prebuilt() -> list[Store]:
    """The folders of $ONELAUNCH_PREBUILT, in its order.

    Raises:
        StoreError: a path in it can't be used, see location.usable_path.
    """
    stores = []
    for name in filter(None, PREBUILT_VARIABLE.read().split(os.pathsep)):
        path = usable_path(os.path.expanduser(name), PREBUILT_VARIABLE)
        if path.is_dir():
            stores.append(Store(path, read_only=True))
        else:
            warn_once(f"{PREBUILT_VARIABLE} names {name}, which isn't a folder; it is passed over.")
    return stores


def tiers(store: Store) -> list[Store]:
    """The stores to search, in order: prebuilt folders, the user's cache, this process's fallback store."""
    temporary = [_fallback[1]] if _fallback is not None and _fallback[0] == os.getpid() else []
    return [*prebuilt(), store, *temporary]


def writable(store: Store, key: str = "") -> Store:
    """The store, or the fallback store if it can't be written; warns once per process.

    Args:
        key: the key that will be built. An existing entry that can't be read or replaced also needs the fallback store.

    Raises:
        StoreError: another user could have written to the folder or its entries.
    """
    try:
        store.folder("entries")
    except OSError as error:
        return fallback(f"The cache folder {error.filename or store.root} can't be used ({error.strerror})")
    try:
        store.folder("staging")
    except OSError as error:
        return fallback(f"The cache folder {error.filename or store.root} can't be used ({error.strerror})")
    except StoreError as error:
        return fallback(f"Nothing is built in {store.root} ({error})")
    path = store.root / "entries" / key
    if key and os.path.lexists(path) and store.find(key) is None and os.path.lexists(path):
        return fallback(f"The cache entry {path} can't be read or replaced")
    return store


def fallback(reason: str) -> Store:
    """A private temporary store, which is removed when this process ends.

    First removes the fallback stores of processes that ended without removing theirs.

    Args:
        reason: why it is needed, for the warning.

    Raises:
        StoreError: no folder for temporary files can be written, or the build is to outlive this process.
    """
    global _fallback
    if not _may_fall_back:
        raise StoreError(f"{reason}. Set {CACHE_VARIABLE} to a folder that this process may write and that has room.")
    if _fallback is None or _fallback[0] != os.getpid():
        try:
            parent = Path(tempfile.gettempdir()).absolute()
            staging.sweep(parent, _PREFIX)
            folder, lock = staging.make(parent, _PREFIX)
        except OSError as error:
            raise StoreError(
                f"{reason}, and no folder for temporary files can be written: {error.strerror or error}. Set "
                f"{CACHE_VARIABLE} or TMPDIR to a folder that this process may write and that has room."
            ) from error
        _fallback = (os.getpid(), Store(private(folder)), lock)
        atexit.register(_remove, folder, os.getpid())
    warn_once(
        f"{reason}; builds go to {_fallback[1].root} and are lost when this process ends. Set {CACHE_VARIABLE} to a "
        "folder that this process may write and that has room."
    )
    return _fallback[1]


def _remove(folder: Path, pid: int) -> None:
    # A forked child runs this too, but the folder belongs to its parent.
    if os.getpid() == pid:
        files.remove(folder)
