"""The bench's parts of a refresh alone, checked against the reference, and beside the engine's kernels."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benched import Meter, some_data
from click.testing import CliRunner
from onelaunch import MetadataBuffers, table
from onelaunch.cli.lab.bench import command, flashmla, tables
from onelaunch.cli.lab.bench.measuring import Record, run_bench
from onelaunch.cli.lab.bench.parts import PARTS, Inputs, Part, part_rows
from onelaunch.cli.lab.bench.verdicts import verdicts
from onelaunch.cli.main import app
from onelaunch.spec.reference_schedules import flashmla_schedule

INDICES, PAGES, TOKENS, MQA, MLA = PARTS
SHAPES = ("3x100", "1x700")
pytestmark = pytest.mark.usefixtures("quick_builds")


def measured(part: Part, shapes: tuple[str, ...] = SHAPES) -> list[dict[str, Any]]:
    return list(part_rows(Meter(), shapes, [part]))


@pytest.mark.parametrize("part", PARTS, ids=lambda part: part.name)
def test_without_an_engine_ours_is_measured(part: Part, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "sgl_kernel").mkdir()
    (tmp_path / "sgl_kernel" / "flashmla_ops.abi3.so").write_bytes(b"no library")
    monkeypatch.syspath_prepend(str(tmp_path))
    flashmla.schedule.cache_clear()
    rows = measured(part)
    assert [(row["backends"], row["shape"]) for row in rows] == [(n, shape) for n in part.backends for shape in SHAPES]
    names = {"ours", *(["declared"] if part.declared else []), *(["floor"] if part is PAGES else [])}
    missing = "^$" if part is TOKENS else "isn't importable|no such kernels|can't be loaded"
    for row in rows:
        assert re.search(missing, row["reason"])
        assert (row["warm_us"], row["cold_us"]) == (dict.fromkeys(names, 4.0), dict.fromkeys(names, 6.0))


def test_a_request_beyond_the_usual_width_is_as_long_as_its_shape_says() -> None:
    seen: list[tuple[list[int], int]] = []

    def destinations(inputs: Inputs, backends: int) -> list[MetadataBuffers]:
        seen.append((inputs.lengths, inputs.width))
        raise RuntimeError("enough")

    assert [row["reason"] for row in measured(dataclasses.replace(MQA, destinations=destinations), ("1x200k",))]
    ((lengths, width),) = seen
    assert lengths == [204_800]
    assert width > 204_800


def test_the_floor_of_pages_writes_their_numbers() -> None:
    inputs = Inputs([700, 64], 2000, torch.device("cpu"))
    made: list[torch.Tensor] = []
    new = inputs.new
    inputs.new = lambda *shape: made.append(new(*shape)) or made[-1]  # type: ignore[method-assign,func-returns-value]
    for call in PAGES.floor(inputs, 3):
        for tensor in made:
            tensor.fill_(-1)
        call()
        assert len(made) == 3
        for tensor in made:
            assert torch.equal(tensor, inputs.pool.flatten()[: 24 * 32 : 32] // 32)


def leftovers(lengths: list[int]) -> torch.Tensor:
    """FlashMLA's schedule with leftover values in the padding."""
    metadata = torch.tensor(flashmla_schedule(lengths, 132)[0], dtype=torch.int32)
    metadata[:, 7] = 5
    return metadata


def engine_of(change: Callable[[torch.Tensor], object]) -> Part:
    """FlashMLA's part with an engine that returns the reference's schedule, changed."""

    def calls(inputs: Inputs, buffers: list[MetadataBuffers]) -> dict[str, list[Callable[[], object]]]:
        metadata = leftovers(inputs.lengths)
        change(metadata)
        splits = torch.tensor(flashmla_schedule(inputs.lengths, 132)[1], dtype=torch.int32)
        return {"engine": [lambda: [MetadataBuffers(flashmla_metadata=metadata, num_splits=splits)]]}

    return dataclasses.replace(MLA, engine=calls)


def test_an_engine_is_measured_where_it_says_the_same() -> None:
    for row in measured(engine_of(lambda metadata: None)):
        assert (row["warm_us"], row["reason"]) == ({"ours": 4.0, "engine": 4.0}, "")
    for row in measured(engine_of(lambda metadata: metadata[0, 1].add_(1))):
        assert set(row["warm_us"]) == {"ours"}
        assert re.match(
            r"engine: backends\[0\].flashmla_metadata\[0, 1\] is \d+, the reference says \d+$", row["reason"]
        )


def test_what_an_engine_leaves_unwritten_is_found() -> None:
    """Its destinations are poisoned, so that what ours or another of its calls wrote doesn't pass for its own."""

    def calls(inputs: Inputs, buffers: list[MetadataBuffers]) -> dict[str, list[Callable[[], object]]]:
        def nothing() -> None: ...

        return {"engine": [nothing]}

    for row in measured(dataclasses.replace(INDICES, engine=calls)):
        assert "engine: backends[0].kv_indptr[1] is -858993460" in row["reason"]


def test_what_is_wrong_with_ours_is_said_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is wrong with an engine's call."""

    def calls(inputs: Inputs, buffers: list[MetadataBuffers]) -> dict[str, list[Callable[[], object]]]:
        right = engine_of(lambda metadata: None).engine(inputs, buffers)["engine"]
        wrong = engine_of(lambda metadata: metadata[0, 1].add_(1)).engine(inputs, buffers)["engine"]
        return {"engine": right, "engine-best": wrong}

    monkeypatch.setattr("onelaunch.run.plan.Plan.run", lambda plan, *tensors: None)
    rows = measured(dataclasses.replace(MLA, engine=calls))
    for row in rows:
        assert set(row["warm_us"]) == {"engine"}
        assert re.match(r"ours: backends\[0\]\.\w+.* is -858993460, .*; engine-best: ", row["reason"])
    said = verdicts([], [], rows)
    assert len(said) == 2 * len(rows)
    assert all("ours wasn't measured; ours: " in each["measured"] and not each["holds"] for each in said)


def test_parts_that_fail_take_nothing_along() -> None:
    def fails(inputs: Inputs, buffers: list[MetadataBuffers]) -> dict[str, list[Callable[[], object]]]:
        if len(inputs.lengths) == 3:
            raise ZeroDivisionError("no\nluck")
        return {}

    rows = measured(dataclasses.replace(MQA, engine=fails))
    assert [row["reason"] for row in rows] == ["ZeroDivisionError: no", ""]


def test_verdicts_and_the_table_have_the_parts() -> None:
    def row(shape: str, reason: str = "", **us: float) -> dict[str, Any]:
        times = {name.replace("_", "-"): took for name, took in us.items()}
        return {
            "part": "pages", "backends": 3, "shape": shape, "reason": reason, "warm_us": times, "cold_us": times
        }  # fmt: skip

    rows = [
        row("1x4k", ours=2.0, engine=9.0, engine_best=2.1, floor=1.0),
        row("8x8k", ours=4.1, engine=4.0),
        row("32x4k", ours=1.05, engine=1.0),
        row("64x8k", "SGLang isn't importable", ours=1.0),
        row("1x1M", "the device is out of memory"),
        row("2x4k", ours=2.0, declared=2.14),
        row("3x4k", ours=2.0, declared=2.16),
        row("4x4k", ours=20.0, declared=20.4),
        row("5x4k", "declared: backends[0].kv_indptr[1] is 5", ours=2.0),
    ]
    said = verdicts([], [], rows)
    assert [(each["of"], each["item"], each["holds"]) for each in said] == [
        (f"{shape} N=3", f"pages, {what}{caches}", holds)
        for what, judged in (
            ("", (("1x4k", True), ("8x8k", False), ("32x4k", True))),
            ("declared, ", (("2x4k", True), ("3x4k", False), ("4x4k", True), ("5x4k", False))),
        )
        for shape, holds in judged
        for caches in ("warm", "cold")
    ]
    assert said[0]["measured"] == "2.00 us; the engine's 2.10, 1.05 of ours"
    lines = [" ".join(line.split()) for line in tables.lines(some_data() | {"parts": rows})]
    assert "pages 3 1x4k 2.00 / 2.00 – 9.00 / 9.00 2.10 / 2.10 1.00 / 1.00" in lines
    assert "pages 3 1x1M – – – – –" in lines
    assert "pages: SGLang isn't importable" in lines


def test_declared_fields_that_differ_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's declarations are held against the reference as the built-in fields are."""
    wrong = dataclasses.replace(TOKENS, declared={"page_indices": table("token(column) + 1", columns="seq_len")})
    for row in measured(wrong):
        assert set(row["warm_us"]) == {"ours"}
        assert row["reason"].startswith("declared: backends[0].page_indices")


def test_a_run_ends_with_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "onelaunch.cli.lab.bench.measuring.part_rows", lambda meter, shapes: part_rows(meter, shapes, [MQA, MLA])
    )
    data = run_bench([], Meter(), Record(tmp_path / "bench.json", {}), host=False, parts=SHAPES)
    assert [row["part"] for row in data["parts"]] == [part.name for part in (MQA, MLA) for _ in SHAPES]
    assert data["complete"]
    cut = run_bench([], Meter(), Record(None, {}), host=False, parts=SHAPES, seconds=0.0)
    assert len(cut["parts"]) == 1
    assert not cut["complete"]
    assert run_bench([], Meter(), Record(None, {}), host=False)["parts"] == []


def test_the_command_measures_parts_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "device_meter", lambda verb: Meter())
    monkeypatch.setattr(
        "onelaunch.cli.lab.bench.measuring.part_rows", lambda meter, shapes: part_rows(meter, shapes, [MQA])
    )
    said = CliRunner().invoke(app, ["bench", "--parts", "--shapes", "3x100"]).stdout
    assert "DeepGEMM's schedule  1  3x100" in said
    assert "plan.run" not in said
    assert "cold us" not in said
