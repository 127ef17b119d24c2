"""From source to a loaded module: strict compilers, the object's requirements, keys, failures, and the store."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import forked
import headers
import onelaunch
import pytest
import support
from click.testing import CliRunner
from onelaunch import PRESETS, JitPolicyError, KernelConfig, ToolchainError, render
from onelaunch.build import compile as compiler
from onelaunch.build import key as keys
from onelaunch.build import toolchain
from onelaunch.build.key import Recipe
from onelaunch.cache.store import Store
from onelaunch.cli.main import app
from onelaunch.emit import binding as emitted_binding
from onelaunch.emit.binding import render_binding
from onelaunch.load import find, loader
from onelaunch.spec import layout

# onelaunch.render is the function; this is the module in which it is replaced.
RENDER = sys.modules["onelaunch.emit.render"]

SMALL = KernelConfig(fields=("cache_seqlens",), target="cpu")
SMALL_CUDA = KernelConfig(fields=("cache_seqlens",))
OTHERS = [KernelConfig(fields=("cache_seqlens",), target="cpu", num_backends=n) for n in range(2, 12)]

# Uses the kernel in a new process, and prints what that needed.
USE = """
import json, sys, warnings
import torch, onelaunch
from onelaunch import MetadataBuffers
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = torch.full((4,), -1, dtype=torch.int32)
    plan = onelaunch.bind([MetadataBuffers(cache_seqlens=out)], req_to_token=torch.zeros(1, 1, dtype=torch.int32))
    plan.run(torch.tensor([5, 6]), torch.tensor([0, 0]))
print(json.dumps({
    "out": out.tolist(),
    "path": str(plan.kernel.path),
    "key": plan.kernel.key,
    "warnings": [str(w.message) for w in caught],
    "modules": [m for m in ("torch.utils.cpp_extension", "jinja2", "ninja", "filelock") if m in sys.modules],
}))
"""


def use(cache: Path, **environment: str) -> tuple[dict[str, Any], str]:
    """Runs USE in its own process; returns what it printed, and its stderr."""
    out, err = forked.Child(USE, {**os.environ, "ONELAUNCH_CACHE_DIR": str(cache), **environment}).finish()
    return json.loads(out), err


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the modules that are built from here on."""
    names: list[str] = []
    build = compiler.build

    def counted(recipe: Recipe, *args: Any, **kwargs: Any) -> compiler.Build:
        names.append(recipe.module)
        return build(recipe, *args, **kwargs)

    monkeypatch.setattr(compiler, "build", counted)
    return names


# ------------------------------------------------------------------------------------------------- strictness


STRICT_CPU = {
    **PRESETS,
    **{f"only {name}": KernelConfig(num_backends=2, fields=(name,)) for name in support.ALL_FIELDS},
    "page 48": KernelConfig(num_backends=2, page_size=48),
    "all fields, shared": KernelConfig(
        num_backends=3, fields=support.ALL_FIELDS, distinct=tuple((name, 1) for name in support.ALL_FIELDS)
    ),
}


def test_the_cpu_target_compiles_without_a_warning(tmp_path: Path) -> None:
    """The emitted sources, with the product's flags and every warning an error.

    As one source: headers take most of a small source's compile time, and they are the same for all.
    """
    sources = [render(config.replace(target="cpu")) for config in STRICT_CPU.values()]
    assert len({tuple(re.findall(r"^#include .*", source, re.M)) for source in sources}) == 1
    assert_strict(support.together(sources), tmp_path)


def test_the_binding_compiles_without_a_warning(tmp_path: Path) -> None:
    """One of each kind: bindings differ only in names, in the number of words, and in the words that a call sets."""
    kinds = {tuple(layout.call_words(config)): config for config in STRICT_CPU.values()}
    assert len(kinds) > 3
    for config in kinds.values():
        assert_strict(render_binding(config.replace(target="cpu"), "a_module"), tmp_path)


def assert_strict(text: str, folder: Path) -> None:
    found = toolchain.find_host_compiler()
    source = folder / "source.cpp"
    source.write_text(text, encoding="utf-8")
    # load_inline prepends nothing, but the host compiler doesn't know the CUDA compiler's pragmas.
    flags = [*found.flags, *compiler.HOST_FLAGS, "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    flags += [f"-isystem{sysconfig.get_path('include')}"]
    done = subprocess.run(
        [str(found.path), "-c", str(source), "-o", str(folder / "source.o"), *flags],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


# ------------------------------------------------------------------------------------------------- the object

PLAIN_LIBRARIES = re.compile(r"(libc|libstdc\+\+|libm|libgcc_s|libdl|libpthread|librt|ld-linux[\w-]*)\.so\.\d+")


def needed(path: Path) -> list[str]:
    text = subprocess.run(["readelf", "-d", "--wide", path], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\((RPATH|RUNPATH)\)", text), "a path of the machine that built it"
    return re.findall(r"\(NEEDED\).*\[(.*)\]", text)


def exported(path: Path) -> list[str]:
    text = subprocess.run(["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in text.splitlines()]


@pytest.mark.parametrize("target", ["cpu", pytest.param("cuda", marks=pytest.mark.nvcc)])
def test_the_object_needs_nothing_but_the_system_and_exports_one_symbol(target: str) -> None:
    """No torch, no CUDA library: it is loaded beside other versions of both than it was built with."""
    kernel = onelaunch.specialize(KernelConfig(num_backends=3, target=target), "90a" if target == "cuda" else None)
    for name in needed(kernel.path):
        assert PLAIN_LIBRARIES.fullmatch(name), name
    assert exported(kernel.path) == [f"PyInit_{kernel.config.symbol}_binding"]
    assert kernel.path.name.endswith(".so")
    assert kernel.source == render(kernel.config)
    # load_inline joins the C++ sources of a build in one file: on the CPU target the binding follows.
    kept = (kernel.path.parent / str(kernel.manifest["source_file"])).read_text()
    assert kept.startswith(kernel.source)
    assert target == "cpu" or kept == kernel.source


@pytest.mark.nvcc
def test_an_object_for_two_architectures(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    one, two = loader.load(SMALL_CUDA, ("90a",), store), loader.load(SMALL_CUDA, ("90a", "100a"), store)
    assert capfd.readouterr().err.startswith(f"onelaunch: building {SMALL_CUDA.symbol} for sm_90a, because ")
    assert one.key != two.key
    assert one.archs == ("90a",)
    assert two.archs == ("90a", "100a")
    assert "compute_100a" in str(two.manifest["command"])


def test_torch_has_no_part_in_the_build(store: Store) -> None:
    """The command names no header of torch, and the kept sources include none."""
    kernel = loader.load(SMALL, store=store)
    command = str(kernel.manifest["command"])
    assert " -c " in command
    assert " ." in command
    assert str(store.root) not in command
    for file in kernel.path.parent.glob("*.c*"):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10|pybind11)", file.read_text())


# ----------------------------------------------------------------------------------------------------- the key


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


# --------------------------------------------------------------------------------------------- another process


@dataclass(frozen=True)
class Used:
    """A cache that one process has built into, what that process printed, and its stderr."""

    folder: Path
    first: dict[str, Any]
    said: str

    def copy(self, folder: Path) -> Path:
        return Path(shutil.copytree(self.folder, folder / "cache"))


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Used:
    folder = tmp_path_factory.mktemp("used") / "cache"
    return Used(folder, *use(folder))


def test_a_second_process_loads_without_building(used: Used) -> None:
    """It imports neither torch's extension builder nor jinja2, and says nothing."""
    cache, first, said = used.folder, used.first, used.said
    assert first["out"] == [5, 6, -1, -1]
    assert first["modules"] == ["jinja2"], "another process runs the compiler"
    notices = [line for line in said.splitlines() if line.startswith("onelaunch:")]
    assert len(notices) == 1, said
    stamp = Path(first["path"]).stat()
    second, said = use(cache)
    assert second["out"] == [5, 6, -1, -1]
    assert second["modules"] == []
    assert said == ""
    assert second["key"] == first["key"]
    after = Path(second["path"]).stat()
    assert (after.st_ino, after.st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns)
    # It works also under the policy that forbids builds.
    assert use(cache, ONELAUNCH_JIT="error")[0]["out"] == [5, 6, -1, -1]


def test_a_process_with_another_compiler_asks_again(used: Used, tmp_path: Path) -> None:
    """The index is valid for the compilers it was made with; another environment finds the entry by its key."""
    folder = tmp_path / "bin"
    folder.mkdir()
    second, said = use(used.copy(tmp_path), PATH=f"{folder}{os.pathsep}{os.environ['PATH']}")
    assert second["key"] == used.first["key"]
    assert "building" not in said


def test_a_truncated_object_doesnt_bring_a_process_down(used: Used, tmp_path: Path) -> None:
    cache = used.copy(tmp_path)
    path = cache / Path(used.first["path"]).relative_to(used.folder)
    data = path.read_bytes()
    path.unlink()  # replaced, not truncated in place: this process may have mapped it
    path.write_bytes(data[:-100])
    second, said = use(cache)
    assert second["out"] == [5, 6, -1, -1]
    assert [w for w in second["warnings"] if "is damaged" in w], second["warnings"]
    assert "building" in said


# --------------------------------------------------------------------------------------------- notices and policy


def test_the_notice_of_a_build(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    loader.load(SMALL, store=store)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == (
        f"onelaunch: building {SMALL.symbol} for the CPU, because {store.root} has no build of it yet\n"
    )
    loader.load(SMALL, store=store)
    assert capfd.readouterr().err == ""


def test_eight_threads_that_ask_at_once_get_one_build(store: Store, builds: list[str]) -> None:
    barrier = threading.Barrier(8)
    kernels: list[Any] = []

    def ask() -> None:
        barrier.wait()
        kernels.append(loader.load(SMALL, store=store))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(kernels) == 8
    assert len({id(kernel) for kernel in kernels}) == 1
    assert len(builds) == 1


# Every form a configuration can have on a command line, the default one among them.
FROZEN = {
    "the defaults": (KernelConfig(), ("90a",)),
    "a preset": (PRESETS["nsa-decode-3-lengths-only"], ("90a",)),
    "two architectures": (KernelConfig(num_backends=3), ("90a", "100a")),
    "shared destinations": (OTHERS[1].replace(distinct=(("cache_seqlens", 1),)), ()),
    "the CPU": (KernelConfig(num_backends=5, target="cpu"), ()),
}


def command_in(error: Exception) -> list[str]:
    """The command that a JitPolicyError names, as a shell would split it."""
    found = re.search(r"ahead of time with: (onelaunch build .*?) \(builds are refused", str(error))
    assert found is not None, str(error)
    return shlex.split(found[1])[1:]


@pytest.mark.parametrize("how", ["freeze", "variable"])
@pytest.mark.parametrize("what", FROZEN)
def test_frozen(what: str, how: str, store: Store, monkeypatch: pytest.MonkeyPatch, builds: list[str]) -> None:
    """No build; the error names the command that builds exactly this. Here it runs without its build."""
    config, archs = FROZEN[what]
    if config.target == "cuda":
        try:
            toolchain.find_toolkit()
        except ToolchainError:
            pytest.skip("no CUDA toolkit: a missing one is said first")
    if how == "freeze":
        onelaunch.freeze()
    else:
        monkeypatch.setenv("ONELAUNCH_JIT", "error")
    with pytest.raises(JitPolicyError) as caught:
        loader.load(config, archs, store)
    assert config.symbol in str(caught.value)
    assert builds == []
    asked: list[tuple[KernelConfig, tuple[str, ...] | None]] = []

    def specialize(wanted: KernelConfig, wanted_archs: tuple[str, ...] | None) -> Any:
        asked.append((wanted, wanted_archs))
        raise ToolchainError("stop here")

    with monkeypatch.context() as patch:
        patch.setattr(onelaunch, "specialize", specialize)
        result = CliRunner().invoke(app, command_in(caught.value))
    assert "stop here" in result.output, result.output
    assert asked == [(config, archs or None)]


def test_the_command_in_the_error_builds_what_was_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, builds: list[str]
) -> None:
    monkeypatch.setenv("ONELAUNCH_CACHE_DIR", str(tmp_path / "cache"))
    store = Store()
    monkeypatch.setattr(loader, "default_store", lambda: store)
    onelaunch.freeze()
    with pytest.raises(JitPolicyError) as caught:
        loader.load(OTHERS[0])
    onelaunch.freeze("allow")
    result = CliRunner().invoke(app, command_in(caught.value))
    assert result.exit_code == 0, result.output
    assert len(builds) == 1
    onelaunch.freeze()
    loader._loaded.clear()
    assert loader.load(OTHERS[0]).path.is_file()
    assert len(builds) == 1


def test_freeze_as_a_warning(store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    onelaunch.freeze("warn")
    assert loader.load(SMALL, store=store).path.is_file()
    said = capfd.readouterr().err
    assert "onelaunch: warning:" in said
    assert f"onelaunch build --set {SMALL.settings()}" in said


def test_freeze_lets_loaded_and_stored_kernels_through(store: Store, builds: list[str]) -> None:
    kernel = loader.load(SMALL, store=store)
    onelaunch.freeze()
    assert loader.load(SMALL, store=store) is kernel
    loader._loaded.clear()
    assert loader.load(SMALL, store=store).key == kernel.key
    assert len(builds) == 1


def test_policies_that_do_not_exist(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(JitPolicyError, match="'never'"):
        onelaunch.freeze("never")  # type: ignore[arg-type]
    monkeypatch.setenv("ONELAUNCH_JIT", "never")
    with pytest.raises(JitPolicyError, match="ONELAUNCH_JIT is 'never'; allowed: allow, warn, error"):
        loader.load(SMALL, store=store)
