"""Faults to plant in emitted kernels, by the file they are planted in: proof that the tests see what they are for.

A new feature of the kernel adds the fault that it invites. A pattern matches a small distinctive fragment; when the
templates change so that it no longer does, the fault fails loudly and is to be brought up to date, not removed.
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
