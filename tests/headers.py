"""A compiler for the tests' hundreds of builds, with precompiled headers, which take half of a build's time."""

from __future__ import annotations

import re
import shlex
import subprocess
import sysconfig
from pathlib import Path

from onelaunch import KernelConfig, render
from onelaunch.build import compile as compiler
from onelaunch.build import toolchain
from onelaunch.emit.binding import render_binding

# Where tests find the compiler itself.
PLAIN_VARIABLE = "ONELAUNCH_TEST_PLAIN_CXX"
# Where tests that check only a kernel's results find theirs: it doesn't optimize, and takes half as long.
QUICK_VARIABLE = "ONELAUNCH_TEST_QUICK_CXX"
# The directives that an emitted source begins with, without the macros of one binding.
DIRECTIVES = r"^\s*#\s*(?:include|define(?! ONELAUNCH_)|ifndef|endif)\b.*\n"


def precompiled(folder: Path) -> dict[str, str]:
    """For the environment: a $CXX that is the compiler found here, but reads the headers of a binding precompiled.

    The objects are the same as the compiler's own. Empty if no compiler is found that can precompile headers.
    """
    try:
        found = toolchain.find_host_compiler()
    except toolchain.ToolchainError:
        return {}
    config = KernelConfig(target="cpu")
    text = render(config) + render_binding(config, "headers")
    directives = "".join(re.findall(DIRECTIVES, text, re.MULTILINE))
    programs = {PLAIN_VARIABLE: found.path}
    for variable, place, more in (("CXX", folder, []), (QUICK_VARIABLE, folder / "quick", ["-O0"])):
        place.mkdir(exist_ok=True)
        program = _program(place, found, directives, more)
        if program is None:
            return {}
        programs[variable] = program
    return {name: shlex.join([str(cxx), *found.flags]) for name, cxx in programs.items()}


def _program(folder: Path, found: toolchain.HostCompiler, directives: str, more: list[str]) -> Path | None:
    """The compiler with more flags for a module's source; None if it can't have headers precompiled."""
    headers, program = folder / "headers.h", folder / "c++"
    headers.write_text(directives, encoding="utf-8")
    flags = [*found.flags, "-fPIC", *compiler.HOST_FLAGS, *more, "-isystem", sysconfig.get_path("include")]
    command = [str(found.path), *flags, "-x", "c++-header", str(headers), "-o", f"{headers}.gch"]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        return None
    # With -Werror the compiler must check the headers too, so they aren't precompiled.
    program.write_text(
        '#!/bin/sh\ncase " $* " in *" -Werror "*) ;;\n'
        f'*" -DPy_LIMITED_API="*" -c "*) set -- -include {shlex.quote(str(headers))} "$@" {shlex.join(more)} ;; esac\n'
        f'exec {shlex.quote(str(found.path))} "$@"\n',
        encoding="utf-8",
    )
    program.chmod(0o755)
    return program
