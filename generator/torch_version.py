"""The oldest torch that onelaunch runs with.

The package's metadata doesn't say it, because an installer must never exchange an engine's torch: the version is
checked when torch is first needed.
"""

from __future__ import annotations

import functools
from importlib import metadata

from .errors import ToolchainError

OLDEST = (2, 11)


@functools.cache
def check() -> None:
    """Checks the installed torch, without importing it.

    Raises:
        ToolchainError: there is none, or it is older than OLDEST.
    """
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        raise ToolchainError(
            "torch isn't installed. Install the torch that your engine needs, 2.11 or later."
        ) from None
    major, minor = (int(number) for number in version.split(".")[:2])
    if (major, minor) < OLDEST:
        raise ToolchainError(
            f"torch is {version}, and onelaunch needs {OLDEST[0]}.{OLDEST[1]} or later. Nothing was changed: "
            "use an engine whose torch is that new, or take onelaunch out."
        )
