"""For the bench's tests: a meter that needs no GPU, benchmark cases, and the data of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from onelaunch.cli.lab.bench.cases import Case
from onelaunch.cli.lab.bench.contenders import CONTENDERS
from onelaunch.cli.lab.bench.scene import Scene
from onelaunch.cli.lab.bench.verdicts import verdicts

CPU = torch.device("cpu")
DATA = Path(__file__).parent / "data"
# HERE runs directly on the CPU: Triton's interpreter must be chosen before import, torch.compile takes a minute.
ELSEWHERE = ["triton", "triton-together", "torch-compile", "sglang", "sglang-best"]
HERE = tuple(name for name in CONTENDERS if name not in ELSEWHERE)
Calls = Sequence[Callable[[], object]]


class Meter:
    """Runs each call and reports a given time for it: enough to test everything but the timing."""

    device = CPU

    def machine(self) -> dict[str, Any]:
        return {"device": "a test", "sm_count": 1}

    def scene(self, case: Case, lengths: Sequence[int]) -> Scene:
        return Scene(lengths, case.backends, case.width, case.page_size, CPU)

    def synchronize(self) -> None:
        pass

    def capture(self, calls: Calls) -> Callable[[], None]:
        def replay() -> None:
            for call in calls:
                call()

        return replay

    def warm_us(self, call: Callable[[], object]) -> list[float]:
        call()
        return [3.0, 4.0, 5.0]

    def cold_us(self, call: Callable[[], object]) -> list[float]:
        call()
        return [5.0, 6.0, 9.0]

    def eager_us(self, call: Callable[[], object]) -> tuple[list[float], list[float]]:
        call()
        return [7.0, 7.0], [2.0, 2.0]

    def host_us(self, pieces: dict[str, Callable[[], object]]) -> dict[str, float]:
        for call in pieces.values():
            call()
        return {name: 1.0 + number for number, name in enumerate(pieces)}


CASES = (
    Case(6, 100, backends=3, width=131, page_size=16),
    Case(6, 100, backends=3, width=131, page_size=16, extent="full"),
    Case(5, 64, backends=3, width=64, page_size=1),
    Case(300, 4, backends=7, width=97, page_size=16, kind="one-long"),
    Case(1, 130, backends=3, width=201, page_size=16),
)


WIDE64 = Case(64, 8192)


def rows_of(case: Case, **times: float) -> Iterator[dict[str, Any]]:
    """Rows of a case, each with the given time for cold caches and half of it for warm caches."""
    for name, us in times.items():
        took = {"cold": us, "warm": us / 2, "eager": 3.0, "host": 2.0}
        yield {
            "case": vars(case),
            "shape": case.shape,
            "label": str(case),
            "series": "",
            "implementation": name.replace("_", "-"),
            "status": "ok",
            "bytes": 1e6,
            **{f"{column}_us": us for column, us in took.items()},
            **{f"{column}_quartiles": [us - 0.5, us + 0.5] for column, us in took.items()},
        }


def some_data() -> dict[str, Any]:
    """The data of a run, made without running anything."""
    times = {
        "ideal": 4.0,
        "torch_copies": 900.0,
        "onelaunch": 5.0,
        "onelaunch_verified": 4.5,
        "sglang": 401.0,
        "triton_together": 12.34,
    }
    rows = []
    for case, series in ((WIDE64, ""), (Case(1, 4096), ""), (WIDE64, "length"), (Case(64, 16384), "length")):
        rows += [{**row, "series": series} for row in rows_of(case, **times)]
    for row in rows[:6:5]:
        rows.append({**row, "implementation": "triton", "status": "failed", "reason": "no such luck"})
    host = [{"piece": "raw", "what": "an empty kernel", "us": 2.0}, {"piece": "plan.run", "what": "ours", "us": 3.0}]
    return {
        "onelaunch": "1",
        "sglang": "9.8",
        "titles": {name: contender.title for name, contender in CONTENDERS.items()},
        "machine": {"device": "a test"},
        "complete": False,
        "rows": json.loads(json.dumps(rows)),
        "host": host,
        "verdicts": verdicts(rows, host),
    }
