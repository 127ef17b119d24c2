"""onelaunch.distribute: several local processes with separate caches, over gloo."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onelaunch
import pytest
from filelock import FileLock
from onelaunch.errors import ArgumentError

HOWS = (
    "all well",
    "two architectures",
    "leader fails",
    "another fails",
    "they differ",
    "a group of two",
    "slower than the time-out",
    "leader is interrupted",
    "no list",
    "another is killed",
    "leader is killed",
)
RANKS = 4
GONE = (
    "A rank ended, or didn't answer in time, while all were in onelaunch.distribute(). Look at what the rank that "
    "ended first said, and start the job again."
)

RANK = """
import datetime, json, os, signal, sys, threading, time
import onelaunch
import torch.distributed as dist
from onelaunch import KernelConfig
from onelaunch.build import compile as compiler
from onelaunch.load import loader, pack
from onelaunch.cache.store import Store
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(os.environ["FOLDER"])
(folder / f"process-{rank}").write_text(str(os.getpid()))
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=4)
rendering, build = sys.modules["onelaunch.emit.render"], compiler.build
render, unpack = onelaunch.render, pack.from_bytes
builds = []
TWO = ("all well", "two architectures", "they differ")
groups = {
    "a group of two": dist.new_group([0, 1]),
    "slower than the time-out": dist.new_group(timeout=datetime.timedelta(seconds=5)),
    "leader is killed": dist.new_group([0, 1, 2]),
}
join = threading.Thread.join
def interrupted(thread, seconds=None):
    raise KeyboardInterrupt
def die():
    os.kill(os.getpid(), signal.SIGKILL)
def wait_and(signal_number):
    while not (folder / "building").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal_number)
if "PATIENCE" in os.environ:
    import onelaunch.load.distribute
    sys.modules["onelaunch.load.distribute"]._PATIENCE_SECONDS = float(os.environ["PATIENCE"])
def lives(rank):
    return " Z " not in Path("/proc", (folder / f"process-{rank}").read_text(), "stat").read_text()
def counted(recipe, *args, **kwargs):
    builds.append(recipe.module)
    if how in ("another is killed", "another stops"):
        (folder / "building").touch()
        while lives(3):
            time.sleep(0.01)
    if how == "leader is killed":
        die()
    if how == "slower than the time-out" and len(builds) == 1:
        time.sleep(7)
    return build(recipe, *args, **kwargs)
def broken(*args):
    raise ValueError("no room for it")
compiler.build = counted
for how in json.loads(os.environ["HOWS"]):
    count = 2 if how in TWO else 1
    configs = [KernelConfig(fields=("cache_seqlens",), target="cpu", num_backends=n + 1) for n in range(count)]
    fails = how == "leader fails" and rank == 0
    rendering.render = (lambda config: render(config) + "#error not today\\n") if fails else render
    pack.from_bytes = broken if how == "another fails" and rank == 1 else unpack
    if how == "they differ" and rank == 2:
        configs = configs[:1]
    archs = ("100a",) if how == "two architectures" and rank == 2 else ("90a",)
    store = Store(folder / how / f"cache-{rank}")
    if how == "slower than the time-out":
        dist.barrier()  # the case before takes two of the ranks a build
    builds.clear()
    threading.Thread.join = interrupted if how == "leader is interrupted" and rank == 0 else join
    if how == "no list" and rank == 1:
        configs = None
    if how in ("another is killed", "another stops") and rank == 3:
        number = signal.SIGKILL if how == "another is killed" else signal.SIGSTOP
        threading.Thread(target=wait_and, args=(number,)).start()
    try:
        kernels = onelaunch.distribute(configs, groups.get(how), archs=archs, store=store)
        said = {
            "keys": [kernel.key for kernel in kernels],
            "paths": [str(kernel.path) for kernel in kernels],
            "works": all(hasattr(kernel.module, "bind") for kernel in kernels),
            "builds": len(builds),
        }
    except (onelaunch.OnelaunchError, KeyboardInterrupt) as error:
        said = {"error": [type(error).__name__, str(error)]}
    threading.Thread.join = join
    print(json.dumps({how: said}), flush=True)
os._exit(0)  # a group can't be destroyed in order where a rank is dead
"""


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    (shared / "ranks").mkdir(exist_ok=True)
    return shared / "ranks"


def start(folder: Path, hows: Sequence[str], **environment: str) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={**os.environ, "RANK": str(rank), "FOLDER": str(folder), "HOWS": json.dumps(hows), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By case, what each rank said, until it was killed. None of them hangs. Made once for all workers."""
    saved = folder / "said.json"
    with FileLock(f"{saved}.lock"):
        if not saved.exists():
            saved.write_text(json.dumps(ran(folder)), encoding="utf-8")
    made: dict[str, list[dict[str, Any]]] = json.loads(saved.read_text(encoding="utf-8"))
    return made


def ran(folder: Path) -> dict[str, list[dict[str, Any]]]:
    started = start(folder, HOWS)
    results = []
    try:
        for rank, process in enumerate(started):
            out, err = process.communicate(timeout=900)
            assert process.returncode == (-signal.SIGKILL if rank in (0, 3) else 0), err
            results.append({how: result for line in out.splitlines() for how, result in json.loads(line).items()})
    finally:
        for process in started:
            process.kill()
    return {how: [result[how] for result in results if how in result] for how in HOWS}


@pytest.mark.parametrize(
    ("how", "builds"),
    [("all well", [2, 0, 0, 0]), ("two architectures", [2, 0, 2, 0]), ("slower than the time-out", [1, 0, 0, 0])],
)
def test_one_rank_builds_and_all_have_it(
    said: dict[str, list[dict[str, Any]]], folder: Path, how: str, builds: list[int]
) -> None:
    assert [result["builds"] for result in said[how]] == builds
    assert len({tuple(result["keys"]) for result in said[how]}) == 1
    for rank, result in enumerate(said[how]):
        assert result["works"]
        assert all(Path(path).is_relative_to(folder / how / f"cache-{rank}") for path in result["paths"])


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("leader fails", "CompileError", "Rank 0: The kernel"),
        ("another fails", "StoreError", "Rank 1 failed in onelaunch.distribute(): ValueError: no room for it"),
        ("they differ", "StoreError", "Rank 2 calls distribute() with other configurations than rank 0"),
        ("no list", "StoreError", "Rank 1 failed in onelaunch.distribute(): TypeError: 'NoneType' object"),
    ],
)
def test_a_rank_that_fails_makes_all_raise(
    said: dict[str, list[dict[str, Any]]], how: str, kind: str, text: str
) -> None:
    errors = {tuple(result["error"]) for result in said[how]}
    assert len(errors) == 1
    ((found, message),) = errors
    assert found == kind
    assert message.startswith(text)


def test_a_rank_outside_of_the_group_gets_a_sentence(said: dict[str, list[dict[str, Any]]]) -> None:
    one, two, *outside = said["a group of two"]
    assert one["keys"] == two["keys"]
    for rank, result in enumerate(outside, 2):
        text = f"Rank {rank} isn't in the group given to distribute(): call it on the group's ranks only."
        assert result["error"] == ["ArgumentError", text]


def test_an_interrupt_is_passed_on(said: dict[str, list[dict[str, Any]]]) -> None:
    first, *others = (result["error"] for result in said["leader is interrupted"])
    assert first == ["KeyboardInterrupt", ""]
    assert others == [["StoreError", "Rank 0 failed in onelaunch.distribute(): KeyboardInterrupt"]] * 3


@pytest.mark.parametrize(("how", "survivors"), [("another is killed", 3), ("leader is killed", 2)])
def test_a_rank_that_is_killed_makes_all_others_raise(
    said: dict[str, list[dict[str, Any]]], how: str, survivors: int
) -> None:
    """At once, not after a group's time-out of half an hour: the fixture waits less for everything together."""
    results = said[how][:survivors]
    assert [result["error"] for result in results] == [["StoreError", GONE]] * survivors


@pytest.mark.long
def test_a_rank_that_stops_makes_all_others_raise(tmp_path: Path) -> None:
    """As on a host that hangs: its connections stay open, and the others wait no longer than a minute."""
    started = start(tmp_path, ["another stops"], PATIENCE="15")
    try:
        for process in started[:3]:
            out, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
            assert json.loads(out) == {"another stops": {"error": ["StoreError", GONE]}}
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_without_torch_distributed() -> None:
    with pytest.raises(ArgumentError, match="isn't initialized: call init_process_group before distribute"):
        onelaunch.distribute([])


def test_without_numpy(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['numpy'] = None; import onelaunch, torch.distributed as dist;"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=0, world_size=1);"
        "onelaunch.distribute([onelaunch.KernelConfig(target='cpu')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ToolchainError: onelaunch.distribute needs numpy" in done.stderr.splitlines()[-1]
