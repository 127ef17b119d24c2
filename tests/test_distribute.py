"""onelaunch.distribute: several local processes with caches of their own, over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RANK = """
import json, os, sys
import onelaunch
import torch.distributed as dist
from onelaunch import KernelConfig, loader
from pathlib import Path
rank, folder, how = int(os.environ["RANK"]), Path(os.environ["FOLDER"]), os.environ["HOW"]
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
configs = [KernelConfig(fields=("cache_seqlens",), target="cpu", num_backends=n) for n in (1, 2)]
if how == "leader fails" and rank == 0:
    rendering = sys.modules["onelaunch.render"]
    render = rendering.render
    rendering.render = lambda config: render(config) + "#error not today\\n"
if how == "another fails" and rank == 1:
    from onelaunch import pack
    def broken(*args):
        raise ValueError("no room for it")
    pack.from_bytes = broken
if how == "they differ" and rank == 2:
    configs = configs[:1]
if how == "two groups":
    os.environ["ONELAUNCH_CUDA_ARCH"] = "90a" if rank < 2 else "100a"
said = {"rank": rank}
try:
    kernels = onelaunch.distribute(configs)
    said["keys"] = [kernel.key for kernel in kernels]
    said["paths"] = [str(kernel.path) for kernel in kernels]
    said["works"] = all(hasattr(kernel.module, "bind") for kernel in kernels)
except onelaunch.OnelaunchError as error:
    said["error"] = [type(error).__name__, str(error)]
print(json.dumps(said))
dist.destroy_process_group()
"""


def run(folder: Path, how: str) -> list[tuple[dict[str, Any], int]]:
    """What each rank said, and how many builds it made."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={
                **os.environ,
                "RANK": str(rank),
                "FOLDER": str(folder),
                "HOW": how,
                "ONELAUNCH_CACHE_DIR": str(folder / f"cache-{rank}"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    results = []
    try:
        for process in started:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            results.append((json.loads(out.splitlines()[-1]), err.count("onelaunch: building")))
    finally:
        for process in started:
            process.kill()
    return results


@pytest.mark.parametrize(("how", "builds"), [("all well", [2, 0, 0]), ("two groups", [2, 0, 2])])
def test_one_rank_builds_and_all_have_it(tmp_path: Path, how: str, builds: list[int]) -> None:
    results = run(tmp_path, how)
    assert [count for _, count in results] == builds
    assert len({tuple(said["keys"]) for said, _ in results}) == 1
    for rank, (said, _) in enumerate(results):
        assert said["works"]
        assert all(Path(path).is_relative_to(tmp_path / f"cache-{rank}") for path in said["paths"])


@pytest.mark.parametrize(
    ("how", "kind", "text"),
    [
        ("leader fails", "CompileError", "Rank 0: The kernel"),
        ("another fails", "StoreError", "Rank 1 failed in onelaunch.distribute(): ValueError: no room for it"),
        ("they differ", "StoreError", "Rank 2 asks distribute() for other configurations than rank 0"),
    ],
)
def test_a_rank_that_fails_makes_all_raise(tmp_path: Path, how: str, kind: str, text: str) -> None:
    results = run(tmp_path, how)
    errors = {tuple(said["error"]) for said, _ in results}
    assert len(errors) == 1
    ((found, message),) = errors
    assert found == kind
    assert message.startswith(text)
