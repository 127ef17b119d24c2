"""onelaunch.distribute: several local processes with separate caches, in groups of gloo, and of NCCL with two GPUs."""

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
    "a group of half",
    "slower than the time-out",
    "leader is interrupted",
    "no list",
    "another is killed",
    "leader is killed",
)
# Ranks by backend: NCCL wants a GPU for each.
RANKS = {"gloo": 4, "nccl": 2}
GONE = (
    "A rank ended, or didn't answer in time, while all were in onelaunch.distribute(). Look at what the rank that "
    "ended first said, and start the job again."
)

# What any rank does in each case. With two ranks, the one that differs is the last one.
RANK = """
import datetime, json, os, signal, sys, threading, time
import onelaunch
import torch
import torch.distributed as dist
from onelaunch import KernelConfig
from onelaunch.build import compile as compiler
from onelaunch.load import loader, pack
from onelaunch.cache.store import Store
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(os.environ["FOLDER"])
backend, size = os.environ["BACKEND"], int(os.environ["SIZE"])
last, other = size - 1, size // 2
(folder / f"process-{rank}").write_text(str(os.getpid()))
if backend == "nccl":
    torch.cuda.set_device(rank)
dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=size)
rendering, build = sys.modules["onelaunch.emit.render"], compiler.build
render, unpack = onelaunch.render, pack.from_bytes
builds = []
TWO = ("all well", "two architectures", "they differ")
groups = {
    "a group of half": dist.new_group(list(range(other))),
    "slower than the time-out": dist.new_group(timeout=datetime.timedelta(seconds=5)),
    "leader is killed": dist.new_group(list(range(max(2, last)))),  # without the rank that is dead by then
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
        while lives(last):
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
    target = "cuda" if backend == "nccl" and how == "all well" else "cpu"
    configs = [KernelConfig(fields=("cache_seqlens",), target=target, num_backends=n + 1) for n in range(count)]
    fails = how == "leader fails" and rank == 0
    rendering.render = (lambda config: render(config) + "#error not today\\n") if fails else render
    pack.from_bytes = broken if how == "another fails" and rank == 1 else unpack
    if how == "they differ" and rank == other:
        configs = configs[:1]
    archs = ("100a",) if how == "two architectures" and rank == other else ("90a",)
    if how == "all well":
        archs = None if backend == "nccl" else ("90a",)
    store = Store(folder / how / f"cache-{rank}")
    if how == "slower than the time-out":
        dist.barrier()  # the case before takes two of the ranks a build
    builds.clear()
    threading.Thread.join = interrupted if how == "leader is interrupted" and rank == 0 else join
    if how == "no list" and rank == 1:
        configs = None
    if how in ("another is killed", "another stops") and rank == last:
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


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, pytest.mark.two_devices])])
def backend(request: pytest.FixtureRequest) -> str:
    """Of the group that distribute() is given."""
    return str(request.param)


@pytest.fixture(scope="module")
def folder(shared: Path, backend: str) -> Path:
    (shared / f"ranks-{backend}").mkdir(exist_ok=True)
    return shared / f"ranks-{backend}"


def start(folder: Path, backend: str, hows: Sequence[str], **environment: str) -> list[subprocess.Popen[str]]:
    facts = {"FOLDER": str(folder), "HOWS": json.dumps(hows), "BACKEND": backend, "SIZE": str(RANKS[backend])}
    return [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={**os.environ, **facts, "RANK": str(rank), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS[backend])
    ]


Said = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def said(folder: Path, backend: str) -> Said:
    """By case, what each rank said, until it was killed. None of them hangs. Made once for all workers."""
    saved = folder / "said.json"
    with FileLock(f"{saved}.lock"):
        if not saved.exists():
            results = ran(folder, backend, HOWS if RANKS[backend] > 2 else HOWS[:-1])
            if RANKS[backend] == 2:  # of which one is dead by now
                again = folder / "again"
                again.mkdir()
                results |= ran(again, backend, HOWS[-1:])
            saved.write_text(json.dumps(results), encoding="utf-8")
    made: Said = json.loads(saved.read_text(encoding="utf-8"))
    return made


def ran(folder: Path, backend: str, hows: Sequence[str]) -> Said:
    started = start(folder, backend, hows)
    killed = {"another is killed": RANKS[backend] - 1, "leader is killed": 0}
    results = []
    try:
        for rank, process in enumerate(started):
            out, err = process.communicate(timeout=900)
            dies = rank in [killed[how] for how in hows if how in killed]
            assert process.returncode == (-signal.SIGKILL if dies else 0), err
            results.append({how: result for line in out.splitlines() for how, result in json.loads(line).items()})
    finally:
        for process in started:
            process.kill()
    return {how: [result[how] for result in results if how in result] for how in hows}


@pytest.mark.parametrize(
    ("how", "builds"),
    [("all well", [2, 0, 0, 0]), ("two architectures", [2, 0, 2, 0]), ("slower than the time-out", [1, 0, 0, 0])],
)
def test_one_rank_builds_and_all_have_it(said: Said, folder: Path, backend: str, how: str, builds: list[int]) -> None:
    if RANKS[backend] == 2:  # the first rank, and the first one that differs
        builds = builds[::2]
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
        ("they differ", "StoreError", "Rank {other} calls distribute() with other configurations than rank 0"),
        ("no list", "StoreError", "Rank 1 failed in onelaunch.distribute(): TypeError: 'NoneType' object"),
    ],
)
def test_a_rank_that_fails_makes_all_raise(said: Said, backend: str, how: str, kind: str, text: str) -> None:
    errors = {tuple(result["error"]) for result in said[how]}
    assert len(errors) == 1
    ((found, message),) = errors
    assert found == kind
    assert message.startswith(text.format(other=RANKS[backend] // 2))


def test_a_rank_outside_of_the_group_gets_a_sentence(said: Said, backend: str) -> None:
    inside, outside = said["a group of half"][: RANKS[backend] // 2], said["a group of half"][RANKS[backend] // 2 :]
    assert len({tuple(result["keys"]) for result in inside}) == 1
    for rank, result in enumerate(outside, len(inside)):
        text = f"Rank {rank} isn't in the group given to distribute(): call it on the group's ranks only."
        assert result["error"] == ["ArgumentError", text]


def test_an_interrupt_is_passed_on(said: Said, backend: str) -> None:
    first, *others = (result["error"] for result in said["leader is interrupted"])
    assert first == ["KeyboardInterrupt", ""]
    passed_on = ["StoreError", "Rank 0 failed in onelaunch.distribute(): KeyboardInterrupt"]
    assert others == [passed_on] * (RANKS[backend] - 1)


@pytest.mark.parametrize("how", ["another is killed", "leader is killed"])
def test_a_rank_that_is_killed_makes_all_others_raise(said: Said, backend: str, how: str) -> None:
    """At once, not after a group's time-out of half an hour: the fixture waits less for everything together."""
    dead = 1 if how == "another is killed" or RANKS[backend] == 2 else 2
    assert [result["error"] for result in said[how]] == [["StoreError", GONE]] * (RANKS[backend] - dead)


@pytest.mark.long
def test_a_rank_that_stops_makes_all_others_raise(tmp_path: Path) -> None:
    """As on a host that hangs: its connections stay open, and the others wait no longer than a minute."""
    started = start(tmp_path, "gloo", ["another stops"], PATIENCE="15")
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
