"""How JIT caches fail in the field, each provoked here or by the test that is named.

=====  ==================================================  ========================================================
 F     failure                                             where it is provoked, or why it can't happen
=====  ==================================================  ========================================================
 F1    stale lock hangs everybody                          test_processes.test_lock_files_of_killed_processes_...,
                                                           test_killed.test_a_process_that_is_killed_while_it_builds,
                                                           test_a_builder_that_is_slower_than_the_wait_...
 F2    second call after a failure hides it                test_faults.test_a_source_that_doesnt_compile
 F3    ranks race, or all compile                          test_eight_processes_that_ask_at_once_get_one_build
 F4    sources of two builds mix under one name            test_two_hosts_that_share_a_folder_without_locks
 F5    network file systems: no locks, late renames        test_two_hosts_that_share_a_folder_without_locks,
                                                           test_a_rename_that_shows_late
 F6    stale after a torch upgrade                         the object uses no symbol of torch:
                                                           test_compile.test_the_object_needs_nothing_but_the_system_...
 F7    stale after a toolkit change, or moved by a path    test_key.test_the_key_changes_with_each_ingredient,
                                                           test_key.test_no_path_in_the_key,
                                                           test_toolchain.test_a_binarys_answer_is_remembered_...
 F8    wrong architecture cached                           test_compile.test_an_object_for_two_architectures,
                                                           test_pack.test_misfits; bind loads on the device at once,
                                                           and its error names both architectures
 F9    no GPU at build time                                test_toolchain.test_no_gpu_is_asked_without_a_device,
                                                           test_sass.test_the_machine_code_of_a_preset
 F10   nvcc, gcc and torch don't fit                       test_toolchain.test_pair_follows_the_toolkits_own_header;
                                                           static cudart makes torch's CUDA irrelevant
 F11   ninja or toolkit not found                          test_toolchain.test_ninja_of_the_package_then_beside_...,
                                                           test_toolkit.test_nothing_found_lists_every_place_...
 F12   read-only HOME, writes at import                    test_unwritable.py,
                                                           test_import.test_the_import_does_nothing
 F13   first request compiles                              test_policy.test_frozen, test_prebuild.py
 F14   build or load inside graph capture                  test_nothing_is_loaded_while_a_graph_is_captured,
                                                           test_gpu.test_a_capture_refuses_a_kernel_that_isnt_loaded
 F15   too many compilers for the memory                   test_prebuild.test_workers_are_bounded,
                                                           test_killed.test_a_compiler_that_is_killed
 F16   disk full, half a file                              test_unwritable.test_a_disk_that_is_really_full,
                                                           test_killed.test_a_process_that_is_killed_while_it_builds,
                                                           test_compile.test_a_truncated_object_doesnt_...
 F17   opaque errors                                       test_faults.test_a_source_that_doesnt_compile
 F18   others can write to the cache                       test_store.test_a_part_that_others_could_have_...,
                                                           test_pack.test_paths_that_lead_out_are_refused
 F19   two kernels export one symbol                       test_compile.test_the_object_needs_nothing_but_the_system_...
                                                           (one exported symbol, which carries the key)
 F20   fork                                                test_a_forked_child_builds, test_spawned_workers
 F21   noexec                                              test_unwritable.test_a_file_system_that_runs_no_programs
 F22   one CUDA major an object                            static cudart: the same test as F19 sees no CUDA library
 F23   cache grows without bound                           test_cache.py
 F24   Windows, odd paths                                  test_import.test_what_cannot_run_it_is_refused_at_import,
                                                           test_builder.test_a_cache_with_any_name
 F25   no compiler in a service's environment              test_doctor.py, test_a_prebuilt_folder_needs_no_compiler
=====  ==================================================  ========================================================
"""

from __future__ import annotations

import errno
import os
import pickle
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from onelaunch import CompileError, JitPolicyError, KernelConfig
from onelaunch.cache.store import Store
from onelaunch.load import loader
from processes import LOAD, Children, finish, light_package
from usable import SMALL, forget


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)


def test_the_table_above_names_tests_that_there_are() -> None:
    files = {path.stem: path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")}
    table = str(__doc__)
    assert re.findall(r"^ F(\d+) ", table, re.M) == [str(number) for number in range(1, 26)]
    named = re.findall(r"(?:(test_\w+)\.)?(test_\w+)(\.\.\.|\.py)?", table)
    assert len(named) > 40
    for module, name, rest in named:
        if rest == ".py":
            assert name in files, name
            continue
        text = files[module] if module else files[Path(__file__).stem]
        assert re.search(rf"^def {name}{'' if rest else '[(]'}", text, re.M), f"{module}.{name}"


# --------------------------------------------------------------------------------------------- many processes


def test_eight_processes_that_ask_at_once_get_one_build(children: Children) -> None:
    """The processes that wait name the one they wait for."""
    started = [children.start(LOAD, UNTIL_WAITING="7") for _ in range(8)]
    results = [finish(child) for child in started]
    assert len({result["key"] for result, _ in results}) == 1
    assert all(result["works"] for result, _ in results)
    (builder,) = children.signed("building")
    waiting = [line for _, said in results for line in said.splitlines() if "waiting for" in line]
    # A holder writes its name after it takes the lock; in between nobody knows it.
    waiting = [line for line in waiting if not line.endswith("its holder didn't say who it is")]
    for line in waiting:
        assert f"host {socket.gethostname()}, pid {builder}, holds it since " in line
        assert line.rsplit(" ", 1)[1] in ("starting", "compiling", "publishing")
    assert any(line.endswith("s) and is compiling") for line in waiting)


def test_a_builder_that_is_slower_than_the_wait_takes_what_the_other_built(children: Children) -> None:
    """Each process builds in its own staging folder, so two builds at once don't mix."""
    code = """
signing_build = compiler.build
def last(*args, stage, **kwargs):
    done = signing_build(*args, stage=stage, **kwargs)
    while not list((store.root / "entries").glob("*/manifest.json")):
        time.sleep(0.01)
    return done
compiler.build = last
"""
    slow = children.start(code + LOAD)
    children.wait_for("building")
    quick = children.start(LOAD, ONELAUNCH_LOCK_TIMEOUT="0.2")
    (first, _), (second, said) = finish(slow), finish(quick)
    assert first == second
    assert "gave up the wait for" in said
    assert f"pid {slow.pid}, holds it since" in said
    assert sorted(children.signed("building")) == sorted([slow.pid, quick.pid])
    assert len(list((children.cache / "entries").iterdir())) == 1
    assert list((children.cache / "staging").iterdir()) == []


NO_LOCKS = {
    **{
        os.strerror(number): f"fcntl.flock = lambda *args: exec('raise OSError({number}, os.strerror({number}))')"
        for number in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
    },
    "on one host only": "socket.gethostname = lambda: os.environ['HOST']; fcntl.flock = lambda *args: None",
}


@pytest.mark.parametrize("locks", NO_LOCKS)
def test_two_hosts_that_share_a_folder_without_locks(children: Children, locks: str) -> None:
    """Both build, one publishes first, and both use its entry."""
    code = """
signing_build = compiler.build
def together(*args, **kwargs):
    done = signing_build(*args, **kwargs)
    sign("built")
    while len(list(SIGNS.glob("built.*"))) < 2:
        time.sleep(0.01)
    return done
compiler.build = together
"""
    one, two = (children.start(f"{NO_LOCKS[locks]}\n{code}{LOAD}", HOST=name) for name in ("node-1", "node-2"))
    (first, said), (second, _) = finish(one), finish(two)
    assert first == second
    assert first["works"]
    assert ("has no locks" in said) == (locks != "on one host only")
    assert len(children.signed("building")) == 2
    assert len(list((children.cache / "entries").iterdir())) == 1
    assert list((children.cache / "staging").iterdir()) == []


def test_a_rename_that_shows_late(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system may hide an entry for a while after its rename."""
    find, blind = Store.find, [2]

    def late(self: Store, key: str, expect: Any = None) -> Any:
        if (self.root / "entries" / key).exists() and blind[0]:
            blind[0] -= 1
            return None
        return find(self, key, expect)

    monkeypatch.setattr(Store, "find", late)
    assert loader.load(SMALL, store=store).path.is_file()
    assert blind == [0]


# ------------------------------------------------------------------------------------------------------- security


def test_a_shared_cache_takes_its_rights_from_the_umask(children: Children) -> None:
    code = "os.umask(0o002)\n" + LOAD
    result, _ = children.run(code, ONELAUNCH_SHARED_CACHE="1")
    modes = {path.name: path.stat().st_mode & 0o777 for path in Path(result["path"]).parent.iterdir()}
    assert set(modes.values()) == {0o664}
    assert (children.cache / "entries").stat().st_mode & 0o777 == 0o775


# ------------------------------------------------------------------------------------------------------- failures


def test_an_error_survives_pickling(tmp_path: Path) -> None:
    error = CompileError("It failed.", key="k", command="c", log=tmp_path / "l", source=tmp_path / "s", lasting=False)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.__dict__) == (str(error), error.__dict__)


# ---------------------------------------------------------------------------------------------------------- tiers


def test_a_prebuilt_folder_needs_no_compiler(
    children: Children, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes first, with or without compilers, and nothing is written to it or to the cache."""
    shelf = Store(tmp_path / "shelf")
    kernel = loader.load(SMALL, store=shelf)
    before = sorted((str(p), p.stat().st_mtime_ns) for p in shelf.root.rglob("*"))
    path_list = f"{tmp_path / 'missing'}{os.pathsep}{shelf.root}"
    (tmp_path / "empty").mkdir()
    result, said = children.run(LOAD, ONELAUNCH_PREBUILT=path_list, PATH=str(tmp_path / "empty"))
    assert result["path"] == str(kernel.path)
    assert "names" in said
    assert "which isn't a folder; it is passed over" in said
    assert not children.cache.exists()
    assert sorted((str(p), p.stat().st_mtime_ns) for p in shelf.root.rglob("*")) == before
    # A damaged entry is passed over with one warning, and left as it is.
    with open(kernel.path, "ab") as file:
        file.write(b"x")
    result, said = children.run(LOAD, ONELAUNCH_PREBUILT=str(shelf.root))
    assert Path(result["path"]).is_relative_to(children.cache)
    (line,) = [line for line in said.splitlines() if "is damaged" in line]
    assert line.endswith(
        f"The prebuilt entry {kernel.path.parent} is damaged ({kernel.path.name} isn't the file that was published); "
        "it is passed over."
    )
    assert kernel.path.exists()


# ----------------------------------------------------------------------------------------------- capture, fork, spawn


def test_nothing_is_loaded_while_a_graph_is_captured(
    store: Store, monkeypatch: pytest.MonkeyPatch, builds: list[str]
) -> None:
    config = KernelConfig(fields=("cache_seqlens",), num_backends=5)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(JitPolicyError, match="a CUDA graph is being captured") as caught:
        loader.load(config, ("90a",), store)
    assert str(caught.value).endswith(loader.build_command(config, ("90a",)))
    assert builds == []
    # Kernels for the CPU are not concerned, and loaded kernels stay usable.
    kernel = loader.load(SMALL, store=store)
    assert loader.load(SMALL, store=store) is kernel


def test_a_forked_child_builds(children: Children) -> None:
    """A forked child can build even if another thread of its parent held every lock at the fork."""
    children.made = None
    code = """
import threading
from onelaunch.build import process
held, go = threading.Event(), threading.Event()
def hold():
    with loader._lock, process._lock:
        held.set()
        go.wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
pid = os.fork()
if pid == 0:
    kernel = loader.load(CONFIG, store=store)
    os._exit(0 if hasattr(kernel.module, "bind") else 3)
status = os.waitpid(pid, 0)[1]
go.set()
print(json.dumps({"status": status, "entries": store.stored_keys()}))
"""
    result, _ = children.run(code)
    assert result["status"] == 0
    assert len(result["entries"]) == 1


def test_spawned_workers(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(f"""
import multiprocessing
from pathlib import Path
from onelaunch.load import loader
from onelaunch.spec.config import KernelConfig
from onelaunch.cache.store import Store
def work(number):
    config = KernelConfig(fields=("cache_seqlens",), target="cpu")
    return loader.load(config, store=Store(Path({str(tmp_path / "cache")!r}))).key
if __name__ == "__main__":
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        assert len(set(pool.map(work, range(2), chunksize=1))) == 1
""")
    environment = {**os.environ, "PYTHONPATH": str(light_package(tmp_path))}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("onelaunch: building") == 1
