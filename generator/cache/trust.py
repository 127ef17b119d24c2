"""Who may write where: code that is loaded from a cache runs as this user, so only this user may have put it there."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from ..errors import StoreError

CACHE_VARIABLE = "ONELAUNCH_CACHE_DIR"
SHARED_VARIABLE = "ONELAUNCH_SHARED_CACHE"


def shared() -> bool:
    """Whether $ONELAUNCH_SHARED_CACHE=1 says that everybody who can write to the cache is trusted."""
    return os.environ.get(SHARED_VARIABLE, "") not in ("", "0")


def private(path: Path) -> Path:
    """The folder, made if need be, that only this user may write (with $ONELAUNCH_SHARED_CACHE, as the umask says).

    Raises:
        StoreError: somebody else could have written there.
        OSError: it can't be made or written.
    """
    path.mkdir(mode=0o777 if shared() else 0o700, parents=True, exist_ok=True)
    check_owner(path)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(13, "Permission denied", str(path))
    return path


def check_owner(path: Path) -> None:
    """Raises StoreError where somebody else could have put the file or folder there; OSError where it is missing."""
    check_status(path, path.lstat())


def check_status(path: Path, status: os.stat_result) -> None:
    """check_owner, for what is already known of a file."""
    if stat.S_ISLNK(status.st_mode):
        raise StoreError(
            f"{path} in the kernel cache is a symbolic link; replace it by the folder or file it leads to."
        )
    if shared():
        return
    opt_in = f"or, if you trust everybody who can write there, set {SHARED_VARIABLE}=1."
    if status.st_uid not in (os.geteuid(), 0):
        raise StoreError(
            f"{path} in the kernel cache belongs to user {status.st_uid}, and code from it would run as user "
            f"{os.geteuid()}. Set {CACHE_VARIABLE} to a folder of your own, {opt_in}"
        )
    if status.st_mode & 0o022:
        raise StoreError(
            f"{path} in the kernel cache can be written by others (mode {stat.S_IMODE(status.st_mode):o}). "
            f"Run: chmod go-w {path} {opt_in}"
        )


def read(path: Path) -> bytes:
    """A file's bytes; it must be a plain file that nobody else could have written.

    Raises:
        StoreError: somebody else could have.
        OSError: it can't be read, or is a symbolic link.
    """
    # O_NONBLOCK: a fifo in its place must not make this wait.
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        check_status(path, status)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} isn't a plain file")
        return file.read()


def restrict(path: Path) -> None:
    """Takes a new file from everybody else, unless the cache is shared."""
    path.chmod(0o666 & ~_umask() if shared() else 0o600)


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk, where the file system can say so."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        # Some network file systems have no fsync for folders.
        if path.is_dir():
            with contextlib.suppress(OSError):
                os.fsync(descriptor)
        else:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    # Only the process itself can be asked, and asking sets it; /proc tells without that.
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1], 8) for line in file if line.startswith("Umask:"))
    except (OSError, StopIteration, ValueError):
        return 0o022
