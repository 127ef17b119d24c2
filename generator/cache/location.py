"""Where the cache is: folders that a user names, and the default one."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import StoreError
from ..variables import CACHE_VARIABLE


def usable_path(text: str, source: str = "") -> Path:
    """An absolute path.

    Args:
        text: the path.
        source: the variable that it comes from, in which ~ has been expanded; "" treats ~ as a name.

    Raises:
        StoreError: it can't be written as UTF-8, has a NUL in it, or begins with the ~ of an unknown user.
    """
    what = source or "The cache folder"
    if source and text.startswith("~"):
        raise StoreError(f"{what} is {text!r}, and no such user's home folder is known; write the whole path.")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise StoreError(f"{what} is {text!a}, which can't be written as UTF-8; choose another folder.") from None
    if "\0" in text:
        raise StoreError(f"{what} is {text!a}, which has a NUL character in it; choose another folder.")
    return Path(text).absolute()


def default_root() -> Path:
    """$XDG_CACHE_HOME/onelaunch, else ~/.cache/onelaunch.

    Raises:
        StoreError: nothing says where this user's home is, or see usable_path.
    """
    place = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(place):  # the standard says that others are ignored
        place = os.path.expanduser("~/.cache")
        if place.startswith("~"):
            raise StoreError(
                f"There is no folder for the kernel cache: HOME isn't set, and user {os.geteuid()} has no entry in the "
                f"password database. Set {CACHE_VARIABLE} to a folder that this process may write."
            )
    return usable_path(place) / "onelaunch"
