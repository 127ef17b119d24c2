"""How the loader uses the store, without a compiler."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from onelaunch import KernelConfig, ToolchainError
from onelaunch.build import binary
from onelaunch.build import compile as compiler
from onelaunch.cache.store import CACHE_VARIABLE, Entry, Store
from onelaunch.load import loader

CONFIG = KernelConfig(fields=("cache_seqlens",), target="cpu")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture
def fake_build(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Builds that take no compiler: the object is text, and its module this one."""
    built: list[str] = []

    def build(name: str, source: str, binding: str, *, stage: Path, **_: Any) -> compiler.Build:
        built.append(name)
        (stage / f"{name}.so").write_text(source)
        (stage / "main.cpp").write_text(source)
        usage = {"90a": {"registers": 8, "stack_bytes": 0, "shared_bytes": 0, "local_bytes": 0}}
        return compiler.Build(sys, f"{name}.so", "main.cpp", "c++ -c main.cpp", 1.23456, usage, {"machine": "a test"})

    monkeypatch.setattr(compiler, "build", build)
    monkeypatch.setattr(loader, "import_module", lambda entry, *_: sys)
    monkeypatch.setattr(loader, "_loaded", {})
    return built


def test_a_kernel_says_what_it_is(store: Store, fake_build: list[str]) -> None:
    kernel = loader.load(CONFIG, store=store)
    assert repr(kernel) == f"Kernel({CONFIG.symbol}, key={kernel.key[:16]}, archs=host)"
    assert kernel.resources["90a"]["registers"] == 8
    assert kernel.manifest["seconds"] == 1.235
    assert kernel.manifest["requires"] == {"machine": "a test"}
    assert kernel.source in kernel.path.read_text()
    two = loader.Kernel(CONFIG, kernel.key, kernel.path, ("90a", "100a"), {}, sys)
    assert repr(two).endswith("archs=90a+100a)")


@pytest.mark.parametrize("change", ["a variable", "a program", "no programs", "no JSON object"])
def test_an_index_of_other_surroundings_is_looked_up_again(
    change: str, store: Store, fake_build: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A changed compiler leads to the tools' versions again, and by them to the same entry: nothing is built."""
    first = loader.load(CONFIG, store=store)
    (index,) = (store.root / "index").iterdir()
    noted = json.loads(index.read_text())
    asked: list[str] = []
    find_tools = compiler.find_tools
    monkeypatch.setattr(compiler, "find_tools", lambda target: (asked.append(target), find_tools(target))[1])
    loader._loaded.clear()
    assert loader.load(CONFIG, store=store).key == first.key
    assert asked == []
    if change == "a variable":
        monkeypatch.setenv("CONDA_PREFIX", "/somewhere")
    elif change == "a program":
        noted["programs"][0]["path"] = "/no/such/program"
    elif change == "no programs":
        del noted["programs"]
    else:
        noted = [noted]
    if change != "a variable":
        index.write_text(json.dumps(noted))
    loader._loaded.clear()
    assert loader.load(CONFIG, store=store).key == first.key
    assert asked == ["cpu"]
    assert len(fake_build) == 1
    # And what was found is noted for the next.
    loader._loaded.clear()
    loader.load(CONFIG, store=store)
    assert asked == ["cpu"]


def test_an_index_that_leads_to_an_entry_that_is_gone(store: Store, fake_build: list[str]) -> None:
    kernel = loader.load(CONFIG, store=store)
    kernel.path.parent.rename(store.root / "gone")
    loader._loaded.clear()
    assert loader.load(CONFIG, store=store).path == kernel.path
    assert len(fake_build) == 2


def test_a_host_without_a_compiler(store: Store, fake_build: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the build that the index names, whatever compiler made it; without one it says what is missing."""
    kernel = loader.load(CONFIG, store=store)

    def none(target: str) -> compiler.Tools:
        raise ToolchainError("there is no compiler")

    monkeypatch.setattr(compiler, "find_tools", none)
    monkeypatch.setenv("PATH", "/nowhere")
    loader._loaded.clear()
    assert loader.load(CONFIG, store=store).key == kernel.key
    with pytest.raises(ToolchainError, match="there is no compiler"):
        loader.load(CONFIG.replace(num_backends=2), store=store)
    kernel.path.parent.rename(store.root / "gone")
    loader._loaded.clear()
    with pytest.raises(ToolchainError, match="there is no compiler"):
        loader.load(CONFIG, store=store)


def test_another_process_built_it_while_this_one_waited(
    store: Store, fake_build: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = loader.load(CONFIG, store=store)
    for path in (store.root / "index").iterdir():
        path.unlink()
    loader._loaded.clear()
    find, missed = Store.find, []

    def late(self: Store, key: str, expect: Any = None) -> Entry | None:
        if not missed:
            missed.append(key)
            return None
        return find(self, key, expect)

    monkeypatch.setattr(Store, "find", late)
    assert loader.load(CONFIG, store=store).key == first.key
    assert missed == [first.key]
    assert len(fake_build) == 1


def test_the_default_store_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    loader.default_store.cache_clear()
    try:
        assert loader.default_store() is loader.default_store()
        assert loader.default_store().root == tmp_path / "cache"
    finally:
        loader.default_store.cache_clear()


# ------------------------------------------------------------------------------------- what only a GPU build reports

USAGE = """
Resource usage:
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]
 Function onelaunch_k:
  REG:40 STACK:0 SHARED:1056 LOCAL:16 CONSTANT[0]:4688 TEXTURE:0 SURFACE:0 SAMPLER:0

arch = sm_100a
 Function onelaunch_k:
  REG:38 STACK:8 SHARED:1060 LOCAL:0 CONSTANT[0]:4688 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_the_resources_that_cuobjdump_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toolkit's program is asked before PATH's, and none is no fault."""
    assert binary.resources(tmp_path / "m.so", None) == {}
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert binary.find_cuobjdump(tmp_path) is None
    assert binary.find_cuobjdump() is None
    for folder in ("bin", "path"):
        (tmp_path / folder).mkdir()
        program = tmp_path / folder / "cuobjdump"
        wanted = f"--dump-resource-usage {tmp_path}/m.so"
        program.write_text(f"#!/bin/sh\n[ \"$*\" = '{wanted}' ] && /bin/cat <<'X'\n{USAGE}\nX\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert binary.find_cuobjdump() == binary.find_cuobjdump(tmp_path / "none") == tmp_path / "path" / "cuobjdump"
    assert binary.find_cuobjdump(tmp_path) == tmp_path / "bin" / "cuobjdump"
    assert binary.resources(tmp_path / "other.so", binary.find_cuobjdump(tmp_path)) == {}
    assert binary.resources(tmp_path / "m.so", binary.find_cuobjdump(tmp_path)) == {
        "90a": {"registers": 40, "stack_bytes": 0, "shared_bytes": 1056, "local_bytes": 16, "spill_bytes": 16},
        "100a": {"registers": 38, "stack_bytes": 8, "shared_bytes": 1060, "local_bytes": 0, "spill_bytes": 8},
    }
