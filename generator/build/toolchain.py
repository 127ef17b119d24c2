"""Finds and checks nvcc, the host C++ compiler, ninja and the GPU architectures; no variable need be set.

Nothing runs at import. A search starts a few short subprocesses when it is first asked for, and its result is
kept for the process. torch is imported only to ask for a device's capability; a torch without CUDA is fine.

A toolkit can also come from pip. Complete for our builds is ``pip install "cuda-toolkit[nvcc]==13.2.*"``: it
brings nvidia-cuda-nvcc, nvidia-cuda-crt, nvidia-nvvm and nvidia-cuda-runtime of one release. nvidia-cuda-nvcc
alone brings the others at their newest release, and an nvidia-nvvm newer than nvcc writes PTX that its ptxas
refuses. pip's CUDA 12 packages hold no nvcc at all.
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
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..errors import ToolchainError

MINIMUM_CUDA = (12, 8)
DEFAULT_ARCHITECTURES = ("90a",)
ARCHITECTURE_VARIABLE = "ONELAUNCH_CUDA_ARCH"
NOT_USABLE = "not usable"
"""The value of a row of describe() that failed."""

SYSTEM_ROOT = Path("/usr/local")
_LAUNCHERS = frozenset({"ccache", "sccache", "distcc", "icecc", "buildcache"})
_VARIABLES = ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "CXX", "PATH")
_TIMEOUT_SECONDS = 60.0

T = TypeVar("T")


@dataclass(frozen=True)
class HostCompiler:
    """A C++ compiler that answers ``--version``.

    Attributes:
        path: absolute path, symbolic links kept: clang++ and ccache's links go by the name they are called.
        version: first line of ``--version`` without the program's name, the identity that goes into cache keys.
        origin: where it was found, and which setting of the environment had to be skipped for it.
        flags: what $CXX says after the compiler's name, such as ("--sysroot=/x",).
    """

    path: Path
    version: str
    origin: str
    flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class CudaToolkit:
    """A CUDA toolkit with all the parts that a build needs.

    Attributes:
        nvcc: the real compiler, home/bin/nvcc, even where the nvcc on PATH is a wrapper script.
        home: the toolkit's real folder, as nvcc itself reports it.
        version: such as "13.0.88".
        build: the build line of ``nvcc --version``, such as "Build cuda_13.0.r13.0/compiler.36424714_0".
        include: folder of cuda_runtime.h and crt/host_config.h.
        libdirs: the existing library folders, stubs left out.
        cudart_static: path of libcudart_static.a.
        origin: where it was found, and which setting of the environment had to be skipped for it.
    """

    nvcc: Path
    home: Path
    version: str
    build: str
    include: Path
    libdirs: tuple[Path, ...]
    cudart_static: Path
    origin: str


class _Rejected(Exception):
    """A candidate that can't be used; the text says why. Never leaves this module."""


def identity(path: Path) -> dict[str, str | int]:
    """What shows that a program changed: real path, size in bytes, mtime in ns. OSError if it is missing."""
    real = path.resolve()
    status = real.stat()
    return {"path": str(real), "size": status.st_size, "mtime_ns": status.st_mtime_ns}


def find_host_compiler() -> HostCompiler:
    """The C++ compiler: $CXX, else c++, g++ or clang++ on PATH or beside the interpreter.

    A launcher in $CXX ("ccache g++") is left out. A $CXX that doesn't run is skipped, and ``origin`` says so.

    Raises:
        ToolchainError: there is none.
    """
    return _compiler(_environment())


def find_toolkit() -> CudaToolkit:
    """The first complete CUDA toolkit that is 12.8 or newer.

    Looked for in $CUDA_HOME, $CUDA_PATH, nvcc on PATH, /usr/local/cuda, /usr/local/cuda-* (newest first),
    pip's packages (the module's docstring names them) and $CONDA_PREFIX.

    Raises:
        ToolchainError: there is none; the message lists each place and what is wrong with it.
    """
    return _toolkit(_environment())


def find_ninja() -> Path:
    """ninja: the ninja package's, else the one beside the interpreter, else the one on PATH.

    Raises:
        ToolchainError: there is none that runs.
    """
    return _ninja(_environment())[0]


def preflight_cuda() -> tuple[CudaToolkit, HostCompiler, Path]:
    """What a CUDA build needs: a toolkit, a host compiler that fits it, and ninja. Raises ToolchainError."""
    toolkit, compiler, ninja = find_toolkit(), find_host_compiler(), find_ninja()
    check_pair(toolkit, compiler)
    return toolkit, compiler, ninja


def check_pair(toolkit: CudaToolkit, compiler: HostCompiler) -> None:
    """Checks the host compiler against the limit that the toolkit's own header sets.

    Compilers that are neither GCC nor Clang are left for nvcc to judge.

    Raises:
        ToolchainError: nvcc would refuse this compiler.
    """
    try:
        header = (toolkit.include / "crt" / "host_config.h").read_text(errors="replace")
    except OSError as error:
        raise ToolchainError(f"nvcc's compiler limits can't be read: {error}. Reinstall CUDA.") from error
    if clang := re.search(r"\bclang version (\d+)", compiler.version):
        major, program = int(clang[1]), "clang++"
        limit = re.search(r"unsupported clang version! clang version must be less than (\d+)", header)
        newest = int(limit[1]) - 1 if limit else None
    elif gcc := re.search(r"\)\s+(\d+)\.\d", compiler.version):
        major, program = int(gcc[1]), "g++"
        limit = re.search(r"#\s*if\s+__GNUC__\s*>\s*(\d+)", header)
        newest = int(limit[1]) if limit else None
    else:
        return
    if newest is None or major <= newest:
        return
    names = [f"{program}-{number}" for number in range(newest, 8, -1)]
    name = next((n for n in names if shutil.which(n, path=_search_path())), None)
    choice = f"set CXX={name}, which is on PATH" if name else f"install one, then set CXX, as in CXX={names[0]}"
    raise ToolchainError(
        f"nvcc {toolkit.version} ({toolkit.nvcc}) accepts {program} up to version {newest}, but the host"
        f" compiler {compiler.path} ({compiler.origin}) is version {major}: {choice}."
    )


def architectures(device: int | None = None) -> tuple[str, ...]:
    """The architectures to build for, such as ("90a",).

    Args:
        device: index of the CUDA device to build for. With None no GPU is asked: CUDA isn't initialised and
            torch isn't imported.

    $ONELAUNCH_CUDA_ARCH, a comma list such as "90a,100a", decides if it is set. Otherwise it is the device's
    capability, and ("90a",) where no device was named or no GPU is visible.

    Raises:
        ToolchainError: $ONELAUNCH_CUDA_ARCH can't be read, or there is no such device.
    """
    if wanted := os.environ.get(ARCHITECTURE_VARIABLE, "").strip():
        names = (_architecture(name, f"{ARCHITECTURE_VARIABLE}={wanted!r}") for name in wanted.split(","))
        return tuple(dict.fromkeys(names))
    if device is None:
        return DEFAULT_ARCHITECTURES
    import torch

    if not torch.cuda.is_available():
        return DEFAULT_ARCHITECTURES
    try:
        major, minor = torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError) as error:
        raise ToolchainError(
            f"CUDA device {device} can't be asked for its architecture: {error}. Use one of the"
            f" {torch.cuda.device_count()} visible devices, or set {ARCHITECTURE_VARIABLE}."
        ) from error
    # "a" unlocks the instructions of exactly this architecture, which exist since 9.0.
    return (f"{major}{minor}{'a' if major >= 9 else ''}",)


def current_architectures() -> tuple[str, ...]:
    """architectures() for the current CUDA device, or for none where no GPU is visible. Initialises CUDA.

    Raises:
        ToolchainError: see architectures().
    """
    import torch

    return architectures(torch.cuda.current_device() if torch.cuda.is_available() else None)


def gencode_flags(archs: Sequence[str], toolkit: CudaToolkit | None = None) -> list[str]:
    """nvcc flags: ("90a",) gives ["-gencode=arch=compute_90a,code=sm_90a"]; so do "9.0a" and "sm_90a".

    Raises:
        ToolchainError: an architecture can't be read, none is given, or the toolkit's nvcc doesn't know it.
    """
    if not archs:
        raise ToolchainError('No architecture was given to build for: name at least one, such as "90a".')
    names = list(dict.fromkeys(_architecture(arch, "the list of architectures") for arch in archs))
    known = _known_architectures(toolkit.nvcc) if toolkit else ()
    for name in names:
        if known and toolkit and name not in known:
            raise ToolchainError(
                f"nvcc {toolkit.version} ({toolkit.nvcc}) can't build for architecture {name!r}; it supports"
                f" {', '.join(known)}. Choose one of these, or a newer toolkit with CUDA_HOME."
            )
    return [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]


def describe(device: int | None = None) -> list[tuple[str, str, str]]:
    """Rows of (tool, value, where it came from). A failure is the row (tool, NOT_USABLE, error text)."""
    rows: list[tuple[str, str, str]] = []

    def add(tool: str, find: Callable[[], T], show: Callable[[T], tuple[str, str]]) -> T | None:
        try:
            found = find()
        except ToolchainError as error:
            rows.append((tool, NOT_USABLE, str(error)))
            return None
        rows.append((tool, *show(found)))
        return found

    def targets() -> tuple[str, ...]:
        names = architectures(device)
        gencode_flags(names, toolkit)
        return names

    toolkit = add("CUDA toolkit", find_toolkit, lambda t: (f"{t.home} ({t.version})", t.origin))
    compiler = add("host compiler", find_host_compiler, lambda c: (f"{c.path} {c.version}", c.origin))
    if toolkit and compiler:
        check, header = (
            functools.partial(check_pair, toolkit, compiler),
            toolkit.include / "crt/host_config.h",
        )
        add("nvcc with host compiler", check, lambda _: ("fits", f"limits in {header}"))
    add("ninja", lambda: _ninja(_environment()), lambda found: (str(found[0]), found[1]))
    source = "default" if device is None else f"CUDA device {device}, or the default if no GPU is visible"
    if os.environ.get(ARCHITECTURE_VARIABLE, "").strip():
        source = f"{ARCHITECTURE_VARIABLE} in the environment"
    add("architectures", targets, lambda names: (", ".join(names), source))
    return rows


def reset() -> None:
    """Forgets every result, so that the next call searches again."""
    for cached in (_compiler, _toolkit, _ninja, _known_architectures):
        cached.cache_clear()


def _environment() -> tuple[str | None, ...]:
    """The variables that a search reads; they key the caches, so that a changed environment is seen."""
    return tuple(os.environ.get(name) for name in _VARIABLES)


def _search_path() -> str:
    # An interpreter that is started by its full path has its folder, a venv's bin, not on PATH.
    return os.pathsep.join(filter(None, [os.environ.get("PATH", os.defpath), os.path.dirname(sys.executable)]))


def _run(*command: str | Path) -> tuple[int, str]:
    """Exit status, and stdout and stderr together."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_SECONDS,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _Rejected(f"{command[0]} doesn't run: {error}") from error
    return done.returncode, done.stdout


def _version_of(program: Path) -> str:
    status, text = _run(program, "--version")
    if status != 0 or not text.strip():
        said = text.strip()[-200:] or "no output"
        raise _Rejected(f"{program} --version ended with status {status}: {said}")
    return text.strip()


def _program(name: str) -> Path:
    found = shutil.which(name, path=_search_path())
    if found is None:
        raise _Rejected(f"there is no program {name!r}")
    return Path(os.path.abspath(found))


def _first(what: str, candidates: Iterable[tuple[str, Callable[[str], T]]], advice: str) -> T:
    """The first candidate, a place and a probe that takes the origin, that isn't rejected."""
    tried: list[str] = []
    for place, probe in candidates:
        skipped = "".join(f"; skipped {line}" for line in tried if "in the environment" in line)
        try:
            return probe(place + skipped)
        except _Rejected as why:
            tried.append(f"{place}: {why}")
    raise ToolchainError(f"{what} was not found. Tried:\n  " + "\n  ".join(tried) + f"\n{advice}")


@functools.cache
def _compiler(environment: tuple[str | None, ...]) -> HostCompiler:
    def probe(command: str, origin: str) -> HostCompiler:
        try:
            words = shlex.split(command)
        except ValueError as error:
            raise _Rejected(f"it can't be read: {error}") from None
        while words and Path(words[0]).name in _LAUNCHERS:
            del words[0]
        if not words:
            raise _Rejected("it names no compiler")
        path = _program(words[0])
        # GCC's answer begins with the name that it was called by, and isn't another compiler by another name.
        version = re.sub(r"^\S+ (?=\(.*\) \d)", "", _version_of(path).splitlines()[0])
        return HostCompiler(path, version, origin, tuple(words[1:]))

    places = [(f"{name} on PATH", name) for name in ("c++", "g++", "clang++")]
    if command := os.environ.get("CXX", "").strip():
        places.insert(0, (f"CXX={command!r} in the environment", command))
    return _first(
        "A host C++ compiler",
        [(place, functools.partial(probe, command)) for place, command in places],
        "Install GCC (the package g++) or set CXX to a compiler.",
    )


@functools.cache
def _ninja(environment: tuple[str | None, ...]) -> tuple[Path, str]:
    def package(origin: str) -> tuple[Path, str]:
        try:
            import ninja
        except ImportError as error:
            raise _Rejected(str(error)) from None
        return checked(str(Path(ninja.BIN_DIR) / "ninja"), origin)

    def checked(name: str, origin: str) -> tuple[Path, str]:
        path = _program(name)
        _version_of(path)
        return path, origin

    beside = str(Path(sys.executable).parent / "ninja")
    candidates: list[tuple[str, Callable[[str], tuple[Path, str]]]] = [
        ("the ninja package", package),
        ("beside the interpreter", functools.partial(checked, beside)),
        ("PATH", functools.partial(checked, "ninja")),
    ]
    return _first("ninja", candidates, "Run `pip install ninja`.")


@functools.cache
def _toolkit(environment: tuple[str | None, ...]) -> CudaToolkit:
    try:
        installed = importlib.metadata.version("cuda-toolkit")
    except importlib.metadata.PackageNotFoundError:
        installed = ""
    # The release that is there already, so that torch's pins hold; CUDA 12's packages hold no nvcc.
    release = f"=={installed}" if installed and not installed.startswith("12.") else ">=13"
    return _first(
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
    numbered = sorted(SYSTEM_ROOT.glob("cuda-*"), key=lambda p: _numbers(p.name), reverse=True)
    for home_path in (SYSTEM_ROOT / "cuda", *numbered):
        yield str(home_path), str(home_path / "bin" / "nvcc")
    spec = importlib.util.find_spec("nvidia")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        folders = sorted(Path(location).glob("cu[0-9]*"), key=lambda p: _numbers(p.name), reverse=True)
        for folder in (*folders, Path(location) / "cuda_nvcc"):
            if folder.is_dir():
                yield f"pip's packages in {folder}", str(folder / "bin" / "nvcc")
    if prefix := os.environ.get("CONDA_PREFIX", "").strip():
        yield f"CONDA_PREFIX={prefix!r} in the environment", os.path.abspath(f"{prefix}/bin/nvcc")


def _inspect(name: str, origin: str) -> CudaToolkit:
    """The toolkit that an nvcc belongs to."""
    if "/cuda_nvcc/" in name and not os.path.exists(name):
        raise _Rejected("the CUDA 12 package nvidia-cuda-nvcc-cu12 holds ptxas but no nvcc")
    found = _program(name)
    # nvcc looks for its profile beside the name that it is called by, so a link to it doesn't work.
    real = found.resolve()
    program = found if real.name in _LAUNCHERS else real
    answer = _ask(program)
    version = re.search(r"release [\d.]+, V([\d.]+)", answer)
    if version is None:
        raise _Rejected(f"{program} --version names no release")
    if _numbers(version[1])[:2] < MINIMUM_CUDA:
        raise _Rejected(f"{program} is CUDA {version[1]}, older than {'.'.join(map(str, MINIMUM_CUDA))}")
    build = re.search(r"^Build .*", answer, re.M)

    def reported(variable: str) -> str:
        line = re.search(rf"^#\$ {variable}=(.+)$", answer, re.M)
        return line[1].strip() if line else ""

    # A wrapper script lies outside the toolkit, so the folder is what nvcc says, not where it was found.
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
        raise _Rejected(f"the toolkit in {home} (nvcc {version[1]}) lacks {', '.join(missing)}")
    _check_pip_releases(home, version[1])
    nvcc = home / "bin" / "nvcc"
    nvcc = nvcc if os.access(nvcc, os.X_OK) else program
    return CudaToolkit(nvcc, home, version[1], build[0] if build else "", include, libdirs, cudart, origin)


def _ask(nvcc: Path) -> str:
    """What nvcc says about its version and, by a dry run, about its folders."""
    version = _version_of(nvcc)
    dry = (nvcc, "--dryrun", "-x", "cu", "-o", os.devnull, os.devnull)
    text = _run(*dry)[1]
    if "#$ TOP=" not in text:  # It wants a gcc on PATH before it says anything.
        try:
            text = _run(*dry, "-ccbin", find_host_compiler().path)[1]
        except ToolchainError:
            text = ""
    folders = re.findall(r"^#\$ (?:TOP|_HERE_|CICC_PATH|INCLUDES|LIBRARIES)=.*", text, re.M)
    return "\n".join([version, *folders])


def _check_pip_releases(home: Path, nvcc: str) -> None:
    """pip mixes releases. Most mixtures work; an nvvm newer than nvcc doesn't, so only that is refused."""
    if home.parent.name != "nvidia":
        return
    for nvvm in importlib.metadata.distributions(name="nvidia-nvvm", path=[str(home.parent.parent)]):
        if _numbers(nvvm.version)[:2] > _numbers(nvcc)[:2]:
            release = ".".join(nvcc.split(".")[:2])
            raise _Rejected(
                f"nvidia-nvvm {nvvm.version} is newer than nvcc {nvcc}, whose ptxas refuses its PTX; run"
                f' `pip install "nvidia-nvvm=={release}.*" "nvidia-cuda-crt=={release}.*"`'
            )


def _folders(flags: str, prefix: str, *usual: Path) -> tuple[Path, ...]:
    """The existing folders, real and once each: those in nvcc's flags, then the usual ones."""
    named = [Path(word.removeprefix(prefix)) for word in shlex.split(flags) if word.startswith(prefix)]
    return tuple(dict.fromkeys(d.resolve() for d in (*named, *usual) if d.is_dir() and d.name != "stubs"))


@functools.cache
def _known_architectures(nvcc: Path) -> tuple[str, ...]:
    # --list-gpu-code leaves out the "a" and "f" variants; the help text has them.
    try:
        text = _run(nvcc, "--help")[1]
    except _Rejected as why:
        raise ToolchainError(f"nvcc can't be asked for its architectures: {why}. Reinstall CUDA.") from None
    names = set(re.findall(r"\bsm_(\d+[af]?)\b", text))
    return tuple(sorted(names, key=lambda name: (_numbers(name), name)))


def _architecture(name: str, source: str) -> str:
    plain = name.strip().removeprefix("sm_").replace(".", "")
    if not re.fullmatch(r"\d{2,3}[af]?", plain):
        raise ToolchainError(f"{name.strip()!r} in {source} isn't an architecture; write 90a, 100a or 89.")
    return plain


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text))
