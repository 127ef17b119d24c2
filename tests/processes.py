"""Child processes for the tests of the cache. They import no torch, so they start quickly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onelaunch
import pytest
from onelaunch import templates

# What every child begins with: the configuration, a store, and a compiler whose speed and calls the test controls.
PROLOGUE = """
import errno, fcntl, json, os, signal, socket, sys, time, warnings
from pathlib import Path
from onelaunch import errors, log
from onelaunch.cache import collect, failures, lock, store as stores
from onelaunch.build import compile as compiler, toolchain
from onelaunch.load import loader
from onelaunch.spec.config import KernelConfig
CONFIG = KernelConfig(fields=("cache_seqlens",), target="cpu")
store = stores.Store()
SIGNS = Path(os.environ["SIGNS"])
real_build = compiler.build
def copying_build(recipe, tools, *, stage, **others):
    # What a compiler would leave, at once: most tests are about everything around it.
    import shutil
    made = Path(os.environ["MADE"])
    manifest = json.loads((made / "manifest.json").read_text())
    for file in manifest["files"]:
        shutil.copy(made / file, stage)
    return compiler.Build(manifest["module_file"], manifest["source_file"], "", 0.0, {}, {})
if os.environ.get("MADE"):
    real_build = copying_build
def sign(name):
    (SIGNS / f"{name}.{os.getpid()}").touch()
def slow_build(*args, **kwargs):
    sign("building")
    while len(list(SIGNS.glob("waiting.*"))) < int(os.environ.get("UNTIL_WAITING", "0")):
        time.sleep(0.01)
    time.sleep(float(os.environ.get("SLOW", "0")))
    return real_build(*args, **kwargs)
compiler.build = slow_build
lock.FIRST_NOTICE_SECONDS = lock.NOTICE_SECONDS = 0.3
def signing_notice(text, notice=log.notice):
    notice(text)
    if text.startswith("waiting for"):
        sign("waiting")
log.notice = signing_notice
"""

# Loads the configuration, and prints what it got.
LOAD = """
kernel = loader.load(CONFIG, store=store)
print(json.dumps({"key": kernel.key, "path": str(kernel.path), "works": hasattr(kernel.module, "bind")}))
"""


def light_package(folder: Path) -> Path:
    """A folder for PYTHONPATH with the package laid out as it is installed, for a Python that doesn't have it."""
    package = folder / "light" / "onelaunch"
    if not package.exists():
        package.mkdir(parents=True)
        for path in Path(str(onelaunch.__file__)).parent.iterdir():
            if path.name not in ("__pycache__", "templates"):  # only an installed package contains the templates
                (package / path.name).symlink_to(path.resolve())
        (package / "templates").symlink_to(Path(str(templates.__file__)).parent.resolve())
    return package.parent


class Children:
    """Starts children on one cache folder.

    Attributes:
        cache: the folder.
        signs: a folder in which children leave files that say what they did.
    """

    def __init__(self, folder: Path, cache: Path | None = None) -> None:
        self.folder, self.cache, self.signs = folder, cache or folder / "cache", folder / "signs"
        self.signs.mkdir(exist_ok=True)
        self.started: list[subprocess.Popen[str]] = []
        # An entry with files in place of a compiler's output; None compiles.
        self.made: Path | None = None

    def start(self, code: str, python: str = sys.executable, **environment: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [python, "-c", PROLOGUE + code],
            env={
                **os.environ,
                "ONELAUNCH_CACHE_DIR": str(self.cache),
                "PYTHONDONTWRITEBYTECODE": "1",
                "SIGNS": str(self.signs),
                "MADE": str(self.made or ""),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(child)
        return child

    def run(self, code: str, **environment: str) -> tuple[Any, str]:
        """What a child printed, parsed as JSON, and its stderr."""
        return finish(self.start(code, **environment))

    def wait_for(self, sign: str, count: int = 1) -> None:
        until(lambda: len(self.signed(sign)) >= count, f"{count} x {sign}")

    def signed(self, sign: str) -> list[int]:
        """The process numbers of the children that left a sign."""
        return [int(path.suffix[1:]) for path in self.signs.glob(f"{sign}.*")]


def finish(child: subprocess.Popen[str]) -> tuple[Any, str]:
    out, err = child.communicate(timeout=300)
    assert child.returncode == 0, err
    return json.loads(out.splitlines()[-1]) if out else None, err


def until(true: Callable[[], bool], what: str, seconds: float = 300.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, f"{what} didn't happen in {seconds:.0f} s"
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether a process exists and isn't a zombie."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # ProcessLookupError if it ends between opening and reading
        return False


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small tmpfs; skips, with the reason, where mounting is refused."""
    folder.mkdir(mode=0o700, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"mode=700,{options}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode != 0:
        pytest.skip(f"a tmpfs can't be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[Path]:
    """A folder that is read-only for a while, for any user."""
    if os.geteuid() != 0:
        folder.chmod(0o500)
        try:
            yield folder
        finally:
            folder.chmod(0o700)
        return
    # Permissions don't stop root; a read-only bind mount of the folder on itself does.
    for options in (["--bind", str(folder)], ["-o", "remount,ro,bind"]):
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
