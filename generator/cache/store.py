"""The cache on disk: finished builds by content key, published whole or not at all, verified before they are loaded.

Layout below the root: ``entries/<key>/`` holds one build, ``index/<request>.json`` leads a warm process to its key
without running a compiler, ``locks/`` holds one file a key that was ever built, ``staging/`` the private folders that
builds happen in, ``stamps/<key>`` when an entry was last used, ``failed/`` what didn't compile, ``damaged/`` what
didn't verify. An entry is complete when its ``manifest.json`` is there: staging is renamed into place after that.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import socket
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import StoreError
from . import lock as locks
from .trust import CACHE_VARIABLE, check_owner, private, read, restrict, shared, sync

PREBUILT_VARIABLE = "ONELAUNCH_PREBUILT"
MANIFEST = "manifest.json"
# Kept beside the shared object, so that a person can read what was built and how.
KEPT_SUFFIXES = (".so", ".cu", ".cpp", ".ninja", ".log", ".json")
# A use is stamped at most this often.
STAMP_SECONDS = 3600.0
# The staging of another host, which can't be asked whether it still builds, is swept after this.
ABANDONED_SECONDS = 24 * 3600.0
_UNKNOWN_SECONDS = 600.0
# Network file systems may show another host's rename only after a while.
_VISIBLE_AFTER_SECONDS = (0.02, 0.1, 0.5, 1.0)
# What a reader runs out of.
_NOT_DAMAGE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT)

_warned: set[str] = set()
_spare: tuple[int, Store] | None = None


@dataclass(frozen=True)
class Entry:
    """A published build.

    Attributes:
        key: its content key, 64 hex digits.
        path: its folder.
        manifest: the parsed manifest.
    """

    key: str
    path: Path
    manifest: Mapping[str, Any]

    @property
    def module_path(self) -> Path:
        """The shared object."""
        return self.path / str(self.manifest["module_file"])

    @property
    def source(self) -> str:
        """The emitted source that was compiled."""
        return (self.path / str(self.manifest["source_file"])).read_text(encoding="utf-8")

    @property
    def size(self) -> int:
        """Bytes of its files, the manifest left out."""
        return sum(int(known["size"]) for known in self.manifest["files"].values())


class Store:
    """One cache folder. Nothing is made on disk before something is built.

    Args:
        root: the folder; None is $ONELAUNCH_CACHE_DIR, else the platform's cache folder.
        read_only: never write there, as in the folders of $ONELAUNCH_PREBUILT.
    """

    def __init__(self, root: Path | None = None, *, read_only: bool = False) -> None:
        self.place = str(root or os.environ.get(CACHE_VARIABLE) or "")
        self.read_only = read_only
        self._swept = False

    @cached_property
    def root(self) -> Path:
        """The folder, which need not exist."""
        if self.place:
            return Path(self.place).absolute()
        import platformdirs

        return Path(platformdirs.user_cache_dir("onelaunch"))

    def writable(self) -> Store:
        """This store, or a private temporary one where this one can't be written, with one warning a process.

        Raises:
            StoreError: somebody else could have written to the folder.
        """
        try:
            private(self.root)
        except OSError as error:
            return spare(f"The cache folder {self.root} can't be used ({error.strerror})")
        return self

    def find(self, key: str) -> Entry | None:
        """The entry of a key, or None. An entry that is damaged is set aside, with a warning.

        Raises:
            StoreError: the entry could have been written by somebody else.
            OSError: this process has no room to read it, which says nothing of the entry.
        """
        path = self.root / "entries" / key
        try:
            for folder in (self.root, path.parent, path):
                check_owner(folder)
            manifest = json.loads(read(path / MANIFEST))
            if manifest["key"] != key:
                raise ValueError(f"it is the manifest of {manifest['key']}")
            for name, known in manifest["files"].items():
                if "/" in name or name.startswith("."):
                    raise ValueError(f"{name!r} isn't the name of a file in it")
                data = read(path / name)
                if len(data) != known["size"] or hashlib.sha256(data).hexdigest() != known["sha256"]:
                    raise ValueError(f"{name} isn't the file that was published")
            if manifest["module_file"] not in manifest["files"]:
                raise ValueError("its manifest doesn't list the shared object")
        except (FileNotFoundError, NotADirectoryError) as error:
            if path.is_dir():
                self._set_aside(path, f"{error.filename} is missing")
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, OSError) and error.errno in _NOT_DAMAGE:
                raise
            self._set_aside(path, str(error))
            return None
        return Entry(key, path, manifest)

    def stored_keys(self) -> list[str]:
        """The keys of every entry, unverified."""
        try:
            names = os.listdir(self.root / "entries")
        except OSError:
            return []
        return sorted(name for name in names if len(name) == 64)

    def entries(self) -> Iterator[Entry]:
        """Every entry that verifies."""
        for key in self.stored_keys():
            entry = self.find(key)
            if entry is not None:
                yield entry

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A private folder on the store's file system, removed at the end if it wasn't published.

        It is locked while its owner lives, so that a sweep can tell.
        """
        folder = self._folder("staging")
        if not self._swept:
            self._swept = True
            self.sweep()
        path = folder / f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:12]}"
        try:
            private(path)
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                locks.is_held(descriptor)
                yield path
            finally:
                os.close(descriptor)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def sweep(self) -> list[Path]:
        """Removes the staging folders of processes that are gone; returns them."""
        gone = [path for path in _listed(self.root / "staging") if _abandoned(path)]
        for path in gone:
            shutil.rmtree(path, ignore_errors=True)
        return gone

    @contextlib.contextmanager
    def lock(self, key: str, what: str = "", done: Callable[[], bool] = lambda: False) -> Iterator[locks.Lock]:
        """Held while a key is being built, so that processes asking at once build it once. See lock.hold."""
        with locks.hold(self._folder("locks") / f"{key}.lock", what or f"the build of {key[:16]}", done) as held:
            yield held

    def publish(self, stage: Path, key: str, facts: Mapping[str, Any]) -> Entry:
        """Moves a finished build into place in one step. If another process was first, its entry is taken.

        Args:
            stage: the folder that staging() gave, with the build in it.
            key: the content key.
            facts: the manifest's contents; needs module_file and source_file.

        Raises:
            OSError: the disk is full, or can't be written.
            StoreError: what was published can't be read back.
        """
        for path in sorted(stage.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.suffix not in KEPT_SUFFIXES:
                path.unlink()
        files = {}
        for path in sorted(stage.iterdir()):
            restrict(path)
            data = path.read_bytes()
            files[path.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            sync(path)
        manifest = {**facts, "key": key, "files": files}
        (stage / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return self.place_folder(stage, key)

    def place_folder(self, stage: Path, key: str) -> Entry:
        """publish, for a folder that has its manifest."""
        restrict(stage / MANIFEST)
        sync(stage / MANIFEST)
        sync(stage)
        target = self._folder("entries") / key
        for pause in _VISIBLE_AFTER_SECONDS:
            try:
                os.rename(stage, target)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT, errno.ESTALE):
                    raise
            sync(target.parent)
            # Another's damaged entry is set aside here, and the next rename succeeds.
            if (entry := self.find(key)) is not None:
                self.stamp(key)
                return entry
            time.sleep(pause)
        raise StoreError(
            f"The entry {target} can't be read back after it was published. Is the disk of {self.root} failing or "
            f"out of sync with another host's? Set {CACHE_VARIABLE} to a folder on a local disk."
        )

    def read_index(self, request: str) -> dict[str, Any] | None:
        """What an earlier process noted for a request, or None.

        Raises:
            StoreError: somebody else could have written it.
        """
        try:
            path = self.root / "index" / f"{request}.json"
            check_owner(self.root)
            check_owner(path.parent)
            noted = json.loads(read(path))
        except (OSError, ValueError):
            return None
        key = noted.get("key") if isinstance(noted, dict) else None
        # It becomes the name of a folder.
        return noted if isinstance(key, str) and re.fullmatch("[0-9a-z]+", key) else None

    def write_index(self, request: str, noted: Mapping[str, Any]) -> None:
        """Notes something for later processes; a failure to write it only costs them time."""
        with contextlib.suppress(OSError):
            folder = self._folder("index")
            handle, name = tempfile.mkstemp(dir=folder)
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    json.dump(noted, file)
                if shared():
                    restrict(Path(name))
                os.replace(name, folder / f"{request}.json")
            except OSError:
                os.unlink(name)

    def stamp(self, key: str) -> None:
        """Notes that an entry was used. Times of access are no help: most file systems are mounted without."""
        if self.read_only:
            return
        path = self.root / "stamps" / key
        with contextlib.suppress(OSError):
            try:
                if time.time() - path.lstat().st_mtime < STAMP_SECONDS:
                    return
            except FileNotFoundError:
                self._folder("stamps")
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
            os.utime(path)

    def used(self, key: str) -> float:
        """When an entry was last used, or published; 0.0 if neither is known."""
        for path in (self.root / "stamps" / key, self.root / "entries" / key):
            with contextlib.suppress(OSError):
                return path.lstat().st_mtime
        return 0.0

    def unusable(self, error: OSError) -> StoreError:
        """A file or folder that can't be made, written or read, as a sentence that says what to do."""
        if error.errno == errno.ENOSPC:
            hint = f"The disk is full: free some space, or set {CACHE_VARIABLE} to a folder on another disk."
        else:
            hint = f"Set {CACHE_VARIABLE} to a folder that this process may write."
        # The error of a write names no file; the root is known by then.
        where = error.filename or self.__dict__.get("root", "folder")
        return StoreError(f"The kernel cache {where} can't be used: {error.strerror or error}. {hint}")

    def _folder(self, name: str) -> Path:
        """A folder below the root. Of folders made on the way to another, the umask alone would say who may write."""
        private(self.root)
        return private(self.root / name)

    def _set_aside(self, path: Path, reason: str) -> None:
        if self.read_only:
            warn_once(f"The prebuilt entry {path} is damaged ({reason}); it is passed over.")
            return
        warnings.warn(f"The cache entry {path} is damaged ({reason}); it is set aside and built again.", stacklevel=3)
        with contextlib.suppress(OSError):
            path.rename(self._folder("damaged") / f"{path.name[:16]}.{uuid.uuid4().hex[:8]}")


def prebuilt() -> list[Store]:
    """The folders of $ONELAUNCH_PREBUILT, in its order."""
    stores = []
    for name in filter(None, os.environ.get(PREBUILT_VARIABLE, "").split(os.pathsep)):
        if os.path.isdir(name):
            stores.append(Store(Path(name), read_only=True))
        else:
            warn_once(f"{PREBUILT_VARIABLE} names {name}, which isn't a folder; it is passed over.")
    return stores


def tiers(store: Store) -> list[Store]:
    """Where a build is looked for, best first: what was prebuilt, the user's cache, this process's temporary one."""
    temporary = [_spare[1]] if _spare is not None and _spare[0] == os.getpid() else []
    return [*prebuilt(), store, *temporary]


def spare(reason: str) -> Store:
    """A private temporary store that goes when this process ends.

    Args:
        reason: why it is needed, for the warning.
    """
    global _spare
    if _spare is None or _spare[0] != os.getpid():
        folder = Path(tempfile.mkdtemp(prefix="onelaunch-"))
        _spare = (os.getpid(), Store(folder))
        atexit.register(_remove, folder, os.getpid())
    warn_once(
        f"{reason}; builds go to {_spare[1].root} and are lost when this process ends. Set {CACHE_VARIABLE} to a "
        "folder that this process may write and that has room."
    )
    return _spare[1]


def warn_once(text: str) -> None:
    """A warning that a process gives once."""
    if text not in _warned:
        _warned.add(text)
        warnings.warn(text, stacklevel=3)


def _remove(folder: Path, pid: int) -> None:
    # A forked child runs this too, and the folder is its parent's.
    if os.getpid() == pid:
        shutil.rmtree(folder, ignore_errors=True)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _abandoned(path: Path) -> bool:
    """Whether the process that made a staging folder is gone."""
    host, _, rest = path.name.rpartition(".")[0].rpartition(".")
    try:
        age = time.time() - path.lstat().st_mtime
        if host != socket.gethostname() or not rest.isdigit():
            return age > ABANDONED_SECONDS
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        held = locks.is_held(descriptor)
    finally:
        os.close(descriptor)
    if held:
        return False
    # A free lock is the sign of a dead owner, but for the moment between making the folder and locking it. Where locks
    # can't be asked, a number that looks dead may belong to another container of the same host name.
    dead = not _alive(int(rest))
    return (held is False and (dead or age > _UNKNOWN_SECONDS)) or (dead and age > _UNKNOWN_SECONDS)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
