"""Files and folders: written atomically, synced, and listed and removed without following links."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import tempfile
import time
from pathlib import Path

# A file that replace() writes, until it is renamed: a process that is killed leaves it behind.
_UNFINISHED = re.compile(r"\.(?P<name>.+)\.[0-9a-z_]{8}")
_UNFINISHED_SECONDS = 600.0


def replace(path: Path, content: str | bytes, mode: int = 0o600) -> None:
    """Writes a file atomically: after a crash, and for readers, it is the old file or the new one.

    Args:
        content: text is written as UTF-8.
        mode: permission bits of the new file.

    Raises:
        OSError: it can't be written. The old file stays.
    """
    data = content.encode() if isinstance(content, str) else content
    # In the same folder, because a rename between file systems is a copy.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def unfinished(folder: Path, name: re.Pattern[str]) -> list[Path]:
    """What replace() of a process that was killed left in a folder: files of such names that are ten minutes old."""
    found = []
    for path in children(folder):
        match = _UNFINISHED.fullmatch(path.name)
        if match and name.fullmatch(match["name"]):
            with contextlib.suppress(OSError):
                found += [path] if time.time() - path.lstat().st_mtime > _UNFINISHED_SECONDS else []
    return found


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk, as far as the file system supports that."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Some network file systems have no fsync for folders.
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_folder(path: Path) -> bool:
    """Whether the path is a folder. A symbolic link to one isn't."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def children(folder: Path) -> list[Path]:
    """The sorted contents of a folder; [] if it is a link, no folder, or unreadable."""
    try:
        return sorted(folder.iterdir()) if is_folder(folder) else []
    except OSError:
        return []


def size_of(path: Path) -> int:
    """The bytes of a file, or of all files below a folder; 0 if it is gone. Links are not followed."""
    if is_folder(path):
        return sum(size_of(child) for child in children(path))
    try:
        return path.lstat().st_size
    except OSError:
        return 0


def remove(path: Path) -> bool:
    """Removes a file, a link itself, or a folder with its contents; returns whether the path is gone."""
    if is_folder(path):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()
    return not os.path.lexists(path)
