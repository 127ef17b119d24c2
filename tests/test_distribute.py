"""onelaunch.distribute: several local processes with caches of their own, over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HOWS = ("all well", "two groups", "leader fails", "another fails", "they differ")

RANK = """
import json, os, sys
import onelaunch
import torch.distributed as dist
from onelaunch import KernelConfig
from onelaunch.build import compile as compiler
from onelaunch.load import loader, pack
from onelaunch.cache.store import Store
from pathlib import Path
rank, folder = int(os.environ["RANK"]), Path(os.environ["FOLDER"])
dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
rendering, build = sys.modules["onelaunch.emit.render"], compiler.build
render, unpack = onelaunch.render, pack.from_bytes
builds = []
def counted(recipe, *args, **kwargs):
    builds.append(recipe.module)
    return build(recipe, *args, **kwargs)
def broken(*args):
    raise ValueError("no room for it")
compiler.build = counted
said = {}
for how in json.loads(os.environ["HOWS"]):
    configs = [KernelConfig(fields=("cache_seqlens",), target="cpu", num_backends=n) for n in (1, 2)]
    fails = how == "leader fails" and rank == 0
    rendering.render = (lambda config: render(config) + "#error not today\\n") if fails else render
    pack.from_bytes = broken if how == "another fails" and rank == 1 else unpack
    if how == "they differ" and rank == 2:
        configs = configs[:1]
    archs = ("100a",) if how == "two groups" and rank == 2 else ("90a",)
    store = Store(folder / how / f"cache-{rank}")
    builds.clear()
    try:
        kernels = onelaunch.distribute(configs, archs=archs, store=store)
        said[how] = {
            "keys": [kernel.key for kernel in kernels],
            "paths": [str(kernel.path) for kernel in kernels],
            "works": all(hasattr(kernel.module, "bind") for kernel in kernels),
            "builds": len(builds),
        }
    except onelaunch.OnelaunchError as error:
        said[how] = {"error": [type(error).__name__, str(error)]}
print(json.dumps(said))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """By case, what each of three ranks said. None of them hangs."""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={**os.environ, "RANK": str(rank), "FOLDER": str(folder), "HOWS": json.dumps(HOWS)},
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
            results.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in started:
            process.kill()
    return {how: [result[how] for result in results] for how in HOWS}


@pytest.mark.parametrize(("how", "builds"), [("all well", [2, 0, 0]), ("two groups", [2, 0, 2])])
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
        ("they differ", "StoreError", "Rank 2 asks distribute() for other configurations than rank 0"),
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
