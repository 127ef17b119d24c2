"""Bounds the cache: removes the least recently used entries first, and whatever no entry needs."""

from __future__ import annotations

import contextlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import StoreError
from ..log import warn_once
from ..variables import MAX_SIZE_VARIABLE
from . import files, lock
from .store import TAG, Store

# A younger entry isn't removed to keep the default limit: a process may be about to load it.
FRESH_SECONDS = 3600.0
# Logs of failures and damaged entries are for people, and are removed after a week.
REMAINS_SECONDS = 7 * 24 * 3600.0
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_TIMES = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0, "w": 604_800.0}


@dataclass(frozen=True)
class Collected:
    """The result of a collection.

    Attributes:
        keys: the keys of the removed entries, in the order of removal.
        freed: bytes of those entries.
        kept: bytes of the remaining entries.
        remains: the number of removed staging folders, lock files, failures, damaged entries, notes and stamps.
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
    """The bytes of every entry, by key."""
    return {path.name: files.size_of(path) for path in store.listed("entries")}


def default_max_size() -> str:
    """$ONELAUNCH_CACHE_MAX_SIZE, else 2 GB."""
    return MAX_SIZE_VARIABLE.read() or MAX_SIZE_VARIABLE.default


def limit() -> int:
    """The bytes that $ONELAUNCH_CACHE_MAX_SIZE allows.

    Raises:
        StoreError: it isn't a size.
    """
    return parse_size(default_max_size(), MAX_SIZE_VARIABLE)


def bound(store: Store, keep: str, max_bytes: int) -> None:
    """Keeps the cache below a limit; called after an entry was added.

    Args:
        keep: the key that was added.
        max_bytes: the limit of all entries together.
    """
    known = sizes(store)
    if sum(known.values()) <= max_bytes:
        return
    if not store.is_marked:
        warn_once(f"The kernel cache {store.root} is above {MAX_SIZE_VARIABLE}. {_unmarked(store)}")
        return
    now = time.time()
    fresh = {key for key in known if now - store.used(key) < FRESH_SECONDS}
    for old in _chosen(store, known, max_bytes, None, fresh | {keep}):
        remove(store, old)


def collect(store: Store, max_bytes: int | None, older_than: float | None, dry_run: bool = False) -> Collected:
    """Removes entries until both limits hold, and whatever no entry needs.

    Args:
        store: the cache.
        max_bytes: the limit of all entries together; None is no limit.
        older_than: removes entries that weren't used for this many seconds; None removes nothing because of its age.
        dry_run: only returns what would be removed.

    Raises:
        StoreError: the folder isn't marked as a cache of onelaunch.
    """
    check_marked(store)
    known = sizes(store)
    chosen = _chosen(store, known, max_bytes, older_than, set())
    leftovers = _leftovers(store, known.keys() - set(chosen))
    gone = chosen if dry_run else [key for key in chosen if remove(store, key)]
    if not dry_run:
        store.sweep()
        leftovers = [path for path in leftovers if files.remove(path)]
    freed = sum(known[key] for key in gone)
    return Collected(tuple(gone), freed, sum(known.values()) - freed, len(leftovers))


def remove(store: Store, key: str) -> bool:
    """Removes one entry atomically, and returns whether it is gone; readers see the whole entry or none.

    An entry whose key is locked, because a process is building it or has just published it, stays.
    """
    if _is_locked(store, key):
        return False
    with contextlib.suppress(OSError, StoreError), store.staging() as stage:
        os.rename(store.root / "entries" / key, stage / key)
    if os.path.lexists(store.root / "entries" / key):
        return False
    if files.is_folder(store.root / "stamps"):
        files.remove(store.root / "stamps" / key)
    return True


def clear(store: Store, dry_run: bool = False) -> int:
    """Removes everything that isn't locked by a process; returns the bytes removed.

    The folders stay, because a process may be publishing into them. With ``dry_run`` nothing is removed, and the result
    is the bytes of everything that isn't locked.

    Raises:
        StoreError: the folder isn't marked as a cache of onelaunch.
    """
    check_marked(store)
    if dry_run:
        entries = sum(size for key, size in sizes(store).items() if not _is_locked(store, key))
        others = [path for name in ("index", "stamps", "failed", "damaged") for path in store.listed(name)]
        return entries + sum(map(files.size_of, [*others, *store.abandoned()]))
    before = files.size_of(store.root)
    for key in store.stored_keys():
        remove(store, key)
    for name in ("index", "stamps", "failed", "damaged"):
        for path in store.listed(name):
            files.remove(path)
    store.sweep()
    return max(0, before - files.size_of(store.root))


def check_marked(store: Store) -> None:
    """Raises StoreError where the folder may hold what isn't the cache's, or another user could exchange it."""
    if files.is_folder(store.root):
        store.check()
    # Listed first: a process that makes a cache marks the empty folder before it puts anything into it.
    if _holds_something(store.root) and not store.is_marked:
        raise StoreError(_unmarked(store))


def _holds_something(path: Path) -> bool:
    """Whether the path exists and isn't a folder without visible names."""
    if not os.path.lexists(path):
        return False
    return not files.is_folder(path) or any(not child.name.startswith(".") for child in files.children(path))


def _is_locked(store: Store, key: str) -> bool:
    return lock.is_path_held(store.root / "locks" / f"{key}.lock")


def _unmarked(store: Store) -> str:
    return (
        f"Nothing is removed from {store.root}, because it has no {TAG} of onelaunch: something else was in it before "
        f"the cache. Use an empty folder; or, if all of it is the cache's, copy the {TAG} of another cache into it."
    )


def _chosen(
    store: Store, known: dict[str, int], max_bytes: int | None, older_than: float | None, keep: set[str]
) -> list[str]:
    """The keys to remove so that both limits hold, least recently used first."""
    used = {key: store.used(key) for key in known}
    total, now, chosen = sum(known.values()), time.time(), []
    for key in sorted(known, key=lambda key: used[key]):
        old = older_than is not None and now - used[key] > older_than
        large = max_bytes is not None and total > max_bytes
        if (old or large) and key not in keep and not _is_locked(store, key):
            total -= known[key]
            chosen.append(key)
    return chosen


def _leftovers(store: Store, kept: set[str]) -> list[Path]:
    """Files and folders that no process needs, and none of the entries with these keys."""
    now, keys = time.time(), set(store.stored_keys())
    leftovers = store.abandoned()
    for name in ("failed", "damaged"):
        for path in store.listed(name):
            with contextlib.suppress(OSError):
                leftovers += [path] if now - path.lstat().st_mtime > REMAINS_SECONDS else []
    for path in store.listed("index"):
        noted = store.read_note(path.stem)
        leftovers += [path] if noted is None or noted.get("key", "") not in {*kept, ""} else []
    return leftovers + [path for path in store.listed("stamps") if path.name not in keys]
