"""For processes that start at the same time and are timed one after the other."""

from __future__ import annotations

import time
from pathlib import Path


def wait_for_turn(folder: Path) -> None:
    """Reports that this process is up, and waits until run.py has stopped all others."""
    (folder / "up").touch()
    while not (folder / "turn").exists():
        time.sleep(0.02)
