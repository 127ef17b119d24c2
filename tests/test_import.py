"""`import onelaunch`: its imports, its refusals, and that lazy names behave like any others."""

from __future__ import annotations

import ast
import os
import pickle
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import onelaunch
import pytest

HEAVY = ("torch", "jinja2", "numpy", "ninja", "click")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("use", "imported"),
    [
        ("onelaunch.__version__, onelaunch.KernelConfig, onelaunch.PRESETS, onelaunch.MetadataBuffers", []),
        ("onelaunch.preset('nsa-decode-3').key, onelaunch.ConfigError, dir(onelaunch)", []),
        ("onelaunch.Kernel, onelaunch.specialize, onelaunch.freeze('allow')", []),
        ("onelaunch.render(onelaunch.preset('nsa-decode-3'))", ["jinja2"]),
        ("onelaunch.reference.refresh", ["torch", "numpy"]),
    ],
    ids=["configurations", "keys", "kernels", "render", "reference"],
)
def test_nothing_heavy_is_imported_before_it_is_needed(use: str, imported: list[str]) -> None:
    done = run(f"import sys, onelaunch\n{use}\nprint(*[name for name in {HEAVY} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == imported


def test_the_import_does_nothing(tmp_path: Path) -> None:
    """It writes no file, starts no process, touches no GPU, and doesn't import torch's build tools."""
    code = """
import subprocess, sys
def refuse(*args, **kwargs):
    raise SystemExit("a process was started")
started = subprocess.run, subprocess.Popen
subprocess.run = subprocess.Popen = refuse
import onelaunch, onelaunch.build.toolchain
assert "torch" not in sys.modules
subprocess.run, subprocess.Popen = started
import torch  # which starts one
subprocess.run = subprocess.Popen = refuse
onelaunch.bind, onelaunch.specialize
assert not torch.cuda.is_initialized()
print(*({"torch.utils.cpp_extension", "jinja2", "ninja", "filelock", "click", "setuptools"} & set(sys.modules)))
"""
    folders = {"HOME": ".", "XDG_CACHE_HOME": "cache", "ONELAUNCH_CACHE_DIR": "store", "TMPDIR": "."}
    environment = {**os.environ, **{name: str(tmp_path / path) for name, path in folders.items()}}
    done = subprocess.run(
        [sys.executable, "-B", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_public_name_is_there_and_is_declared_once() -> None:
    """The imports for type checkers and the table of lazy names list the same names."""
    tree = ast.parse(Path(str(onelaunch.__file__)).read_text(encoding="utf-8"))
    blocks = [n for n in tree.body if isinstance(n, ast.If) and isinstance(n.test, ast.Name)]
    (block,) = [n for n in blocks if n.test.id == "TYPE_CHECKING"]  # type: ignore[attr-defined]
    declared = {
        alias.name: f"{node.module}.reference" if alias.name == "reference" else node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert declared == onelaunch._LAZY
    for name in onelaunch.__all__:
        value = getattr(onelaunch, name)
        assert getattr(onelaunch, name) is value
        assert name in dir(onelaunch)
        assert name == "reference" or not hasattr(value, "__path__")
        assert type(value).__name__ != "module" or name == "reference"


def test_lazy_names_behave_like_any_others() -> None:
    from onelaunch import Plan, bind  # a `from` import

    assert bind.__module__ == "onelaunch.run.bind"
    assert pickle.loads(pickle.dumps((bind, Plan))) == (bind, Plan)
    assert bind.__doc__
    with pytest.raises(AttributeError, match="module 'onelaunch' has no attribute 'binds'"):
        onelaunch.binds  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'binds'"):
        from onelaunch import binds  # noqa: F401


@pytest.mark.long
def test_a_lazy_name_is_found_while_torch_compile_traces() -> None:
    """The process hasn't used the name before, and the graph has no break."""
    done = run(
        """
import torch
import onelaunch
def copy(source, destination):
    onelaunch.fused_metadata_copy_cuda(source, destination, bs=2)
    return destination.cache_seqlens + 1
make = lambda: onelaunch.MetadataBuffers(cache_seqlens=torch.tensor([5, 6], dtype=torch.int32))
source, destination = make(), make()
destination.cache_seqlens.zero_()
print(torch.compile(copy, backend="eager", fullgraph=True)(source, destination).tolist())
"""
    )
    assert done.stdout == "[6, 7]\n", done.stderr


@pytest.mark.parametrize(
    ("disguise", "message"),
    [
        ("sys.platform = 'win32'", "onelaunch runs on Linux only, and this is win32."),
        ("sys.abiflags = 't'", "onelaunch doesn't support free-threaded Python yet. Use a Python built with the GIL."),
    ],
)
def test_what_cannot_run_it_is_refused_at_import(disguise: str, message: str) -> None:
    done = run(f"import sys\n{disguise}\nimport onelaunch")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ImportError: {message}"


@pytest.mark.parametrize(
    ("version", "sentence"),
    [
        ("2.9.1+cu128", "torch is 2.9.1+cu128, and onelaunch needs 2.11 or later. Nothing was changed: use an engine"),
        ("", "torch isn't installed. Install the torch that your engine needs, 2.11 or later."),
    ],
)
def test_an_older_torch_is_a_sentence_at_the_first_use(version: str, sentence: str, tmp_path: Path) -> None:
    """sys.path leads to the metadata of an older torch before the real one's."""
    folder = tmp_path / f"torch-{version or 'x'}.dist-info"
    folder.mkdir()
    if version:
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    code = f"""
import importlib.metadata, sys
sys.path.insert(0, {str(tmp_path)!r})
if not {version!r}:
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)
    importlib.metadata.version = missing
import onelaunch
for use in (lambda: onelaunch.bind, lambda: onelaunch.specialize(onelaunch.KernelConfig(target="cpu"))):
    try:
        use()
    except onelaunch.ToolchainError as error:
        print(error)
print("torch" in sys.modules)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr
    first, second, imported = done.stdout.splitlines()
    assert first == second
    assert first.startswith(sentence)
    assert imported == "False"


def test_no_installer_would_exchange_an_engines_torch() -> None:
    needs = [need for need in metadata.requires("onelaunch") or () if "extra" not in need]
    assert "torch" in needs, "a bound on torch's version could make an installer exchange it"
    assert sorted(re.match(r"[\w-]+", need)[0] for need in needs) == ["click", "jinja2", "ninja", "setuptools", "torch"]
