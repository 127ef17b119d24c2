"""Kernels edited by hand: $ONELAUNCH_OVERRIDE_DIR/<symbol>.cu is compiled in place of what the templates emit.

The idea is from Triton's TRITON_OVERRIDE_DIR. The edited text is part of the key, so no cache confuses the two kernels.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ..cache.trust import shared
from ..errors import StoreError
from ..spec.config import KernelConfig
from ..variables import OVERRIDE_VARIABLE, SHARED_VARIABLE
from . import render as emission


@dataclass(frozen=True)
class Edited:
    """An edited source: the file, and its text."""

    path: Path
    text: str

    @property
    def digest(self) -> str:
        """sha256 (hex) of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def edited(config: KernelConfig) -> Edited | None:
    """The edited source of a configuration; None if there is none, or if it is what the templates emit anyway.

    Raises:
        StoreError: the folder or file can't be read, or another user could have written it.
    """
    name = OVERRIDE_VARIABLE.read()
    if not name:
        return None
    path = Path(name) / f"{config.symbol}.cu"
    try:
        folder = Path(name).absolute()  # fails where the working folder is gone
        path = folder / path.name
        _check(folder)
        if not path.exists():
            return None
        _check(path)
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8"
        raise StoreError(
            f"{OVERRIDE_VARIABLE} is {name} and {getattr(error, 'filename', None) or path} can't be read: {reason}. "
            "Name a folder of edited kernels, or unset the variable."
        ) from error
    return None if text == emission.render(config) else Edited(path, text)


def _check(path: Path) -> None:
    """Checks that only this user could have written it: what is compiled here runs as this user."""
    status = path.stat()
    if not shared() and (status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022):
        raise StoreError(
            f"{path}, which {OVERRIDE_VARIABLE} leads to, can be written by another user (owner {status.st_uid}, mode "
            f"{stat.S_IMODE(status.st_mode):o}), and its code would run as user {os.geteuid()}. Run: chmod go-w "
            f"{path} or, if you trust every user who can write there, set {SHARED_VARIABLE}=1."
        )
