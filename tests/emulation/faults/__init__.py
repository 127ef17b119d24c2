"""Faults to plant in emitted kernels, by file. They prove that the tests detect such faults.

A new feature of the kernel adds a likely fault. A pattern matches a small distinctive fragment. If it no longer matches
after a change of the templates, the test fails: update the fault, don't remove it.
"""

from __future__ import annotations

from . import live, pages, rows, schedules, tiles, vectors, verified
from .fault import Fault

FAULTS: dict[str, list[Fault]] = {
    **vectors.FAULTS,
    **live.FAULTS,
    **rows.FAULTS,
    **tiles.FAULTS,
    **pages.FAULTS,
    **schedules.FAULTS,
    **verified.FAULTS,
}
