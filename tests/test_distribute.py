"""onelaunch.distribute: several processes with separate caches, in gloo groups, and in NCCL groups on two GPUs."""

from __future__ import annotations

import json
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
from ranks import EVENTS, LATE_SECONDS

# Number of ranks for each backend: NCCL needs a GPU per rank.
RANKS = {"gloo": 4, "nccl": 2}
WELL = ("two architectures", "a group without the first", "slower than the time-out")
FAILING = ("leader fails", "they differ", "no list")
STOPPED = tuple(how for how, (_, _, event) in EVENTS.items() if event == "stopped")
KILLED = tuple(how for how, (_, _, event) in EVENTS.items() if event == "killed")
INTERRUPTED = tuple(how for how, (_, _, event) in EVENTS.items() if event == "interrupted")
# Far below the time-outs of a group, which are 10 or 30 minutes: an error this soon is no time-out.
SOON_SECONDS = 120

GONE = (
    "Rank {rank} ended, or didn't answer in time, while all were in onelaunch.distribute(). Look at the last "
    "output there, and start the job again."
)
NEVER_CAME = (
    f"Rank {{rank}} didn't call onelaunch.distribute() within {LATE_SECONDS} s of the others, the time-out given to "
    "init_process_group. Look at the last output there."
)
NO_STORE = (
    "The store of torch.distributed doesn't answer: what holds it, rank 0 or torchrun, ended or stopped during "
    "onelaunch.distribute(). Look at the last output there, and start the job again."
)

Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=["gloo", pytest.param("nccl", marks=[pytest.mark.gpu, pytest.mark.two_devices])])
def backend(request: pytest.FixtureRequest) -> str:
    """The backend of the group given to distribute()."""
    return str(request.param)


@pytest.fixture(scope="module")
def folder(shared: Path, backend: str) -> Path:
    (shared / f"ranks-{backend}").mkdir(exist_ok=True)
    return shared / f"ranks-{backend}"


@pytest.fixture(scope="module")
def results(folder: Path, backend: str) -> Results:
    """For each case, what each rank reported and how it ended. The first pytest worker runs them for all."""
    saved = folder / "results.json"
    with FileLock(f"{saved}.lock"):
        if not saved.exists():
            made = run(folder, backend, ["all well"]) | run(folder, backend, [*WELL, *FAILING])
            made |= run(folder, backend, [how for how in EVENTS if how not in STOPPED])
            saved.write_text(json.dumps(made), encoding="utf-8")
    read: Results = json.loads(saved.read_text(encoding="utf-8"))
    return read


def run(folder: Path, backend: str, hows: Sequence[str]) -> Results:
    script = Path(__file__).with_name("ranks.py")
    command = [sys.executable, str(script), str(folder), backend, str(RANKS[backend]), json.dumps(hows)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    results: Results = json.loads(done.stdout.splitlines()[-1])
    for how, ranks in results.items():
        _, which, event = EVENTS.get(how, ("", "", ""))
        ends = {0 if which == "first" else len(ranks) - 1} if event in ("killed", "stopped") else {}
        for rank, result in enumerate(ranks):
            assert result["signal"] == (signal.SIGKILL if rank in ends else 0)
            assert (result["said"] is None) == (rank in ends), done.stderr
    return results


def errors(results: Results, how: str) -> list[list[str]]:
    """The errors of the ranks that are still alive."""
    return [result["said"]["error"] for result in results[how] if result["said"] is not None]


@pytest.mark.parametrize(
    ("how", "builds"),
    [("all well", [2, 0, 0, 0]), ("two architectures", [1, 0, 1, 0]), ("slower than the time-out", [1, 0, 0, 0])],
)
def test_one_rank_builds_and_all_have_it(
    results: Results, folder: Path, backend: str, how: str, builds: list[int]
) -> None:
    if RANKS[backend] == 2:  # the first rank, and the first one that differs
        builds = builds[::2]
    said = [result["said"] for result in results[how]]
    assert [result["builds"] for result in said] == builds
    assert len({tuple(result["keys"]) for result in said}) == 1
    for rank, result in enumerate(said):
        assert result["works"]
        assert all(
            Path(path).is_relative_to(folder / how.replace(" ", "-") / f"cache-{rank}") for path in result["paths"]
        )


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("leader fails", "CompileError", "Rank 0: The kernel"),
        ("fails as it takes", "StoreError", "Rank {last} failed in onelaunch.distribute(): ValueError: no room for it"),
        ("they differ", "StoreError", "Rank {other} calls distribute() with other configurations than rank 0"),
        ("no list", "StoreError", "Rank 1 failed in onelaunch.distribute(): TypeError: no list"),
    ],
)
def test_a_rank_that_fails_makes_all_raise(results: Results, backend: str, how: str, kind: str, text: str) -> None:
    ranks = RANKS[backend]
    found = errors(results, how)
    assert found == [found[0]] * ranks
    assert found[0][0] == kind
    assert found[0][1].startswith(text.format(other=ranks // 2, last=ranks - 1))


def test_a_rank_outside_of_the_group_gets_a_sentence(results: Results) -> None:
    outside, *inside = (result["said"] for result in results["a group without the first"])
    text = "Rank 0 isn't in the group given to distribute(): call it on the group's ranks only."
    assert outside["error"] == ["ArgumentError", text]
    assert [result["builds"] for result in inside] == [1] + [0] * (len(inside) - 1)


@pytest.mark.parametrize("how", INTERRUPTED)
def test_an_interrupt_is_passed_on(results: Results, how: str) -> None:
    found = errors(results, how)
    rank = 0 if EVENTS[how][1] == "first" else len(found) - 1
    assert found.pop(rank) == ["KeyboardInterrupt", ""]
    passed_on = f"Rank {rank} failed in onelaunch.distribute(): KeyboardInterrupt"
    assert found == [["StoreError", passed_on]] * len(found)
    assert max(result["seconds"] for result in results[how]) < SOON_SECONDS


@pytest.mark.parametrize("how", KILLED)
def test_a_rank_that_is_killed_makes_all_others_raise(results: Results, backend: str, how: str) -> None:
    """The others name it, unless it held the store, without which they can't tell who is missing."""
    sentence = {"killed before it": NEVER_CAME, "the store's process killed": NO_STORE}.get(how, GONE)
    last = RANKS[backend] - 1
    text = sentence.format(rank=0 if EVENTS[how][1] == "first" else last)
    assert errors(results, how) == [["StoreError", text]] * last
    assert max(result["seconds"] for result in results[how]) < SOON_SECONDS


def test_a_rank_that_comes_after_the_time_out_raises_what_the_others_did(results: Results, backend: str) -> None:
    ranks = RANKS[backend]
    assert errors(results, "late") == [["StoreError", NEVER_CAME.format(rank=ranks - 1)]] * ranks


@pytest.mark.long
@pytest.mark.parametrize("how", STOPPED)
def test_a_rank_that_stops_makes_all_others_raise(tmp_path: Path, how: str) -> None:
    """As on a host that hangs: its connections stay open, and the others wait at most a minute for each rank."""
    found = errors(run(tmp_path, "gloo", [how]), how)
    assert found == [["StoreError", GONE.format(rank=3) if how == "stopped" else NO_STORE]] * 3


def test_without_torch_distributed() -> None:
    with pytest.raises(ArgumentError, match="isn't initialized: call init_process_group before distribute"):
        onelaunch.distribute([])


def test_without_numpy(tmp_path: Path) -> None:
    """torch's own object collectives need numpy; distribute() doesn't."""
    code = (
        "import sys; sys.modules['numpy'] = None; import onelaunch, torch.distributed as dist;"
        f"dist.init_process_group('gloo', init_method='file://{tmp_path}/meet', rank=0, world_size=1);"
        "print(len(onelaunch.distribute([onelaunch.KernelConfig(target='cpu')])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "1\n", done.stderr
