"""From source to a loaded module: strict compilers, the object's requirements, and a second process."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import onelaunch
import pytest
import support
from onelaunch import PRESETS, KernelConfig, render
from onelaunch.build import compile as compiler
from onelaunch.build import toolchain
from onelaunch.cache.store import Store
from onelaunch.emit.binding import render_binding
from onelaunch.load import loader
from onelaunch.spec import layout
from usable import SMALL, SMALL_CUDA

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
