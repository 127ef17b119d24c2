"""A compiler for $CXX that does something of a test's before it runs the real one."""

from __future__ import annotations

import shlex
from pathlib import Path

from onelaunch.build import toolchain
from toolkits import script

REAL = toolchain.find_host_compiler().path


def compiler_that(does: str, folder: Path, name: str = "c++") -> Path:
    """A script that calls the real compiler, but on a call with -o runs ``does`` before.

    In it, $out is the requested file, $step is "compile" or "link", and "$real" the real compiler.
    """
    return script(
        folder / "bin" / name,
        f"""real={shlex.quote(str(REAL))}
out= step=link previous=
for word in "$@"; do
  [ "$previous" = -o ] && out=$word
  [ "$word" = -c ] && step=compile
  previous=$word
done
if [ -n "$out" ]; then
  :
{does}
fi
exec "$real" "$@"
""",
    )


def only_of(symbol: str, does: str) -> str:
    """For compiler_that(): what it does when it compiles the kernel of that name; it compiles all others."""
    return f'if [ "$step" = compile ] && grep -q {symbol} main.cpp; then {does}; fi'


def hanging(folder: Path) -> str:
    """For compiler_that(): it leaves its process number in ``folder``, as running.NUMBER, and never ends."""
    return f"touch {shlex.quote(str(folder))}/running.$$; exec sleep 3000"


def running(folder: Path) -> list[int]:
    """The processes of the compilers that are hanging(), or were."""
    return [int(path.suffix[1:]) for path in folder.glob("running.*")]
