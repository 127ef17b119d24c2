"""Finds a complete CUDA toolkit; its own nvcc reports its folders.

A toolkit can also come from pip: ``pip install "cuda-toolkit[nvcc]==13.2.*"`` installs all that a build needs,
nvidia-cuda-nvcc, nvidia-cuda-crt, nvidia-nvvm and nvidia-cuda-runtime, of one release. nvidia-cuda-nvcc alone installs
the newest releases of the others, and an nvidia-nvvm newer than nvcc writes PTX that its ptxas refuses. pip's CUDA 12
packages contain no nvcc.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import ToolchainError
from .host import find_host_compiler
from .programs import LAUNCHERS, Rejected, answer, first, locate, run, version_of

MINIMUM_CUDA = (12, 8)
SYSTEM_ROOT = Path("/usr/local")
_VARIABLES = ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "CXX", "PATH")


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA toolkit with all the parts that a build needs.

    Attributes:
        nvcc: the real compiler, home/bin/nvcc, even if the nvcc on PATH is a wrapper script.
        home: the toolkit's real folder, as nvcc itself reports it.
        version: such as "13.0.88".
        build: the build line of ``nvcc --version``, such as "Build cuda_13.0.r13.0/compiler.36424714_0".
        include: folder of cuda_runtime.h and crt/host_config.h.
        libdirs: the existing library folders, without stubs.
        cudart_static: path of libcudart_static.a.
        origin: where it was found, and which environment variable was skipped because its value doesn't work.
    """

    nvcc: Path
    home: Path
    version: str
    build: str
    include: Path
    libdirs: tuple[Path, ...]
    cudart_static: Path
    origin: str


def find_toolkit() -> CudaToolkit:
    """The first complete CUDA toolkit that is 12.8 or newer.

    Searches $CUDA_HOME, $CUDA_PATH, nvcc on PATH, /usr/local/cuda, /usr/local/cuda-* (newest first),
    pip's packages (the module's docstring names them) and $CONDA_PREFIX.

    Raises:
        ToolchainError: there is none; the message lists each place and what is wrong with it.
    """
    return _toolkit(tuple(os.environ.get(name) for name in _VARIABLES))


def reset() -> None:
    """Forgets the result, so that the next call searches again."""
    _toolkit.cache_clear()
    _known_architectures.cache_clear()


@functools.cache
def _toolkit(environment: tuple[str | None, ...]) -> CudaToolkit:
    try:
        installed = importlib.metadata.version("cuda-toolkit")
    except importlib.metadata.PackageNotFoundError:
        installed = ""
    # The installed release, so that torch's pins hold; CUDA 12's packages contain no nvcc.
    release = f"=={installed}" if installed and not installed.startswith("12.") else ">=13"
    return first(
        "A CUDA toolkit, 12.8 or newer and complete,",
        ((place, functools.partial(_inspect, nvcc)) for place, nvcc in _nvcc_candidates()),
        "Install the CUDA toolkit and, if it is in none of these places, set CUDA_HOME to its folder. Or run"
        f' `pip install "cuda-toolkit[nvcc]{release}"`, which brings nvidia-cuda-nvcc, nvidia-cuda-crt,'
        " nvidia-nvvm and nvidia-cuda-runtime of one release.",
    )


def _nvcc_candidates() -> Iterator[tuple[str, str]]:
    """Each place, and the nvcc in it; lazily, since most searches end early."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable, "").strip():
            yield f"{variable}={home!r} in the environment", os.path.abspath(f"{home}/bin/nvcc")
    yield "nvcc on PATH", "nvcc"
    numbered = sorted(SYSTEM_ROOT.glob("cuda-*"), key=lambda p: version_numbers(p.name), reverse=True)
    for home_path in (SYSTEM_ROOT / "cuda", *numbered):
        yield str(home_path), str(home_path / "bin" / "nvcc")
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folders = sorted(Path(location).glob("cu[0-9]*"), key=lambda p: version_numbers(p.name), reverse=True)
        for folder in (*folders, Path(location) / "cuda_nvcc"):
            if folder.is_dir():
                yield f"pip's packages in {folder}", str(folder / "bin" / "nvcc")
    if prefix := os.environ.get("CONDA_PREFIX", "").strip():
        yield f"CONDA_PREFIX={prefix!r} in the environment", os.path.abspath(f"{prefix}/bin/nvcc")


def _inspect(name: str, origin: str) -> CudaToolkit:
    """The toolkit that an nvcc belongs to."""
    if "/cuda_nvcc/" in name and not os.path.exists(name):
        raise Rejected("the CUDA 12 package nvidia-cuda-nvcc-cu12 holds ptxas but no nvcc")
    found = locate(name)
    # nvcc looks for its profile beside its path, so calling it by a link doesn't work.
    real = found.resolve()
    program = found if real.name in LAUNCHERS else real
    said = answer(program, _ask)
    version = re.search(r"release [\d.]+, V([\d.]+)", said)
    if version is None:
        raise Rejected(f"{program} --version names no release")
    if version_numbers(version[1])[:2] < MINIMUM_CUDA:
        raise Rejected(f"{program} is CUDA {version[1]}, older than {'.'.join(map(str, MINIMUM_CUDA))}")
    build = re.search(r"^Build .*", said, re.M)

    def reported(variable: str) -> str:
        line = re.search(rf"^#\$ {variable}=(.+)$", said, re.M)
        return line[1].strip() if line else ""

    # A wrapper script is outside the toolkit, so the folder comes from nvcc's own output.
    top = reported("TOP") or (f"{reported('_HERE_')}/.." if reported("_HERE_") else "")
    home = Path(top).resolve() if top else program.parent.parent
    target = home / "targets" / ("sbsa-linux" if platform.machine() == "aarch64" else "x86_64-linux")
    includes = _folders(reported("INCLUDES"), "-I", home / "include", target / "include")
    libdirs = _folders(reported("LIBRARIES"), "-L", home / "lib64", home / "lib", target / "lib")
    include = next((d for d in includes if (d / "cuda_runtime.h").is_file()), None)
    cudart = next((d / "libcudart_static.a" for d in libdirs if (d / "libcudart_static.a").is_file()), None)
    cicc = shutil.which("cicc", path=reported("CICC_PATH") or str(home / "nvvm/bin"))
    parts = {
        "cuda_runtime.h (pip: nvidia-cuda-runtime)": include,
        "crt/host_config.h (pip: nvidia-cuda-crt)": include and (include / "crt/host_config.h").is_file(),
        "libcudart_static.a (pip: nvidia-cuda-runtime)": cudart,
        "cicc (pip: nvidia-nvvm)": cicc,
    }
    missing = [part for part, there in parts.items() if not there]
    if missing or include is None or cudart is None:
        raise Rejected(f"the toolkit in {home} (nvcc {version[1]}) lacks {', '.join(missing)}")
    _check_pip_releases(home, version[1])
    nvcc = home / "bin" / "nvcc"
    nvcc = nvcc if os.access(nvcc, os.X_OK) else program
    return CudaToolkit(nvcc, home, version[1], build[0] if build else "", include, libdirs, cudart, origin)


def _ask(nvcc: Path) -> str:
    """nvcc's output about its version and, from a dry run, its folders."""
    version = version_of(nvcc)
    dry = (nvcc, "--dryrun", "-x", "cu", "-o", os.devnull, os.devnull)
    text = run(*dry)[2]
    if "#$ TOP=" not in text:  # without a gcc on PATH it prints nothing
        try:
            text = run(*dry, "-ccbin", find_host_compiler().path)[2]
        except ToolchainError:
            text = ""
    folders = re.findall(r"^#\$ (?:TOP|_HERE_|CICC_PATH|INCLUDES|LIBRARIES)=.*", text, re.M)
    return "\n".join([version, *folders])


def _check_pip_releases(home: Path, nvcc: str) -> None:
    """pip mixes releases. Most mixtures work; an nvvm newer than nvcc doesn't, so only that is refused."""
    if home.parent.name != "nvidia":
        return
    for nvvm in importlib.metadata.distributions(name="nvidia-nvvm", path=[str(home.parent.parent)]):
        if version_numbers(nvvm.version)[:2] > version_numbers(nvcc)[:2]:
            release = ".".join(nvcc.split(".")[:2])
            raise Rejected(
                f"nvidia-nvvm {nvvm.version} is newer than nvcc {nvcc}, whose ptxas refuses its PTX; run"
                f' `pip install "nvidia-nvvm=={release}.*" "nvidia-cuda-crt=={release}.*"`'
            )


def _folders(flags: str, prefix: str, *usual: Path) -> tuple[Path, ...]:
    """The existing folders, resolved and without repeats: those in nvcc's flags, then the usual ones."""
    named = [Path(word.removeprefix(prefix)) for word in shlex.split(flags) if word.startswith(prefix)]
    return tuple(dict.fromkeys(d.resolve() for d in (*named, *usual) if d.is_dir() and d.name != "stubs"))


def known_architectures(nvcc: Path) -> tuple[str, ...]:
    """The architectures that an nvcc can build for, such as ("80", "90", "90a").

    Raises:
        ToolchainError: it doesn't run.
    """
    return _known_architectures(nvcc)


@functools.cache
def _known_architectures(nvcc: Path) -> tuple[str, ...]:
    # --list-gpu-code omits the "a" and "f" variants; the help text has them.
    try:
        text = run(nvcc, "--help")[1]
    except Rejected as why:
        raise ToolchainError(f"nvcc doesn't say which architectures it supports: {why}. Reinstall CUDA.") from None
    names = set(re.findall(r"\bsm_(\d+[af]?)\b", text))
    return tuple(sorted(names, key=lambda name: (version_numbers(name), name)))


def version_numbers(text: str) -> tuple[int, ...]:
    """The numbers of a version, for comparisons."""
    return tuple(int(number) for number in re.findall(r"\d+", text))
