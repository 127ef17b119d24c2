"""Questions of one way against another, timed side by side inside CUDA graphs. NOTES.md has the answers.

    python tests/gpu/ways.py [FILE]

Groups of backends on streams of their own against one launch; a schedule in the launch against a kernel of its own
after it; N backends that share their tensors against one backend. Prints a JSON object, question to shape to way to
microseconds a call, and writes it to FILE if one is named.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onelaunch
import torch
from onelaunch import MetadataBuffers
from onelaunch.cli.lab.bench.cases import WIDE
from onelaunch.cli.lab.bench.cuda_meter import CudaMeter
from onelaunch.cli.lab.bench.scene import Scene

SHAPES = ((1, 4096), (8, 8192), (64, 8192), (128, 32768), (256, 4096))
SETS = 12


def partitions(n: int) -> dict[str, list[list[int]]]:
    """One launch, two groups and a group a backend; those that differ for n backends."""
    half = n // 2
    found = {
        "one launch": [list(range(n))],
        "two groups": [list(range(half)), list(range(half, n))],
        "a group each": [[index] for index in range(n)],
    }
    return {name: p for name, p in found.items() if all(p) and (name == "one launch" or len(p) > 1)}


def groups(scene: Scene) -> dict[str, list[Callable[[], object]]]:
    """A call a set for every way to split the backends."""
    return {
        name: _calls(
            scene,
            [
                onelaunch.bind_groups(buffers, partition, req_to_token=pool, page_size=scene.page_size)
                for buffers, (_, _, pool) in zip(scene.buffers, scene.inputs, strict=True)
            ],
        )
        for name, partition in partitions(scene.backends).items()
    }


def schedules(scene: Scene) -> dict[str, list[Callable[[], object]]]:
    """DeepGEMM's and FlashMLA's schedules in the refresh's launch, and in one of their own behind it."""
    bs, sms = len(scene.lengths), torch.cuda.get_device_properties(0).multi_processor_count
    ways = {"without a schedule": _calls(scene, _bound(scene, scene.buffers))}
    for name, shapes in (
        ("DeepGEMM", {"paged_mqa_schedule_metadata": (sms + 1, 2)}),
        ("FlashMLA", {"flashmla_metadata": (sms, 8), "num_splits": (bs + 1,)}),
    ):
        made = [
            [
                {field: torch.zeros(shape, dtype=torch.int32, device=scene.device) for field, shape in shapes.items()}
                for _ in b
            ]
            for b in scene.buffers
        ]
        both = [
            [dataclasses.replace(b, **fields) for b, fields in zip(buffers, extra, strict=True)]
            for buffers, extra in zip(scene.buffers, made, strict=True)
        ]
        alone = [[MetadataBuffers(**fields) for fields in extra] for extra in made]
        ways[f"{name}, one launch"] = _calls(scene, _bound(scene, both))
        first, second = ways["without a schedule"], _calls(scene, _bound(scene, alone))
        ways[f"{name}, two launches"] = [_both(a, b) for a, b in zip(first, second, strict=True)]
    return ways


def aliases(scene: Scene) -> dict[str, list[Callable[[], object]]]:
    """N backends of their own, N that share their tensors, and one."""
    n = scene.backends
    return {
        f"{n} backends": _calls(scene, _bound(scene, scene.buffers)),
        f"{n} that share": _calls(scene, _bound(scene, [[buffers[0]] * n for buffers in scene.buffers])),
        "1 backend": _calls(scene, _bound(scene, [buffers[:1] for buffers in scene.buffers])),
    }


def _bound(scene: Scene, backends: Sequence[list[MetadataBuffers]]) -> list[Any]:
    return [
        onelaunch.bind(buffers, req_to_token=pool, page_size=scene.page_size)
        for buffers, (_, _, pool) in zip(backends, scene.inputs, strict=True)
    ]


def _calls(scene: Scene, plans: Sequence[Any]) -> list[Callable[[], object]]:
    return [
        (lambda plan=plan, lens=lens, rows=rows: plan.run(lens, rows))
        for plan, (lens, rows, _) in zip(plans, scene.inputs, strict=True)
    ]


def _both(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], object]:
    def run() -> None:
        first()
        second()

    return run


def answers(n: int = 3) -> dict[str, Any]:
    """Every question at every shape."""
    meter = CudaMeter(0.05)
    found: dict[str, Any] = {}
    for bs, length in SHAPES:
        lengths = torch.randint(length // 2, length + 1, (bs,), generator=torch.Generator().manual_seed(3)).tolist()
        scene = Scene(lengths, n, WIDE, 64, SETS)
        for question in (groups, schedules, aliases):
            for way, calls in question(scene).items():
                for call in calls:
                    call()
                took = meter.graph_us(*meter.capture(calls, 10.0))
                found.setdefault(question.__name__, {}).setdefault(f"{bs} x {length}", {})[way] = round(took, 2)
        del scene
        torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    text = json.dumps(answers(), indent=1)
    print(text)
    if len(sys.argv) > 1:
        Path(sys.argv[1]).write_text(text + "\n", encoding="utf-8")
