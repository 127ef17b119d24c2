"""The committed results of real SGLang on a GPU (`make engines-gpu`) support what the guide says of them."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

GPU = Path(__file__).parent / "engines" / "gpu"


def _module(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module here
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def run() -> Any:
    return _module("engines_gpu_run", GPU / "run.py")


@pytest.fixture
def tokens() -> Any:
    return json.loads((GPU / "tokens.json").read_text())


def test_tokens_and_verify_steps_are_the_same_with_and_without(run: Any, tokens: Any) -> None:
    wanted: dict[str, set[str]] = {}
    for each in run.token_runs():
        wanted.setdefault(each.configuration, set()).add(each.kind)
    assert {configuration: set(kinds) for configuration, kinds in tokens.items()} == wanted
    for configuration, kinds in tokens.items():
        assert run.differences(kinds) == [], configuration
        for result in kinds.values():
            assert set(result["scenarios"]) == {"batch 16", "batch 1", "shrinking"}
            assert result["versions"]["sglang"] == "0.5.17"
            assert result["versions"]["gpu"]


def test_what_would_be_wrong_is_noticed(run: Any, tokens: Any, times: Any) -> None:
    def found(kind: str, change: Any, kinds: Any = tokens["triton, 3 steps, page 1"]) -> list[str]:
        changed = copy.deepcopy(kinds)
        change(changed[kind])
        return run.differences(changed)

    assert "on: " in found("on", lambda r: r["scenarios"]["shrinking"][0].update(verify_steps=1))[0]
    assert "on: " in found("on", lambda r: r["scenarios"]["batch 1"][0].update(hash="0"))[0]
    several = times["triton, 3 steps, page 1"]
    assert "rounds differ" in found("on", lambda r: r["scenarios"]["batch 16"][1].update(hash="0"), several)[0]
    assert "isn't attached" in found("on", lambda r: r["probe"].update(attachments=[]))[0]
    assert "after the capture" in found("on", lambda r: r["probe"].update(built_or_bound_after_capture=["bind"]))[0]
    steps = tokens["triton, 3 steps, page 1"]["off"]["scenarios"]["batch 1"][0]["verify_steps"]
    assert "same verify steps" in found(
        "spoiled", lambda r: r["scenarios"]["batch 1"][0].update(verify_steps=steps)
    )[0]  # fmt: skip
    assert found("on", lambda r: r.update(error=1)) == ["on: 1"]


@pytest.fixture
def times() -> Any:
    return json.loads((GPU / "times.json").read_text())


def test_the_table_has_all_states_side_by_side(run: Any, times: Any) -> None:
    lines = run.table(times).splitlines()
    assert len(lines) == 2 + 3 * len(times)
    assert run.guide_rows(times) in (GPU.parents[2] / "GUIDE.md").read_text(), "run.py prints the rows to copy"
    for configuration, kinds in times.items():
        assert run.differences(kinds) == [], configuration  # the tokens are the same in all states
        launches = kinds["on"]["probe"]["launches"]
        for role in run.ROLES:
            before, after = launches["off"].get(role, {}), launches["backends"].get(role, {})
            assert after.get("kernels", 0) <= before.get("kernels", 0), (configuration, role)


@pytest.mark.parametrize("backend", ["fa3", "triton"])
def test_attached_backends_launch_a_fifth_in_a_fifth_of_the_hosts_time(run: Any, times: Any, backend: str) -> None:
    probe = times[f"{backend}, 3 steps, page 1"]["on"]["probe"]

    def launched(state: str) -> int:
        metadata = [probe["launches"][state][role] for role in run.ROLES]
        return sum(count.get("kernels", 0) + count.get("copies", 0) for count in metadata)

    assert 5 * launched("backends") <= launched("off")
    states = ("off", "backends")
    host = {state: {role: probe["host_us"][state][role]["median"] for role in run.ROLES} for state in states}
    assert 5 * sum(host["backends"].values()) <= sum(host["off"].values())
    # At most a sixth for each role; a quarter for Triton's draft, which took little time before.
    for role in run.ROLES:
        assert (4 if (backend, role) == ("triton", "draft") else 6) * host["backends"][role] <= host["off"][role], role


@pytest.mark.parametrize("backend", ["fa3", "triton"])
def test_all_attached_takes_less_of_the_host_than_attached_backends(run: Any, times: Any, backend: str) -> None:
    probe = times[f"{backend}, 3 steps, page 1"]["on"]["probe"]
    host = {state: sum(run._host(probe["host_us"][state], role) for role in run.ROLES) for state in probe["host_us"]}
    assert host["on"] < host["backends"] < host["off"]
    assert 5 * host["on"] <= host["off"]
    # The lower decile, because a slow phase of the host can fall into one state's turn.
    step = {state: probe["host_us"][state]["step"]["p10"] for state in host}
    assert step["on"] < step["backends"] < step["off"]


@pytest.mark.parametrize(("backend", "share"), [("fa3", 5), ("triton", 5), ("flashinfer", 3)])
def test_all_attached_leaves_a_part_of_what_comes_before_the_graphs(times: Any, backend: str, share: int) -> None:
    """Counts launches before the graphs, also of the engine's producers. By name, one or two in each seam are ours.

    FlashInfer's own plan() stays, so its share is smaller.
    """
    seams = times[f"{backend}, 3 steps, page 1"]["on"]["probe"]["seams"]
    before, after = ({role: sum(names.values()) for role, names in seams[state].items()} for state in ("off", "on"))
    assert share * sum(after.values()) <= sum(before.values()), after
    mine = {role: sum("onelaunch" in name for name in names) for role, names in seams["on"].items()}
    assert mine == {"draft": 1, "verify": 2, "draft-extend": 2}


def test_each_seam_alone_is_the_same_by_fewer_launches_in_less_time(run: Any) -> None:
    found = json.loads((GPU / "seams.json").read_text())
    assert found["gpu"]
    assert set(found["seams"]) == {
        *(f"{backend}, {role}" for backend in run.BACKENDS for role in run.ROLES),
        "the verified chain",
        "a draft extension's layout",
    }
    for name, sides in found["seams"].items():
        assert sides["different"] == [], name
        assert not sides.get("failed"), name
        engine, mine = sides["engine"], sides["onelaunch"]
        assert sum("onelaunch" in kernel for kernel in mine["names"]) == 1, name
        assert 2 * mine["launches"] <= engine["launches"], name  # both sides copy hidden states
        assert 2 * mine["eager_device_us"] <= engine["eager_device_us"], name
        plan = name.startswith("flashinfer")  # the engine's, on the host, which can't be captured and stays
        assert ("graph_device_us" in mine) is not plan
        for time in ("eager_host_us",) if plan else ("eager_host_us", "graph_device_us"):
            assert (1 if plan else 2) * mine[time]["median"] <= engine[time]["median"], (name, time)
    lines = run.seam_table(found).splitlines()
    assert len(lines) == 2 + 2 * len(found["seams"])


def test_vllms_draft_step_alone_is_the_same_by_one_launch_in_less_time() -> None:
    found = json.loads((GPU / "vllm_seam.json").read_text())
    assert found["gpu"]
    assert found["vllm"] == "0.33.0"
    for sides, launches in zip(found["seams"].values(), (8, 7), strict=True):
        assert sides["different"] == sides["control"] == []
        assert set(sides["before ours ran"]) == set(sides["written"]) < set(sides["compared"])
        engine, mine = sides["engine"], sides["onelaunch"]
        assert any("paged_mqa_logits_metadata" in kernel for kernel in engine["names"])
        assert (engine["launches"], mine["launches"]) == (launches, 1)
        assert 3 * mine["eager_device_us"] <= engine["eager_device_us"]
        for time in ("eager_host_us", "graph_device_us"):
            assert 3 * mine[time]["median"] <= engine[time]["median"], time


@pytest.mark.parametrize("name", ["seams", "vllm_seam"])
def test_the_guide_has_each_seams_row(name: str) -> None:
    rows = _module("engines_gpu_measure", GPU / "measure.py").guide_rows(
        json.loads((GPU / f"{name}.json").read_text())["seams"]
    )
    guide = (GPU.parents[2] / "GUIDE.md").read_text().splitlines()
    for row in rows.splitlines():
        assert row in guide, "measure.guide_rows makes the rows to copy"


_TIMED = """
import sys, time
from pathlib import Path
sys.path.append(sys.argv[1])
from turn import wait_for_turn
folder = Path(sys.argv[2])
wait_for_turn(folder)
start = time.monotonic()
time.sleep(0.2)
(folder / "found.json").write_text(f"[{start}, {time.monotonic()}]")
"""


def test_engines_are_timed_in_turns(run: Any, tmp_path: Path) -> None:
    engines = []
    for name in "abc":
        (tmp_path / name).mkdir()
        command = [sys.executable, "-c", _TIMED, str(GPU), str(tmp_path / name)]
        engines.append(run.Engine(tmp_path / name, command, dict(os.environ), 60))
    command = [sys.executable, "-c", "import sys; sys.exit('CUDA said no')"]
    (tmp_path / "failing").mkdir()
    engines.insert(1, run.Engine(tmp_path / "failing", command, dict(os.environ), 60))
    for engine in engines:
        engine.up()
    found = [engine.ended("found.json") for engine in run.in_turns(engines)]
    assert (found[1]["error"], found[1]["log"]) == (1, "CUDA said no\n")
    spans = [each["found"] for each in (found[0], *found[2:])]
    for (_, end), (start, _) in itertools.pairwise(spans):
        assert end <= start


def _trace(*events: tuple[str, str, float, float, int]) -> list[dict[str, Any]]:
    return [
        {"cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": {"correlation": correlation}}
        for cat, name, ts, dur, correlation in events
    ]


def test_launches_are_counted_by_name_in_the_seam_that_they_belong_to() -> None:
    trace = _module("engine_trace", GPU / "site" / "engine_trace.py")
    events = _trace(
        ("user_annotation", "probe step", 0, 100, 0),
        ("cuda_runtime", "cudaLaunchKernel", 1, 1, 1),
        (
            "kernel",
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<long>, x>(int)",
            90,
            1,
            1,
        ),
        ("cpu_op", "aten::fill_", 0.5, 2, 0),
        ("cpu_op", "aten::inner", 0.8, 1, 0),
        ("user_annotation", "probe draft", 5, 10, 0),
        ("cuda_driver", "cuLaunchKernelEx", 6, 1, 2),
        ("kernel", "generate_draft_decode_kv_indices", 91, 1, 2),
        ("cuda_runtime", "cudaGraphLaunch", 20, 1, 3),
        ("cuda_runtime", "cudaMemcpyAsync", 30, 1, 4),
        ("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 92, 1, 4),
        ("cuda_runtime", "cudaGraphLaunch", 40, 1, 5),
        ("cuda_runtime", "cudaLaunchKernel", 45, 1, 6),  # sampling, which belongs to no seam
        ("kernel", "sample", 93, 1, 6),
        ("user_annotation", "probe extend", 50, 40, 0),
        ("user_annotation", "probe draft-extend", 60, 10, 0),
        ("cuda_runtime", "cudaLaunchKernel", 61, 1, 7),
        ("kernel", "void (anonymous namespace)::_metadata<int>(int)", 94, 1, 7),
        ("cuda_runtime", "cudaLaunchKernel", 71, 1, 8),  # after the metadata of an extension without a graph
        ("kernel", "gemm", 95, 1, 8),
    )
    assert trace.seams(events) == {
        "draft": {"aten::fill_: FillFunctor": 1, "generate_draft_decode_kv_indices": 1},
        "verify": {"Memcpy DtoD": 1},
        "draft-extend": {"_metadata": 1},
    }
    assert trace.launches(events)["draft"] == {"kernels": 1}
    with_graph = [*events, *_trace(("cuda_runtime", "cudaGraphLaunch", 80, 1, 9))]
    assert trace.seams(with_graph)["draft-extend"] == {"_metadata": 1, "gemm": 1}
    assert trace.seams([]) == {}
