"""The cache on disk: finished builds by key, published atomically, verified before use.

The layout below the root. Only names of these forms are ever removed:

=====================================  ===============================================================================
CACHEDIR.TAG                           made with the root, in an empty folder; without it nothing is removed
entries/<key>/                         one build; always complete, since it is renamed from staging/
entries/<key>/manifest.json            details of the build, sizes and checksums of its files, its own checksum
index/<name>.json                      notes that save time only (see read_note)
locks/<key>.lock                       present while a process builds that key
staging/<host>.<pid>.<random>/         a process's work in progress, locked while that process lives
stamps/<key>                           when the entry was last used
failed/<16 digits>/                    log, source and record of a build that failed
damaged/<16 digits>.<random>/          entries that failed verification
=====================================  ===============================================================================

Who may write: only this user and root (trust.py), except with $ONELAUNCH_SHARED_CACHE=1.

=====================================  ===============================================================================
when                                   what is verified
=====================================  ===============================================================================
find                                   every folder from / down, owner and mode of each file, the manifest's sum and
                                       keys, the key from its ingredients, size and sum of each file, and the facts
                                       that the caller expects
publish                                the same, after the rename
module.import_entry                    the sum of the open object, which is then loaded through that descriptor
pack.unpack                            as find, of all entries, before one is put into the store
=====================================  ===============================================================================

A damaged entry (a file is missing, or isn't the one that was published) is set aside, with a warning, and built again.
An unreadable entry is skipped. A folder that can't be written only loses its purpose: without locks/ two processes may
build the same kernel, without stamps/ and index/ there are no stamps and notes, and builds that don't fit into entries/
or staging/ go to the temporary store of tiers.py.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import StoreError
from ..log import warn_once
from ..variables import CACHE_VARIABLE
from . import files, location, manifest, staging, trust
from . import lock as locks
from .manifest import KEY, MANIFEST, Entry

TAG = "CACHEDIR.TAG"
# The first line is the standard's, see bford.info/cachedir. The second distinguishes it from other programs' caches.
TAG_TEXT = "Signature: 8a477f597d28d172789f06886806bc55\n# This folder is a cache of onelaunch.\n"
# Folders below the root, and the names in them that are the cache's own.
OWN_NAMES = {
    "entries": KEY,
    "index": re.compile(r"[0-9a-z_-]{1,80}\.json"),
    "locks": re.compile(r"[0-9a-f]{64}\.lock"),
    "staging": re.compile(r".+\.\d+\.[0-9a-f]{12}"),
    "stamps": KEY,
    "failed": re.compile("[0-9a-f]{16}"),
    "damaged": re.compile(r"[0-9a-f]{16}\.[0-9a-f]{8}"),
}
# Also published, beside the shared object, so that people can read what was built and how.
KEPT_SUFFIXES = (".so", ".cu", ".cpp", ".ninja", ".log", ".json")
# A stamp younger than this isn't renewed.
STAMP_SECONDS = 3600.0
# Network file systems may show another host's rename only after a while.
_VISIBLE_AFTER_SECONDS = (0.02, 0.1, 0.5, 1.0)
# The number of times that an entry is read if it is replaced meanwhile.
_LOOKS = 5
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO)
_UNREADABLE = (errno.EACCES, errno.EPERM)
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Store:
    """One cache folder. It is made on disk by the first build.

    Args:
        root: the folder; None is $ONELAUNCH_CACHE_DIR, else $XDG_CACHE_HOME/onelaunch, else ~/.cache/onelaunch.
        read_only: whether nothing may be written, as in the folders of $ONELAUNCH_PREBUILT.
    """

    def __init__(self, root: Path | None = None, *, read_only: bool = False) -> None:
        named = CACHE_VARIABLE.read()
        self.place = str(root) if root else os.path.expanduser(named)
        self._source = "" if root else CACHE_VARIABLE
        self.read_only = read_only
        self._swept = False

    @cached_property
    def root(self) -> Path:
        """The absolute path of the folder, which need not exist.

        Raises:
            StoreError: the path can't be written as UTF-8, or nothing says where this user's home is.
        """
        return location.usable_path(self.place, self._source) if self.place else location.default_root()

    def find(self, key: str, expect: Mapping[str, Any] | None = None) -> Entry | None:
        """The verified entry of a key, or None. A damaged entry is set aside, with a warning.

        Args:
            key: 64 hex digits.
            expect: values that its manifest must have, such as "config" and "archs" (see manifest.satisfies); an entry
                with others is a miss.

        Raises:
            StoreError: another user could have written the entry.
            OSError: this process lacks memory or descriptors, or the disk fails. The entry may be intact.
        """
        path = self.root / "entries" / key
        for _ in range(_LOOKS if KEY.fullmatch(key) else 0):
            descriptor, facts, reason = -1, {}, ""
            try:
                descriptor = self._open_entry(path)
                facts = manifest.decode(trust.read(path / MANIFEST, descriptor, manifest.MAX_MANIFEST_BYTES), key)
                for name in facts["files"]:
                    manifest.check_file(facts, name, trust.read(path / name, descriptor))
            except FileNotFoundError as error:
                if descriptor < 0:
                    return None
                reason = f"{Path(error.filename).name} is missing"
            except OSError as error:
                if error.errno in _UNREADABLE and not os.path.lexists(path):
                    return None
                if error.errno in _UNREADABLE:
                    warn_once(f"The cache entry {path} can't be read ({error.strerror}); it is passed over.")
                    return None
                if error.errno not in _DAMAGE:
                    raise
                reason = str(error)
            except ValueError as error:
                reason = str(error)
            finally:
                exchanged = descriptor >= 0 and not _is_at(descriptor, path)
                if descriptor >= 0:
                    os.close(descriptor)
            if exchanged:
                continue
            if reason and os.path.lexists(path):
                self._set_aside(path, reason)
            expected = not reason and (expect is None or manifest.satisfies(facts, expect))
            return Entry(key, path, facts) if expected else None
        return None

    def stored_keys(self) -> list[str]:
        """The keys of all entries, which aren't verified."""
        return [path.name for path in self.listed("entries")]

    def entries(self) -> Iterator[Entry]:
        """All entries that pass verification."""
        for key in self.stored_keys():
            entry = self.find(key)
            if entry is not None:
                yield entry

    def check(self, *folders: Path) -> None:
        """Checks the root, every folder above it, and these below it.

        Raises:
            StoreError: another user could have written there.
            OSError: one is missing or can't be looked at.
        """
        trust.check_ancestors(self.root)
        for folder in (self.root, *folders):
            trust.check_owner(folder)

    def listed(self, name: str) -> list[Path]:
        """The paths in a folder of the root whose names have the cache's form."""
        return [path for path in files.children(self.root / name) if OWN_NAMES[name].fullmatch(path.name)]

    @property
    def is_marked(self) -> bool:
        """Whether the root has the cache's own CACHEDIR.TAG, without which nothing below it is removed.

        False also if another user could exchange the root.
        """
        try:
            self.check()
            return trust.read(self.root / TAG, max_bytes=4096).startswith(TAG_TEXT.encode())
        except (OSError, ValueError, StoreError):
            return False

    def folder(self, name: str) -> Path:
        """A folder of the root. Makes it, the root and CACHEDIR.TAG if needed; errors as of trust.private."""
        trust.private(self.root)
        self._mark()
        return trust.private(self.root / name)

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A private folder on the store's file system, removed at the end if it wasn't published.

        Raises:
            StoreError, OSError: see trust.private.
        """
        parent = self.folder("staging")
        if not self._swept:
            self._swept = True
            self.sweep()
        with staging.folder(parent) as path:
            yield path

    def sweep(self) -> list[Path]:
        """Removes staging folders, lock files and half-written files of processes that are gone; returns them."""
        if not self.is_marked:
            return []
        free = [path for path in self.listed("locks") if locks.remove_if_free(path)]
        names = {"": re.compile(re.escape(TAG)), "index": OWN_NAMES["index"]}
        unfinished = [path for name, own in names.items() for path in files.unfinished(self.root / name, own)]
        return staging.sweep(self.root / "staging") + free + [path for path in unfinished if files.remove(path)]

    def abandoned(self) -> list[Path]:
        """The paths that sweep() would remove."""
        free = [path for path in self.listed("locks") if not locks.is_path_held(path)]
        return [path for path in self.listed("staging") if staging.is_abandoned(path)] + free

    @contextlib.contextmanager
    def lock(self, key: str, what: str = "", done: Callable[[], bool] = lambda: False) -> Iterator[locks.Lock]:
        """Holds the lock of a key, so that processes that start at the same time build it once. See lock.hold."""
        try:
            path = self.folder("locks") / f"{key}.lock"
        except (OSError, StoreError):
            yield locks.Lock(None)
            return
        with locks.hold(path, what or f"the build of {key[:16]}", done) as held:
            yield held

    def publish(self, stage: Path, key: str, facts: Mapping[str, Any]) -> Entry:
        """Moves a finished build into place atomically. If another process was first, returns that entry.

        Args:
            stage: a folder from staging(), with the build in it.
            key: the build's key.
            facts: the manifest's contents; needs symbol, module, module_file and source_file.

        Raises:
            ValueError: ``facts`` isn't a valid manifest of this key.
            OSError: the disk is full, or can't be written.
            StoreError: the published entry can't be read back.
        """
        for path in files.children(stage):
            if files.is_folder(path):
                shutil.rmtree(path)
            elif path.is_symlink() or path.suffix not in KEPT_SUFFIXES:
                path.unlink()
        known = {}
        for path in sorted(stage.iterdir()):
            trust.restrict(path)
            data = path.read_bytes()
            known[path.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            files.sync(path)
        whole = json.loads(json.dumps({**facts, "key": key, "files": known}))
        manifest.check(whole, key)
        (stage / MANIFEST).write_bytes(manifest.encode(whole))
        trust.restrict(stage / MANIFEST)
        files.sync(stage / MANIFEST)
        files.sync(stage)
        return self._place(stage, key)

    def read_note(self, name: str) -> dict[str, Any] | None:
        """The note that an earlier process wrote under a name (up to 80 of [0-9a-z_-]), or None.

        A note has no checksum, so the caller must check what it refers to.

        Raises:
            StoreError: another user could have written it.
        """
        path = self.root / "index" / f"{name}.json"
        try:
            self.check(path.parent)
            noted = json.loads(trust.read(path, max_bytes=manifest.MAX_MANIFEST_BYTES))
        except (OSError, ValueError, RecursionError):
            return None
        return noted if isinstance(noted, dict) else None

    def write_note(self, name: str, facts: Mapping[str, Any]) -> None:
        """Writes a note for later processes. Errors are ignored: without the note they only take longer."""
        if self.read_only:
            return
        with contextlib.suppress(OSError):
            path = self.folder("index") / f"{name}.json"
            files.replace(path, json.dumps(dict(facts)), trust.new_file_mode())

    def stamp(self, key: str) -> None:
        """Records that an entry was used. Access times don't help: most file systems don't update them."""
        if self.read_only:
            return
        path = self.root / "stamps" / key
        with contextlib.suppress(OSError, StoreError):
            try:
                if time.time() - path.lstat().st_mtime < STAMP_SECONDS:
                    return
            except FileNotFoundError:
                self.folder("stamps")
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            os.utime(path)

    def used(self, key: str) -> float:
        """The time when an entry was last used or, without a stamp, published; 0.0 if neither is known."""
        for path in (self.root / "stamps" / key, self.root / "entries" / key):
            with contextlib.suppress(OSError):
                return path.lstat().st_mtime
        return 0.0

    def unusable(self, error: OSError) -> StoreError:
        """The StoreError for an OSError of the cache's files; its message says what to do."""
        if error.errno == errno.ENOSPC:
            hint = f"The disk is full: free some space, or set {CACHE_VARIABLE} to a folder on another disk."
        else:
            hint = f"Set {CACHE_VARIABLE} to a folder that this process may write."
        # The OSError of a write names no file; the root is known by then.
        where = error.filename or self.__dict__.get("root", "folder")
        return StoreError(f"The kernel cache {where} can't be used: {error.strerror or error}. {hint}")

    def _open_entry(self, path: Path) -> int:
        self.check(path.parent, path)
        return os.open(path, _FOLDER)

    def _place(self, stage: Path, key: str) -> Entry:
        target = self.folder("entries") / key
        for pause in _VISIBLE_AFTER_SECONDS:
            try:
                os.rename(stage, target)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.ENOENT, errno.ESTALE):
                    raise
            files.sync(target.parent)
            # Another's damaged entry is set aside here, and the next rename succeeds.
            if (entry := self.find(key)) is not None:
                self.stamp(key)
                return entry
            time.sleep(pause)
        raise StoreError(
            f"The entry {target} can't be read back after it was published. Was it removed meanwhile? Is the disk of "
            f"{self.root} failing, or out of sync with another host's? Set {CACHE_VARIABLE} to a folder on a local "
            "disk."
        )

    def _mark(self) -> None:
        """Writes CACHEDIR.TAG if the root is empty, or has only folders with the cache's names."""
        tag = self.root / TAG
        with contextlib.suppress(OSError):
            if not os.path.lexists(tag):
                others = {name for name in os.listdir(self.root) if not name.startswith(".")}
                if others <= {*OWN_NAMES, "lost+found"}:
                    files.replace(tag, TAG_TEXT, trust.new_file_mode())

    def _set_aside(self, path: Path, reason: str) -> None:
        if self.read_only:
            warn_once(f"The prebuilt entry {path} is damaged ({reason}); it is passed over.")
            return
        if reason == manifest.EARLIER:
            warn_once(f"The cache {self.root} has entries of an earlier version; they are set aside.")
        else:
            text = f"The cache entry {path} is damaged ({reason}); it is set aside and built again."
            warnings.warn(text, stacklevel=3)
        with contextlib.suppress(OSError):
            path.rename(self.folder("damaged") / f"{path.name[:16]}.{uuid.uuid4().hex[:8]}")


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open folder is still the one at its path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False
