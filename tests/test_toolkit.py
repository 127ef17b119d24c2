"""Finding a CUDA toolkit: toolkits made of shell scripts, pip packages, and the real nvcc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from onelaunch.build import toolchain
from onelaunch.errors import ToolchainError
from toolkits import HOST_CONFIG, make_bare, script, toolkit, touch


@pytest.fixture(autouse=True)
def _bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_bare(tmp_path, monkeypatch)


# The toolkit: where it is found


def test_each_place_is_used_when_the_better_ones_are_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Toolkits are added from the least preferred place to the most preferred; each new one must win."""
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
    """A distribution may put headers in /usr/include, outside the toolkit."""
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
    """Observed with real wheels: ptxas 13.0 refuses the PTX that cicc 13.5 writes."""
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
    """The real wheels' layout: one has ptxas and the crt headers, another the runtime's headers and library."""
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


# The real toolkit


@pytest.mark.nvcc
def test_real_toolkit_compiles_and_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the standard places alone, discovery reports all that building a program needs."""
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
def test_real_nvcc_knows_the_default_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = toolchain.find_toolkit()
    with pytest.raises(ToolchainError, match=r"supports .*\b90a\b"):
        toolchain.gencode_flags(["35"], found)
