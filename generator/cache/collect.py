"""Keeps the cache finite: what was used longest ago goes first, and what no entry needs goes with it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

from ..errors import StoreError
from .store import Store

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
        keys: of the entries, in the order they went.
        freed: bytes of those entries.
        kept: bytes of the entries that are left.
        remains: staging, failures, damaged entries and notes that went too.
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


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 if it is gone."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            return sum(size_of(child) for child in path.iterdir())
        return path.lstat().st_size
    return 0


def sizes(store: Store) -> dict[str, int]:
    """Bytes of every entry by key."""
    return {key: size_of(store.root / "entries" / key) for key in store.stored_keys()}


def default_max_size() -> str:
    """$ONELAUNCH_CACHE_MAX_SIZE, else 2 GB."""
    return os.environ.get(MAX_SIZE_VARIABLE) or DEFAULT_MAX_SIZE


def limit() -> int:
    """The bytes that $ONELAUNCH_CACHE_MAX_SIZE allows.

    Raises:
        StoreError: it isn't a size.
    """
    return parse_size(default_max_size(), MAX_SIZE_VARIABLE)


def bound(store: Store, keep: str, most: int) -> None:
    """Keeps the cache below a bound; called when an entry was added.

    Args:
        keep: the key that was added.
        most: bytes.
    """
    known = sizes(store)
    if sum(known.values()) > most:
        now = time.time()
        fresh = {key for key in known if now - store.used(key) < FRESH_SECONDS}
        _remove_entries(store, known, most, None, fresh | {keep})


def collect(store: Store, max_bytes: int | None, older_than: float | None) -> Collected:
    """Removes entries until both bounds hold, and what no entry needs.

    Args:
        store: the cache.
        max_bytes: most bytes that the entries may have; None is no bound.
        older_than: remove what wasn't used for so many seconds; None removes nothing for its age.
    """
    known = sizes(store)
    gone = _remove_entries(store, known, max_bytes, older_than, set())
    freed = sum(known[key] for key in gone)
    return Collected(tuple(gone), freed, sum(known.values()) - freed, _remains(store))


def remove(store: Store, key: str) -> None:
    """Removes one entry. Whoever looks for it meanwhile finds it whole or not at all."""
    path = store.root / "entries" / key
    aside = store.root / "staging" / f"removed.0.{uuid.uuid4().hex[:12]}"
    aside.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
    shutil.rmtree(aside, ignore_errors=True)
    (store.root / "stamps" / key).unlink(missing_ok=True)


def clear(store: Store) -> int:
    """Removes everything in the cache; returns its bytes. Lock files stay, for the processes that hold them."""
    before = size_of(store.root)
    for name in ("index", "entries", "stamps", "failed", "damaged"):
        shutil.rmtree(store.root / name, ignore_errors=True)
    store.sweep()
    return before - size_of(store.root)


def _remove_entries(
    store: Store, known: dict[str, int], max_bytes: int | None, older_than: float | None, keep: set[str]
) -> list[str]:
    used = {key: store.used(key) for key in known}
    total, now, gone = sum(known.values()), time.time(), []
    for key in sorted(known, key=lambda key: used[key]):
        old = older_than is not None and now - used[key] > older_than
        large = max_bytes is not None and total > max_bytes
        if (old or large) and key not in keep:
            remove(store, key)
            total -= known[key]
            gone.append(key)
    return gone


def _remains(store: Store) -> int:
    count = len(store.sweep())
    now = time.time()
    for name in ("failed", "damaged"):
        for path in _children(store.root / name):
            with contextlib.suppress(OSError):
                if now - path.lstat().st_mtime > REMAINS_SECONDS:
                    shutil.rmtree(path)
                    count += 1
    keys = set(store.stored_keys())
    for path in _children(store.root / "index"):
        noted = store.read_index(path.stem) if path.suffix == ".json" else None
        if noted is None or noted["key"] not in keys:
            path.unlink(missing_ok=True)
            count += 1
    for path in _children(store.root / "stamps"):
        if path.name not in keys:
            path.unlink(missing_ok=True)
            count += 1
    return count


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []
