"""Whether groups of backends on streams of their own ever win over one launch: times inside CUDA graphs.

    python tests/gpu/groups.py [N]

prints a JSON object: shape, way, microseconds a call.
"""

from __future__ import annotations

import json
import sys
from typing import Any

SHAPES = ((1, 4096), (8, 8192), (64, 8192), (128, 32768), (16, 131_072))


def partitions(n: int) -> dict[str, list[list[int]]]:
    """One launch, two groups and a group a backend; those that differ for n backends."""
    half = n // 2
    found = {
        "one launch": [list(range(n))],
        "two groups": [list(range(half)), list(range(half, n))],
        "a group each": [[index] for index in range(n)],
    }
    return {name: p for name, p in found.items() if all(p) and (name == "one launch" or len(p) > 1)}


def measure(n: int = 3, shapes: tuple[tuple[int, int], ...] = SHAPES, **scene: Any) -> dict[str, dict[str, float]]:
    """Microseconds a call of every way to split n backends, by shape "batch x length".

    Args:
        n: backends.
        shapes: (batch, tokens of each request).
        scene: width, page_size and sets of cli.measure.Scene, if not 163,911, 64 and 12.
    """
    import onelaunch
    from onelaunch.cli.measure import Scene, graph_microseconds

    facts = {"width": 163_911, "page_size": 64, "sets": 12, **scene}
    found: dict[str, dict[str, float]] = {}
    for bs, length in shapes:
        made = Scene([length] * bs, n, facts["width"], facts["page_size"], facts["sets"])
        row = found[f"{bs} x {length}"] = {}
        for name, partition in partitions(n).items():
            bound = [
                onelaunch.bind_groups(buffers, partition, req_to_token=pool, page_size=facts["page_size"])
                for buffers, (_, _, pool) in zip(made.buffers, made.inputs, strict=True)
            ]
            calls = [
                (lambda groups=groups, lens=lens, rows=rows: groups.run(lens, rows))
                for groups, (lens, rows, _) in zip(bound, made.inputs, strict=True)
            ]
            row[name] = graph_microseconds(calls)
    return found


if __name__ == "__main__":
    print(json.dumps(measure(*map(int, sys.argv[1:2])), indent=2))
