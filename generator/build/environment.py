"""The environment of every program that a build starts: known variables only, and messages in English."""

from __future__ import annotations

import os
import sys

# A variable outside this list can't change what a compiler makes: the key would not show it. So NVCC_APPEND_FLAGS,
# CPATH, LIBRARY_PATH, CFLAGS, LD_PRELOAD, NINJA_STATUS and their kind stay behind.
PASSED_ON = (
    "HOME",
    "USER",
    "LOGNAME",
    # Compilers of environment modules, and torch itself, find their own libraries by it.
    "LD_LIBRARY_PATH",
    "PYTHONHOME",
    "PYTHONNOUSERSITE",
    "PYTHONDONTWRITEBYTECODE",
    "CCACHE_DIR",
)


def search_path() -> str:
    """PATH, then the interpreter's folder: a venv that isn't activated has its programs there, not on PATH."""
    folder = os.path.dirname(sys.executable or "")
    return os.pathsep.join(filter(None, [os.environ.get("PATH", os.defpath), folder]))


def clean(**more: str) -> dict[str, str]:
    """A new environment: PATH, the variables of PASSED_ON, LC_ALL=C, and the given ones."""
    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    return {"PATH": search_path(), **passed_on, "LC_ALL": "C", **more}
