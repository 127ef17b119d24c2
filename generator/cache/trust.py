"""Checks of owners and modes. Code from a cache runs as this user, so no other user may be able to put it there.

A path is trusted if every folder from / down to it belongs to this user or to root, and is not writable by anybody
else; a folder with the sticky bit, such as /tmp, may be, because there users can't rename each other's files.
"""

from __future__ import annotations

import contextlib
import functools
import grp
import os
import pwd
import stat
from pathlib import Path
from typing import NamedTuple

from ..errors import StoreError
from ..variables import CACHE_VARIABLE, SHARED_VARIABLE

# The kernel's own limit.
_MAX_LINKS = 40


class Place(NamedTuple):
    """What a path belongs to, for messages: its name, and the variable that names its folder."""

    name: str
    variable: str


CACHE = Place("the kernel cache", CACHE_VARIABLE)
# O_NONBLOCK: opening a fifo must not wait for a writer.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK


def shared() -> bool:
    """Whether $ONELAUNCH_SHARED_CACHE=1 says that everybody who can write to the cache is trusted."""
    return SHARED_VARIABLE.is_on()


def private(path: Path) -> Path:
    """Makes a folder, and those above it that are missing, with mode 0700; returns the path.

    With $ONELAUNCH_SHARED_CACHE=1 the umask decides about the mode.

    Raises:
        StoreError: another user could write there.
        OSError: it can't be made or written.
    """
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            folder.mkdir(mode=0o777 if shared() else 0o700, exist_ok=True)
    check_ancestors(path)
    check_owner(path)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(13, "Permission denied", str(path))
    return path


def check_ancestors(path: Path, place: Place = CACHE) -> None:
    """Checks every folder above an absolute path, and above what the links on the way lead to.

    Raises:
        StoreError: another user could exchange one of them.
        OSError: one is missing or can't be looked at.
    """
    if shared():
        return
    at, names, links = Path("/"), list(reversed(path.parent.parts[1:])), 0
    _check_ancestor(at, at.lstat(), place)
    while names:
        name = names.pop()
        step = at.parent if name == ".." else at / name
        status = step.lstat()
        _check_ancestor(step, status, place)
        if not stat.S_ISLNK(status.st_mode):
            at = step
            continue
        links += 1
        if links > _MAX_LINKS:
            raise OSError(40, "Too many levels of symbolic links", str(path))
        target = Path(os.readlink(step))
        if target.is_absolute():
            at = Path("/")
        names += reversed([part for part in target.parts if part != "/"])


def check_owner(path: Path, place: Place = CACHE) -> None:
    """Checks a file or folder itself.

    Raises:
        StoreError: it is a link, belongs to another user, or can be written by others.
        OSError: it is missing.
    """
    check_status(path, path.lstat(), place)


def check_status(path: Path, status: os.stat_result, place: Place = CACHE) -> None:
    """check_owner, for a status that is known."""
    what = f"{path} in {place.name}"
    if stat.S_ISLNK(status.st_mode):
        raise StoreError(f"{what} is a symbolic link; replace it by the folder or file it leads to.")
    if shared():
        return
    if status.st_uid not in (os.geteuid(), 0):
        raise _owned_by_another(what, status, place)
    if status.st_mode & 0o022:
        raise _writable_by_others(path, what, status)


def open_file(path: Path, folder: int | None = None, place: Place = CACHE) -> int:
    """Opens a plain file for reading and returns its descriptor.

    Args:
        path: the file.
        folder: descriptor of the folder that it is in, which may have another name by now; None goes by the path.
        place: what it belongs to.

    Raises:
        StoreError: another user could have written it.
        ValueError: it isn't a plain file.
        OSError: it can't be opened, or is a link.
    """
    descriptor = os.open(path if folder is None else path.name, _READ, dir_fd=folder)
    try:
        status = os.fstat(descriptor)
        check_status(path, status, place)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"{path.name} isn't a plain file")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read(path: Path, folder: int | None = None, max_bytes: int = -1, place: Place = CACHE) -> bytes:
    """A plain file's bytes; arguments and errors as of open_file.

    Args:
        max_bytes: ValueError for a longer file; -1 is no bound.
    """
    with open(open_file(path, folder, place), "rb") as file:
        data = file.read(max_bytes + 1 if max_bytes >= 0 else -1)
    if 0 <= max_bytes < len(data):
        raise ValueError(f"{path.name} is longer than {max_bytes} bytes")
    return data


def new_file_mode() -> int:
    """Permission bits of a new file in the cache: this user's alone, or as the umask says in a shared cache."""
    return 0o666 & ~_umask() if shared() else 0o600


def restrict(path: Path) -> None:
    """Gives a file the mode of new files in the cache."""
    path.chmod(new_file_mode())


def _check_ancestor(path: Path, status: os.stat_result, place: Place) -> None:
    what = f"{path}, which leads to {place.name},"
    if status.st_uid not in (os.geteuid(), 0, _unmapped_root()):
        raise _owned_by_another(what, status, place)
    # The mode of a link means nothing. Only its owner can change it, given that its folder passed this check.
    if stat.S_ISLNK(status.st_mode) or status.st_mode & stat.S_ISVTX:
        return
    others = status.st_mode & 0o022
    if others == 0o020 and _is_own_group(status.st_gid):
        return
    if others:
        raise _writable_by_others(path, what, status)


def _owned_by_another(what: str, status: os.stat_result, place: Place) -> StoreError:
    return StoreError(
        f"{what} belongs to user {status.st_uid}, and code from it would run as user {os.geteuid()}. Set "
        f"{place.variable} to a folder of your own, or, if you trust everybody who can write there, set "
        f"{SHARED_VARIABLE}=1."
    )


def _writable_by_others(path: Path, what: str, status: os.stat_result) -> StoreError:
    return StoreError(
        f"{what} can be written by others (mode {stat.S_IMODE(status.st_mode):o}). Run: chmod go-w {path} or, if you "
        f"trust everybody who can write there, set {SHARED_VARIABLE}=1."
    )


def _is_own_group(group: int) -> bool:
    """Whether a group is this user's private one, as distributions with umask 002 make it: same name, nobody else."""
    with contextlib.suppress(KeyError, OSError):
        known, user = grp.getgrgid(group), pwd.getpwuid(os.geteuid())
        return known.gr_gid == user.pw_gid and known.gr_name == user.pw_name and set(known.gr_mem) <= {user.pw_name}
    return False


@functools.cache
def _unmapped_root() -> int:
    """The user that root of the host appears as in a user namespace that doesn't map it; 0 elsewhere."""
    with contextlib.suppress(OSError, ValueError):
        maps = Path("/proc/self/uid_map").read_text(encoding="ascii").split()
        if maps and maps[1:3] != ["0", "4294967295"]:
            return int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="ascii"))
    return 0


def _umask() -> int:
    # os.umask returns it only while setting another one, which other threads would see. /proc has it, too.
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1], 8) for line in file if line.startswith("Umask:"))
    except (OSError, StopIteration, ValueError):
        return 0o022
