"""Differences between two kernels."""

from __future__ import annotations

import difflib
import re

from . import machine_code
from .kernels import Subject
from .views import table, view

# The views that can be compared.
COMPARED = ("cuda", "ptx", "sass", "resources")


def difference(one: Subject, other: Subject, what: str, context: int = 3) -> str:
    """A unified diff of one view of two kernels; "" if they don't differ.

    Names that always differ are made equal first: keys and symbols; in PTX numbers of virtual registers and labels; in
    SASS addresses and labels.

    Args:
        what: one of COMPARED.
        context: equal lines around each difference.
    """
    before, after = (comparable(kernel, what).splitlines(keepends=True) for kernel in (one, other))
    was, now = (f"{kernel.name} ({what}{', edited by hand' if kernel.edited else ''})" for kernel in (one, other))
    return "".join(difflib.unified_diff(before, after, was, now, n=context))


def comparable(kernel: Subject, what: str) -> str:
    """A view without what differs by name alone."""
    if what == "resources":
        return table(machine_code.resources(kernel))
    text = view(kernel, what).replace(kernel.symbol, "onelaunch_kernel")
    if what == "cuda":
        text = re.sub(r"^//   onelaunch show .*$", "//   onelaunch show …", text, flags=re.M)
        return re.sub(r"^// key [0-9a-f]{64}$", "// key …", text, flags=re.M)
    if what == "ptx":
        text = re.sub(r"(%[a-z]+)\d+", r"\1", text)
        return re.sub(r"(\$L__\w+?)[_\d]+\b", r"\1", text)
    text = re.sub(r"/\*[0-9a-f]{4,}\*/", "", text)
    return re.sub(r"\.L_x_\d+", ".L_x", text)
