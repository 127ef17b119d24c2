"""The builder process: its environment, the state that it leaves unchanged, and difficult names and folders."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compilers import compiler_that
from onelaunch import KernelConfig, ToolchainError
from onelaunch.build import child, process, toolchain
from onelaunch.cache.store import Store
from onelaunch.load import loader
from processes import light_package

SMALL = KernelConfig(fields=("cache_seqlens",), target="cpu")
OTHER = SMALL.replace(num_backends=2)
SMALL_CUDA = KernelConfig(fields=("cache_seqlens",))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(loader, "_loaded", {})
    return Store(tmp_path / "cache")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes $CXX a script that does something before it runs the real compiler."""

    def write(does: str, name: str = "c++") -> Path:
        path = compiler_that(does, tmp_path, name)
        monkeypatch.setenv("CXX", shlex.quote(str(path)))
        return path

    return write


def test_nothing_is_imported_from_the_working_folder(tmp_path: Path) -> None:
    """A file that another user left in /tmp would run with this user's rights."""
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for name in ("torch", "json", "ninja", "setuptools", "subprocess", "onelaunch", "sitecustomize"):
        (hostile / f"{name}.py").write_text(f"import os; open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    words = [word for config in (SMALL, OTHER) for word in ("--set", config.settings())]
    # PYTHONPATH is the user's choice, but a child may resolve a relative folder differently.
    code = "import os; os.environ['PYTHONPATH'] = ':.:hostile'; from onelaunch.cli.main import app; app()"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "build", *words, "--jobs", "2"],
        cwd=hostile,
        env={**os.environ, "ONELAUNCH_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 built" in done.stdout
    assert not (tmp_path / "ran").exists()


def test_what_reaches_a_compiler(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: Callable[..., Path]
) -> None:
    """Only known variables: one that changes the object but not its key is dropped. This process stays unchanged."""
    names = ("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH")
    names += ("CFLAGS", "CXXFLAGS", "LDFLAGS", "LD_PRELOAD", "NINJA_STATUS", "TORCH_CUDA_ARCH_LIST", "GCC_EXEC_PREFIX")
    for name in names:
        monkeypatch.setenv(name, "/somebody's")
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    monkeypatch.setenv("MAX_JOBS", "²")
    compiler(f'[ "$step" = compile ] && /usr/bin/env >{tmp_path}/seen && pwd >{tmp_path}/folder')
    before = dict(os.environ)
    loader.load(SMALL, store=store)
    assert dict(os.environ) == before
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines())
    assert not {*names, "LANG", "MAX_JOBS"} & set(seen)
    assert (seen["LC_ALL"], seen["TMPDIR"]) == ("C", child.HERE)
    assert Path((tmp_path / "folder").read_text()).parent == store.root / "staging"


@pytest.mark.nvcc
def test_flags_that_nvcc_would_append_are_in_no_kernel(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A debug build under the key of a release build would be served to everybody afterwards.

    The second cache's path contains characters that are special to a shell and to ninja.
    """
    plain = loader.load(SMALL_CUDA, ("90a",), store)
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-G")
    loader._loaded.clear()
    again = loader.load(SMALL_CUDA, ("90a",), Store(store.root.with_name("a b$c")))
    assert (again.key, again.resources) == (plain.key, plain.resources)


def test_a_builder_is_used_again_and_replaced_when_it_is_gone(store: Store) -> None:
    pids = []
    for number in range(3):
        loader.load(SMALL.replace(num_backends=number + 3), store=store)
        builder = process._idle[-1]
        pids.append(builder._process.pid)
        if number == 1:
            os.kill(pids[-1], signal.SIGKILL)
            builder._process.wait()
    assert pids[0] == pids[1] != pids[2]


def test_a_builder_inherits_no_lock(store: Store, tmp_path: Path, compiler: Callable[..., Path]) -> None:
    """Otherwise others would wait for a dead process's build: the builder starts while its parent holds the lock."""
    while process._idle:
        process._idle.pop().end()
    compiler(f"ls -l /proc/self/fd >>{tmp_path}/open")
    loader.load(SMALL, store=store)
    builder = process._idle[-1]._process.pid
    open_in_builder = [os.readlink(path) for path in Path(f"/proc/{builder}/fd").iterdir()]
    assert not [path for path in open_in_builder if str(store.root) in path]
    assert f"{store.root}/locks" not in (tmp_path / "open").read_text()


def test_without_a_name_for_the_interpreter(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a program that embeds Python: sys.executable is None."""
    while process._idle:
        process._idle.pop().end()
    monkeypatch.setattr(sys, "executable", None)
    with pytest.raises(ToolchainError, match=r"sys\.executable is None: a build runs in a Python of its own"):
        loader.load(SMALL, store=store)


def test_a_process_that_cant_be_started(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    while process._idle:
        process._idle.pop().end()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    with pytest.raises(ToolchainError, match=r"A build can't be started with /no/such/python: No such file"):
        loader.load(SMALL, store=store)
    assert list((store.root / "staging").iterdir()) == []


# ------------------------------------------------------------------------------------------------ names and folders


@pytest.mark.parametrize("name", ["a b", "a$b:c|d", "a\nb", "a'b\"c", "ä"])
def test_a_cache_with_any_name(tmp_path: Path, name: str, store: Store) -> None:
    """ninja escapes only spaces; so every path that it sees begins with /proc/self/cwd."""
    first = loader.load(SMALL, store=Store(tmp_path / name))
    assert first.path.is_relative_to(tmp_path / name)
    assert " -c ./main.cpp" in first.manifest["command"]


def test_a_compiler_with_any_name(store: Store, compiler: Callable[..., Path]) -> None:
    """As in a virtual environment whose path has a space."""
    path = compiler("", "my c++ (1)")
    assert toolchain.find_host_compiler().path == path
    assert loader.load(SMALL, store=store).path.is_file()


def test_a_virtual_environment_with_a_space(store: Store, tmp_path: Path) -> None:
    """torch names its own folder on the link line, without quotes."""
    venv = tmp_path / "some one's venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    site = next(venv.glob("lib/python*/site-packages"))
    # As if they were installed there: a link for each package.
    packages = Path(torch.__file__).parent.parent
    for path in packages.iterdir():
        if path.suffix != ".pth":
            (site / path.name).symlink_to(path)
    (venv / "bin" / "ninja").symlink_to(toolchain.find_ninja())
    code = (
        "import sys; from pathlib import Path; import onelaunch; from onelaunch import KernelConfig;"
        "from onelaunch.load import loader; from onelaunch.cache.store import Store;"
        "print(loader.load(KernelConfig(fields=('cache_seqlens',), target='cpu'), store=Store(Path(sys.argv[1]))).path)"
    )
    environment = {**os.environ, "PYTHONPATH": str(light_package(tmp_path))}
    done = subprocess.run(
        [venv / "bin" / "python", "-P", "-c", code, store.root], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_file()


def test_a_working_folder_that_is_gone(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    assert loader.load(SMALL, store=store).path.is_file()


@pytest.mark.parametrize("stream", ["closed", "full", "none"])
def test_a_progress_line_never_fails_a_build(store: Store, stream: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        if stream == "closed":
            full.close()
        monkeypatch.setattr(sys, "stderr", None if stream == "none" else full)
        assert loader.load(SMALL, store=store).path.is_file()
        monkeypatch.undo()
        if stream == "full":
            with pytest.raises(OSError, match="No space left"):
                full.close()


def test_a_user_without_a_name_and_a_home(tmp_path: Path) -> None:
    """As in a container with an arbitrary uid: without a named cache folder that is a sentence, with one it builds."""
    code = """
import os, pwd
try:
    raise SystemExit(f"{pwd.getpwuid(os.getuid())} has a name")
except KeyError:
    pass
from onelaunch import KernelConfig, StoreError
from onelaunch.cache.store import Store
from onelaunch.load import loader
named = os.environ.pop("ONELAUNCH_CACHE_DIR")
try:
    print(Store().find("5" * 64))
except StoreError as error:
    print(error)
os.environ["ONELAUNCH_CACHE_DIR"] = named
print(loader.load(KernelConfig(fields=("cache_seqlens",), target="cpu")).path)
"""
    become = ["unshare", "--user", "--map-user=54321"]
    if shutil.which("unshare") is None or subprocess.run([*become, "true"], capture_output=True).returncode:
        pytest.skip("this system gives no user without a name")
    homes = ("HOME", "XDG_CACHE_HOME", "USER", "LOGNAME")
    environment = {name: value for name, value in os.environ.items() if name not in homes}
    done = subprocess.run(
        [*become, sys.executable, "-c", code],
        env={**environment, "ONELAUNCH_CACHE_DIR": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said, path = done.stdout.splitlines()
    assert "HOME isn't set, and user 54321 has no entry in the password database. Set ONELAUNCH_CACHE_DIR" in said
    assert re.search(r"entries/\w{64}/\w+\.so$", path)
