"""Source text to a shared object, through torch.utils.cpp_extension.load_inline in a private folder.

The recipe keeps torch out of the build: no torch header in any translation unit, the limited C-API, a static cudart,
hidden symbols, explicit architectures. The result serves every Python from 3.11 on and every torch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from . import binary, toolchain
from ..cache import staging, trust
from ..errors import CompileError

# Python.h of the limited C-API of 3.11. The rest is what makes a small, self-contained object.
# C++14, since with C++17 <math.h>, which Python.h includes, takes the compiler as long as all the rest.
HOST_FLAGS = ("-O2", "-std=c++14", "-fvisibility=hidden", "-DPy_LIMITED_API=0x030B0000", "-Wno-unknown-pragmas")
CUDA_FLAGS = ("-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fvisibility=hidden")
# --as-needed and the stubs below leave libc as the only library that the object needs at run time.
LINK_FLAGS = ("-Wl,--as-needed", "-Wl,-Bsymbolic", "-Wl,--exclude-libs,ALL")
CUDA_LINK_FLAGS = ("-lcudart_static", "-ldl", "-lrt", "-lpthread")

# load_inline names these on every link line. The object uses none of them, so each is met by an empty linker script:
# a link can't fail because pip's toolkit has no libcudart.so, or torch no CUDA.
_UNUSED_LIBRARIES = ("c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda", "torch_python", "cudart")

_build_lock = threading.Lock()


def _forked() -> None:
    """A child's other threads are gone, and what they held would stay held."""
    global _build_lock
    _build_lock = threading.Lock()


os.register_at_fork(after_in_child=_forked)


@dataclass(frozen=True)
class Build:
    """A finished build in a staging folder.

    Attributes:
        module: the loaded module.
        module_file, source_file: names of the shared object and the emitted source in the folder.
        command: the compiler command of the emitted source.
        seconds: wall time.
        resources: registers, stack, shared and local bytes by architecture, where cuobjdump could be asked.
        requires: what a host must have to run it, see binary.requirements.
    """

    module: ModuleType
    module_file: str
    source_file: str
    command: str
    seconds: float
    resources: dict[str, dict[str, int]]
    requires: dict[str, Any]


@dataclass(frozen=True)
class Tools:
    """The compilers of one build, and what names them in a key.

    Attributes:
        compiler: the host compiler.
        ninja: the ninja executable.
        toolkit: the CUDA toolkit, None for the CPU target.
    """

    compiler: toolchain.HostCompiler
    ninja: Path
    toolkit: toolchain.CudaToolkit | None

    def versions(self) -> dict[str, str]:
        """What a key holds of the compilers: versions, never paths."""
        versions = {"host_compiler": " ".join((self.compiler.version, *self.compiler.flags))}
        if self.toolkit is not None:
            versions["nvcc"] = self.toolkit.version
            versions["nvcc_build"] = self.toolkit.build
        return versions

    def programs(self) -> list[Path]:
        """The executables whose change means that versions() must be asked again."""
        return [self.compiler.path] + ([self.toolkit.nvcc] if self.toolkit else [])


def find_tools(target: str) -> Tools:
    """The compilers for a target, "cuda" or "cpu".

    Raises:
        ToolchainError: one is missing or doesn't fit the others.
    """
    if target == "cuda":
        toolkit, compiler, ninja = toolchain.preflight_cuda()
        return Tools(compiler, ninja, toolkit)
    return Tools(toolchain.find_host_compiler(), toolchain.find_ninja(), None)


def flags(target: str, archs: Sequence[str]) -> list[str]:
    """Every flag that shapes the object, without paths: an ingredient of the key."""
    common = [*HOST_FLAGS, *LINK_FLAGS]
    if target == "cpu":
        return common
    return [*common, *CUDA_FLAGS, *CUDA_LINK_FLAGS, *toolchain.gencode_flags(archs)]


def build(name: str, source: str, binding: str, *, archs: Sequence[str], tools: Tools, stage: Path, key: str) -> Build:
    """Compiles, links and loads.

    Args:
        name: the module's import name, baked into the binding.
        source: emitted CUDA, or C++ where tools.toolkit is None.
        binding: emitted C++ of the binding.
        archs: GPU architectures, such as ("90a",); ignored on the CPU target.
        stage: an empty private folder.
        key: for the error.

    Raises:
        CompileError: the compiler or linker failed; the log and source are kept, their paths in the error.
    """
    start = time.perf_counter()
    stubs = stage / "stubs"
    stubs.mkdir()
    for library in _UNUSED_LIBRARIES:
        (stubs / f"lib{library}.so").write_text("/* unused */\n", encoding="utf-8")
    # Relative to the folder that ninja runs in: a path with a space would fall apart on the linker's command line.
    link = [f"-L{stubs.name}", *LINK_FLAGS]
    arguments: dict[str, Any] = {
        "name": name,
        "build_directory": str(stage),
        "functions": None,
        "extra_cflags": [*tools.compiler.flags, *HOST_FLAGS],
        "no_implicit_headers": True,
        "use_pch": False,
        "verbose": False,
    }
    if tools.toolkit is None:
        arguments |= {"cpp_sources": [source, binding], "with_cuda": False, "extra_ldflags": link}
    else:
        link += [shlex.quote(f"-L{tools.toolkit.cudart_static.parent}"), *CUDA_LINK_FLAGS]
        arguments |= {
            "cpp_sources": [binding],
            "cuda_sources": [source],
            "with_cuda": True,
            "extra_cuda_cflags": [*CUDA_FLAGS, *toolchain.gencode_flags(archs, tools.toolkit)],
            "extra_ldflags": link,
        }
    # load_inline reads its settings from the process's environment and from a module constant.
    with _build_lock, _settings(tools) as cpp_extension:
        # A failed attempt leaves the name with a raised version, under which the module's entry point isn't found.
        cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(name, None)
        try:
            module: ModuleType = cpp_extension.load_inline(**arguments)
        except (RuntimeError, OSError, ImportError, subprocess.SubprocessError) as error:
            failure = _compile_error(str(error), source, stage, key)
            # The compiler's own errors come as RuntimeError; an OSError is the machine's, and so is a ninja that was
            # killed, or a compiler or folder that went away meanwhile.
            killed = isinstance(error.__cause__, subprocess.CalledProcessError) and error.__cause__.returncode < 0
            whole = stage.is_dir() and all(path.exists() for path in tools.programs())
            failure.lasting = failure.lasting and whole and not killed and not isinstance(error, OSError)
            raise failure from error
    source_file = "main.cpp" if tools.toolkit is None else "cuda.cu"
    object_file = stage / f"{name}.so"
    resources = binary.resources(object_file, binary.find_cuobjdump(tools.toolkit.home)) if tools.toolkit else {}
    if resources and (missing := sorted(set(archs) - set(resources))):
        raise _compile_error(f"error: the object holds no code for {', '.join(missing)}", source, stage, key)
    return Build(
        module=module,
        module_file=f"{name}.so",
        source_file=source_file,
        command=_command(stage, source_file, tools),
        seconds=time.perf_counter() - start,
        resources=resources,
        requires=binary.requirements(object_file, archs, tools.toolkit.version if tools.toolkit else None),
    )


@contextlib.contextmanager
def _settings(tools: Tools) -> Iterator[Any]:
    """torch.utils.cpp_extension, told which compilers to use; everything is put back at the end."""
    # On import it warns that there is no GPU, which is none of its business in an ahead-of-time build.
    logger = logging.getLogger("torch.utils.cpp_extension")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        from torch.utils import cpp_extension
    finally:
        logger.setLevel(level)
    extension: Any = cpp_extension
    kept = {name: os.environ.get(name) for name in ("PATH", "CXX", "CC", "PYTORCH_NVCC", "TORCH_CUDA_ARCH_LIST")}
    kept_home = extension.CUDA_HOME
    # torch locks the build's folder. It is nobody else's here, and its file system may have no locks.
    kept_lock = getattr(extension, "FileLock", None)
    if kept_lock is not None:
        extension.FileLock = lambda path: contextlib.nullcontext()
    folders = [str(tools.ninja.parent), str(Path(sys.executable).parent), kept["PATH"] or os.defpath]
    os.environ["PATH"] = os.pathsep.join(folders)
    os.environ["CXX"] = str(tools.compiler.path)
    # torch hands $CC to nvcc as -ccbin: the host compiler that was checked against nvcc.
    os.environ["CC"] = str(tools.compiler.path)
    os.environ.pop("PYTORCH_NVCC", None)
    if tools.toolkit is not None:
        extension.CUDA_HOME = str(tools.toolkit.home)
    try:
        yield extension
    finally:
        extension.CUDA_HOME = kept_home
        if kept_lock is not None:
            extension.FileLock = kept_lock
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# What the machine and not the source is to blame for: (what the output says, what to do).
_PASSING = (
    (
        r"Killed|exit(ed with)? (code|status) 137|\[code=137\]|signal 9|Cannot allocate memory|out of memory",
        "The compiler was killed, most often for want of memory: build fewer at once (MAX_JOBS=1), or give it more.",
    ),
    (
        r"No space left|Disk quota exceeded",
        "The disk is full: free some space, or set ONELAUNCH_CACHE_DIR to a folder on another disk.",
    ),
    (
        r"failed to map segment|Operation not permitted",
        "Programs can't be run from the cache's file system, which is mounted noexec: set ONELAUNCH_CACHE_DIR to a "
        "folder on another one.",
    ),
    (r"Read-only file system", "Set ONELAUNCH_CACHE_DIR to a folder that can be written."),
    (r"Resource temporarily unavailable", "There are too many processes: build fewer at once (MAX_JOBS=1)."),
)
# What another try won't mend by itself.
_HINTS = (
    (r"unsupported GNU version|unsupported clang version", "Set CXX to an older compiler."),
    (r"Python\.h: No such file", "Install Python's headers (the package python3-dev)."),
    (r"fatal error: \S+: No such file", "A header is missing: `onelaunch doctor` checks the toolchain."),
    (r"cannot find -l", "A library is missing: `onelaunch doctor` checks the toolchain."),
    (r"Unsupported gpu architecture", "This nvcc doesn't know the architecture: choose another or a newer toolkit."),
)


def _compile_error(output: str, source: str, stage: Path, key: str) -> CompileError:
    """Keeps log and source outside the staging folder, which goes, and distils the first error."""
    log, kept_source = _keep(stage.parent.parent / "failed" / key[:16], output, source)
    lines = output.splitlines()
    telling = r"\berror\b|undefined reference|cannot find|Killed", r"not found$", r"^FAILED: ", r"\S"
    found = (line for pattern in telling for line in lines if re.search(pattern, line))
    first = next(found, "no output").strip().removesuffix(".")
    # ninja shows the command that failed below this line; those that were done are above it.
    failed = re.search(r"^FAILED: .*\n(.+)$", output, re.M)
    command = failed[1].strip() if failed else ""
    passing = next((hint for pattern, hint in _PASSING if re.search(pattern, output)), None)
    hint = passing or next((hint for pattern, hint in _HINTS if re.search(pattern, output)), None)
    message = (
        f"The kernel {key[:16]} didn't compile: {first}.{f' {hint}' if hint else ''} "
        f"The whole log is in {log}, the source in {kept_source}."
    )
    return CompileError(message, key=key, command=command, log=log, source=kept_source, lasting=passing is None)


def _keep(folder: Path, output: str, source: str) -> tuple[Path, Path]:
    def write(place: Path) -> tuple[Path, Path]:
        log, kept_source = place / "build.log", place / "source.cu"
        log.write_text(output, encoding="utf-8")
        kept_source.write_text(source, encoding="utf-8")
        return log, kept_source

    try:
        trust.private(folder.parent)
        return write(trust.private(folder))
    except OSError:  # a full disk, say
        return write(staging.failed_folder())


def _command(stage: Path, source_file: str, tools: Tools) -> str:
    done = subprocess.run(
        [str(tools.ninja), "-C", str(stage), "-t", "commands"], capture_output=True, text=True, check=False
    )
    line = next((line for line in done.stdout.splitlines() if source_file in line), "")
    # The staging folder is gone when somebody reads this.
    return line.replace(str(stage), ".")
