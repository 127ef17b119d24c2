"""Reference counts before and after many calls."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any


def refcounts(things: list[Any]) -> list[int]:
    return [sys.getrefcount(thing) for thing in things]


def check_references(things: list[Any], call: Callable[[], object]) -> None:
    """After many calls every reference count is unchanged, and so is the number of memory blocks.

    A few may differ: field names are interned strings, which other threads of the test run hold and release. A leak
    of one reference per call is off by a thousand.
    """
    for _ in range(10):
        call()
    gc.collect()
    before, blocks = refcounts(things), sys.getallocatedblocks()
    for _ in range(1_000):
        call()
    gc.collect()
    assert [now - was for now, was in zip(refcounts(things), before, strict=True) if abs(now - was) > 50] == []
    assert sys.getallocatedblocks() - blocks < 500
