"""Formatting of sizes, and writing of files, for the verbs."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from onelaunch.cache import files


def size(count: float) -> str:
    """A number of bytes for people: 2400000 is 2 MB."""
    for unit in ("B", "KB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: if it is interrupted, the file keeps its old content.

    Raises:
        OSError: it can't be written; the error names ``path``.
    """
    data = content.encode() if isinstance(content, str) else content
    target = path.resolve()
    if target.exists() and not target.is_file():  # a device or a pipe, such as /dev/stdout
        target.write_bytes(data)
        return
    try:
        files.replace(target, data, 0o644)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def check_writable(path: Path) -> None:
    """Raises OSError if write_whole would fail, as far as that is known in advance."""
    target = path.resolve()
    place = target if target.exists() and not target.is_file() else target.parent
    place.stat()  # raises if the folder is missing
    if not os.access(place, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
