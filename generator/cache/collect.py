"""Bounds the cache: what was used longest ago is removed first, and with it what no entry needs."""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import StoreError
from . import files, lock
from .store import TAG, Store, warn_once

MAX_SIZE_VARIABLE = "ONELAUNCH_CACHE_MAX_SIZE"
DEFAULT_MAX_SIZE = "2G"
# Never removed to keep the default bound: a process may be about to load it.
FRESH_SECONDS = 3600.0
# Logs of failures and damaged entries are for people; nobody looks at older ones.
REMAINS_SECONDS = 7 * 24 * 3600.0
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TIMES = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}


@dataclass(frozen=True)
class Collected:
    """What a collection removed.

    Attributes:
        keys: of the entries, in the order of removal.
        freed: bytes of those entries.
        kept: bytes of the remaining entries.
        remains: how many staging folders, lock files, failures, damaged entries, notes and stamps.
    """

    keys: tuple[str, ...]
    freed: int
    kept: int
    remains: int


def parse_size(text: str, what: str) -> int:
    """Bytes of "500M" or "2G"; StoreError names ``what`` if it can't be read."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.I)
    if found is None:
        raise StoreError(f"{what} is {text!r}; it must be a size such as 500M or 2G.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def parse_age(text: str, what: str) -> float:
    """Seconds of "30d" or "12h"; StoreError names ``what`` if it can't be read."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhdw])", text.strip())
    if found is None:
        raise StoreError(f"{what} is {text!r}; it must be an age such as 12h, 30d or 4w.")
    return float(found[1]) * _TIMES[found[2]]


def sizes(store: Store) -> dict[str, int]:
    """Bytes of every entry by key."""
    return {path.name: files.size_of(path) for path in store.listed("entries")}


def default_max_size() -> str:
    """$ONELAUNCH_CACHE_MAX_SIZE, else 2 GB."""
    return os.environ.get(MAX_SIZE_VARIABLE) or DEFAULT_MAX_SIZE


def limit() -> int:
    """The bytes that $ONELAUNCH_CACHE_MAX_SIZE allows.

    Raises:
        StoreError: it isn't a size.
    """
    return parse_size(default_max_size(), MAX_SIZE_VARIABLE)


def bound(store: Store, keep: str, max_bytes: int) -> None:
    """Keeps the cache below a bound; called when an entry was added.

    Args:
        keep: the key that was added.
        max_bytes: of all entries together.
    """
    known = sizes(store)
    if sum(known.values()) <= max_bytes:
        return
    if not store.is_marked:
        warn_once(f"The kernel cache {store.root} is above {MAX_SIZE_VARIABLE}. {_unmarked(store)}")
        return
    now = time.time()
    fresh = {key for key in known if now - store.used(key) < FRESH_SECONDS}
    _remove_entries(store, known, max_bytes, None, fresh | {keep})


def collect(store: Store, max_bytes: int | None, older_than: float | None) -> Collected:
    """Removes entries until both bounds hold, and what no entry needs.

    Args:
        store: the cache.
        max_bytes: of all entries together; None is no bound.
        older_than: remove what wasn't used for so many seconds; None removes nothing for its age.

    Raises:
        StoreError: the folder isn't marked as a cache of onelaunch.
    """
    check_marked(store)
    known = sizes(store)
    gone = _remove_entries(store, known, max_bytes, older_than, set())
    freed = sum(known[key] for key in gone)
    return Collected(tuple(gone), freed, sum(known.values()) - freed, _remove_leftovers(store))


def remove(store: Store, key: str) -> bool:
    """Removes one entry in one step, and returns whether it is gone; a reader finds it whole or not at all.

    The entry of a key that a process is building, or has just published, stays.
    """
    if lock.is_path_held(store.root / "locks" / f"{key}.lock"):
        return False
    with contextlib.suppress(OSError, StoreError), store.staging() as stage:
        os.rename(store.root / "entries" / key, stage / key)
    if os.path.lexists(store.root / "entries" / key):
        return False
    if files.is_folder(store.root / "stamps"):
        files.remove(store.root / "stamps" / key)
    return True


def clear(store: Store) -> int:
    """Removes everything but what processes are using at this moment; returns the bytes.

    The folders stay, so that nobody who publishes at this moment misses one.

    Raises:
        StoreError: the folder isn't marked as a cache of onelaunch.
    """
    check_marked(store)
    before = files.size_of(store.root)
    for key in store.stored_keys():
        remove(store, key)
    for name in ("index", "stamps", "failed", "damaged"):
        for path in store.listed(name):
            files.remove(path)
    store.sweep()
    return max(0, before - files.size_of(store.root))


def check_marked(store: Store) -> None:
    """Raises StoreError where the folder may hold what isn't the cache's, or somebody else could exchange it."""
    if files.is_folder(store.root):
        store.check()
    # Listed first: whoever makes a cache marks the empty folder, and only then puts something into it.
    if _holds_something(store.root) and not store.is_marked:
        raise StoreError(_unmarked(store))


def _holds_something(path: Path) -> bool:
    """Whether the path is anything but a missing folder, or one in which nothing has a visible name."""
    if not os.path.lexists(path):
        return False
    return not files.is_folder(path) or any(not child.name.startswith(".") for child in files.children(path))


def _unmarked(store: Store) -> str:
    return (
        f"Nothing is removed from {store.root}, because it has no {TAG} of onelaunch: something else was in it before "
        f"the cache. Use an empty folder; or, if all of it is the cache's, copy the {TAG} of another cache into it."
    )


def _remove_entries(
    store: Store, known: dict[str, int], max_bytes: int | None, older_than: float | None, keep: set[str]
) -> list[str]:
    used = {key: store.used(key) for key in known}
    total, now, gone = sum(known.values()), time.time(), []
    for key in sorted(known, key=lambda key: used[key]):
        old = older_than is not None and now - used[key] > older_than
        large = max_bytes is not None and total > max_bytes
        if (old or large) and key not in keep and remove(store, key):
            total -= known[key]
            gone.append(key)
    return gone


def _remove_leftovers(store: Store) -> int:
    """Removes what no entry and no process needs; returns how many."""
    now, keys = time.time(), set(store.stored_keys())
    gone = []
    for name in ("failed", "damaged"):
        for path in store.listed(name):
            with contextlib.suppress(OSError):
                gone += [path] if now - path.lstat().st_mtime > REMAINS_SECONDS else []
    for path in store.listed("index"):
        noted = store.read_note(path.stem)
        gone += [path] if noted is None or noted.get("key", "") not in {*keys, ""} else []
    gone += [path for path in store.listed("stamps") if path.name not in keys]
    return len(store.sweep()) + sum(files.remove(path) for path in gone)
