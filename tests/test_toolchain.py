"""Toolchain checks: host compiler, ninja, architectures, remembered answers. Shell scripts stand for the programs."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from onelaunch.build import programs, toolchain
from onelaunch.errors import ToolchainError
from toolkits import GCC_12, compiler, make_bare, script, toolkit, touch

ELF = b"\x7fELF rest of a program"


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_bare(tmp_path, monkeypatch)


# The host compiler


def test_compilers_on_path_in_order(tmp_path: Path) -> None:
    compiler(tmp_path / "bin" / "clang++", "clang version 18.1.3")
    compiler(tmp_path / "bin" / "g++")
    found = toolchain.find_host_compiler()
    assert found == toolchain.HostCompiler(tmp_path / "bin" / "c++", GCC_12.removeprefix("g++ "), "c++ on PATH")
    for name, following in (("c++", "g++"), ("g++", "clang++")):
        (tmp_path / "bin" / name).unlink()
        toolchain.reset()
        assert toolchain.find_host_compiler().path.name == following


def test_a_compiler_beside_the_interpreter_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    path = compiler(tmp_path / "venv" / "bin" / "g++")
    assert toolchain.find_host_compiler().path == path


@pytest.mark.parametrize(
    ("command", "flags"),
    [("my++", ()), ("ccache my++", ()), ("/usr/bin/sccache my++ --sysroot='/a b'", ("--sysroot=/a b",))],
)
def test_cxx_with_launcher_and_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, flags: tuple[str, ...]
) -> None:
    path = compiler(tmp_path / "bin" / "my++", "my++ (Mine) 13.1.0")
    monkeypatch.setenv("CXX", command)
    found = toolchain.find_host_compiler()
    assert (found.path, found.version, found.flags) == (path, "(Mine) 13.1.0", flags)
    assert found.origin == f"CXX={command!r} in the environment"


@pytest.mark.parametrize("command", ["/no/such/g++", "ccache", "'unbalanced", "failing++"])
def test_bogus_cxx_is_skipped_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    script(tmp_path / "bin" / "failing++", "exit 1")
    monkeypatch.setenv("CXX", command)
    found = toolchain.find_host_compiler()
    assert found.path.name == "c++"
    assert f"skipped CXX={command!r}" in found.origin


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin" / "c++").unlink()
    monkeypatch.setenv("CXX", "/no/such/g++")
    with pytest.raises(ToolchainError, match=r"(?s)CXX='/no/such/g\+\+'.*c\+\+ on PATH.*clang\+\+ on PATH.*set CXX"):
        toolchain.find_host_compiler()


# nvcc and the host compiler together


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("g++ (Debian 14.2.0-8) 14.2.0", True),
        ("g++ (GCC) 15.1.1 20250425 (Red Hat 15.1.1-1)", False),
        ("x86_64-conda-linux-gnu-c++ (conda-forge gcc 15.2.0-1) 15.2.0", False),
        ("Debian clang version 19.1.7", True),
        ("Ubuntu clang version 20.1.2 (0ubuntu1)", False),
        ("nvc++ 99.5-0 64-bit target on x86-64 Linux", True),
    ],
)
def test_pair_follows_the_toolkits_own_header(tmp_path: Path, version: str, fits: bool) -> None:
    toolkit(tmp_path / "local" / "cuda")
    compiler(tmp_path / "bin" / "c++", version)
    pair = toolchain.find_toolkit(), toolchain.find_host_compiler()
    if fits:
        toolchain.check_pair(*pair)
    else:
        with pytest.raises(
            ToolchainError, match=r"accepts (g\+\+ up to version 14|clang\+\+ up to version 19), .*CXX="
        ):
            toolchain.check_pair(*pair)


def test_pair_error_names_a_compiler_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit(tmp_path / "local" / "cuda")
    compiler(tmp_path / "bin" / "c++", "g++ (GCC) 15.1.0")
    script(tmp_path / "bin" / "ninja", "echo 1.13")
    with pytest.raises(ToolchainError, match=r"install one, then set CXX, as in CXX=g\+\+-14\."):
        toolchain.preflight_cuda()
    compiler(tmp_path / "bin" / "g++-13", "g++ (GCC) 13.3.0")
    with pytest.raises(ToolchainError, match=r"set CXX=g\+\+-13, which is on PATH"):
        toolchain.preflight_cuda()
    monkeypatch.setenv("CXX", "g++-13")
    assert toolchain.preflight_cuda()[1].path == tmp_path / "bin" / "g++-13"


# ninja


def test_ninja_of_the_package_then_beside_the_interpreter_then_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ToolchainError, match=r"(?s)ninja package.*beside the interpreter.*PATH.*pip install ninja"):
        toolchain.find_ninja()
    on_path = script(tmp_path / "bin" / "ninja", "echo 1.11")
    assert toolchain.find_ninja() == on_path
    toolchain.reset()
    beside = script(tmp_path / "venv" / "bin" / "ninja", "echo 1.12")
    assert toolchain.find_ninja() == beside
    toolchain.reset()
    # A module named ninja that isn't the ninja package is not imported and not used.
    touch(tmp_path / "site" / "ninja.py", "raise SystemExit('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert toolchain.find_ninja() == beside
    toolchain.reset()
    package = script(tmp_path / "site" / "bin" / "ninja", "echo 1.13")
    touch(tmp_path / "site" / "ninja-1.13.dist-info" / "METADATA", "Name: ninja\nVersion: 1.13\n")
    touch(tmp_path / "site" / "ninja-1.13.dist-info" / "RECORD", "bin/ninja,,\n")
    assert toolchain.find_ninja() == package
    toolchain.reset()
    script(package, "exit 1")
    assert toolchain.find_ninja() == beside


# Architectures


def test_no_gpu_is_asked_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert toolchain.architectures() == ("90a",)


@pytest.mark.parametrize(
    ("capability", "name"),
    [((8, 0), "80"), ((8, 9), "89"), ((9, 0), "90a"), ((10, 0), "100a"), ((12, 0), "120a")],
)
def test_architecture_of_a_device(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], name: str) -> None:
    def asked(device: int) -> tuple[int, int]:
        if device != 1:
            raise AssertionError("Invalid device id")
        return capability

    cuda = SimpleNamespace(is_available=lambda: True, get_device_capability=asked, device_count=lambda: 2)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    assert toolchain.architectures(1) == (name,)
    with pytest.raises(ToolchainError, match=r"CUDA device 7 .* one of the 2 visible devices"):
        toolchain.architectures(7)


@pytest.mark.parametrize(
    ("failing", "expected"),
    [("", ("100a",)), ("cuInit", ("90a",)), ("cuDeviceGet", ("90a",)), ("cuDeviceGetAttribute", ("90a",))],
)
def test_the_driver_is_asked_where_torch_is_not_imported(
    monkeypatch: pytest.MonkeyPatch, failing: str, expected: tuple[str, ...]
) -> None:
    class Driver:
        def cuInit(self, flags: int) -> int:
            return 100 * (failing == "cuInit")

        def cuDeviceGet(self, device: Any, number: int) -> int:
            device._obj.value = 7 + number
            return 101 * (failing == "cuDeviceGet")

        def cuDeviceGetAttribute(self, value: Any, attribute: int, device: ctypes.c_int) -> int:
            value._obj.value = {75: 10, 76: 0}[attribute] if device.value == 7 else 5
            return failing == "cuDeviceGetAttribute"

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: {"libcuda.so.1": Driver()}[name])
    assert toolchain.current_architectures() == expected
    assert "torch" not in sys.modules
    monkeypatch.setenv("ONELAUNCH_CUDA_ARCH", "89")
    assert toolchain.current_architectures() == ("89",)


def test_no_driver_gives_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert toolchain.current_architectures() == ("90a",)
    assert "torch" not in sys.modules


def test_torch_without_cuda_gives_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cuda = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda=None)))
    assert toolchain.architectures(0) == ("90a",)
    toolkit(tmp_path / "local" / "cuda")
    assert toolchain.find_toolkit().version == "13.0.88"


def test_architectures_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONELAUNCH_CUDA_ARCH", "9.0a, 100f,sm_89,90a")
    assert toolchain.architectures() == ("90a", "100f", "89")
    monkeypatch.setenv("ONELAUNCH_CUDA_ARCH", "90a,hopper")
    with pytest.raises(ToolchainError, match="'hopper' in ONELAUNCH_CUDA_ARCH='90a,hopper'"):
        toolchain.architectures()


def test_gencode_flags(tmp_path: Path) -> None:
    flags = ["-gencode=arch=compute_90a,code=sm_90a", "-gencode=arch=compute_100f,code=sm_100f"]
    assert toolchain.gencode_flags(["90a", "10.0f", "sm_90a"]) == flags
    toolkit(tmp_path / "local" / "cuda")
    found = toolchain.find_toolkit()
    assert toolchain.gencode_flags(["90a", "100f"], found) == flags
    with pytest.raises(ToolchainError, match="architecture '120a'; it supports 80, 90, 90a, 100, 100a, 100f"):
        toolchain.gencode_flags(["90a", "120a"], found)
    with pytest.raises(ToolchainError, match="No architecture"):
        toolchain.gencode_flags([])
    with pytest.raises(ToolchainError, match="'x' in the list"):
        toolchain.gencode_flags(["x"])


# What is remembered


def test_a_search_runs_once_until_the_environment_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = toolkit(tmp_path / "local" / "cuda")
    toolchain.find_toolkit()
    calls = (home / "calls").read_text()
    toolchain.find_toolkit()
    assert (home / "calls").read_text() == calls
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "other", "13.1.1")))
    assert toolchain.find_toolkit().version == "13.1.1"
    monkeypatch.delenv("CUDA_HOME")
    assert toolchain.find_toolkit().version == "13.0.88"


def answered(program: Path) -> int:
    """How often a fresh process runs a program for its answer: 0 if the cache has it."""
    asked: list[Path] = []
    programs.answer(program, lambda path: (asked.append(path), "13.0")[1])
    programs.save_answers()
    programs.reset()
    return len(asked)


def binary(path: Path, *more: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(ELF + "".join(more).encode())
    return path


def test_a_binarys_answer_is_remembered_until_it_changes(tmp_path: Path) -> None:
    """Keyed by the real file behind links. Kept in one note of an existing cache that no other user can write."""
    real = binary(tmp_path / "gcc-13" / "g++")
    link = tmp_path / "g++"
    link.symlink_to(real)
    assert [answered(link), answered(link)] == [1, 1]
    assert not (tmp_path / "cache").exists()
    (tmp_path / "cache").mkdir(mode=0o700)
    assert [answered(link), answered(link)] == [1, 0]
    binary(real, "upgraded")
    assert [answered(link), answered(link)] == [1, 0]
    os.utime(real, (1, 1))
    assert [answered(link), answered(link)] == [1, 0]
    link.unlink()
    link.symlink_to(binary(tmp_path / "gcc-14" / "g++", "upgraded"))
    assert [answered(link), answered(link)] == [1, 0]
    file = tmp_path / "cache" / "index" / f"{programs.ANSWERS_NOTE}.json"
    for text in ("[]", "{", '{"a": 1}', '{"a": {}}', file.read_text().replace('"13.0"', "13")):
        file.write_text(text)
        assert [answered(link), answered(link)] == [1, 0], text
    file.chmod(0o666)
    assert [answered(link), answered(link)] == [1, 0], "a note that others can write is replaced"
    (tmp_path / "cache").chmod(0o777)
    assert [answered(link), answered(link)] == [1, 1]


def test_what_stands_for_another_program_is_asked_each_time(tmp_path: Path) -> None:
    """An upgrade of a compiler behind a script or a launcher's link must be noticed."""
    (tmp_path / "cache").mkdir(mode=0o700)
    ccache = tmp_path / "lib" / "g++"
    ccache.parent.mkdir()
    ccache.symlink_to(binary(tmp_path / "bin" / "ccache"))
    for program in (script(tmp_path / "wrapper", "exec g++"), ccache):
        assert [answered(program), answered(program)] == [1, 1]


def test_what_a_tool_says_on_stderr_is_not_its_version(tmp_path: Path) -> None:
    """A dynamic linker that can't preload a library writes to stderr, for example."""
    script(tmp_path / "bin" / "c++", f"echo 'ERROR: ld.so: object cannot be preloaded' >&2; echo '{GCC_12}'")
    assert toolchain.find_host_compiler().version == GCC_12.removeprefix("g++ ")
    script(tmp_path / "bin" / "c++", f"echo '{GCC_12}' >&2")
    toolchain.reset()
    with pytest.raises(ToolchainError, match=r"c\+\+ --version ended with status 0: g\+\+ \(GCC\)"):
        toolchain.find_host_compiler()


def test_tools_are_asked_in_the_clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("LD_PRELOAD", "NVCC_APPEND_FLAGS", "CPATH", "LIBRARY_PATH", "CFLAGS", "LC_MESSAGES", "LANG")
    for name in names:
        monkeypatch.setenv(name, "/somebody's")
    script(tmp_path / "bin" / "c++", f"echo '{GCC_12}'; /usr/bin/env >{tmp_path}/seen")
    toolchain.find_host_compiler()
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines())
    assert not set(names) & set(seen)
    assert seen["LC_ALL"] == "C"


# The report


def test_describe_turns_failures_into_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONELAUNCH_CUDA_ARCH", "120a")
    rows = {tool: (value, where) for tool, value, where in toolchain.describe()}
    assert rows["CUDA toolkit"][0] == rows["ninja"][0] == toolchain.NOT_USABLE
    assert "Tried:" in rows["CUDA toolkit"][1]
    assert rows["host compiler"] == (f"{tmp_path}/bin/c++ (GCC) 12.2.0", "c++ on PATH")
    assert rows["architectures"] == ("120a", "ONELAUNCH_CUDA_ARCH in the environment")
    home = toolkit(tmp_path / "local" / "cuda")
    compiler(tmp_path / "bin" / "c++", "g++ (GCC) 15.1.0")
    toolchain.reset()
    rows = {tool: (value, where) for tool, value, where in toolchain.describe()}
    assert rows["CUDA toolkit"] == (f"{home} (13.0.88)", str(home))
    assert rows["nvcc with host compiler"][0] == toolchain.NOT_USABLE
    assert "can't build for architecture '120a'" in rows["architectures"][1]


def test_a_compiler_by_another_name_is_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GCC's first line begins with the name it was called by, so c++ and g++ would otherwise have different keys."""
    versions = set()
    for name in ("c++", "g++-12", "x86_64-linux-gnu-g++"):
        script(tmp_path / name, f"echo '{name} (Debian 12.2.0-14+deb12u1) 12.2.0'\necho 'Copyright (C) 2022'")
        monkeypatch.setenv("CXX", str(tmp_path / name))
        versions.add(toolchain.find_host_compiler().version)
    assert versions == {"(Debian 12.2.0-14+deb12u1) 12.2.0"}
