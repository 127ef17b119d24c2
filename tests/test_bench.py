"""onelaunch bench: what is measured, checked, kept, judged and drawn. Timing itself needs a GPU; all else runs here."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from onelaunch.cli import baselines, bench
from onelaunch.cli.baselines import IMPLEMENTATIONS, Implementation
from onelaunch.cli.bench import Record, Selected, run_bench, select, verdicts
from onelaunch.cli.scene import WIDE, Case, Scene, parse_shape, short
from onelaunch.errors import ConfigError

CPU = torch.device("cpu")
# What the CPU can run without a compiler for it being started, or an interpreter being chosen beforehand.
HERE = [name for name in IMPLEMENTATIONS if name not in ("triton", "torch-compile")]


class Meter:
    """A meter that calls what it is given and says how long that took: enough for all that isn't timing."""

    device = CPU

    def __init__(self) -> None:
        self.scenes = 0

    def machine(self) -> dict[str, Any]:
        return {"device": "a test"}

    def scene(self, case: Case, lengths: Sequence[int]) -> Scene:
        self.scenes += 1
        if case.length == 2**20:  # the ceiling's
            case, lengths = case.replace(width=64), [64]
        return Scene(lengths, case.backends, case.width, case.page_size, 2, CPU)

    def synchronize(self) -> None:
        pass

    def estimate_us(self, calls: Sequence[Callable[[], object]]) -> float:
        return 1.0

    def capture(self, calls: Sequence[Callable[[], object]], estimate_us: float) -> tuple[Callable[[], None], int]:
        def replay() -> None:
            for call in calls:
                call()

        return replay, len(calls)

    def graph_us(self, replay: Callable[[], None], count: int) -> float:
        began = time.perf_counter()
        replay()
        return (time.perf_counter() - began) / count * 1e6

    def eager_us(self, calls: Sequence[Callable[[], object]], estimate_us: float) -> tuple[float, float]:
        return 3.0, 2.0

    def host_us(self, pieces: dict[str, Callable[[], object]]) -> dict[str, float]:
        return {name: 1.0 + number for number, name in enumerate(pieces)}

    def copy_gbps(self) -> float:
        return 10.0


CASES = (
    Case(6, 100, backends=3, width=131, page_size=16),
    Case(6, 100, backends=1, width=131, page_size=16, extent="full"),
    Case(5, 64, backends=3, width=64, page_size=1),
    Case(300, 4, backends=7, width=97, page_size=64, kind="one-long"),
    Case(1, 130, backends=2, width=201, page_size=8),
)


# ------------------------------------------------------------------------------------------------ the rivals are right


@pytest.mark.parametrize("name", HERE)
def test_an_implementation_writes_what_the_reference_says(name: str) -> None:
    """Also those that onelaunch is compared with: a wrong one mustn't be measured."""
    ran = 0
    for case in CASES:
        scene = Scene(case.lengths(), case.backends, case.width, case.page_size, 2, CPU)
        implementation = IMPLEMENTATIONS[name]
        try:
            variants = implementation.calls(scene, case)
        except baselines.Unsupported:
            continue
        for calls in variants:
            for number in range(2):
                assert implementation.check(scene, case, calls[number], number) == "", str(case)
                ran += 1
    assert ran >= 4
