"""Diagnosis of a failed build's output: the first error, what to do, and whether another try would fail again."""

from __future__ import annotations

import re
from pathlib import Path

from ..cache import staging, trust
from ..errors import CompileError

# Errors that a compiler or linker reports for the emitted files. Only these are lasting, because a list of temporary
# causes would never be complete.
_VERDICT = re.compile(
    r"""^(?:\./)?(?:main\.cpp|cuda\.cu)(?::\d+|\(\d+\)).*\berror\b   # g++, clang++, cudafe++, cicc
    |^ptxas\b.*\berror\b                                             # by line of the PTX
    |\bundefined\ reference\ to\b""",
    re.MULTILINE | re.VERBOSE,
)
# Outputs with such lines that nevertheless have a cause outside the source.
_ELSEWHERE = re.compile(
    r"No such file|internal compiler error|[Kk]illed|signal|memory|exhausted|No space left|quota exceeded"
    r"|temporarily unavailable|Too many open files|Permission denied|not permitted|Read-only|Input/output error"
    r"|[Cc]annot open|[Cc]an't open|[Cc]ould not open"
)
NO_SPACE = re.compile(r"No space left|Disk quota exceeded")

# (pattern in the output, what to do)
_HINTS = (
    (
        r"Killed|exit(ed with)? (code|status) 137|\[code=137\]|signal 9|Cannot allocate memory|out of memory"
        r"|MemoryError",
        "The compiler was killed, most often because memory ran out: build fewer at once (MAX_JOBS=1), or give it more "
        "memory.",
    ),
    (
        NO_SPACE.pattern,
        "The disk is full: free some space, or set ONELAUNCH_CACHE_DIR to a folder on another disk.",
    ),
    (
        r"failed to map segment|Operation not permitted",
        "Programs can't be run from the cache's file system, which is mounted noexec: set ONELAUNCH_CACHE_DIR to a "
        "folder on another one.",
    ),
    (r"Read-only file system", "Set ONELAUNCH_CACHE_DIR to a folder that this process may write."),
    (r"Resource temporarily unavailable", "There are too many processes: build fewer at once (MAX_JOBS=1)."),
    (r"No module named '?torch", "A build needs torch in the environment of {python}."),
    (r"unsupported GNU version|unsupported clang version", "Set CXX to an older compiler."),
    (r"Python\.h: No such file", "Install Python's headers (the package python3-dev)."),
    (r"fatal error: \S+: No such file", "A header is missing: `onelaunch doctor` checks the toolchain."),
    (r"cannot find -l", "A library is missing: `onelaunch doctor` checks the toolchain."),
    (r"Unsupported gpu architecture", "This nvcc doesn't know the architecture: choose another or a newer toolkit."),
)
# Patterns of the most informative line, best first.
_FIRST_ERROR = (r"\berror\b|undefined reference|cannot find|Killed", r"not found$", r"^FAILED: ", r"\S")


def is_lasting(output: str) -> bool:
    """Whether a compiler or linker refused the source, so that another try would fail again."""
    lines = [line for line in output.splitlines() if _VERDICT.search(line)]
    return bool(lines) and not _ELSEWHERE.search(output)


def compile_error(what: str, output: str, source: str, key: str, folder: Path, lasting: bool) -> CompileError:
    """The error of a failed build.

    Args:
        what: how it failed, such as "didn't compile".
        output: everything that the build wrote.
        source: the emitted source.
        key: of the build.
        folder: the folder for log and source; if it can't be written, a temporary folder.
        lasting: see CompileError.
    """
    lines = output.splitlines()
    found = (line for pattern in _FIRST_ERROR for line in lines if re.search(pattern, line))
    first = next(found, "no output").strip().removesuffix(".")
    # ninja prints the failed command after this line.
    failed = re.search(r"^FAILED: .*\n(.+)$", output, re.MULTILINE)
    hint = next((f" {hint}" for pattern, hint in _HINTS if re.search(pattern, output)), "")
    places = _write(folder, output, source)
    if places is None:
        where = "Its log can't be written anywhere: both the cache folder and the folder for temporary files refuse it."
        log = kept_source = Path("/dev/null")
    else:
        log, kept_source = places
        where = f"The whole log is in {log}, the source in {kept_source}."
    return CompileError(
        f"The kernel {key[:16]} {what}: {first}.{hint} {where}",
        key=key,
        command=failed[1].strip() if failed else "",
        log=log,
        source=kept_source,
        lasting=lasting,
    )


def _write(folder: Path, output: str, source: str) -> tuple[Path, Path] | None:
    def write(place: Path) -> tuple[Path, Path]:
        log, kept_source = place / "build.log", place / "source.cu"
        log.write_text(output, encoding="utf-8")
        kept_source.write_text(source, encoding="utf-8")
        return log, kept_source

    try:
        trust.private(folder.parent)
        return write(trust.private(folder))
    except OSError:
        try:
            return write(staging.failed_folder())
        except OSError:
            return None
