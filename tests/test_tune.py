"""onelaunch tune: launch shapes swept, the best chosen, kept by device, and found again by bind."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from onelaunch import KernelConfig, loader, preset, tuning
from onelaunch.cli import tune
from onelaunch.cli.main import app
from onelaunch.cli.scene import SHAPES, WIDE, Case, Scene
from onelaunch.cli.tune import choose, launch_shapes, loads, run_tune, sweep
from onelaunch.errors import ConfigError, StoreError
from onelaunch.store import Store
from rich.console import Console
from test_bench import Meter
from typer.testing import CliRunner

DEVICE = "NVIDIA H200"
CONFIG = KernelConfig(num_backends=3)
SHAPE = {"threads": 512, "unroll": 4, "blocks_per_sm": 4}
USUAL = {"threads": 256, "unroll": 2, "blocks_per_sm": 4}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


def wanted(**changes: Any) -> list[tune.Load]:
    facts: dict[str, Any] = {"backends": 3, "page_size": 64, "extent": "live", "width": None, **changes}
    return loads(facts.pop("shapes", ()), facts.pop("lengths", ()), **facts)


# ------------------------------------------------------------------------------------------------- what bind is told


def test_what_was_tuned_is_found_again(store: Store) -> None:
    assert tuning.launch_shape(CONFIG, DEVICE, 132, 64, store=store) == USUAL
    path = tuning.remember(store, DEVICE, CONFIG, SHAPE, {"loads": {"64x8k": 4.5}})
    assert tuning.launch_shape(CONFIG, DEVICE, 132, 64, store=store) == SHAPE
    # Whatever launch shape it has now, the rest of the configuration decides.
    assert tuning.launch_shape(CONFIG.replace(threads=128), DEVICE, 132, 64, store=store) == SHAPE
    for other in (CONFIG.replace(num_backends=4), CONFIG.replace(extent="full"), CONFIG.replace(page_size=16)):
        assert tuning.launch_shape(other, DEVICE, 132, 64, store=store) == USUAL
    assert tuning.launch_shape(CONFIG, "NVIDIA B200", 148, 64, store=store) == USUAL
    noted = json.loads(path.read_text())
    assert noted["device"] == DEVICE
    assert noted["loads"] == {"64x8k": 4.5}
    assert path.stat().st_mode & 0o077 == 0
    tuning.remember(store, DEVICE, CONFIG, USUAL, {})
    assert tuning.recall(store, DEVICE, CONFIG) == USUAL
    assert tuning.forget(store, DEVICE, CONFIG)
    assert not tuning.forget(store, DEVICE, CONFIG)
    assert tuning.recall(store, DEVICE, CONFIG) is None


def test_a_shape_that_no_kernel_can_have_is_not_kept(store: Store) -> None:
    with pytest.raises(ConfigError, match="threads is 100"):
        tuning.remember(store, DEVICE, CONFIG, {**SHAPE, "threads": 100}, {})
    assert not store.root.exists()


@pytest.mark.parametrize(
    "damage",
    ["", "[]", "{}", "not JSON", json.dumps({**SHAPE, "threads": 100}), json.dumps({**SHAPE, "unroll": "2"})],
)
def test_what_is_damaged_is_not_there(damage: str, store: Store) -> None:
    tuning.remember(store, DEVICE, CONFIG, SHAPE, {}).write_text(damage)
    assert tuning.launch_shape(CONFIG, DEVICE, 132, 64, store=store) == USUAL


def test_what_others_could_have_written_is_refused(store: Store) -> None:
    path = tuning.remember(store, DEVICE, CONFIG, SHAPE, {})
    path.chmod(0o666)
    with pytest.raises(StoreError, match="can be written by others"):
        tuning.recall(store, DEVICE, CONFIG)


def test_what_was_prebuilt_comes_first(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = Store(tmp_path / "shipped")
    tuning.remember(shipped, DEVICE, CONFIG, SHAPE, {})
    monkeypatch.setenv("ONELAUNCH_PREBUILT", str(shipped.root))
    assert tuning.recall(store, DEVICE, CONFIG) == SHAPE


def test_bind_asks_for_the_device(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def properties(device: torch.device) -> Any:
        asked.append(device)
        return SimpleNamespace(name=DEVICE, multi_processor_count=132)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(loader, "default_store", lambda: store)
    device = torch.device("cuda", 1)
    assert tuning.shaped(CONFIG, device, 64, WIDE) == CONFIG
    tuning.remember(store, DEVICE, CONFIG, SHAPE, {})
    assert tuning.shaped(CONFIG, device, 64, WIDE) == CONFIG.replace(**SHAPE)
    assert asked == [device] * 2
    # Where there are no tables, or no GPU, there is nothing to choose.
    for other in (preset("nsa-decode-3-lengths-only"), CONFIG.replace(target="cpu")):
        assert tuning.shaped(other, device, 64, WIDE) is other
    assert len(asked) == 2


# ------------------------------------------------------------------------------------------------------ what is tried


def test_loads() -> None:
    assert [load.case.shape for load in wanted()] == list(SHAPES)
    (given,) = wanted(lengths=[5, 700, 1])
    assert given.lengths == (5, 700, 1)
    assert (given.case.batch, given.case.length, given.case.width) == (3, 700, WIDE)
    both = wanted(shapes=["2x1k"], lengths=[9], width=2000, backends=5, page_size=1, extent="full")
    assert [load.case for load in both] == [
        Case(2, 1024, 5, 2000, 1, "full"),
        Case(1, 9, 5, 2000, 1, "full", kind="given"),
    ]
    assert both[0].lengths == tuple(both[0].case.lengths())
    with pytest.raises(ConfigError, match=r"--width is 500, and .* has a request of 1024 tokens"):
        wanted(shapes=["2x1k"], width=500)
    with pytest.raises(ConfigError, match="--width is 0"):
        wanted(width=0)


def test_launch_shapes() -> None:
    assert len(launch_shapes((), (), ())) == 36
    assert USUAL in launch_shapes((), (), ())
    assert launch_shapes([64], [2, 8], [1]) == [
        {"threads": 64, "unroll": 2, "blocks_per_sm": 1},
        {"threads": 64, "unroll": 8, "blocks_per_sm": 1},
    ]


class Timed(Meter):
    """Says that a launch shape takes what it is told, one list of times a shape."""

    def __init__(self, *times: Sequence[float]) -> None:
        super().__init__()
        self.times = [list(each) for each in times]

    def capture(self, calls: Sequence[Callable[[], object]], estimate_us: float) -> tuple[Callable[[], None], int]:
        return super().capture(calls, estimate_us)[0], self.graphs - 1

    def graph_us(self, replay: Callable[[], None], count: int) -> float:
        replay()
        times = self.times[count]
        return times.pop(0) if len(times) > 1 else times[0]


def shapes_of(*threads: int) -> list[dict[str, int]]:
    """Launch shapes that are the same kernel on the CPU."""
    return [{"threads": count, "unroll": 2, "blocks_per_sm": 1} for count in threads]


def test_a_sweep_measures_the_best_again(monkeypatch: pytest.MonkeyPatch) -> None:
    (load,) = wanted(shapes=["3x40"], width=64)
    default = shapes_of(6)[0]
    # The first looked best by chance; the sixth is slow, but it is what there would be without tuning.
    meter = Timed([1, 9, 8], [2], [3], [4], [7], [6, 5, 5.5])
    said: list[str] = []
    rows = sweep(meter, load, shapes_of(1, 2, 3, 4, 5, 6), default, said.append)
    assert [(row["graph_us"], row["again"]) for row in rows] == [
        (8, True),
        (2, True),
        (3, True),
        (4, True),
        (7, False),
        (5, True),
    ]
    assert said == [f"{load}: 6 launch shapes measured"]


def test_a_shape_that_is_wrong_or_fails_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Scene.refresh_calls

    def crooked(self: Scene, extent: str = "live", **facts: int) -> list[Callable[[], object]]:
        if facts["threads"] == 1:
            return [lambda: None] * self.sets
        if facts["threads"] == 2:
            raise RuntimeError("too many resources requested for launch")
        return real(self, extent, **facts)

    monkeypatch.setattr(Scene, "refresh_calls", crooked)
    (load,) = wanted(shapes=["3x40"], width=64)
    rows = sweep(Timed([5]), load, shapes_of(1, 2, 3), shapes_of(3)[0])
    assert rows[0]["reason"].startswith("wrong: backends[0]")
    assert rows[1]["reason"] == "RuntimeError: too many resources requested for launch"
    assert "graph_us" not in rows[0] | rows[1]
    assert rows[2]["graph_us"] == 5


def rows_of(**times: float | None) -> list[Mapping[str, Any]]:
    """Rows by threads."""
    return [
        {"threads": int(name[1:]), "unroll": 2, "blocks_per_sm": 1, **({"graph_us": us} if us else {"reason": "no"})}
        for name, us in times.items()
    ]


def test_the_choice_is_the_shape_that_is_nowhere_far_off() -> None:
    default = shapes_of(2)[0]
    swept = {"short": rows_of(t1=2.0, t2=2.2, t4=4.0), "long": rows_of(t1=20.0, t2=12.0, t4=10.0)}
    choice = choose(swept, default)
    assert choice["winner"] == default
    long = choice["loads"]["long"]
    assert long["best"]["threads"] == 4
    assert (long["best_us"], long["winner_us"], long["default_us"]) == (10, 12, 12)
    assert long["winner_off"] == long["default_off"] == pytest.approx(0.2)
    # A shape that failed somewhere can't win, but it can be the best of a load that it ran on.
    swept["short"] = rows_of(t1=2.0, t2=None, t4=4.0)
    choice = choose(swept, default)
    assert choice["winner"]["threads"] in (1, 4)
    assert choice["loads"]["long"]["default_us"] is None
    with pytest.raises(ConfigError, match=re.escape("No launch shape ran on every load: no.")):
        choose({"short": rows_of(t1=None), "long": rows_of(t1=1.0)}, default)


def test_the_choice_as_a_table(tmp_path: Path) -> None:
    default = shapes_of(2)[0]
    swept = {"short": rows_of(t1=2.0, t2=2.04), "long": rows_of(t1=10.0, t2=10.6)}
    with open(tmp_path / "said", "w", encoding="utf-8") as file:
        console = Console(width=150, file=file)
        tune.print_choice(choose(swept, default), default, console)
        tune.print_choice(choose({"short": swept["short"]}, default), default, console)
    said = (tmp_path / "said").read_text()
    assert "at most 6.0 % off the best; the target of 5 % doesn't hold" in said
    assert "at most 2.0 % off the best; the target of 5 % holds" in said
    assert "winner 1 threads, unroll 2, 1 blocks" in said


# --------------------------------------------------------------------------------------------------------- the command


def test_a_run_builds_sweeps_and_chooses(tmp_path: Path) -> None:
    """On the CPU target, where a block has one thread whatever is asked for."""
    path = tmp_path / "tune.json"
    meter = Timed([9], [3], [4])
    data = run_tune(meter, wanted(shapes=["3x40"], width=64), launch_shapes([128, 512], [2], [8]), json_to=path)
    assert data["default"] == USUAL
    assert data["choice"]["winner"] == {"threads": 512, "unroll": 2, "blocks_per_sm": 8}
    (off,) = (row["default_off"] for row in data["choice"]["loads"].values())
    assert off == pytest.approx(1 / 3)
    kept = json.loads(path.read_text())
    assert kept["choice"] == data["choice"]
    assert [row["threads"] for rows in kept["rows"].values() for row in rows] == [128, 512, 256]


def test_a_build_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from onelaunch import prebuild

    def build_all(jobs: Sequence[prebuild.Job], at_once: int) -> list[prebuild.Done]:
        return [prebuild.Done(job, "", "", 1.0, False, "no compiler" if n else "") for n, job in enumerate(jobs)]

    monkeypatch.setattr(prebuild, "build_all", build_all)
    config = CONFIG.replace(target="cpu")
    assert tune.build_all(config, [*shapes_of(1, 1), {**USUAL, "unroll": 4}], ()) == ["no compiler"]


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["tune", *arguments])


def test_the_command_keeps_the_winner(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    data = {
        "machine": {"device": DEVICE},
        "default": USUAL,
        "choice": {"winner": SHAPE, "loads": {"64x8k": {**dict.fromkeys(("best_us", "winner_us", "default_us"), 4.0)}}},
    }
    data["choice"]["loads"]["64x8k"] |= {"best": SHAPE, "winner_off": 0.0, "default_off": 0.01}  # type: ignore[index]
    asked: list[Any] = []

    def run(meter: Any, wanted: list[tune.Load], shapes: list[Any], **rest: Any) -> Any:
        asked.append((wanted, shapes))
        return data

    monkeypatch.setattr(tune, "device_meter", lambda verb: Meter())
    monkeypatch.setattr(tune, "run_tune", run)
    monkeypatch.setattr(loader, "default_store", lambda: store)
    assert invoke("nsa-decode-7", "--shapes", "64x8k", "--unroll", "4", "--no-keep").exit_code == 0
    ((load,), shapes) = asked[-1]
    assert (load.case.backends, load.case.shape, len(shapes)) == (7, "64x8k", 12)
    assert tuning.recall(store, DEVICE, preset("nsa-decode-7")) is None
    result = invoke("--lengths", "700,3", "--n", "2", "--page-size", "1", "--extent", "full")
    assert result.exit_code == 0, result.output
    assert "kept for NVIDIA H200 in" in result.stdout
    tuned = KernelConfig(num_backends=2, page_size=1, extent="full")
    assert tuning.recall(store, DEVICE, tuned) == SHAPE
    assert len(asked[-1][1]) == 36


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nsa-decode-9",), "the preset's name is 'nsa-decode-9'"),
        (("nsa-decode-3-pages-only",), "has other fields, dtypes or alignment"),
        (("nsa-decode-3-int32",), "has other fields, dtypes or alignment"),
        (("--threads", "100"), "threads is 100"),
        (("--blocks", "many"), "--blocks is 'many'"),
        (("--extent", "dead"), "extent is 'dead'"),
        (("--shapes", "64"), "BATCHxLENGTH"),
    ],
)
def test_bad_options_are_sentences(arguments: tuple[str, ...], said: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert said in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so_in_a_sentence() -> None:
    result = invoke()
    assert result.exit_code == 2
    assert result.stderr.startswith("onelaunch: onelaunch tune measures on a CUDA device, and there is none here.")
