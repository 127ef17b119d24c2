"""onelaunch bench: selection, measuring, records and the command. Only the timing itself needs a GPU."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from benched import CASES, DATA, HERE, Meter, some_data
from click.testing import CliRunner
from onelaunch.cli.lab.bench import command, measuring, selection
from onelaunch.cli.lab.bench.cases import SHAPES, WIDE, Case, parse_shape, short, trace_lengths
from onelaunch.cli.lab.bench.contenders import CONTENDERS
from onelaunch.cli.lab.bench.host import HOST
from onelaunch.cli.lab.bench.implementation import Implementation
from onelaunch.cli.lab.bench.measuring import Record, run_bench
from onelaunch.cli.lab.bench.scene import Scene
from onelaunch.cli.lab.bench.selection import Selected, select
from onelaunch.cli.main import app
from onelaunch.errors import ConfigError

# --------------------------------------------------------------------------------------------------- what is measured


def test_shapes() -> None:
    assert [parse_shape(text) for text in ("64x8k", "1 x 1M", "3×100")] == [(64, 8192), (1, 2**20), (3, 100)]
    assert [short(number) for number in (8192, 2**20, 1000, 133_120)] == ["8k", "1M", "1000", "130k"]
    assert all(Case(*parse_shape(shape)).shape == shape for shape in SHAPES)
    for wrong in ("64", "64x", "0x4k", "4x0", "x8k", "64x8g", "1048577x1", "1x2048M"):
        with pytest.raises(ConfigError, match="BATCHxLENGTH"):
            parse_shape(wrong)


def test_lengths_are_the_same_in_every_run_and_fit_the_table() -> None:
    uniform = Case(64, 8192)
    assert uniform.lengths() == uniform.lengths()
    assert max(uniform.lengths()) == 8192
    assert min(uniform.lengths()) >= 4096
    ragged = Case(256, 2048, kind="one-long").lengths()
    assert sorted(ragged)[-1] == 64 * 2048
    assert sorted(ragged)[-2] <= 2048
    assert max(Case(8, 4096, width=5000, kind="one-long").lengths()) == 5000
    traced = trace_lengths(DATA / "mooncake_conversation.csv")
    drawn = Case(64, WIDE, kind="mooncake").lengths(traced)
    assert len(drawn) == 64
    assert set(drawn) <= set(traced)
    assert len(set(drawn)) > 20


def labels(selected: Sequence[Selected]) -> Counter[str]:
    return Counter(str(one.case) for one in selected)


def test_what_is_measured_unless_something_is_asked_for() -> None:
    names = list(CONTENDERS)
    selected = select(names)
    assert max(labels(selected).values()) == 1
    cases = [one.case for one in selected]
    # The ten shapes come first, in tables as wide as an engine's; a request of a million tokens needs a wider one.
    assert tuple(case.shape for case in cases[:10]) == SHAPES
    assert all(case.width == (WIDE if case.length <= WIDE else 2**20 + 71) for case in cases[:10])
    assert {case.kind for case in cases} == {"uniform", "one-long"}
    assert {case.page_size for case in cases} == {64, 1}
    assert {case.backends for case in cases} == {1, 3, 7}
    assert Case(64, 8192, width=8192) in cases
    assert sum(case.extent == "full" for case in cases) == 5
    assert all("onelaunch" in one.names and "ideal" in one.names for one in selected)
    assert [sum(name in one.names for one in selected) for name in selection.FEW_NAMES] == [4] * len(
        selection.FEW_NAMES
    )
    assert len(selected) <= 24


def test_what_is_asked_for_is_measured() -> None:
    names = ["ideal", "onelaunch", "single-block"]
    asked = select(names, shapes=["2x1k", "3x2k"], backends=[1, 7], widths=["live", "5000"], extents=["full"])
    assert len(asked) == 8
    assert {(one.case.width, one.case.shape) for one in asked} == {
        (1024, "2x1k"),
        (2048, "3x2k"),
        (5000, "2x1k"),
        (5000, "3x2k"),
    }
    assert all(one.names == tuple(names) for one in asked)
    both = select(list(CONTENDERS), quick=True, series=True)
    assert {one.series for one in both} == {"", "length"}
    quick = select(list(CONTENDERS), quick=True)
    assert [one.case.shape for one in quick] == list(selection.QUICK_SHAPES)
    assert set(quick[0].names) == set(selection.QUICK_NAMES)
    # Ten shapes and two ragged ones, three N, two widths, two page sizes; both extents except for the ragged ones.
    assert len(select(names, everything=True)) == 10 * 3 * 2 * 2 * 2 + 2 * 3 * 2
    traced = select(names, shapes=["1x1k"], traces=["azure"])
    assert [(one.case.kind, one.case.batch) for one in traced] == [("uniform", 1), ("azure", 64), ("azure", 256)]
    curves = Counter(one.series for one in select(names, shapes=["1x1k"], series=True))
    assert curves == {"": 1, "length": len(selection.SERIES_LENGTHS)}
    # After the shapes and before the rest, so that a run that is cut short has them.
    assert [one.series for one in select(names, series=True)][9:12] == ["", "length", "length"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"shapes": ["big"]}, "BATCHxLENGTH"),
        ({"backends": [0]}, "--n is 0"),
        ({"pages": [0]}, "--page-size is 0"),
        ({"extents": ["dead"]}, "--extent is 'dead'"),
        ({"widths": ["wider"]}, "--width is 'wider'"),
        ({"widths": ["0"]}, "--width is '0'"),
        ({"widths": ["²"]}, "--width is '²'"),
    ],
)
def test_what_cannot_be_measured_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        select(["onelaunch"], **wrong)


# ---------------------------------------------------------------------------------------------------------- measuring


@pytest.fixture
def tampered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Adds an implementation whose calls do something else."""

    def tamper(name: str, call: Callable[[Scene], None], **facts: Any) -> None:
        def variants(scene: Scene, case: Case) -> list[Callable[[], object]]:
            return [lambda: call(scene)]

        monkeypatch.setitem(CONTENDERS, name, Implementation(name, name, "", variants, **facts))

    return tamper


@pytest.mark.usefixtures("quick_builds")
def test_a_run(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    lines: list[str] = []
    selected = [Selected(case, HERE) for case in CASES[:2]]
    run_bench(selected, Meter(), Record(path, {"onelaunch": "1"}), say=lines.append)
    data = json.loads(path.read_text())
    assert data["complete"]
    assert data["not_built"] == []
    assert len(data["rows"]) == 2 * len(HERE)
    status = Counter(row["status"] for row in data["rows"])
    assert status == {"ok": 2 * len(HERE) - 1, "left out": 1}
    ours, ideal = (
        next(row for row in data["rows"] if row["implementation"] == name) for name in ("onelaunch", "ideal")
    )
    lengths = CASES[0].lengths()
    words, pages = sum(lengths), sum(-(-length // 16) for length in lengths)
    assert ours["bytes"] == 4 * (words + 3 * (words + pages + 4 * 6 + 2)) + 16 * 6
    assert ideal["bytes"] == 16 * words
    assert [ours[f"{column}_us"] for column in ("warm", "cold", "eager", "host")] == [4.0, 6.0, 7.0, 2.0]
    assert [ours[f"{column}_quartiles"] for column in ("warm", "cold")] == [[3.5, 4.5], [5.5, 7.5]]
    assert data["titles"]["torch-copies"] == "PyTorch, copies"
    assert Case(**ours["case"]) == CASES[0]
    assert {"num_backends=3", "page_size=16"} <= set(ours["config"].split(","))
    host = {row["piece"]: row["us"] for row in data["host"]}
    assert [n for n in host if n in HOST] == [n for n in HOST if n not in ("stream", "raw+stream")]
    # A part is the time of a call less the time of the call inside it. "raw" took 3, "kernel" 4, "run" 5 and
    # "plan.run" 6.
    assert [us for piece, us in host.items() if piece.startswith("of which")] == [1, 1, 1, 1]
    assert len([line for line in lines if "onelaunch: 6.00 us" in line]) == 2
    assert os.stat(path).st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_or_is_wrong_takes_nothing_along(tampered: Callable[..., None]) -> None:
    def stop(scene: Scene) -> None:
        raise RuntimeError("out of luck\nand more")

    def wrong(scene: Scene) -> None:
        scene.buffers[0].cache_seqlens.fill_(1)  # type: ignore[union-attr]

    tampered("fails", stop, builds=True)
    tampered("wrong", wrong)
    tampered("slow", stop, limit=6 * 100)
    meter = Meter()
    selected = [Selected(CASES[0], ("fails", "wrong", "slow", "onelaunch"))]
    data = run_bench(selected, meter, Record(None, {}), host=False)
    assert [(row["implementation"], row["status"]) for row in data["rows"]] == [
        ("fails", "failed"),
        ("wrong", "wrong"),
        ("slow", "left out"),
        ("onelaunch", "ok"),
    ]
    assert data["rows"][0]["reason"] == "RuntimeError: out of luck"
    assert "backends[0].cache_seqlens[0] is 1, the reference says" in data["rows"][1]["reason"]
    assert not any("cold_us" in row for row in data["rows"][:3])
    assert "fails, " in data["not_built"][0]
    assert data["complete"]


def test_of_the_variants_that_work_the_fastest_counts() -> None:
    case = CASES[0]

    def variants(scene: Scene, case: Case) -> list[Callable[[], object]]:
        (good,) = CONTENDERS["onelaunch"].variants(scene, case)
        return [lambda: [][0], good, lambda: good()]

    class Slower(Meter):
        calls = 0

        def cold_us(self, call: Callable[[], object]) -> list[float]:
            self.calls += 1
            return [10.0 * self.calls, 20.0 * self.calls, 30.0 * self.calls]

    row = measuring.measure_one(
        Slower(), Meter().scene(case, case.lengths()), case, Implementation("a", "", "", variants)
    )
    assert (row["status"], row["cold_us"], row["cold_quartiles"]) == ("ok", 20.0, [15.0, 25.0])
    assert row["reason"] == "IndexError: list index out of range"


def test_a_graph_that_is_wrong_where_eager_calls_are_right_is_not_timed() -> None:
    case = CASES[0]

    def variants(scene: Scene, case: Case) -> list[Callable[[], object]]:
        made = 0
        (good,) = CONTENDERS["onelaunch"].variants(scene, case)

        def once() -> None:
            nonlocal made
            made += 1
            if made == 1:
                good()

        return [once]

    crooked = Implementation("crooked", "", "", variants)
    row = measuring.measure_one(Meter(), Meter().scene(case, case.lengths()), case, crooked)
    assert row["status"] == "wrong"


def test_a_run_that_is_cut_keeps_what_it_has(tmp_path: Path, tampered: Callable[..., None]) -> None:
    path = tmp_path / "bench.json"
    kept: list[int] = []

    def look(scene: Scene) -> None:
        kept.append(len(json.loads(path.read_text())["rows"]))

    tampered("looks", look, checked=False)
    selected = [Selected(CASES[0], ("onelaunch",)), Selected(CASES[1], ("looks",)), Selected(CASES[2], ("onelaunch",))]
    run_bench(selected, Meter(), Record(path, {}), host=False)
    assert max(kept) == 1  # the second case found the first one's row
    data = run_bench(selected, Meter(), Record(path, {}), host=False, seconds=0.0)
    assert not data["complete"]
    assert data["not_begun"] == [str(one.case) for one in selected]
    assert json.loads(path.read_text()) == json.loads(json.dumps(data))


def test_a_device_that_is_lost_ends_the_run() -> None:
    class Lost(Meter):
        def synchronize(self) -> None:
            raise RuntimeError("an illegal memory access was encountered")

    data = run_bench([Selected(case, ("onelaunch",)) for case in CASES[:2]], Lost(), Record(None, {}), host=False)
    assert len(data["rows"]) == 1
    assert data["rows"][0]["status"] == "failed"
    assert "illegal memory access" in data["lost"]
    assert not data["complete"]


def test_a_case_without_room_is_said() -> None:
    class Small(Meter):
        def scene(self, case: Case, lengths: Sequence[int]) -> Scene:
            raise RuntimeError("CUDA out of memory")

    data = run_bench([Selected(CASES[0], ("ideal", "onelaunch"))], Small(), Record(None, {}))
    assert [row["reason"] for row in data["rows"]] == ["no buffers: RuntimeError: CUDA out of memory"] * 2
    assert "CUDA out of memory" in data["host"][0]["what"]


# --------------------------------------------------------------------------------------------------------- the command


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def test_without_a_gpu_it_says_so_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = invoke("bench")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "onelaunch: onelaunch bench measures on a CUDA device, and there is none here. Run it on a machine with a GPU."
    ]


def test_the_command_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "device_meter", lambda verb: Meter())
    path = tmp_path / "bench.json"
    began = time.time()
    result = invoke("bench", "--shapes", "3x50", "--width", "60", "--only", "onelaunch,ideal", "--json", str(path))
    assert result.exit_code == 0, result.output
    assert "3x50 N=3 width=60 page=64 live" in result.stdout
    assert "[1/1]" in result.stderr
    data = json.loads(path.read_text())
    assert [row["implementation"] for row in data["rows"]] == ["ideal", "onelaunch"]
    assert data["seconds"] <= time.time() - began + 1
    alone = invoke("bench", "--host")
    assert alone.exit_code == 0, alone.output
    assert "plan.run" in alone.stdout
    assert "cold us" not in alone.stdout
    trace = str(DATA / "azure_2023_conversation.csv")
    monkeypatch.setattr(measuring, "run_bench", lambda selected, *a, traces, **k: some_data() | {"machine": traces})
    assert "azure_2023_conversation" in invoke("bench", "--trace", trace).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--only", "cuda"), "--only names 'cuda'; allowed: ideal, listed, empty, onelaunch"),
        (("--from", "tests/gpu/bench.json", "--only", "ideal"), "only --plot and --quick go with it"),
        (("--n", "three"), "--n is 'three'; it must be whole numbers"),
        (("--n", "3,²"), "--n is '3,²'; it must be whole numbers"),
        (("--trace", "nowhere.csv"), "nowhere.csv can't be opened"),
        (("--from", "pyproject.toml"), "isn't what --json writes"),
        (("--from", "nowhere.json"), "nowhere.json can't be read"),
    ],
)
def test_bad_options_are_sentences(arguments: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    result = invoke("bench", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr


def test_a_file_that_cannot_be_written_is_known_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "device_meter", lambda verb: Meter())
    monkeypatch.setattr(measuring, "run_bench", lambda *a, **k: pytest.fail("measured"))
    result = invoke("bench", "--json", "/nowhere/at/all.json")
    assert result.exit_code == 2
    assert "can't be read or written" in result.stderr
