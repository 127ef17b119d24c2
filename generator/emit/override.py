"""Kernels edited by hand: $ONELAUNCH_OVERRIDE_DIR/<symbol>.cu is compiled in place of what the templates emit.

The idea is from Triton's TRITON_OVERRIDE_DIR. The edited text is part of the key, so no cache confuses the two kernels.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from ..cache import trust
from ..errors import StoreError
from ..spec.config import KernelConfig
from ..variables import OVERRIDE_VARIABLE
from . import render as emission

# What is compiled from it runs as this user, so it is trusted like the cache: only this user may have written there.
_PLACE = trust.Place("the folder of edited kernels", OVERRIDE_VARIABLE)


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
        # Both may be links, to a repository of edits for example: what leads there is checked, too.
        for place in (path, path.resolve()):
            trust.check_ancestors(place, _PLACE)
            trust.check_status(place.parent, place.parent.stat(), _PLACE)
        if not path.exists():
            return None
        text = trust.read(path.resolve(), place=_PLACE).decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8 text"
        raise StoreError(
            f"{OVERRIDE_VARIABLE} is {name} and {getattr(error, 'filename', None) or path} can't be read: {reason}. "
            "Name a folder of edited kernels, or unset the variable."
        ) from error
    return None if text == emission.render(config) else Edited(path, text)
