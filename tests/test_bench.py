"""onelaunch bench: selection, checks, records, verdicts and figure. Only the timing itself needs a GPU."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Shape
from click.testing import CliRunner
from emulation import harness
from onelaunch import KernelConfig
from onelaunch.cli.lab.bench import command, measuring, selection, summary, tables, torch_refresh
from onelaunch.cli.lab.bench.cases import SHAPES, WIDE, Case, parse_shape, short, trace_lengths
from onelaunch.cli.lab.bench.contenders import CONTENDERS
from onelaunch.cli.lab.bench.host import HOST
from onelaunch.cli.lab.bench.implementation import Implementation, Unsupported
from onelaunch.cli.lab.bench.measuring import Record, run_bench
from onelaunch.cli.lab.bench.scene import Scene
from onelaunch.cli.lab.bench.selection import Selected, select
from onelaunch.cli.lab.bench.verdicts import verdicts
from onelaunch.cli.main import app
from onelaunch.emit.render import render_baseline
from onelaunch.errors import ConfigError
from onelaunch.spec import layout

CPU = torch.device("cpu")
DATA = Path(__file__).parent / "data"
# What runs on the CPU at once: no interpreter that has to be chosen beforehand, no compiler that takes a minute.
ELSEWHERE = ["triton", "triton-together", "torch-compile", "sglang", "sglang-best"]
HERE = tuple(name for name in CONTENDERS if name not in ELSEWHERE)
Calls = Sequence[Callable[[], object]]


class Meter:
    """Calls what it is given, and says that each took as long as it is given: enough for all that isn't timing."""

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


# ------------------------------------------------------------------------------------------------ the rivals are right


@pytest.mark.usefixtures("quick_builds")
@pytest.mark.parametrize("name", [name for name in HERE if CONTENDERS[name].checked])
def test_an_implementation_writes_what_the_reference_says(name: str) -> None:
    ran = 0
    for case in CASES:
        scene = Scene(case.lengths(), case.backends, case.width, case.page_size, CPU)
        implementation = CONTENDERS[name]
        try:
            variants = implementation.variants(scene, case)
        except Unsupported:
            continue
        for call in variants:
            assert implementation.check(scene, case, call) == "", str(case)
            ran += 1
    assert ran >= 2


def test_listed_tiles_that_are_wrong_or_write_more_are_found() -> None:
    case = CASES[0]
    scene = Scene(case.lengths(), case.backends, case.width, case.page_size, CPU)
    listed = CONTENDERS["listed"]
    (good, *_), buffers = listed.variants(scene, case), scene.buffers[0]

    def after(change: Callable[[], object]) -> str:
        return listed.check(scene, case, lambda: (good(), change()))

    assert after(lambda: None) == ""
    assert "page_indices[0, 0]" in after(lambda: buffers.page_indices[0, 0].fill_(-5))  # type: ignore[index]
    assert "cache_seqlens[0] is 7" in after(lambda: buffers.cache_seqlens.fill_(7))  # type: ignore[union-attr]


@pytest.mark.usefixtures("quick_builds")
def test_verified_writes_have_something_new_to_write_in_every_call() -> None:
    case = CASES[0]
    for name, changed in (("onelaunch-verified", "cache_seqlens"), ("onelaunch-moved", "page_indices")):
        scene = Scene(case.lengths(), case.backends, case.width, case.page_size, CPU)
        (call,) = CONTENDERS[name].variants(scene, case)
        scene.poison()
        seen = []
        for _ in range(4):
            call()
            seen.append(getattr(scene.buffers[0], changed).clone())
        assert torch.equal(seen[0], seen[2])
        assert torch.equal(seen[1], seen[3])
        first = [tensor[:, 0] if changed == "page_indices" else tensor for tensor in seen]
        assert (first[0] != first[1]).all(), "of every request"


def test_the_ideal_copies_the_words_to_all_backends() -> None:
    case = Case(3, 40, backends=3, width=64)
    scene = Scene(case.lengths(), 3, 64, 64, CPU)
    for call in CONTENDERS["ideal"].variants(scene, case):
        scene.poison()
        call()
        words = scene.live // 4 * 4
        for backend in scene.buffers:
            assert backend.page_indices is not None
            flat = backend.page_indices.flatten()
            assert torch.equal(flat[:words], scene.inputs[2].flatten()[:words])
            assert (flat[words:] == -858993460).all()


def test_the_single_block_sums_right_whatever_the_batch(tmp_path: Path) -> None:
    """Its known model was right for one warp alone. Here its 256 threads run, under the emulation of CUDA."""
    config = KernelConfig(num_backends=2, extent="full", vector_bytes=4, page_size=16)
    words = len(layout.param_words(config))
    source, _ = render_baseline("single_block", "rival", layout.call_words(config), words, config=config)
    program = harness.build(source, "none", tmp_path, copies=1)
    cases = [
        Shape(f"{bs} requests", tuple(7 * i % 40 for i in range(bs)), width=37, pool_rows=bs + 1) for bs in (1, 33, 600)
    ]
    outcome = harness.run(program, config, cases, launches=((1, 1),))
    assert outcome.caught is None, outcome


CHECKED = """
import sys
import torch
from onelaunch.cli.lab.bench import triton_together
from onelaunch.cli.lab.bench.contenders import CONTENDERS
from onelaunch.cli.lab.bench.cases import Case
from onelaunch.cli.lab.bench.scene import Scene
name, device = sys.argv[1:]
triton_together.multiprocessors = lambda device: 3  # several programs a request, and fewer than there are chunks
for case in (Case(6, 999, 2, 1031), Case(258, 9, 1, 37, 16, "full"), Case(1, 6000, 3, 6001, 1)):
    scene = Scene(case.lengths(), case.backends, case.width, case.page_size, torch.device(device))
    calls = CONTENDERS[name].variants(scene, case)
    print(next(filter(None, (CONTENDERS[name].check(scene, case, call) for call in (calls[0], calls[2]))), "right"))
"""
NO_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this torch brings no triton")


@NO_TRITON
@pytest.mark.parametrize("name", ["triton", "triton-together"])
def test_the_triton_kernels_are_right_for_any_batch(name: str, tmp_path: Path) -> None:
    # In a process of its own: whether it is interpreted, as without a GPU, is decided before it is imported.
    gpu = torch.cuda.is_available()
    environment = {**os.environ, "TRITON_INTERPRET": "0" if gpu else "1", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CHECKED, name, "cuda" if gpu else "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["right"] * 3, done.stderr


@NO_TRITON
@pytest.mark.parametrize(("name", "backends"), [("triton_refresh", 1), ("triton_together", 3)])
def test_the_triton_kernels_compile_for_a_gpu_that_is_not_there(
    name: str, backends: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    triton = importlib.import_module("triton")
    source = importlib.import_module("triton.compiler").ASTSource
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    kernel = importlib.import_module(f"onelaunch.cli.lab.bench.{name}")._refresh
    names = list(kernel.arg_names)
    facts = {"backends": backends, "index_topk": 2048, "page_shift": 6, "live_only": True, "scan": 256}
    facts = {fact: value for fact, value in (facts | {"block": 512, "aligned": True}).items() if fact in names}
    types: dict[str, Any] = dict.fromkeys(("seq_lens", "req_pool_indices"), "*i64") | {"req_to_token": "*i32"}
    types |= dict.fromkeys(("pool_stride", "page_indices_stride", "real_page_table_stride"), "i32")
    types |= dict.fromkeys(("batch_size", "columns", "splits"), "i32") | dict.fromkeys(facts, "constexpr")
    written = ("*i32",) * backends if name == "triton_together" else "*i32"
    signature = {argument: types.get(argument, written) for argument in names}
    built = triton.compile(source(kernel, signature, {(names.index(n),): v for n, v in facts.items()}), target=target)
    assert built.asm["cubin"]
    # One launch writes each backend's six fields: four of the requests, the first zeros of the sums, and both tables.
    assert built.asm["ptx"].count("st.global") >= 8 * backends


def test_what_torch_compile_gets_is_right_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling takes a minute, and the GPU run checks what comes out of it."""
    monkeypatch.setattr(torch_refresh, "compiled", lambda: torch_refresh.fused)
    for case in CASES:
        scene = Scene(case.lengths(), case.backends, case.width, case.page_size, CPU)
        (call,) = CONTENDERS["torch-compile"].variants(scene, case)
        assert CONTENDERS["torch-compile"].check(scene, case, call) == "", str(case)


def test_what_an_implementation_cannot_do_is_said() -> None:
    case = Case(2, 9, backends=9, width=33, page_size=48)
    scene = Scene(case.lengths(), 9, 33, 48, CPU)
    for name, reason in (
        ("runtime", "8 backends"),
        ("torch-copies", "power of two"),
        ("triton", "power of two"),
        ("triton-together", "power of two"),
    ):
        with pytest.raises(Unsupported, match=reason):
            CONTENDERS[name].variants(scene, case)
    case = case.replace(backends=2)
    with pytest.raises(Unsupported, match="power of two"):
        CONTENDERS["runtime"].variants(scene, case)


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
    # Ten shapes and two ragged ones, three N, two widths, two page sizes; both extents but for the ragged ones.
    assert len(select(names, everything=True)) == 10 * 3 * 2 * 2 * 2 + 2 * 3 * 2
    traced = select(names, shapes=["1x1k"], traces=["azure"])
    assert [(one.case.kind, one.case.batch) for one in traced] == [("uniform", 1), ("azure", 64), ("azure", 256)]
    curves = Counter(one.series for one in select(names, shapes=["1x1k"], series=True))
    assert curves == {"": 1, "length": len(selection.SERIES_LENGTHS)}
    # After the shapes and before the rest, for a run that is cut.
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
    # The parts are what the whole took, less what is part of it: by then "raw" had 3, "kernel" 4, "run" 5 and
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


# ----------------------------------------------------------------------------------------------------------- verdicts


def rows_of(case: Case, **times: float) -> Iterator[dict[str, Any]]:
    """Rows of a case, each with the given time for cold caches, half of it for warm ones."""
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


WIDE64 = Case(64, 8192)
FASTEST = {"fastest, cold": True, "fastest, warm": True}
DECLARED = {"declared, cold": True, "declared, warm": True}
TWENTY = {"20 vectors more, cold": True, "20 vectors more, warm": True}


@pytest.mark.parametrize(
    ("case", "times", "expected"),
    [
        (WIDE64, {"onelaunch": 10.2, "sglang": 400, "sglang_best": 10}, FASTEST),
        (WIDE64, {"onelaunch": 10.3, "sglang": 400, "sglang_best": 10}, dict.fromkeys(FASTEST, False)),
        (WIDE64, {"onelaunch": 1.05, "triton_together": 1.0}, FASTEST),
        (WIDE64, {"onelaunch": 1.08, "triton_together": 1.0}, FASTEST | {"fastest, cold": False}),
        (WIDE64.replace(backends=1), {"onelaunch": 9, "triton": 8}, dict.fromkeys(FASTEST, False)),
        (WIDE64, {"ideal": 1, "listed": 1, "empty": 1, "runtime": 1, "onelaunch": 9}, {}),
        (WIDE64.replace(extent="full"), {"ideal": 85, "onelaunch": 99}, {"whole tables": True}),
        (WIDE64.replace(extent="full"), {"ideal": 84, "onelaunch": 100}, {"whole tables": False}),
        (WIDE64, {"onelaunch": 4, "onelaunch_verified": 3.4, "ideal": 3}, {"verified": True}),
        (WIDE64, {"onelaunch": 4, "onelaunch_verified": 3.5}, {"verified": False}),
        (Case(1, 4096), {"onelaunch": 2, "onelaunch_verified": 2.1}, {"verified": True}),
        (Case(1, 4096), {"onelaunch": 2, "onelaunch_verified": 2.2}, {"verified": False}),
        (WIDE64, {"onelaunch": 4, "onelaunch_moved": 5.2}, {"verified, all changed": True}),
        (WIDE64, {"onelaunch": 4, "onelaunch_moved": 5.3}, {"verified, all changed": False}),
        (WIDE64, {"onelaunch": 4, "onelaunch_declared": 4.08}, DECLARED),
        (WIDE64, {"onelaunch": 4, "onelaunch_declared": 4.12}, dict.fromkeys(DECLARED, False)),
        (WIDE64, {"onelaunch": 4, "onelaunch_20_more": 4.3}, TWENTY),
        (WIDE64, {"onelaunch": 4, "onelaunch_20_more": 4.4}, TWENTY | {"20 vectors more, cold": False}),
        (WIDE64.replace(kind="one-long"), {"onelaunch": 4, "onelaunch_verified": 9}, {}),
        (WIDE64, {"ideal": 4, "triton": 9}, {}),
    ],
)
def test_verdicts(case: Case, times: dict[str, float], expected: dict[str, bool]) -> None:
    assert {v["item"]: v["holds"] for v in verdicts(list(rows_of(case, **times)), [])} == expected


def test_verified_writes_are_below_the_ideal_of_all_bytes_where_that_takes_long() -> None:
    for verified, holds in ((5.9, True), (6.1, False)):
        rows = rows_of(Case(128, 32768), ideal=6.0, onelaunch=20.0, onelaunch_verified=verified)
        assert [v["holds"] for v in verdicts(list(rows), [])] == [True, holds]


def test_a_verdict_names_the_fastest_and_by_how_much() -> None:
    rows = list(rows_of(WIDE64, onelaunch=10.0, triton=30.0, sglang_best=8.0))
    cold, warm = verdicts(rows, [])
    assert cold["measured"] == "10.00 us; sglang-best 8.00, 0.80 of ours"
    assert warm["measured"] == "5.00 us; sglang-best 4.00, 0.80 of ours"


def test_a_series_takes_no_verdict_away() -> None:
    rows = list(rows_of(WIDE64, triton=10.0, onelaunch=12.0))
    series = [{**row, "series": "length"} for row in rows_of(WIDE64, triton=10.0, onelaunch=9.0)]
    assert verdicts([*rows, *series], []) == verdicts([*series, *rows], []) == verdicts(rows, []) != []
    assert verdicts(series, []) == []


def test_verdicts_of_host_time() -> None:
    def host(**us: float | None) -> dict[str, bool]:
        said = verdicts([], [{"piece": name.replace("_", "."), "us": value} for name, value in us.items()])
        return {verdict["of"]: verdict["holds"] for verdict in said}

    assert host(raw=2.0, plan_run=2.6, broadcast=5.6, copy=5.7) == {"plan.run": True, "broadcast": True, "copy": False}
    assert host(raw=2.0, plan_run=2.7) == {"plan.run": False}
    assert host(plan_run=None) == {}


# -------------------------------------------------------------------------------------------------- what people see


def some_data() -> dict[str, Any]:
    """A run's data without a run."""
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


def test_the_summary_has_a_line_for_each_way() -> None:
    headings, *lines = summary.summary(some_data())
    assert headings[1:] == ["device 1 × 4k", "device 64 × 8k", "eager 1 × 4k", "eager 64 × 8k", "host"]
    assert lines == [
        ["SGLang 9.8, as it runs", "401", "401", "3.00", "3.00", "2.00"],
        ["Triton, a launch a backend", "no such luck"],
        ["Triton, one launch", "12.3", "12.3", "3.00", "3.00", "2.00"],
        ["onelaunch", "5.00", "5.00", "3.00", "3.00", "2.00"],
        ["onelaunch, verified writes", "4.50", "4.50", "3.00", "3.00", "2.00"],
    ]
    markdown = summary.markdown(some_data())
    assert markdown[1] == "|---|--:|--:|--:|--:|--:|"
    assert markdown[3] == "| Triton, a launch a backend | no such luck |  |  |  |  |"
    assert {line.count("|") for line in markdown} == {7}
    device, eager = summary.narrow([headings, *lines])
    assert device[0] == ["device", "1 × 4k", "64 × 8k", "host"]
    assert device[3] == ["Triton, one launch", "12.3", "12.3", "2.00"]
    assert eager[:2] == [["eager", "1 × 4k", "64 × 8k"], ["SGLang 9.8, as it runs", "3.00", "3.00"]]
    assert [line[0] for line in device] == ["device", *(line[0] for line in lines)]
    assert [line[0] for line in eager[1:]] == [line[0] for line in lines if len(line) > 2]


def test_the_summary_takes_one_configuration_of_one_run() -> None:
    data = some_data()
    for change in ({"backends": 7}, {"page_size": 1}, {"extent": "full"}, {"kind": "one-long"}, {"width": 8192}):
        data["rows"] = list(rows_of(WIDE64.replace(**change), onelaunch=1.0))
        assert summary.summary(data) == []


@pytest.mark.parametrize("columns", ["80", "200"])
def test_verdicts_come_first_and_are_never_cut(columns: str, kept: Path) -> None:
    text = CliRunner().invoke(app, ["bench", "--from", str(kept)], env={"COLUMNS": columns}).stdout
    lines = text.splitlines()
    judged = [line for line in lines if line.startswith(("yes ", "NO "))]
    assert len(judged) == len(some_data()["verdicts"])
    assert all(any(line.endswith(verdict["measured"]) for line in judged) for verdict in some_data()["verdicts"])
    # The summary, the verdicts, the rows.
    assert text.index("\ndevice ") < text.index("\neager ") < text.index("targets are met") < text.index("cold us")


def test_a_row_is_compared_with_ours_of_the_same_series() -> None:
    data = some_data()
    data["rows"] = [row for row in data["rows"] if row["status"] == "ok"]
    for row in data["rows"]:
        if row["series"] and row["implementation"] == "onelaunch":
            row["cold_us"] = 40.0  # the same case as one that is in no series
    rows = [line.split() for line in tables.lines(data) if " ideal " in line and "page=64" in line]
    assert [row[-1] for row in rows if "ideal" in row] == ["0.80", "0.80", "0.10", "0.10"]


def test_the_tables() -> None:
    said = "\n".join(tables.lines(some_data()))
    row = next(line for line in said.splitlines() if " onelaunch " in line and "4.50–5.50" in line)
    assert row.endswith("5.00 (4.50–5.50)  2.50 (2.00–3.00)  3.00 (2.50–3.50)  2.00 (1.50–2.50)     1.25    1.00")
    assert "triton: failed: no such luck" in said
    assert any(line.startswith("NO") and "plan.run" in line for line in said.splitlines())
    assert "The run was interrupted. These are" in said
    cut = list(tables.lines(some_data() | {"not_begun": ["a case", "another"]}))
    assert cut[1] == "Cases that weren't begun, for --seconds: 2. These are its results up to then."


def test_a_brief_table_has_no_verdicts_and_no_rows() -> None:
    said = list(tables.lines(some_data(), brief=True))
    assert "SGLang 9.8, as it runs" in "\n".join(said)
    assert not any(line.startswith(("yes", "NO")) or "targets" in line or "page=64" in line for line in said)
    assert len(said) <= 30
    assert max(map(len, said)) <= 80


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(some_data()))
    return path


def test_the_figure(kept: Path) -> None:
    picture = kept.with_suffix(".png")
    result = invoke("bench", "--from", str(kept), "--plot", str(picture))
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 10_000
    assert invoke("bench", "--from", str(kept), "--quick").output == "\n".join(tables.lines(some_data(), True)) + "\n"
    result = invoke("bench", "--from", str(kept), "--plot", str(kept.parent / "nowhere" / "a.png"))
    assert result.exit_code == 2
    assert "can't be written" in result.stderr
    data = some_data()
    data["rows"] = data["rows"][12:18]  # the series alone
    kept.write_text(json.dumps(data))
    result = invoke("bench", "--from", str(kept), "--plot", str(picture))
    assert result.exit_code == 2
    assert "none was measured" in result.stderr


def test_the_figure_says_what_the_table_says(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *a, **k: drawn.append(figure))
    assert invoke("bench", "--from", str(kept), "--plot", "a.png").exit_code == 0
    *shapes, curves = drawn[0].axes
    assert [axes.get_title() for axes in shapes] == ["1 × 4k", "64 × 8k"]
    headings, *rows = summary.summary(some_data())
    measured = [row for row in rows if len(row) == len(headings)]  # a contender that couldn't be measured has no bar
    for place, axes in enumerate(shapes, 1):
        assert [text.get_text().strip() for text in axes.texts] == [row[place] for row in measured]
        widths = sorted(bar.get_width() for bar in axes.patches if hasattr(bar, "get_width"))
        assert widths[:-1] == [4.5, 5.0, 12.34]
        assert widths[-1] == pytest.approx(1.25 * 12.34)  # not 401: it is cut
        assert len({bar.get_facecolor() for bar in axes.patches}) == len(widths) + 1  # and has a white gap
    assert [label.get_text() for label in shapes[0].get_yticklabels()] == [row[0] for row in measured]
    assert [text.get_text().strip() for text in curves.texts] == ["onelaunch: 5.00", "onelaunch, verified writes: 4.50"]


def test_without_matplotlib_it_says_what_to_install(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = invoke("bench", "--from", str(kept), "--plot", "a.png")
    assert result.exit_code == 2
    assert "pip install 'onelaunch[bench]'" in result.stderr


def test_without_numpy_only_traces_say_what_to_install(kept: Path, tmp_path: Path) -> None:
    """In a process of its own: modules of this one have numpy already."""
    code = "import sys; sys.modules['numpy'] = None; from onelaunch.cli.main import app; app(sys.argv[1:])"
    trace = str(DATA / "azure_2023_conversation.csv")

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)

    for what, words in (("--trace", ("bench", "--trace", trace)), ("onelaunch replay", ("replay", trace))):
        done = run(*words)
        wanted = (
            f"onelaunch: {what} needs numpy, which isn't installed. Install it with: pip install 'onelaunch[bench]'."
        )
        assert (done.returncode, done.stderr.splitlines()) == (2, [wanted])
    for words in (("bench", "--from", str(kept)), ("replay", "--help"), ("explain", "nsa-decode-3", "--target", "cpu")):
        done = run(*words)
        assert (done.returncode in (0, 1), done.stderr) == (True, "")


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
