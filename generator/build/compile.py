"""Source text to a shared object, through torch.utils.cpp_extension.load_inline in a child process.

The object doesn't depend on torch: no translation unit includes a torch header. It uses the limited C API, a static
cudart, hidden symbols and explicit architectures, so it works with every Python from 3.11 on and every torch.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CompileError
from . import binary, child, diagnosis, environment, process, toolchain

if TYPE_CHECKING:
    from .key import Recipe

# Py_LIMITED_API selects the limited C API of 3.11. _GLIBCXX_INCLUDE_NEXT_C_HEADERS makes Python.h include C's <math.h>:
# the compiler needs as long for libstdc++'s as for everything else.
HOST_FLAGS = (
    "-O2",
    "-std=c++17",
    "-fvisibility=hidden",
    "-DPy_LIMITED_API=0x030B0000",
    "-D_GLIBCXX_INCLUDE_NEXT_C_HEADERS",
    "-Wno-unknown-pragmas",
)
CUDA_FLAGS = ("-O3", "-std=c++17", "-lineinfo", "-Xcompiler=-fvisibility=hidden")
# With --as-needed and the empty libraries of child.py, the object needs only libc at run time.
LINK_FLAGS = ("-Wl,--as-needed", "-Wl,-Bsymbolic", "-Wl,--exclude-libs,ALL")
CUDA_LINK_FLAGS = ("-lcudart_static", "-ldl", "-lrt", "-lpthread")

JOBS_VARIABLE = "MAX_JOBS"
# torch writes the compiler's path into ninja's file and on nvcc's command line without quotes.
_PLAIN_PATH = re.compile(r"[\w./+@%,=-]+", re.ASCII)


@dataclass(frozen=True)
class Build:
    """A finished build in a staging folder. The child process has loaded it once.

    Attributes:
        module_file, source_file: names of the shared object and the emitted source in the folder.
        command: the compiler command of the emitted source.
        seconds: wall time.
        resources: registers, stack, shared and local bytes by architecture; {} without cuobjdump.
        requires: its requirements of a host, see binary.requirements.
    """

    module_file: str
    source_file: str
    command: str
    seconds: float
    resources: dict[str, dict[str, int]]
    requires: dict[str, Any]


def flags(target: str, archs: Sequence[str]) -> list[str]:
    """All flags that affect the object, without paths: an ingredient of the key."""
    common = [*HOST_FLAGS, *LINK_FLAGS]
    if target == "cpu":
        return common
    return [*common, *CUDA_FLAGS, *CUDA_LINK_FLAGS, *toolchain.gencode_flags(archs)]


def build(
    recipe: Recipe, tools: toolchain.Tools, *, stage: Path, timeout: float | None = None, jobs: int | None = None
) -> Build:
    """Compiles and links in a child process; this process doesn't change.

    Args:
        recipe: what to build.
        tools: the compilers.
        stage: an empty private folder, two levels below the store's root.
        timeout: seconds after which the child is killed with every compiler that it started. None is no limit.
        jobs: compilers that run at the same time; None is $MAX_JOBS, else one per file.

    Raises:
        CompileError: the build failed. The error has the paths of its log and source, which stay; ``lasting`` is True
            if a compiler or linker refused the source.
        ToolchainError: a tool is missing, the compilers don't fit each other, or no process can be started.
        OSError: the staging folder is gone or can't be read.
    """
    start = time.perf_counter()
    if tools.toolkit is not None:
        toolchain.check_pair(tools.toolkit, tools.compiler)
    ninja = toolchain.find_ninja()
    source_file = "main.cpp" if tools.toolkit is None else "cuda.cu"
    job = {
        "arguments": _arguments(recipe, tools),
        "ninja": str(ninja),
        "toolkit": str(tools.toolkit.home) if tools.toolkit else None,
    }
    outcome = process.run(job, stage, _variables(tools, ninja, stage, jobs), timeout)
    answer = outcome.answer
    failed = stage.parent.parent / "failed" / recipe.key[:16]

    def error(what: str, output: str, lasting: bool = False) -> CompileError:
        return diagnosis.compile_error(what, output, recipe.source, recipe.key, failed, lasting)

    if outcome.status is None:
        raise error(
            "wasn't built in time",
            f"{recipe.symbol} wasn't built in {timeout:g} s; --timeout sets how long it may take.",
        )
    if not answer:
        ending = f"signal {-outcome.status}" if outcome.status < 0 else f"exit status {outcome.status}"
        last = outcome.errors.strip().splitlines()[-1:]
        raise error(
            f"wasn't built, since its build process ended by {ending}",
            "\n".join([*last, "If memory ran out, build fewer at once with --jobs.", outcome.errors]),
        )
    if "commands" not in answer:
        output = str(answer["output"])
        judged = answer["step"] == "compile" and answer["status"] == 1 and diagnosis.is_lasting(output)
        what = {"load": "was built and can't be loaded", "compile": "didn't compile"}.get(
            str(answer["step"]), "didn't compile"
        )
        raise error(what, output, judged)
    object_file = stage / f"{recipe.module}.so"
    resources = binary.resources(object_file, binary.find_cuobjdump(tools.toolkit.home)) if tools.toolkit else {}
    if resources and (missing := sorted(set(recipe.archs) - set(resources))):
        raise error("isn't complete", f"error: the object holds no code for {', '.join(missing)}")
    command = next((line for line in str(answer["commands"]).splitlines() if source_file in line), "")
    return Build(
        module_file=object_file.name,
        source_file=source_file,
        command=command,
        seconds=time.perf_counter() - start,
        resources=resources,
        requires=binary.requirements(object_file, recipe.archs, tools.toolkit.version if tools.toolkit else None),
    )


def _arguments(recipe: Recipe, tools: toolchain.Tools) -> dict[str, Any]:
    """The arguments of load_inline, except the folder."""
    arguments: dict[str, Any] = {
        "name": recipe.module,
        "functions": None,
        "extra_cflags": [*tools.compiler.flags, *HOST_FLAGS],
        "extra_ldflags": ["-Lstubs", *LINK_FLAGS],
        "no_implicit_headers": True,
        "use_pch": False,
        "verbose": False,
    }
    if tools.toolkit is None:
        return arguments | {"cpp_sources": [recipe.source, recipe.binding], "with_cuda": False}
    library = shlex.quote(f"-L{tools.toolkit.cudart_static.parent}")
    return arguments | {
        "cpp_sources": [recipe.binding],
        "cuda_sources": [recipe.source],
        "with_cuda": True,
        "extra_cuda_cflags": [*CUDA_FLAGS, *toolchain.gencode_flags(recipe.archs, tools.toolkit)],
        "extra_ldflags": ["-Lstubs", *LINK_FLAGS, library, *CUDA_LINK_FLAGS],
    }


def _variables(tools: toolchain.Tools, ninja: Path, stage: Path, jobs: int | None) -> dict[str, str]:
    compiler = str(tools.compiler.path)
    if not _PLAIN_PATH.fullmatch(compiler):
        # The script has the compiler's name, because some compilers behave according to their name.
        script = stage / "compiler" / (re.sub(r"[^\w.+-]", "_", tools.compiler.path.name, flags=re.ASCII) or "c++")
        script.parent.mkdir()
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(compiler)} "$@"\n', encoding="utf-8", errors="surrogateescape")
        script.chmod(0o700)
        compiler = str(script.relative_to(stage))
    wanted = str(jobs) if jobs is not None else os.environ.get(JOBS_VARIABLE, "")
    found = environment.clean()
    return {
        **found,
        "PATH": os.pathsep.join([str(ninja.parent), found["PATH"]]),
        "PYTHONPATH": os.pathsep.join(
            folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if os.path.isabs(folder)
        ),
        "TMPDIR": child.HERE,
        # torch passes $CC to nvcc as -ccbin: the host compiler that was checked against nvcc.
        "CXX": compiler,
        "CC": compiler,
        # onelaunch has checked the compilers itself, and uses ccache only where the user put it.
        "TORCH_DONT_CHECK_COMPILER_ABI": "1",
        "TORCH_NO_COMPILER_WRAPPER": "1",
        **({JOBS_VARIABLE: wanted} if re.fullmatch("[1-9][0-9]*", wanted) else {}),
    }
