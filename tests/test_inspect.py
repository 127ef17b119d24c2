"""Inspection of kernels: finding one by name, its views, and the differences of two."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from onelaunch import PRESETS, ArgumentError, ConfigError, KernelConfig, StoreError, ToolchainError, preset, render
from onelaunch.build import binary, toolchain
from onelaunch.cache.store import Store
from onelaunch.emit.binding import module_name, render_binding
from onelaunch.inspect import editors, kernels, machine_code
from onelaunch.inspect.diff import difference
from onelaunch.inspect.kernels import Subject, find
from onelaunch.inspect.views import facts, view
from onelaunch.load import loader

CPU = KernelConfig(fields=("cache_seqlens",), target="cpu")
# Small enough to compile quickly. Its running sums give it shared memory and inlined functions.
SMALL = KernelConfig(fields=("cache_seqlens", "cu_seqlens_k"))
ARCHS = ("90a",)


@pytest.fixture
def built() -> loader.Kernel:
    """A CUDA kernel that the session's cache holds."""
    return loader.load(SMALL, ARCHS)


def aside(config: KernelConfig, tmp_path: Path) -> Subject:
    """A configuration of which nothing is built: its views compile aside."""
    return kernels.of_config("aside", config, ARCHS, Store(tmp_path / "empty"))


# ---------------------------------------------------------------------------------------- what a name stands for


def test_a_preset_settings_and_the_defaults(tmp_path: Path) -> None:
    empty = Store(tmp_path / "empty")
    for name, settings, target, config in (
        ("nsa-decode-3", None, None, preset("nsa-decode-3")),
        ("nsa-decode-3", "page_size=16", "cpu", preset("nsa-decode-3").replace(page_size=16, target="cpu")),
        (None, "num_backends=5", None, KernelConfig(num_backends=5)),
        (None, None, None, KernelConfig()),
    ):
        found = find(name, settings, target, ("100a",), empty)
        assert (found.config, found.source, found.symbol) == (config, render(config), config.symbol)
        assert found.archs == (() if config.target == "cpu" else ("100a",))
        assert found.entry is None
        assert found.edited is None
    assert not empty.root.exists(), "looking wrote to the cache"


def test_a_key_prefix_and_an_entrys_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = loader.load(CPU)
    folder = kernel.path.parent
    for name in (kernel.key, kernel.key[:12], str(folder)):
        found = find(name)
        assert (found.config, found.source, found.archs) == (CPU, render(CPU), ())
        assert found.entry is not None
        assert found.entry.key == kernel.key
    assert find(None, CPU.settings()).entry is not None, "the entry wasn't found by its configuration"
    # find() also looks in a prebuilt folder.
    monkeypatch.setenv("ONELAUNCH_PREBUILT", str(folder.parent.parent))
    assert find(kernel.key[:12], store=Store(Path("/nonexistent"))).config == CPU


@pytest.mark.parametrize("name", ["nsa-decode-3", "nsa-copy-3-rows", "flashinfer-decode-3", "sglang-draft-2"])
def test_a_file_of_emitted_source_leads_to_its_configuration(name: str, tmp_path: Path) -> None:
    for config in (PRESETS[name], PRESETS[name].replace(unroll=4, target="cpu")):
        file = tmp_path / "kernel.cu"
        file.write_text(render(config), encoding="utf-8")
        found = find(str(file))
        assert (found.config, found.symbol, found.edited) == (config, config.symbol, None)
        file.write_text(render(config) + "// mine\n", encoding="utf-8")
        assert find(str(file)).edited == file
        assert find(str(file)).config == config


def test_what_stands_for_no_kernel(tmp_path: Path) -> None:
    kernel = loader.load(CPU)
    (tmp_path / "other.cu").write_text("int main() {}\n")
    cases: list[tuple[tuple[Any, ...], type[Exception], str]] = [
        (("nsa-decod-3",), ConfigError, "Did you mean 'nsa-decode-"),
        (("0000000000000000",), StoreError, "No entry's key begins with '0000000000000000'"),
        ((str(tmp_path),), StoreError, "isn't an entry of a cache"),
        ((str(tmp_path / "other.cu"),), ConfigError, "isn't a kernel's source"),
        ((str(tmp_path / "no.cu"),), OSError, "No such file"),
        ((kernel.key[:12], "unroll=4"), ConfigError, "--set and --target change a preset"),
    ]
    for arguments, error, text in cases:
        with pytest.raises(error, match=re.escape(text)):
            find(*arguments)


def test_a_prefix_of_several_keys(tmp_path: Path) -> None:
    store = Store(tmp_path / "cache")
    for key in ("abcd" + "0" * 60, "abcd" + "1" * 60):
        (store.root / "entries" / key).mkdir(parents=True)
    with pytest.raises(StoreError, match="2 entries' keys begin with 'abcd'; give more digits"):
        find("abcd", store=store)


@pytest.mark.nvcc
def test_an_entry_of_another_version_is_what_it_was(tmp_path: Path, built: loader.Kernel) -> None:
    """Its manifest names settings that this version doesn't know; its files are shown as they are."""
    entry = loader.entry_of(built)
    manifest = {**entry.manifest, "config": {"colour": "red"}}
    found = kernels.of_entry(type(entry)(entry.key, entry.path, manifest))
    assert found.config is None
    assert view(found, "cuda") == entry.source
    with pytest.raises(ArgumentError, match="doesn't say which configuration it is for"):
        view(found, "binding")


# ------------------------------------------------------------------------------------------------ views


def test_the_binding_the_commands_and_the_key(tmp_path: Path) -> None:
    kernel = loader.load(CPU)
    for found in (find(kernel.key[:12]), find(None, CPU.settings())):
        assert view(found, "binding") == render_binding(CPU, module_name(CPU.symbol))
        commands = facts(found, "command")
        assert commands["onelaunch"] == f"onelaunch build --set {CPU.settings()}"
        assert commands["recorded"] == kernel.manifest["command"]
        key = facts(found, "key")
        assert (key["configuration"], key["build"], key["built"]) == (CPU.key, kernel.key, str(kernel.path.parent))
    empty = kernels.of_config("cpu", CPU, store=Store(tmp_path / "empty"))
    key = facts(empty, "key")
    assert (key["build"], key["built"]) == (kernel.key, "no"), "the key it would have isn't the one it gets"
    assert key["made of"]["source"] == hashlib.sha256(render(CPU).encode()).hexdigest()
    # The compiler command that is shown works.
    source = tmp_path / f"{CPU.symbol}.cu"
    source.write_text(empty.source, encoding="utf-8")
    subprocess.run(facts(empty, "command")["compiler"], shell=True, check=True, cwd=tmp_path)
    assert source.with_suffix(".o").stat().st_size > 0


@pytest.mark.nvcc
def test_resources_as_they_were_recorded_and_as_they_are_found_aside(built: loader.Kernel, tmp_path: Path) -> None:
    recorded = machine_code.resources(find(built.key[:12]))
    assert recorded == built.resources
    assert recorded["90a"]["registers"] > 0
    assert recorded["90a"]["shared_bytes"] >= 4 * SMALL.threads / 32
    assert machine_code.resources(aside(SMALL, tmp_path)) == recorded
    assert "registers" in view(find(built.key[:12]), "resources")


@pytest.mark.nvcc
def test_sass_is_the_entrys_own(built: loader.Kernel, tmp_path: Path) -> None:
    inside, outside = (view(kernel, "sass") for kernel in (find(built.key[:12]), aside(SMALL, tmp_path)))
    assert f"\n{SMALL.symbol}:\n" in inside, "the kernel's name isn't readable"
    assert "_Z" not in inside
    assert re.search(r"/\*[0-9a-f]{4}\*/ +\w", inside)
    assert re.search(r"\bEXIT\b", inside)
    assert inside == outside, "the code compiled aside differs from the built one"


@pytest.mark.nvcc
def test_ptx_is_what_ptxas_takes(tmp_path: Path) -> None:
    found = aside(SMALL, tmp_path)
    text = view(found, "ptx", annotate=True)
    assert f".entry {SMALL.symbol}(" in text
    (tmp_path / "k.ptx").write_text(text, encoding="utf-8")
    ptxas = toolchain.find_toolkit().nvcc.parent / "ptxas"
    subprocess.run([ptxas, "-arch=sm_90a", "k.ptx", "-o", "k.cubin"], check=True, cwd=tmp_path)
    used = binary.resources(tmp_path / "k.cubin", binary.find_cuobjdump())
    assert used[""]["registers"] == machine_code.resources(found)["90a"]["registers"]


@pytest.mark.nvcc
@pytest.mark.parametrize("what", ["ptx", "sass"])
def test_annotations_are_lines_of_the_source(what: str, tmp_path: Path) -> None:
    found = aside(SMALL, tmp_path)
    source = found.source.splitlines()
    annotated = view(found, what, annotate=True).splitlines()
    notes = [re.match(r"\s+// (\d+): (.*)$", line) for line in annotated]
    named = {int(note[1]): note[2] for note in notes if note}
    assert len(named) > 5
    assert all(source[number - 1].strip() == text for number, text in named.items())
    assert any("seq_lens" in text for text in named.values())
    code = [line for line, note in zip(annotated, notes, strict=True) if not note]
    plain = view(found, what).splitlines()
    assert [line for line in code if "sm_30_intrinsics.hpp" not in line] == plain


def test_the_cpu_has_no_machine_code_here(tmp_path: Path) -> None:
    kernel = find(None, CPU.settings())
    for what in ("ptx", "sass", "resources"):
        with pytest.raises(ArgumentError, match="is built for the CPU"):
            view(kernel, what)
    with pytest.raises(ArgumentError, match="--annotate is for ptx and sass"):
        view(kernel, "cuda", annotate=True)


@pytest.mark.nvcc
@pytest.mark.parametrize(("what", "program"), [("sass", "nvdisasm"), ("resources", "cuobjdump")])
def test_a_missing_program_is_named(what: str, program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binary, "find_program", lambda *args: None)
    with pytest.raises(ToolchainError, match=rf"^{program} is missing: .* Install the toolkit's package"):
        view(aside(SMALL, tmp_path), what)


@pytest.mark.nvcc
def test_without_cuobjdump_sass_is_compiled_aside(built: loader.Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = view(find(built.key[:12]), "sass")
    monkeypatch.setattr(binary, "find_cuobjdump", lambda *args: None)
    assert view(find(built.key[:12]), "sass") == wanted


@pytest.mark.nvcc
def test_a_source_that_doesnt_compile_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "k.cu"
    file.write_text(render(SMALL).replace("kThreads", "kThreats", 1), encoding="utf-8")
    with pytest.raises(ToolchainError, match=r"nvcc can't take .*k\.cu: .*kThrea.s"):
        view(find(str(file), archs=ARCHS), "ptx")


@pytest.mark.parametrize(
    ("mangled", "name"),
    [
        ("_ZN36_GLOBAL__N__b7224ec5_4_k_cu_1e8eebd56kernelENS_6ParamsE", "kernel"),
        ("_ZN36_GLOBAL__N__b7224ec5_4_k_cu_1e8eebd56kernelENS_6ParamsE_param_0", "kernel_param_0"),
        (
            "_ZZN34_INTERNAL_b7224ec5_4_k_cu_1e8eebd536_GLOBAL__N__b7224ec5_4_k_cu_1e8eebd513gather_tablesERKNS0_6Params"
            "EE9pool_rows",
            "gather_tables__pool_rows",
        ),
        ("_Z3addii", "add"),
        ("_ZTV", "_ZTV"),
    ],
)
def test_mangled_names(mangled: str, name: str) -> None:
    assert machine_code._demangled(mangled) == name


# ------------------------------------------------------------------------------------------------ differences


def test_a_fact_that_changed_and_nothing_else(tmp_path: Path) -> None:
    one, other = (aside(preset(name), tmp_path) for name in ("nsa-decode-3", "nsa-decode-3-page16"))
    text = difference(one, other, "cuda")
    changed = [line for line in text.splitlines()[2:] if line.startswith(("+", "-"))]
    assert changed == [
        "+//   page_size               16",
        "-constexpr int kPageSize = 64;  // tokens",
        "-constexpr int kPageShift = 6;  // log2(kPageSize), if kPageSize is a power of two",
        "+constexpr int kPageSize = 16;  // tokens",
        "+constexpr int kPageShift = 4;  // log2(kPageSize), if kPageSize is a power of two",
    ]
    assert one.symbol not in text
    assert difference(one, one, "cuda") == ""
    assert len(difference(one, other, "cuda", context=0)) < len(text)


@pytest.mark.nvcc
def test_machine_code_without_addresses_and_names(tmp_path: Path) -> None:
    # The difference hides keys, symbols and hashes of paths. Only instructions with index_topk are left.
    configs = (KernelConfig(fields=("nsa_cache_seqlens",), index_topk=topk) for topk in (2048, 1024))
    one, other = (aside(config, tmp_path) for config in configs)
    for what, numbers in (("sass", ("0x800", "0x400")), ("ptx", ("2048", "1024"))):
        lines = difference(one, other, what, context=0).splitlines()[2:]
        changed = [line for line in lines if not line.startswith("@@")]
        removed, added = ([line[1:] for line in changed if line[0] == sign] for sign in "-+")
        assert len(removed) > 0
        assert all(numbers[0] in line for line in removed)
        assert added == [line.replace(*numbers) for line in removed]


@pytest.mark.nvcc
def test_resources_differ_by_number(built: loader.Kernel, tmp_path: Path) -> None:
    less = aside(KernelConfig(fields=("cache_seqlens",)), tmp_path)
    assert machine_code.resources(less)["90a"]["shared_bytes"] == 0
    lines = difference(less, find(built.key[:12]), "resources", context=0).splitlines()
    assert [line.split() for line in lines if "shared_bytes" in line] == [
        ["-", "shared_bytes", "0"],
        ["+", "shared_bytes", str(built.resources["90a"]["shared_bytes"])],
    ]


# ------------------------------------------------------------------------------------------------ for editors


@pytest.mark.nvcc
def test_compile_commands(tmp_path: Path) -> None:
    files = {}
    for config in (SMALL, CPU):
        path = tmp_path / f"{config.symbol}.cu"
        path.write_text(render(config), encoding="utf-8")
        files[path] = find(str(path), archs=ARCHS)
    gpu, cpu = json.loads(editors.compile_commands(files))
    toolkit = toolchain.find_toolkit()
    assert {"-xcuda", f"--cuda-path={toolkit.home}", "--cuda-gpu-arch=sm_90a"} <= set(gpu["arguments"])
    assert (toolkit.include / "cuda_runtime.h").exists()
    assert [Path(command["file"]) for command in (gpu, cpu)] == list(files)
    # Any host compiler takes the arguments for clang++.
    host = toolchain.find_tools("cpu").compiler.path
    subprocess.run([host, *cpu["arguments"][1:]], check=True, cwd=cpu["directory"])
