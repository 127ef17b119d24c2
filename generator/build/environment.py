"""The environment of all programs that a build starts: only known variables, and messages in English."""

from __future__ import annotations

import os
import sys

# Other variables, such as NVCC_APPEND_FLAGS, CPATH, LIBRARY_PATH, CFLAGS, LD_PRELOAD or NINJA_STATUS, aren't passed on:
# they could change the object, and the key doesn't cover them.
PASSED_ON = (
    "HOME",
    "USER",
    "LOGNAME",
    # Compilers from environment modules, and torch, find their libraries through it.
    "LD_LIBRARY_PATH",
    "PYTHONHOME",
    "PYTHONNOUSERSITE",
    "PYTHONDONTWRITEBYTECODE",
    "CCACHE_DIR",
)


def search_path() -> str:
    """PATH, then the interpreter's folder, where the programs of a venv are that isn't activated."""
    folder = os.path.dirname(sys.executable or "")
    return os.pathsep.join(filter(None, [os.environ.get("PATH", os.defpath), folder]))


def clean(**more: str) -> dict[str, str]:
    """A new environment: PATH, the variables of PASSED_ON, LC_ALL=C, and the given ones."""
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {"PATH": search_path(), **passed_on, "LC_ALL": "C", **more}
