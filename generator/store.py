"""The cache on disk: finished builds by content key, published whole or not at all, verified before they are loaded.

Layout below the root: ``entries/<key>/`` holds one build, ``index/<request>.json`` leads a warm process to its key
without running a compiler, ``locks/`` holds one file a build in progress, ``staging/`` the private folders that builds
happen in. An entry is complete when its ``manifest.json`` is there: staging is renamed into place after it is written.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import socket
import stat
import tempfile
import uuid
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import StoreError

CACHE_VARIABLE = "ONELAUNCH_CACHE_DIR"
MANIFEST = "manifest.json"
# Kept beside the shared object, so that a person can read what was built and how.
KEPT_SUFFIXES = (".so", ".cu", ".cpp", ".ninja", ".log", ".json")


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


class Store:
    """One cache folder.

    Args:
        root: the folder; None is $ONELAUNCH_CACHE_DIR, else the platform's cache folder, else, where that can't be
            written, a private temporary one, with one warning.
    """

    def __init__(self, root: Path | None = None) -> None:
        self._asked = root

    @cached_property
    def root(self) -> Path:
        """The folder, created on first use."""
        if self._asked is not None:
            return _private(self._asked)
        named = os.environ.get(CACHE_VARIABLE)
        if named:
            return _private(Path(named))
        import platformdirs

        usual = Path(platformdirs.user_cache_dir("onelaunch"))
        try:
            return _private(usual)
        except OSError as error:
            private = Path(tempfile.mkdtemp(prefix="onelaunch-"))
            warnings.warn(
                f"The cache folder {usual} can't be used ({error.strerror}); builds go to {private} and are lost "
                f"with it. Set {CACHE_VARIABLE} to a folder that this process may write.",
                stacklevel=2,
            )
            return private

    def find(self, key: str) -> Entry | None:
        """The entry of a key, or None. An entry that is damaged is set aside, with a warning.

        Raises:
            StoreError: the entry could have been written by somebody else.
        """
        path = self.root / "entries" / key
        try:
            _check_owner(path)
            manifest = json.loads(_read(path / MANIFEST))
            if manifest["key"] != key:
                raise ValueError(f"it is the manifest of {manifest['key']}")
            for name, known in manifest["files"].items():
                data = _read(path / name)
                if len(data) != known["size"] or hashlib.sha256(data).hexdigest() != known["sha256"]:
                    raise ValueError(f"{name} isn't the file that was published")
        except FileNotFoundError as error:
            if not path.exists():
                return None
            self._set_aside(path, f"{error.filename} is missing")
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._set_aside(path, str(error))
            return None
        return Entry(key, path, manifest)

    def entries(self) -> Iterator[Entry]:
        """Every entry that verifies."""
        folder = self.root / "entries"
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if len(path.name) == 64:
                entry = self.find(path.name)
                if entry is not None:
                    yield entry

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A private folder on the store's file system, removed at the end if it wasn't published."""
        path = self.root / "staging" / f"{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:12]}"
        _private(path)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Held while a key is being built, so that processes asking at once build it once."""
        import filelock

        with filelock.FileLock(_private(self.root / "locks") / f"{key}.lock"):
            yield

    def publish(self, stage: Path, key: str, facts: Mapping[str, Any]) -> Entry:
        """Moves a finished build into place in one step. If another process was first, its entry is taken.

        Args:
            stage: the folder that staging() gave, with the build in it.
            key: the content key.
            facts: the manifest's contents; needs module_file and source_file.
        """
        for path in sorted(stage.iterdir()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.suffix not in KEPT_SUFFIXES:
                path.unlink()
        files = {}
        for path in sorted(stage.iterdir()):
            path.chmod(0o600)
            data = path.read_bytes()
            files[path.name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            _sync(path)
        manifest = {**facts, "key": key, "files": files}
        (stage / MANIFEST).write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        (stage / MANIFEST).chmod(0o600)
        _sync(stage / MANIFEST)
        _sync(stage)
        target = _private(self.root / "entries") / key
        try:
            stage.rename(target)
        except OSError:
            if not target.is_dir():
                raise
        _sync(target.parent)
        entry = self.find(key)
        if entry is None:
            raise StoreError(f"The entry {target} can't be read back after it was published; is the disk full?")
        return entry

    def read_index(self, request: str) -> dict[str, Any] | None:
        """What an earlier process noted for a request, or None."""
        try:
            path = self.root / "index" / f"{request}.json"
            _check_owner(path)
            noted = json.loads(_read(path))
        except (OSError, ValueError):
            return None
        return noted if isinstance(noted, dict) else None

    def write_index(self, request: str, noted: Mapping[str, Any]) -> None:
        """Notes something for later processes; a failure to write it only costs them time."""
        with contextlib.suppress(OSError):
            folder = _private(self.root / "index")
            handle, name = tempfile.mkstemp(dir=folder)
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                json.dump(noted, file)
            os.replace(name, folder / f"{request}.json")

    def unusable(self, error: OSError) -> StoreError:
        """A file or folder that can't be made, written or read, as a sentence that says what to do."""
        if error.errno == errno.ENOSPC:
            hint = f"The disk is full: free some space, or set {CACHE_VARIABLE} to a folder on another disk."
        else:
            hint = f"Set {CACHE_VARIABLE} to a folder that this process may write."
        # The error of a write names no file; the root is known by then.
        where = error.filename or self.__dict__.get("root", "folder")
        return StoreError(f"The kernel cache {where} can't be used: {error.strerror or error}. {hint}")

    def _set_aside(self, path: Path, reason: str) -> None:
        warnings.warn(f"The cache entry {path} is damaged ({reason}); it is set aside and built again.", stacklevel=3)
        with contextlib.suppress(OSError):
            path.rename(_private(self.root / "damaged") / f"{path.name[:16]}.{uuid.uuid4().hex[:8]}")


def _private(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_owner(path)
    if not os.access(path, os.W_OK):
        raise PermissionError(13, "Permission denied", str(path))
    return path


def _check_owner(path: Path) -> None:
    """Raises StoreError where somebody else could have put the file or folder there."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode):
        raise StoreError(
            f"{path} in the kernel cache is a symbolic link; replace it by the folder or file it leads to."
        )
    if status.st_uid not in (os.geteuid(), 0):
        raise StoreError(
            f"{path} in the kernel cache belongs to user {status.st_uid}, and code from it would run as user "
            f"{os.geteuid()}. Set {CACHE_VARIABLE} to a folder of your own."
        )
    if status.st_mode & 0o022:
        raise StoreError(
            f"{path} in the kernel cache can be written by others (mode {stat.S_IMODE(status.st_mode):o}). "
            f"Run: chmod go-w {path}"
        )


def _read(path: Path) -> bytes:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
        return file.read()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
