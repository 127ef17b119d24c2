"""Discovery and checks of the toolchain, on toolkits made of shell scripts and on the real nvcc."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from onelaunch.build import programs, toolchain
from onelaunch.build import toolkit as toolkits
from onelaunch.errors import ToolchainError

HOST_CONFIG = """
#if __GNUC__ > 14
#error -- unsupported GNU version! gcc versions later than 14 are not supported!
#endif
#if (__clang_major__ >= 20) || (__clang_major__ < 3)
#error -- unsupported clang version! clang version must be less than 20 and greater than 3.2 .
#endif
"""
GCC_12 = "g++ (GCC) 12.2.0"
ELF = b"\x7fELF rest of a program"

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None and not Path("/usr/local/cuda").exists(), reason="no CUDA toolkit"
)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def compiler(path: Path, version: str = GCC_12) -> Path:
    return script(path, f"echo '{version}'; echo 'a second line'")


def touch(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def toolkit(
    home: Path, version: str = "13.0.88", include: str = "include", lib: str = "lib64", report: bool = True
) -> Path:
    """A complete toolkit; its nvcc reports the folder that it lies in, unless report is False."""
    release = ".".join(version.split(".")[:2])
    top = f"echo '#$ _HERE_={home}/bin'; echo '#$ TOP={home}/bin/..'" if report else "exit 1"
    script(
        home / "bin" / "nvcc",
        f"""echo "$@" >> {home}/calls
case "$1" in
--version) echo 'Cuda compilation tools, release {release}, V{version}'; echo 'Build cuda_{release}.r/c.1';;
--dryrun) {{ {top}; }} >&2;;
--help) echo "Allowed: 'sm_80','sm_90','sm_90a','sm_100','sm_100a','sm_100f'";;
esac""",
    )
    touch(home / include / "cuda_runtime.h")
    touch(home / include / "crt" / "host_config.h", HOST_CONFIG)
    touch(home / lib / "libcudart_static.a")
    script(home / "nvvm" / "bin" / "cicc", "")
    return home


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with a C++ compiler at tmp_path/bin/c++ and nothing else."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "CXX", "ONELAUNCH_CUDA_ARCH"):
        monkeypatch.delenv(name, raising=False)
    compiler(tmp_path / "bin" / "c++")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    monkeypatch.setattr(toolkits, "SYSTEM_ROOT", tmp_path / "local")
    monkeypatch.setenv("ONELAUNCH_CACHE_DIR", str(tmp_path / "cache"))
    # pip's toolkits are found through sys.path; an imported namespace package would follow it too.
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    toolchain.reset()


# The toolkit: where it is found


def test_each_place_is_used_when_the_better_ones_are_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places are filled from the least preferred up; each new one must win."""
    monkeypatch.setenv("CONDA_PREFIX", str(toolkit(tmp_path / "conda", "12.8.1")))
    assert toolchain.find_toolkit().version == "12.8.1"
    toolchain.reset()
    toolkit(tmp_path / "site" / "nvidia" / "cu13", "13.1.1", lib="lib")
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    assert toolchain.find_toolkit().version == "13.1.1"
    toolchain.reset()
    toolkit(tmp_path / "local" / "cuda-12.9", "12.9.1")
    toolkit(tmp_path / "local" / "cuda-12.10", "12.10.1")
    assert toolchain.find_toolkit().version == "12.10.1"
    toolchain.reset()
    toolkit(tmp_path / "local" / "cuda", "12.8.2")
    assert toolchain.find_toolkit().version == "12.8.2"
    toolkit(tmp_path / "on-path", "13.0.1")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{tmp_path}/on-path/bin")
    assert toolchain.find_toolkit().origin == "nvcc on PATH"
    monkeypatch.setenv("CUDA_PATH", str(toolkit(tmp_path / "cuda-path", "13.0.2")))
    assert toolchain.find_toolkit().version == "13.0.2"
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda-home", "13.0.3")))
    found = toolchain.find_toolkit()
    assert found.version == "13.0.3"
    assert found.build == "Build cuda_13.0.r/c.1"
    assert found.origin == f"CUDA_HOME='{tmp_path}/cuda-home' in the environment"


def test_a_wrapper_outside_the_toolkit_leads_to_the_toolkit(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "opt" / "cuda")
    script(tmp_path / "bin" / "nvcc", f'exec {home}/bin/nvcc "$@"')
    found = toolchain.find_toolkit()
    assert (found.home, found.nvcc) == (home, home / "bin" / "nvcc")
    assert found.include == home / "include"
    assert found.cudart_static == home / "lib64" / "libcudart_static.a"


def test_a_link_to_nvcc_is_followed_before_it_is_called(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "opt" / "cuda", report=False)
    (tmp_path / "bin" / "nvcc").symlink_to(home / "bin" / "nvcc")
    assert toolchain.find_toolkit().home == home


def test_nvcc_without_gcc_on_path_is_asked_again_with_the_host_compiler(tmp_path: Path) -> None:
    home = toolkit(tmp_path / "opt" / "cuda")
    wrapper = f"""case "$*" in
*-ccbin\\ {tmp_path}/bin/c++*|--version) exec {home}/bin/nvcc "$@";;
*) echo 'nvcc fatal: Failed to preprocess host compiler properties.'; exit 1;;
esac"""
    script(tmp_path / "bin" / "nvcc", wrapper)
    assert toolchain.find_toolkit().home == home


def test_headers_and_libraries_that_nvcc_itself_names_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a distribution puts headers in /usr/include."""
    home = toolkit(tmp_path / "opt" / "cuda", include="../usr/include", lib="../usr/lib")
    text = (home / "bin" / "nvcc").read_text()
    usr = f"{tmp_path}/opt/usr"
    (tmp_path / "opt/usr/lib/stubs").mkdir()
    named = f'echo \'#$ INCLUDES="-I{usr}/include" \'; echo \'#$ LIBRARIES=  "-L{usr}/lib/stubs" "-L{usr}/lib"\''
    script(home / "bin" / "nvcc", text.replace("--dryrun) { ", f"--dryrun) {{ {named}; "))
    monkeypatch.setenv("CUDA_HOME", str(home))
    found = toolchain.find_toolkit()
    assert (found.include, found.libdirs) == (tmp_path / "opt/usr/include", (tmp_path / "opt/usr/lib",))


def test_targets_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    target = "targets/x86_64-linux"
    home = toolkit(tmp_path / "local" / "cuda", include=f"{target}/include", lib=f"{target}/lib")
    found = toolchain.find_toolkit()
    assert (found.include, found.libdirs) == (home / target / "include", (home / target / "lib",))


def test_bogus_cuda_home_is_skipped_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = toolkit(tmp_path / "local" / "cuda")
    monkeypatch.setenv("CUDA_HOME", f":{home}")
    found = toolchain.find_toolkit()
    assert found.home == home
    assert f"skipped CUDA_HOME=':{home}' in the environment: there is no program" in found.origin


def test_nothing_found_lists_every_place_and_the_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/no/home")
    monkeypatch.setenv("CUDA_PATH", "/no/path")
    monkeypatch.setenv("CONDA_PREFIX", "/no/conda")
    (tmp_path / "local" / "cuda-12.8").mkdir(parents=True)
    with pytest.raises(ToolchainError) as caught:
        toolchain.find_toolkit()
    message = str(caught.value)
    places = (
        "CUDA_HOME='/no/home'",
        "CUDA_PATH='/no/path'",
        "nvcc on PATH",
        "local/cuda:",
        "local/cuda-12.8:",
    )
    for place in (*places, "CONDA_PREFIX='/no/conda'"):
        assert place in message
    assert 'pip install "cuda-toolkit[nvcc]' in message
    assert "CUDA_HOME to its folder" in message


def test_an_old_toolkit_is_refused_but_a_newer_one_behind_it_is_used(tmp_path: Path) -> None:
    toolkit(tmp_path / "local" / "cuda", "12.6.85")
    with pytest.raises(ToolchainError, match=r"is CUDA 12\.6\.85, older than 12\.8"):
        toolchain.find_toolkit()
    toolkit(tmp_path / "local" / "cuda-12.8", "12.8.61")
    assert toolchain.find_toolkit().version == "12.8.61"


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("lib64/libcudart_static.a", "lacks libcudart_static.a (pip: nvidia-cuda-runtime)"),
        ("include/cuda_runtime.h", "lacks cuda_runtime.h (pip: nvidia-cuda-runtime)"),
        ("include/crt/host_config.h", "lacks crt/host_config.h (pip: nvidia-cuda-crt)"),
        ("nvvm/bin/cicc", "lacks cicc (pip: nvidia-nvvm)"),
    ],
)
def test_a_missing_part_is_named_with_its_package(tmp_path: Path, part: str, said: str) -> None:
    (toolkit(tmp_path / "local" / "cuda") / part).unlink()
    with pytest.raises(ToolchainError) as caught:
        toolchain.find_toolkit()
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("body", "said"),
    [("echo broken; exit 3", "ended with status 3: broken"), ("echo hello", "names no release")],
)
def test_an_nvcc_that_does_not_answer_is_refused(tmp_path: Path, body: str, said: str) -> None:
    script(tmp_path / "bin" / "nvcc", body)
    with pytest.raises(ToolchainError, match=said):
        toolchain.find_toolkit()


# The toolkit: pip's packages


def test_pip_cu13(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    home = toolkit(site / "nvidia" / "cu13", "13.2.86", lib="lib")
    touch(site / "nvidia_nvvm-13.2.86.dist-info" / "METADATA", "Name: nvidia-nvvm\nVersion: 13.2.86\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    found = toolchain.find_toolkit()
    assert (found.home, found.libdirs) == (home, (home / "lib",))
    assert "nvidia" not in sys.modules


def test_pip_nvvm_newer_than_nvcc_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen with real wheels: ptxas 13.0 refuses the PTX that cicc 13.5 writes."""
    site = tmp_path / "site"
    toolkit(site / "nvidia" / "cu13", "13.0.88", lib="lib")
    touch(site / "nvidia_nvvm-13.5.37.dist-info" / "METADATA", "Name: nvidia-nvvm\nVersion: 13.5.37\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    with pytest.raises(ToolchainError, match=r'pip install "nvidia-nvvm==13\.0\.\*"'):
        toolchain.find_toolkit()


def test_pip_suggestion_keeps_the_release_that_torch_pins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    touch(site / "nvidia" / "cu13" / "include" / "cuda_runtime.h")
    touch(site / "cuda_toolkit-13.2.2.dist-info" / "METADATA", "Name: cuda-toolkit\nVersion: 13.2.2\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    with pytest.raises(ToolchainError) as caught:
        toolchain.find_toolkit()
    assert 'pip install "cuda-toolkit[nvcc]==13.2.2"' in str(caught.value)
    assert f"pip's packages in {site}/nvidia/cu13: there is no program" in str(caught.value)


def test_pip_cu12_has_no_nvcc_and_the_message_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of the real wheels: ptxas and the crt headers here, runtime headers and library there."""
    site = tmp_path / "site"
    script(site / "nvidia" / "cuda_nvcc" / "bin" / "ptxas", "")
    touch(site / "nvidia" / "cuda_nvcc" / "include" / "crt" / "host_config.h", HOST_CONFIG)
    touch(site / "nvidia" / "cuda_runtime" / "include" / "cuda_runtime.h")
    touch(site / "nvidia" / "cuda_runtime" / "lib" / "libcudart_static.a")
    touch(site / "cuda_toolkit-12.9.1.dist-info" / "METADATA", "Name: cuda-toolkit\nVersion: 12.9.1\n")
    monkeypatch.setattr(sys, "path", [str(site), *sys.path])
    with pytest.raises(ToolchainError, match="nvidia-cuda-nvcc-cu12 holds ptxas but no nvcc") as caught:
        toolchain.find_toolkit()
    assert "cuda-toolkit[nvcc]>=13" in str(caught.value)


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
    # A module of that name isn't the tool, and isn't imported.
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
    """How often a program is asked by a process that has nothing in its memory."""
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
    """By the real file behind links; only where there is a cache already, in one small file that no one else wrote."""
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
    assert [answered(link), answered(link)] == [1, 0], "written anew"
    (tmp_path / "cache").chmod(0o777)
    assert [answered(link), answered(link)] == [1, 1]


def test_what_stands_for_another_program_is_asked_each_time(tmp_path: Path) -> None:
    """A compiler that was upgraded behind a script or a launcher's link must be noticed."""
    (tmp_path / "cache").mkdir(mode=0o700)
    ccache = tmp_path / "lib" / "g++"
    ccache.parent.mkdir()
    ccache.symlink_to(binary(tmp_path / "bin" / "ccache"))
    for program in (script(tmp_path / "wrapper", "exec g++"), ccache):
        assert [answered(program), answered(program)] == [1, 1]


def test_what_a_tool_says_on_stderr_is_not_its_version(tmp_path: Path) -> None:
    """As a dynamic linker that can't preload something."""
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


# The real toolkit


@pytest.mark.nvcc
@needs_nvcc
def test_real_toolkit_compiles_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What discovery reports is enough, from nothing but the standard places, to build a program."""
    monkeypatch.undo()
    for name in ("CUDA_HOME", "CUDA_PATH", "ONELAUNCH_CUDA_ARCH"):
        monkeypatch.delenv(name, raising=False)
    found, host, ninja = toolchain.preflight_cuda()
    assert found.nvcc.parent.parent == found.home
    assert os.access(ninja, os.X_OK)
    source = tmp_path / "program.cu"
    source.write_text("#include <cuda_runtime.h>\n__global__ void k(int* p) { *p = 1; }\nint main() { int v = 0; ")
    with source.open("a") as file:
        file.write("k<<<1, 1>>>(nullptr); return cudaRuntimeGetVersion(&v) || v < 12080; }\n")
    flags = toolchain.gencode_flags(toolchain.architectures(), found)
    program = tmp_path / "program"
    command: list[str | Path] = [
        found.nvcc,
        "-ccbin",
        host.path,
        *flags,
        f"-I{found.include}",
        source,
        "-o",
        program,
    ]
    subprocess.run([*command, "-cudart=none", found.cudart_static, "-ldl", "-lrt", "-lpthread"], check=True)
    assert subprocess.run([program], check=False).returncode == 0


@pytest.mark.nvcc
@needs_nvcc
def test_real_toolkit_through_a_wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    toolchain.reset()
    real = toolchain.find_toolkit()
    script(tmp_path / "wrapper" / "nvcc", f'exec "{real.nvcc}" "$@"')
    monkeypatch.setenv("PATH", f"{tmp_path}/wrapper{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    found = toolchain.find_toolkit()
    assert (found.home, found.nvcc, found.origin) == (real.home, real.nvcc, "nvcc on PATH")


@pytest.mark.nvcc
@needs_nvcc
def test_real_nvcc_knows_the_default_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = toolchain.find_toolkit()
    with pytest.raises(ToolchainError, match=r"supports .*\b90a\b"):
        toolchain.gencode_flags(["35"], found)


def test_a_compiler_by_another_name_is_the_same_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GCC's first line begins with the name that it is called by: c++ and g++ would have had keys of their own."""
    versions = set()
    for name in ("c++", "g++-12", "x86_64-linux-gnu-g++"):
        script(tmp_path / name, f"echo '{name} (Debian 12.2.0-14+deb12u1) 12.2.0'\necho 'Copyright (C) 2022'")
        monkeypatch.setenv("CXX", str(tmp_path / name))
        versions.add(toolchain.find_host_compiler().version)
    assert versions == {"(Debian 12.2.0-14+deb12u1) 12.2.0"}
