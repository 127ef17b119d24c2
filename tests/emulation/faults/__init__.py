"""Faults to plant in emitted kernels, by file. They prove that the tests detect such faults.

A new feature of the kernel adds a likely fault. A pattern matches a small distinctive fragment. If it no longer matches
after a change of the templates, the test fails: update the fault, don't remove it.
"""

from __future__ import annotations

from . import audit, declared, live, pages, rows, schedules, tiles, vectors, verified
from .fault import Fault

_OF_FILES = (vectors, live, rows, tiles, pages, schedules, declared, verified, audit)
FAULTS: dict[str, list[Fault]] = {}
for _module in _OF_FILES:
    for _file, _faults in _module.FAULTS.items():
        FAULTS.setdefault(_file, []).extend(_faults)
