"""Faults around a GPU: other devices and processes, freed memory, threads, failed captures, other people's errors."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onelaunch
import pytest
import torch
from cases import batch
from checker import Scene
from onelaunch import PRESETS, ArgumentError, MetadataBuffers
from onelaunch.run.bound import LOST
from support import POISON, captured, poison

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
CONFIG = PRESETS["nsa-decode-3"]
SHAPE = batch(33, 517)


def start(code: str, *arguments: object, **environment: str) -> subprocess.Popen[str]:
    """A child process that can import the tests' modules."""
    path = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(children: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """The exit status, stdout and stderr of each process."""
    try:
        return [
            (child.wait(), *said) for child, said in [(child, child.communicate(timeout=300)) for child in children]
        ]
    finally:
        for child in children:
            child.kill()


def said_by(children: Sequence[subprocess.Popen[str]]) -> list[Any]:
    """The last line of each process's stdout, decoded from JSON."""
    results = ended(children)
    assert [status for status, _, _ in results] == [0] * len(results), results
    return [json.loads(out.splitlines()[-1]) for _, out, _ in results]


# Runs and compares 20 times on a device, and reports whether it built the kernel.
COMPARES = """
import json, sys
import torch
from cases import batch
from checker import check
from onelaunch import PRESETS
device = torch.device("cuda", int(sys.argv[1]))
plans = [check(PRESETS["nsa-decode-3"], batch(33, 517, seed=seed), device) for seed in range(20)]
print(json.dumps(plans[0].kernel.built))
"""


# ------------------------------------------------------------------------------------------------ devices


@pytest.mark.parametrize(
    "devices",
    [pytest.param((0, 0), id="one device"), pytest.param((0, 1), id="two devices", marks=pytest.mark.two_devices)],
)
def test_two_processes_build_and_run_at_the_same_time(devices: tuple[int, int], tmp_path: Path) -> None:
    """They share an empty cache, so one of them builds. The second device isn't its process's current one."""
    cache = str(tmp_path / "cache")
    built = said_by([start(COMPARES, device, ONELAUNCH_CACHE_DIR=cache) for device in devices])
    assert sorted(built) == [False, True]


@pytest.mark.two_devices
def test_graphs_and_threads_of_two_devices() -> None:
    """In one process: graphs captured on each device, and calls by two threads while the other device is current."""
    scenes = [Scene(CONFIG, SHAPE, torch.device("cuda", index)) for index in (0, 1)]
    plans: list[Any] = [scene.bind() for scene in scenes]
    graphs = []
    for index, (scene, plan) in enumerate(zip(scenes, plans, strict=True)):
        with torch.cuda.device(index):
            scene.run(plan)
            torch.cuda.synchronize()
            graphs.append(torch.cuda.CUDAGraph())
            # torch's default capture stream belongs to the first device that captured anything.
            with torch.cuda.graph(graphs[-1], stream=torch.cuda.Stream()):
                scene.run(plan)
    for turn in range(4):
        for scene in scenes:
            poison(scene.backends)
        for index in (0, 1):
            with torch.cuda.device(index ^ turn % 2):  # on odd turns, replay while the other device is current
                graphs[index].replay()
        for index, scene in enumerate(scenes):
            torch.cuda.synchronize(index)
            scene.compare()

    def call(index: int) -> None:
        torch.cuda.set_device(index ^ 1)  # the current device is per thread
        for _ in range(300):
            scenes[index].run(plans[index])
        failures[index] = torch.cuda.current_device() != index ^ 1

    for scene in scenes:
        poison(scene.backends)
    failures = [True, True]
    threads = [threading.Thread(target=call, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [False, False]
    for index, scene in enumerate(scenes):
        torch.cuda.synchronize(index)
        scene.compare()
    with pytest.raises(ArgumentError, match="seq_lens is on cuda:1"):
        plans[0].run(scenes[1].seq_lens, scenes[0].req_pool_indices)


# ------------------------------------------------------------------------------------------------ freed memory


def tables() -> tuple[MetadataBuffers, torch.Tensor]:
    """A destination of 4 MB, which the allocator keeps apart from small ones, and a pool."""
    pool = torch.arange(8 * 131_072, dtype=torch.int32, device=DEVICE).view(8, 131_072)
    return MetadataBuffers(page_indices=torch.empty((8, 131_072), dtype=torch.int32, device=DEVICE)), pool


def filled(count: int) -> list[torch.Tensor]:
    """Somebody else's tensors, as large as the destination."""
    return [torch.full((8, 131_072), POISON, dtype=torch.int32, device=DEVICE) for _ in range(count)]


def test_a_plan_keeps_the_memory_of_a_destination_that_was_freed() -> None:
    """Otherwise the allocator would give the memory to another stream, and the plan would write there."""
    destination, pool = tables()
    plan = onelaunch.bind([destination], req_to_token=pool)
    (region,) = plan.regions
    lengths, rows = torch.full((8,), 131_072, device=DEVICE), torch.arange(8, device=DEVICE)
    del destination, pool
    gc.collect()

    def overlapping(tensors: Sequence[torch.Tensor]) -> int:
        return sum(t.data_ptr() < region.end and region.start < t.data_ptr() + t.nbytes for t in tensors)

    here = filled(16)
    with torch.cuda.stream(torch.cuda.Stream()):
        there = filled(16)
    assert overlapping(here + there) == 0
    torch.cuda.synchronize()
    plan.run(lengths, rows)
    torch.cuda.synchronize()
    assert all(bool((tensor == POISON).all()) for tensor in here + there)
    del plan
    gc.collect()
    assert overlapping(filled(8)) == 1, "the memory must be free once the plan is gone"


def test_a_plan_that_goes_before_its_launch_ran() -> None:
    """The launch is on another stream than the memory's. The caller must use record_stream, as for any operation."""
    destination, pool = tables()
    plan = onelaunch.bind([destination], req_to_token=pool)
    lengths, rows = torch.full((8,), 131_072, device=DEVICE), torch.arange(8, device=DEVICE)
    plan.run(lengths, rows)
    filled(8)  # so that the allocator has free blocks later; cudaMalloc could wait for kernels
    gc.collect()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(6_000_000_000)  # three seconds, because other tests may use the device, too
        plan.run(lengths, rows)
    for tensor in (destination.page_indices, pool, lengths, rows):
        assert tensor is not None
        tensor.record_stream(stream)
    del plan, destination, pool, lengths, rows, tensor
    others = filled(8)
    torch.cuda.current_stream().synchronize()
    assert not stream.query(), "the launch ran before the memory could be given away"
    torch.cuda.synchronize()
    assert all(bool((tensor == POISON).all()) for tensor in others)


def test_lists_whose_memory_comes_again() -> None:
    """The functions remember plans by address. A new tensor at a known address has another stream and shape."""
    pool = torch.arange(8 * 70_000, dtype=torch.int32, device=DEVICE).view(8, 70_000)
    lengths, rows = torch.tensor([7, 70_000, 0, 3], device=DEVICE), torch.tensor([2, 7, 1, 0], device=DEVICE)
    seen, again = set(), 0
    for turn in range(24):
        width = (65_536, 70_000, 32_768)[turn % 3]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            table = torch.full((4, width), POISON, dtype=torch.int32, device=DEVICE)
            lists: dict[str, list[torch.Tensor]] = {
                "cache_seqlens": [torch.empty(4, dtype=torch.int32, device=DEVICE)],
                "cu_seqlens_k": [torch.empty(5, dtype=torch.int32, device=DEVICE)],
                "page_indices": [table],
                "nsa_cache_seqlens": [torch.empty(4, dtype=torch.int32, device=DEVICE)],
                "nsa_cu_seqlens_k": [torch.empty(5, dtype=torch.int32, device=DEVICE)],
                "real_page_table": [torch.empty((4, -(-width // 64)), dtype=torch.int32, device=DEVICE)],
            }
            onelaunch.fused_metadata_precompute_and_broadcast_cuda(
                lengths,
                rows,
                pool,
                *(lists[name] for name in CONFIG.fields),
                max_len=width,
                nsa_index_topk=2048,
                real_page_size=64,
            )
        stream.synchronize()
        assert torch.equal(table, pool[rows, :width]), turn  # every column below max_len
        again += table.data_ptr() in seen
        seen.add(table.data_ptr())
        del table, lists
        torch.cuda.empty_cache()
    assert again > 8, "too few addresses came again"


# ------------------------------------------------------------------------------------------------ threads, streams


def test_a_plan_of_several_threads_and_streams() -> None:
    """A launch that mixed two threads' inputs would read beyond the shorter ones, and check() would report it."""
    scene = Scene(CONFIG.replace(checked=True), batch(64, 517).within(517), DEVICE)
    plan: Any = scene.bind()

    def inputs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        given = []
        for values, behind in ((scene.seq_lens, -5), (scene.req_pool_indices, 2**40)):
            storage = torch.full((64,), behind, dtype=torch.int64, device=DEVICE)
            storage[:count] = values[:count]
            given.append(storage[:count])
        return given[0], given[1]

    sizes, runs = (16, 32, 48, 64), 1500
    mine = [[inputs(count) for _ in range(6)] for count in sizes]  # more than the 8 that a plan remembers
    torch.cuda.synchronize()
    together = threading.Barrier(len(sizes))

    def call(of_thread: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        together.wait()
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(runs):
                plan.run(*of_thread[turn % 6], max_len=517)

    threads = [threading.Thread(target=call, args=(of_thread,)) for of_thread in mine]
    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(switching)
    plan.check()
    assert plan.launches == runs * len(sizes)
    scene.compare()


# ------------------------------------------------------------------------------------------------ captures


def test_an_argument_that_is_refused_during_a_capture() -> None:
    """The refused call captures nothing, and the capture goes on."""
    scene = Scene(CONFIG, SHAPE, DEVICE)
    plan: Any = scene.bind()

    def calls() -> None:
        with pytest.raises(ArgumentError, match="max_len is 10000"):
            plan.run(scene.seq_lens, scene.req_pool_indices, max_len=10_000)
        scene.run(plan)
        with pytest.raises(ArgumentError, match="seq_lens has dtype float32"):
            plan.run(scene.seq_lens.float(), scene.req_pool_indices)

    graph = captured(calls)
    poison(scene.backends)
    graph.replay()
    torch.cuda.synchronize()
    scene.compare()
    assert plan.launches == 1


FAILED_CAPTURE = """
import json, os
import torch
from cases import batch
from checker import Scene
from onelaunch import PRESETS, LaunchError
from support import captured, poison
scene = Scene(PRESETS["nsa-decode-3"], batch(33, 517), torch.device("cuda", 0))
plan = scene.bind()
scene.run(plan)
torch.cuda.synchronize()
said, graph = [], torch.cuda.CUDAGraph()
with torch.cuda.stream(torch.cuda.Stream()):
    graph.capture_begin()
    scene.run(plan)
    for call in (torch.cuda.synchronize, lambda: scene.run(plan), graph.capture_end):
        try:
            call()
            said.append("nothing")
        except (RuntimeError, LaunchError) as error:
            said.append(str(error))
for again in range(2):  # as an ordinary call, and in a new capture
    poison(scene.backends)
    (captured(lambda: scene.run(plan)).replay if again else lambda: scene.run(plan))()
    torch.cuda.synchronize()
    scene.compare()
print(json.dumps(said), flush=True)
os._exit(0)  # what torch's destructors say of a graph that failed is none of this
"""


def test_a_capture_that_fails_halfway() -> None:
    """A synchronization between two launches ends the capture. The second launch reports it; later captures work."""
    ((ended_it, refused, end),) = said_by([start(FAILED_CAPTURE)])
    assert "captur" in ended_it
    assert "captur" in end
    assert refused == (
        f"{CONFIG.symbol} wasn't launched on cuda:0: CUDA error 901: operation failed due to a previous error during "
        "capture. Something before this launch ended the capture: end the capture, and capture again without it."
    )


# ------------------------------------------------------------------------------------------------ others' errors

BREAKS = """
import json, os, sys
import onelaunch, torch
from onelaunch import LaunchError, MetadataBuffers
device = torch.device("cuda", 0)
pool = torch.zeros((4, 64), dtype=torch.int32, device=device)
buffers = [MetadataBuffers(cache_seqlens=torch.zeros(4, dtype=torch.int32, device=device),
                           page_indices=torch.zeros((4, 64), dtype=torch.int32, device=device))]
lengths, rows = torch.tensor([64, 3], device=device), torch.tensor([0, 1], device=device)
far = torch.tensor([2**40, 2**41], device=device)
plan = onelaunch.bind(buffers, req_to_token=pool)
checked = onelaunch.bind(buffers, req_to_token=pool, checked=True)
plan.run(lengths, rows)
checked.run(lengths, rows)
checked.check()
held = torch.zeros(4, dtype=torch.int32, device=device)

class Far:
    "As if held were much longer than it is."
    __cuda_array_interface__ = {"data": (held.data_ptr(), False), "shape": (2**40,), "typestr": "<i4", "version": 2}

how = sys.argv[1]
if how == "assert":
    print(held[torch.tensor([7], device=device)].shape)
elif how == "address":
    print((torch.as_tensor(Far(), device=device)[2**39:2**39 + 2] + 1).shape)
else:
    plan.run(lengths, far)  # out of the pool, which only a checked plan sees
try:
    torch.cuda.synchronize()
    raise SystemExit("nothing is broken")
except RuntimeError:
    pass
said = []
for call in (lambda: plan.run(lengths, rows), lambda: plan.run(rows, lengths), checked.check,
             lambda: onelaunch.bind(buffers, req_to_token=pool, max_len=32)):
    try:
        call()
        said.append("nothing")
    except LaunchError as error:
        said.append(str(error))
print(json.dumps(said), flush=True)
os._exit(0)
"""
ADDRESS = "CUDA error 700: an illegal memory access was encountered"


@pytest.mark.parametrize(
    ("how", "text"),
    [("assert", "CUDA error 710: device-side assert triggered"), ("address", ADDRESS), ("own kernel", ADDRESS)],
)
def test_an_error_of_a_kernel_before_is_told_as_such(how: str, text: str) -> None:
    """The first two errors come from torch's kernels. Such an error lasts until the process ends."""
    ((run, again, check, bind),) = said_by([start(BREAKS, how)])
    for message in (run, again):
        assert message.endswith(f"wasn't launched on cuda:0: {text}. {LOST}")
    assert f"can't be checked on cuda:0: CUDA error: {text.partition(': ')[2]}. {LOST}" in check
    assert bind.endswith(f"can't be loaded on cuda:0: {text}. {LOST}")


# ------------------------------------------------------------------------------------------------ MPS


@contextlib.contextmanager
def mps(folder: Path) -> Iterator[dict[str, str]]:
    """Starts a control daemon and yields its clients' environment variables; skips, with the reason, if none starts."""
    control = shutil.which("nvidia-cuda-mps-control")
    if control is None:
        pytest.skip("there is no nvidia-cuda-mps-control")
    variables = {"CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"), "CUDA_MPS_LOG_DIRECTORY": str(folder / "log")}
    for place in variables.values():
        Path(place).mkdir()

    def tell(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [control, *arguments],
            input=text,
            env={**os.environ, **variables},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    started = tell("-d")
    if started.returncode != 0:
        pytest.skip(f"MPS doesn't start here: {(started.stderr or started.stdout).strip()}")
    try:
        ((status, _, said),) = ended([start("import torch; torch.zeros(1, device='cuda')", **variables)])
        if status != 0:
            pytest.skip(f"MPS takes no clients here: {said.strip().splitlines()[-1]}")
        yield variables
        servers = tell(text="get_server_list\n").stdout.split()
        assert servers, "no server ran, so MPS wasn't used"
    finally:
        tell(text="quit -t 5\n")


def test_two_clients_of_mps(tmp_path: Path) -> None:
    """Both processes run their kernels at the same time in one context of the device."""
    with mps(tmp_path) as variables:
        assert len(said_by([start(COMPARES, 0, **variables) for _ in range(2)])) == 2
