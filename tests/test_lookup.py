"""How the loader uses the store, without a compiler."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from onelaunch import KernelConfig
from onelaunch.build import binary
from onelaunch.build import compile as compiler
from onelaunch.cache.manifest import Entry
from onelaunch.cache.module import EntryChanged
from onelaunch.cache.store import CACHE_VARIABLE, Store
from onelaunch.load import loader

CONFIG = KernelConfig(fields=("cache_seqlens",), target="cpu")


@pytest.fixture
def fake_build(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Builds without a compiler: the object is a text file, and ``sys`` stands in for its module."""
    built: list[str] = []

    def build(recipe: Any, tools: Any, *, stage: Path, **_: Any) -> compiler.Build:
        built.append(recipe.module)
        (stage / f"{recipe.module}.so").write_text(recipe.source)
        (stage / "main.cpp").write_text(recipe.source)
        usage = {"90a": {"registers": 8, "stack_bytes": 0, "shared_bytes": 0, "local_bytes": 0}}
        command = "c++ -c main.cpp"
        return compiler.Build(f"{recipe.module}.so", "main.cpp", command, 1.23456, usage, {"machine": "a test"})

    monkeypatch.setattr(compiler, "build", build)
    monkeypatch.setattr(loader, "import_entry", lambda entry, *_: sys)
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


@pytest.mark.parametrize("change", ["other compilers", "no compilers", "no JSON object"])
def test_a_note_that_doesnt_hold_is_looked_up_again(change: str, store: Store, fake_build: list[str]) -> None:
    """After a damaged note, or one for other compilers, the key still finds the entry: nothing is built."""
    first = loader.load(CONFIG, store=store)
    (index,) = (store.root / "index").iterdir()
    good = noted = json.loads(index.read_text())
    if change == "other compilers":
        noted = {**good, "compilers": {"host_compiler": "g++ 1"}}
    elif change == "no compilers":
        noted = {"key": good["key"]}
    else:
        noted = [good]
    index.write_text(json.dumps(noted))
    loader._loaded.clear()
    assert loader.load(CONFIG, store=store).key == first.key
    assert len(fake_build) == 1
    # The note is corrected for the next process.
    assert json.loads(index.read_text()) == good


def test_an_index_that_leads_to_an_entry_that_is_gone(store: Store, fake_build: list[str]) -> None:
    kernel = loader.load(CONFIG, store=store)
    kernel.path.parent.rename(store.root / "gone")
    loader._loaded.clear()
    assert loader.load(CONFIG, store=store).path == kernel.path
    assert len(fake_build) == 2


def test_an_entry_that_is_removed_while_it_is_loaded(
    store: Store, fake_build: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cache clear` in another process can do that. The kernel is built again, once."""
    loaded = []

    def removed(entry: Entry, *_: Any) -> Any:
        loaded.append(entry)
        if len(loaded) == 1:
            shutil.rmtree(entry.path)
            raise EntryChanged("gone")
        return sys

    monkeypatch.setattr(loader, "import_entry", removed)
    assert loader.load(CONFIG, store=store).path.is_file()
    assert (len(loaded), len(fake_build)) == (2, 2)


def test_exchanged_notes_are_noticed(store: Store, fake_build: list[str]) -> None:
    """A note gives a key without reading the source, so the loader must check the entry's configuration."""
    configs = [CONFIG, CONFIG.replace(num_backends=2)]
    keys = [loader.load(config, store=store).key for config in configs]
    one, two = (path for path in (store.root / "index").iterdir() if "compilers" not in path.name)
    texts = one.read_text(), two.read_text()
    one.write_text(texts[1])
    two.write_text(texts[0])
    loader._loaded.clear()
    assert [loader.load(config, store=store).key for config in configs] == keys
    assert len(fake_build) == 2
    assert (one.read_text(), two.read_text()) == texts


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
    """The toolkit's cuobjdump comes before PATH's. Without one there is no report and no error."""
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
