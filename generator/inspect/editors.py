"""What an editor needs to read emitted sources."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path

from ..build import toolchain
from ..errors import ConfigError
from .kernels import Subject, of_file

COMMANDS = "compile_commands.json"


def commands_of_folder(folder: Path) -> str:
    """The compile_commands.json of the emitted sources in a folder; other files are left out."""
    files = {}
    for source in sorted(folder.glob("*.cu")):
        with contextlib.suppress(ConfigError):  # onelaunch didn't emit it
            files[source] = of_file(source)
    return compile_commands(files)


def compile_commands(files: Mapping[Path, Subject]) -> str:
    """A compile_commands.json for clangd, by which an editor reads emitted sources.

    CUDA is spelled as clang takes it, since clangd knows few of nvcc's flags.
    See https://clang.llvm.org/docs/JSONCompilationDatabase.html and https://llvm.org/docs/CompileCudaWithLLVM.html.

    Raises:
        ToolchainError: there is no CUDA toolkit, and a source is CUDA.
    """
    commands = []
    for path, kernel in files.items():
        arguments = ["clang++", "-std=c++17", "-fsyntax-only"]
        if kernel.on_gpu:
            toolkit = toolchain.find_toolkit()
            arguments += ["-xcuda", f"--cuda-path={toolkit.home}", f"-I{toolkit.include}", "-Wno-unknown-cuda-version"]
            arguments += [f"--cuda-gpu-arch=sm_{arch}" for arch in kernel.archs]
        else:
            arguments += ["-xc++", "-Wno-unknown-pragmas"]
        absolute = path.resolve()
        commands.append(
            {"directory": str(absolute.parent), "file": str(absolute), "arguments": [*arguments, str(absolute)]}
        )
    return json.dumps(commands, indent=1) + "\n"
