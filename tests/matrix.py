"""The tests on the oldest and the newest Python and torch, each pair in an environment of its own: `make matrix`.

Standard library alone, so that any Python runs it. A missing interpreter is named and skipped; the exit
status is 1 where tests failed, or an environment can't be made.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "matrix"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# onelaunch refuses these at import, with a sentence.
FREE_THREADED = ("3.13t", "3.14t")


def pairs() -> list[tuple[str, str]]:
    """(Python, what pip installs as torch): every Python with the newest torch, and the oldest one with the oldest."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = re.search(r"^OLDEST = \((\d+), (\d+)\)$", (ROOT / "generator" / "torch_version.py").read_text(), re.M)
    assert found is not None, "the version that is checked at the first use"
    oldest = f"{found[1]}.{found[2]}"
    assert project["requires-python"] == f">={PYTHONS[0]}", "the table of Pythons above"
    return [(PYTHONS[0], f"torch=={oldest}.*"), *((python, "torch") for python in PYTHONS)]


def interpreter(version: str) -> str | None:
    """A working Python of a version such as "3.13" or "3.13t": on PATH, or beside the one that runs this."""
    for path in _candidates(version):
        code = "import sys; print('%d.%d' % sys.version_info[:2] + 't' * ('t' in sys.abiflags))"
        done = subprocess.run([path, "-c", code], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip() == version:
            return path
    return None


def _candidates(version: str) -> Iterator[str]:
    if found := shutil.which(f"python{version}"):
        yield found
    for folder in sorted(Path(sys.base_prefix).parent.glob("*"), reverse=True):
        if os.access(path := folder / "bin" / f"python{version}", os.X_OK):
            yield str(path)


def run(python: str, torch: str, tests: list[str]) -> tuple[bool, str]:
    """Whether the tests pass, and a line about it."""
    folder = FOLDER / re.sub(r"[^\w.]+", "-", f"{Path(python).name}-{torch}").strip("-.")
    own, log = folder / "bin" / "python", FOLDER / f"{folder.name}.log"
    FOLDER.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    pip = [own, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    commands = [
        [python, "-m", "venv", folder],
        [*pip, "-e", f"{ROOT}[test]", torch],
        [own, "-c", "import torch, sys; print('Python', sys.version.split()[0] + ',', 'torch', torch.__version__)"],
        [own, "-m", "pytest", "-q", "-n", os.environ.get("WORKERS", "2"), "--dist", "worksteal", *tests],
    ]
    with open(log, "w", encoding="utf-8") as file:
        for command in commands:
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
            if done.returncode != 0:
                break
    said = log.read_text(encoding="utf-8", errors="replace")
    versions = re.search(r"^Python \d.*, torch \d.*$", said, re.M)
    counts = re.findall(r"^.*\d+ (?:passed|failed|error).*$", said, re.M)
    result = counts[-1].strip("= ") if counts else f"failed; see {log.relative_to(ROOT)}"
    what = versions[0] if versions else f"{Path(python).name}, {torch}"
    return done.returncode == 0, f"{what}: {result} ({time.monotonic() - began:.0f} s)"


def refused(python: str) -> tuple[bool, str]:
    """Whether a free-threaded Python is refused with the sentence that says so."""
    package = ROOT / "build" / "matrix" / "package"
    package.mkdir(parents=True, exist_ok=True)
    if not (package / "onelaunch").is_symlink():
        (package / "onelaunch").symlink_to(ROOT / "generator")
    done = subprocess.run(
        [python, "-c", "import onelaunch"],
        env={"PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    return "free-threaded" in last, f"{Path(python).name}: import says {last}"


def main() -> int:
    """Runs every pair whose interpreter is installed, and ends with a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", action="append", help="only this version; may be repeated")
    parser.add_argument("tests", nargs="*", help="of pytest; all tests if there is none")
    chosen = parser.parse_args()
    lines, well = [], True
    for version, torch in [*pairs(), *((version, "") for version in FREE_THREADED)]:
        if chosen.python and version not in chosen.python:
            continue
        python = interpreter(version)
        if python is None:
            what = f" with {torch}" if torch else ""
            lines.append(f"not run: there is no python{version} here (on PATH, or beside {sys.base_prefix}){what}")
            continue
        passed, line = run(python, torch, chosen.tests) if torch else refused(python)
        well = well and passed
        lines.append(f"{'passed' if passed else 'FAILED'}: {line}")
        print(lines[-1], flush=True)
    print("", *lines, sep="\n")
    return 0 if well else 1


if __name__ == "__main__":
    raise SystemExit(main())
