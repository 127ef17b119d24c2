"""The cache from outside: explain, the verbs, and its size limit."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from onelaunch import KernelConfig, StoreError, render
from onelaunch.build import compile as compiler
from onelaunch.build import toolchain
from onelaunch.build.key import Recipe
from onelaunch.cache import collect
from onelaunch.cache.module import import_entry
from onelaunch.cache.store import Store
from onelaunch.cli.main import app
from onelaunch.emit.binding import render_binding
from onelaunch.inspect.explain import explain
from onelaunch.load import loader
from onelaunch.load.obtain import obtain

CONFIGS = [KernelConfig(fields=("cache_seqlens",), target="cpu", num_backends=n) for n in (1, 2, 3)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with the three builds."""
    folder = tmp_path_factory.mktemp("built") / "cache"
    for config in CONFIGS:
        loader.load(config, store=Store(folder))
    return folder


@pytest.fixture
def store(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """Three entries, last used one, two and three days ago."""
    shutil.copytree(built, tmp_path / "cache")
    store = Store(tmp_path / "cache")
    for key in store.stored_keys():
        found = store.find(key)
        assert found is not None
        used(store, key, found.manifest["config"]["num_backends"])
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(loader, "default_store", lambda: store)
    return store


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds whose objects are plain text: they take no time and can't be loaded."""

    def build(recipe: Recipe, tools: Any, *, stage: Path, **_: Any) -> compiler.Build:
        for name in (f"{recipe.module}.so", "main.cpp"):
            (stage / name).write_text(recipe.source * 5)
        return compiler.Build(f"{recipe.module}.so", "main.cpp", "c++", 1.0, {}, {})

    monkeypatch.setattr(compiler, "build", build)
    monkeypatch.setattr(loader, "import_entry", lambda entry, *_: None)


def used(store: Store, key: str, days: float) -> None:
    then = time.time() - days * 86_400
    os.utime(store.root / "stamps" / key, (then, then))


def backends(store: Store) -> list[int]:
    return sorted(entry.manifest["config"]["num_backends"] for entry in store.entries())


def verb(*words: str) -> Any:
    return CliRunner().invoke(app, list(words))


# -------------------------------------------------------------------------------------------------------- explain


def test_explain_a_hit_and_a_miss(store: Store) -> None:
    hit = verb("explain", "--set", CONFIGS[0].settings())
    assert hit.exit_code == 0, hit.output
    assert hit.output.startswith(f"hit: {store.root / 'entries'}")
    miss = verb("explain", "--set", CONFIGS[2].replace(num_backends=4).settings())
    assert miss.exit_code == 1
    assert "num_backends: " in miss.output
    assert " → 4\n" in miss.output
    assert "source" not in miss.output


def test_explain_passes_over_what_isnt_a_configuration(tmp_path: Path) -> None:
    """A benchmark's baseline is stored like a kernel, but explain must not suggest it as a near match."""
    store, tools, config = Store(tmp_path / "cache"), toolchain.find_tools("cpu"), CONFIGS[0]
    binding = render_binding(config, f"{config.symbol}_binding")
    recipe = Recipe(config.symbol, render(config), binding, (), tuple(compiler.flags("cpu", ())), tools.versions())
    entry, home, built = obtain(recipe, tools, store)
    assert (entry.key, home, built) == (recipe.key, store, True)
    # Again, as after waiting for another process: there is nothing to build.
    assert obtain(recipe, tools, store)[2] is False
    assert hasattr(import_entry(entry), "bind")
    assert explain(CONFIGS[1], (), store).nearest is None


def test_explain_names_the_compiler_that_changed(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the version of nvcc, but nothing that merely follows from these."""
    versions = toolchain.find_tools("cpu").versions()
    monkeypatch.setattr(toolchain.Tools, "versions", lambda self: {**versions, "host_compiler": "g++ 99"})
    found = explain(CONFIGS[1], (), store)
    assert found.hit is None
    assert found.nearest is not None
    assert found.nearest.manifest["config"]["num_backends"] == 2
    assert found.differs == (("host compiler", versions["host_compiler"], "g++ 99"),)
    assert f"host compiler: {versions['host_compiler']} → g++ 99" in str(found)


@pytest.mark.nvcc
def test_explain_names_another_nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, config = Store(tmp_path / "cache"), KernelConfig(fields=("cache_seqlens",))
    versions = toolchain.find_tools("cuda").versions()
    loader.load(config, ("90a",), store)
    monkeypatch.setattr(toolchain.Tools, "versions", lambda self: {**versions, "nvcc": "13.9.1"})
    assert f"nvcc: {versions['nvcc']} → 13.9.1" in str(explain(config, ("90a",), store))
    assert explain(config, ("100a",), store).differs[0][:2] == ("archs", "90a")


def test_explain_an_empty_cache(tmp_path: Path) -> None:
    found = explain(CONFIGS[0], (), Store(tmp_path / "none"))
    assert "there is no other entry" in str(found)
    assert not (tmp_path / "none").exists()


# --------------------------------------------------------------------------------------------------------- verbs


def test_list_info_path_verify(store: Store) -> None:
    assert verb("cache", "path").output == f"{store.root}\n"
    lines = verb("cache", "list").output.splitlines()
    assert [line.split()[-1] for line in lines[:-1]] == [config.symbol for config in CONFIGS], "last used first"
    assert lines[-1].startswith("3 entries, ")
    rows = json.loads(verb("cache", "list", "--json").output)
    assert [row["key"] for row in rows] == sorted(store.stored_keys(), key=lambda key: -store.used(key))
    manifest = json.loads(verb("cache", "info", rows[0]["key"][:12]).output)
    assert KernelConfig.from_dict(manifest["config"]) == CONFIGS[0]
    assert {"compilers", "command", "seconds", "resources", "requires", "ingredients"} <= set(manifest)
    result = verb("cache", "info", "zz")
    assert result.exit_code == 2
    assert "No entry's key begins with 'zz'" in result.output
    assert verb("cache", "verify").output.startswith("3 of 3 entries are whole")
    with open(store.root / "entries" / rows[0]["key"] / "main.cpp", "a") as file:
        file.write("//")
    with pytest.warns(UserWarning, match="is damaged"):
        result = verb("cache", "verify", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["damaged"], sorted(found["whole"])) == ([rows[0]["key"]], store.stored_keys())
    assert verb("cache", "verify").output.startswith("2 of 2 entries")


def test_gc_by_age_and_size(store: Store, no_compiler: None) -> None:
    result = verb("cache", "gc", "--older-than", "60h")
    assert result.exit_code == 0, result.output
    assert result.output.startswith("removed 1 entries")
    assert backends(store) == [1, 2]
    one = max(collect.sizes(store).values())
    assert verb("cache", "gc", "--max-size", f"{1.5 * one / 1024:.0f}K").exit_code == 0
    assert backends(store) == [1], "the one that was used last"
    # A removed entry is built again, and a kept one loads.
    assert loader.load(CONFIGS[0], store=store).path.is_file()
    assert len([path for path in store.listed("index") if "key" in json.loads(path.read_text())]) == 1
    for words, sentence in (
        (("--max-size", "large"), "--max-size is 'large'; it must be a size such as 500M or 2G"),
        (("--older-than", "30"), "--older-than is '30'; it must be an age such as 12h, 30d or 4w"),
    ):
        result = verb("cache", "gc", *words)
        assert result.exit_code == 2
        assert sentence in result.output


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_dry_run_removes_nothing_and_says_what_it_would(store: Store) -> None:
    (store.folder("staging") / f"{socket.gethostname()}.{2**22 + 1}.0123456789ab").mkdir()
    (store.folder("locks") / f"{'0' * 64}.lock").touch()
    before, words = everything(store.root), ("cache", "gc", "--older-than", "60h")
    oldest = json.loads(verb("cache", "list", "--json").stdout)[-1]["key"]
    dry = verb(*words, "--dry-run")
    assert dry.stdout.startswith(f"{oldest[:12]}\nwould remove 1 entries")
    said = json.loads(verb(*words, "--dry-run", "--json").stdout)
    clear = json.loads(verb("cache", "clear", "--dry-run", "--json").stdout)
    assert verb("cache", "clear", "--dry-run").stdout.startswith("would remove ")
    assert everything(store.root) == before
    done = json.loads(verb(*words, "--json").stdout)
    assert (said.pop("dry_run"), done.pop("dry_run")) == (True, False)
    assert said == done
    assert (done["keys"], done["remains"]) == ([oldest], 3), "with the note that led to it"
    assert 0 < json.loads(verb("cache", "clear", "--json").stdout)["freed"] < clear["freed"], "the oldest was gone"


def test_a_new_build_keeps_the_bound(store: Store, no_compiler: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes the least recently used entries, except the new one and those used within the last hour."""
    one = max(collect.sizes(store).values())
    monkeypatch.setenv(collect.MAX_SIZE_VARIABLE, f"{2.5 * one / 1024:.0f}K")
    loader.load(CONFIGS[0].replace(num_backends=4), store=store)
    assert backends(store) == [1, 4]
    loader.load(CONFIGS[0], store=store)
    monkeypatch.setenv(collect.MAX_SIZE_VARIABLE, "1")
    loader.load(CONFIGS[0].replace(num_backends=5), store=store)
    assert backends(store) == [1, 4, 5]
    monkeypatch.setenv(collect.MAX_SIZE_VARIABLE, "much")
    with pytest.raises(StoreError, match="ONELAUNCH_CACHE_MAX_SIZE is 'much'"):
        loader.load(CONFIGS[0].replace(num_backends=6), store=store)
    assert backends(store) == [1, 4, 5], "it is reported before the build"


def test_clear(store: Store, no_compiler: None) -> None:
    assert verb("cache", "clear").exit_code == 0
    assert store.stored_keys() == []
    assert loader.load(CONFIGS[0], store=store).path.is_file()
