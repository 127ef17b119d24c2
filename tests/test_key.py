"""The key of a build: what is in it, what isn't, and how often the source is rendered for it."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import headers
import pytest
from onelaunch import KernelConfig, ToolchainError, render
from onelaunch.build import compile as compiler
from onelaunch.build import key as keys
from onelaunch.build import toolchain
from onelaunch.build.key import Recipe
from onelaunch.cache.store import Store
from onelaunch.emit import binding as emitted_binding
from onelaunch.load import find, loader
from usable import SMALL, SMALL_CUDA

# onelaunch.render is the function; this is the module in which it is replaced.
RENDER = sys.modules["onelaunch.emit.render"]


def test_two_stores_have_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The key depends neither on the folder nor on the time, nor on precompiled headers."""
    a, b = Store(tmp_path / "a"), Store(tmp_path / "some" / "other" / "folder")
    first = loader.load(SMALL, store=a)
    monkeypatch.setenv("CXX", os.environ.get(headers.PLAIN_VARIABLE, str(toolchain.find_host_compiler().path)))
    second = loader.load(SMALL, store=b)
    assert first.key == second.key
    assert first.path.relative_to(a.root) == second.path.relative_to(b.root)
    # The object is the same too, and so are the stored sources.
    for name in (first.path.name, str(first.manifest["source_file"])):
        assert (first.path.parent / name).read_bytes() == (second.path.parent / name).read_bytes()


def key_of(config: KernelConfig = SMALL_CUDA, archs: tuple[str, ...] = ("90a",), **versions: str) -> str:
    return loader.content_key(config, archs, {"host_compiler": "g++ 1", "nvcc": "13.0", "nvcc_build": "x", **versions})


def change_source(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(RENDER, "render", lambda config: render(config) + "// changed\n")
    return key_of()


def change_binding(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(emitted_binding, "render_binding", lambda config, module: "// changed\n")
    return key_of()


def change_flags(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(compiler, "CUDA_FLAGS", (*compiler.CUDA_FLAGS, "--use_fast_math"))
    return key_of()


def change_host_flags(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(compiler, "HOST_FLAGS", ("-O3", *compiler.HOST_FLAGS[1:]))
    return key_of()


def change_schema(patch: pytest.MonkeyPatch) -> str:
    patch.setattr(keys, "SCHEMA_VERSION", keys.SCHEMA_VERSION + 1)
    return key_of()


def change_machine(patch: pytest.MonkeyPatch) -> str:
    patch.setattr("platform.machine", lambda: "another")
    return key_of()


INGREDIENTS: dict[str, Callable[[pytest.MonkeyPatch], str]] = {
    "schema": change_schema,
    "configuration": lambda patch: key_of(SMALL_CUDA.replace(num_backends=2)),
    "source": change_source,
    "binding": change_binding,
    "flags": change_flags,
    "host flags": change_host_flags,
    "architecture": lambda patch: key_of(archs=("100a",)),
    "machine": change_machine,
    "host compiler": lambda patch: key_of(host_compiler="g++ 2"),
    "nvcc": lambda patch: key_of(nvcc="13.1"),
    "nvcc build": lambda patch: key_of(nvcc_build="y"),
}


@pytest.mark.parametrize("ingredient", INGREDIENTS)
def test_the_key_changes_with_each_ingredient(ingredient: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of()
    assert before == key_of()
    assert re.fullmatch("[0-9a-f]{64}", before)
    assert INGREDIENTS[ingredient](monkeypatch) != before


def test_the_key_is_the_digest_of_its_ingredients() -> None:
    """The manifest records the ingredients, so that a reader of an entry can check its name."""
    recipe = loader.recipe(SMALL, (), {"host_compiler": "g++ 1"})
    assert keys.key_of(json.loads(json.dumps(recipe.ingredients))) == recipe.key
    plain = Recipe("a", "source", "binding", (), (), {})
    assert "config" not in plain.ingredients
    assert len({plain.key, replace(plain, edited=Path("/e")).key, replace(plain, config={}).key}) == 3


def test_a_load_renders_once(store: Store, monkeypatch: pytest.MonkeyPatch, builds: list[str]) -> None:
    """And not at all if an earlier process recorded the configuration's key."""
    rendered: list[str] = []
    monkeypatch.setattr(RENDER, "render", lambda config: (rendered.append(config.symbol), render(config))[1])
    loader.load(SMALL, store=store)
    assert (len(rendered), len(builds)) == (1, 1)
    loader._loaded.clear()
    loader.load(SMALL, store=store)
    assert (len(rendered), len(builds)) == (1, 1)


def test_the_package_digests_what_is_in_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new file counts without being listed anywhere; files that Python writes beside it don't."""
    package = tmp_path / "onelaunch"
    for room in ("spec", "emit", "build", "templates/device"):
        (package / room).mkdir(parents=True)
    monkeypatch.setattr("importlib.resources.files", lambda name: tmp_path.joinpath(*name.split(".")))
    digests = []
    for path in ("spec/a.py", "spec/__pycache__/a.pyc", "templates/device/new.cuh", "run/b.py"):
        (package / path).parent.mkdir(exist_ok=True)
        (package / path).write_text("x")
        find.package_digest.cache_clear()
        digests.append(find.package_digest())
    assert digests[0] == digests[1] != digests[2] == digests[3]
    (package / "emit" / "gone.py").symlink_to(tmp_path / "nowhere")
    find.package_digest.cache_clear()
    with pytest.raises(ToolchainError, match=r"emit/gone\.py: No such file or directory\. Install onelaunch again"):
        find.package_digest()
    monkeypatch.undo()
    find.package_digest.cache_clear()


def test_no_path_in_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = key_of(SMALL, ())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ONELAUNCH_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("time.time", lambda: 0.0)
    assert key_of(SMALL, ()) == before
    tools = toolchain.find_tools("cpu")
    assert "/" not in "".join(tools.versions().values()).replace("http://", "")
