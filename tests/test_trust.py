"""Which users could have written the loaded code: checks every folder above it, and loads only verified files."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from entries import FACTS, KEY, published
from onelaunch import StoreError
from onelaunch.cache import tiers, trust
from onelaunch.cache.manifest import Entry
from onelaunch.cache.module import EntryChanged, import_entry
from onelaunch.cache.store import Store
from users import ALICE, MALLORY, as_user, public_folder


@pytest.fixture
def public() -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can make folders of several users")
    with public_folder() as folder:
        yield folder


# ----------------------------------------------------------------------------------------------------- the ancestors


def folder(path: Path, owner: int = 0, mode: int = 0o755) -> Path:
    path.mkdir()
    path.chmod(mode)
    os.chown(path, owner, owner)
    return path


def refused(path: Path) -> str:
    with pytest.raises(StoreError) as caught:
        trust.check_ancestors(path)
    return str(caught.value)


def test_every_folder_above_is_checked(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a folder above belongs to another user, or others can write it, they can replace the cache by another one."""
    hers = folder(public / "hers", MALLORY)
    expected = (
        f"{hers}, which leads to the kernel cache, belongs to user {MALLORY}, and code from it would run as user 0. "
        f"Set ONELAUNCH_CACHE_DIR to a folder of your own, or, if you trust everybody who can write there, set "
        f"ONELAUNCH_SHARED_CACHE=1."
    )
    mine = folder(hers / "mine", mode=0o700)
    assert refused(mine / "cache") == expected
    # The check runs before anything is created.
    with pytest.raises(StoreError, match="which leads to the kernel cache, belongs to user"):
        tiers.writable(Store(mine / "cache"))
    for mode in (0o777, 0o775, 0o757):
        everybodys = folder(public / f"mode-{mode:o}", mode=mode)
        os.chown(everybodys, 0, MALLORY)
        assert f"{everybodys}, which leads to the kernel cache, can be written by others (mode {mode:o})" in refused(
            everybodys / "a" / "cache"
        )
    # In a folder with the sticky bit no user can rename another user's files.
    trust.check_ancestors(folder(public / "sticky", mode=0o1777) / "cache")
    monkeypatch.setenv(trust.SHARED_VARIABLE, "1")
    trust.check_ancestors(mine / "cache")


def test_links_on_the_way_are_followed_and_checked(public: Path) -> None:
    """Checked are the link's target, the folders above the target, and the link's owner."""
    good, hers = folder(public / "good"), folder(public / "hers", MALLORY)
    folder(hers / "mine", mode=0o700)
    folder(public / "way")
    for name, target in (
        ("absolute", hers / "mine"),
        ("relative", "../hers/mine"),
        ("two", "absolute"),
        ("back", "../hers/mine/../../good"),
    ):
        (public / "way" / name).symlink_to(target)
        assert f"{hers}, which leads to" in refused(public / "way" / name / "cache"), name
    (public / "way" / "good").symlink_to(good)
    trust.check_ancestors(public / "way" / "good" / "cache")
    sticky = folder(public / "sticky", mode=0o1777)
    (sticky / "link").symlink_to(good)
    os.chown(sticky / "link", MALLORY, MALLORY, follow_symlinks=False)
    assert f"{sticky}/link, which leads to" in refused(sticky / "link" / "cache")
    (public / "way" / "circle").symlink_to("circle")
    with pytest.raises(OSError, match="Too many levels"):
        trust.check_ancestors(public / "way" / "circle" / "cache")


def test_a_group_of_one_user_is_that_user(public: Path) -> None:
    """Distributions with umask 002 make home folders so: mode 775, and a group named after the user."""
    if not trust._is_own_group(0):
        pytest.skip("root's group has members")
    trust.check_ancestors(folder(public / "home", mode=0o775) / "cache")
    (public / "home").chmod(0o777)
    assert "can be written by others (mode 777)" in refused(public / "home" / "cache")
    assert not trust._is_own_group(MALLORY)


def test_another_users_parent_is_no_place_for_a_cache(public: Path) -> None:
    """Run as a user who is not root, with real owners of all folders."""
    parent = folder(public / "mallory", MALLORY)
    cache = folder(parent / "alice", ALICE, 0o700)
    own = folder(public / "alice", ALICE, 0o700)

    def attempt() -> list[str]:
        made = [published(Store(own / "deep" / "cache")).path.name]
        with pytest.raises(StoreError) as caught:
            published(Store(cache / "cache"))
        return [*made, str(caught.value), oct((own / "deep").stat().st_mode)]

    (key, said, mode), warned = as_user(ALICE, attempt)
    assert key == KEY
    assert f"{parent}, which leads to the kernel cache, belongs to user {MALLORY}" in said
    assert mode == "0o40700"
    assert warned == []


# ---------------------------------------------------------------------------------------------- one entry, one part


@pytest.mark.parametrize("part", ["", "entries", f"entries/{KEY}", f"entries/{KEY}/m.so"])
def test_a_part_that_others_could_have_written_is_named(
    public: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code and each folder above it in the cache: the error names the path and the remedy."""
    store = Store(folder(public / "mine", mode=0o700) / "cache")
    entry = published(store)
    path, mode = store.root / part, (store.root / part).stat().st_mode & 0o777

    def refused_by(look: Store) -> str:
        with pytest.raises(StoreError) as caught:
            look.find(KEY)
        return str(caught.value)

    for loose in (mode | 0o020, mode | 0o002):
        path.chmod(loose)
        assert refused_by(Store(store.root)) == (
            f"{path} in the kernel cache can be written by others (mode {loose:o}). Run: chmod go-w {path} or, if you "
            "trust everybody who can write there, set ONELAUNCH_SHARED_CACHE=1."
        )
    path.chmod(mode)
    assert store.find(KEY) == entry
    os.chown(path, MALLORY, MALLORY)
    assert refused_by(store) == (
        f"{path} in the kernel cache belongs to user {MALLORY}, and code from it would run as user 0. Set "
        "ONELAUNCH_CACHE_DIR to a folder of your own, or, if you trust everybody who can write there, set "
        "ONELAUNCH_SHARED_CACHE=1."
    )
    monkeypatch.setenv(trust.SHARED_VARIABLE, "1")
    assert store.find(KEY) == entry
    monkeypatch.delenv(trust.SHARED_VARIABLE)
    os.chown(path, 0, 0)
    if path.is_dir():  # a link in the place of a file counts as damage instead
        path.rename(public / "elsewhere")
        path.symlink_to(public / "elsewhere")
        assert refused_by(store) == (
            f"{path} in the kernel cache is a symbolic link; replace it by the folder or file it leads to."
        )


# -------------------------------------------------------------------------------------- what only some users can do


def test_a_cache_of_root_is_read_by_everybody(public: Path) -> None:
    """Another user finds its readable entries and builds missing ones elsewhere. Unreadable entries aren't damaged."""
    cache, temporary = public / "cache", folder(public / "tmp", mode=0o1777)
    store = Store(cache)
    for key in (KEY, "6" * 64):
        published(store, key)
    subprocess.run(["chmod", "-R", "go+rX", str(cache)], check=True)
    (cache / "entries" / ("6" * 64) / "m.so").chmod(0o600)

    def attempt() -> list[object]:
        found = [Store(cache).find(key) is not None for key in (KEY, "6" * 64, "7" * 64)]
        home = tiers.writable(Store(cache), "7" * 64)
        published(home, "7" * 64)
        return [*found, home.root.is_relative_to(temporary), str(home.root)]

    (*results, root), warned = as_user(ALICE, attempt, TMPDIR=str(temporary))
    assert results == [True, False, False, True]
    assert len(warned) == 2
    assert (
        f"The cache entry {cache}/entries/{'6' * 64} can't be read (Permission denied); it is passed over." == warned[0]
    )
    assert f"{cache} can't be used (Permission denied); builds go to {root}" in warned[1]
    assert store.listed("damaged") == []
    assert store.find("6" * 64) is not None


@pytest.mark.parametrize("part", ["locks", "entries", "staging"])
def test_a_part_that_a_user_cant_write(public: Path, part: str) -> None:
    """One folder in a user's cache belongs to root: builds work without the lock, or go to the temporary store."""
    temporary = folder(public / "tmp", mode=0o1777)
    own = folder(public / "alice", ALICE, 0o700)
    cache = own / "cache"
    as_user(ALICE, lambda: str(published(Store(cache)).path))
    folder_of_root = cache / part
    folder_of_root.mkdir(exist_ok=True)
    os.chown(folder_of_root, 0, 0)
    folder_of_root.chmod(0o755)

    def attempt() -> list[object]:
        store = Store(cache)
        home = tiers.writable(store, "7" * 64)
        with home.lock("7" * 64) as held:
            published(home, "7" * 64)
        return [store.find(KEY) is not None, home is store, held.held]

    result, warned = as_user(ALICE, attempt, TMPDIR=str(temporary))
    assert result == ([True, True, False] if part == "locks" else [True, False, False])
    assert len(warned) == (0 if part == "locks" else 1), warned


def test_an_unreadable_entry_is_no_obstacle(public: Path) -> None:
    """If a key's entry exists but can't be read, the kernel is built in the temporary store."""
    temporary = folder(public / "tmp", mode=0o1777)
    own = folder(public / "alice", ALICE, 0o700)
    as_user(ALICE, lambda: str(published(Store(own / "cache")).path))
    entry = own / "cache" / "entries" / KEY
    os.chown(entry, 0, 0)
    entry.chmod(0o700)

    def attempt() -> list[bool]:
        store = Store(own / "cache")
        home = tiers.writable(store, KEY)
        return [home is store, published(home).path.is_relative_to(temporary), tiers.writable(store) is store]

    result, warned = as_user(ALICE, attempt, TMPDIR=str(temporary))
    assert result == [False, True, True]
    assert any("can't be read or replaced; builds go to" in text for text in warned)


# ------------------------------------------------------------------------------------------- what is loaded is it


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two real modules with the same name. Their number() returns 1 and 2."""
    folder = tmp_path_factory.mktemp("objects")
    made = []
    for number in (1, 2):
        source = folder / f"m{number}.cpp"
        source.write_text(f"""
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
static PyObject* number(PyObject*, PyObject*) {{ return PyLong_FromLong({number}); }}
static PyMethodDef methods[] = {{{{"number", number, METH_NOARGS, nullptr}}, {{}}}};
static PyModuleDef definition = {{PyModuleDef_HEAD_INIT, "m", nullptr, -1, methods}};
extern "C" __attribute__((visibility("default"))) PyObject* PyInit_m() {{ return PyModule_Create(&definition); }}
""")
        made.append(folder / f"m{number}.so")
        include = subprocess.run(
            [sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('include'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        subprocess.run(["c++", "-shared", "-fPIC", f"-I{include}", str(source), "-o", str(made[-1])], check=True)
    return made


def real(store: Store, key: str, object_file: Path) -> Entry:
    with store.staging() as stage:
        shutil.copy(object_file, stage / "m.so")
        (stage / "main.cpp").write_text("")
        return store.publish(stage, key, FACTS)


def test_kernels_never_stand_for_each_other(tmp_path: Path, objects: list[Path]) -> None:
    """Descriptor numbers and module names recur, and glibc and Python take an object of a known name for the same."""
    store = Store(tmp_path / "cache")
    entries = [real(store, str(number) * 64, path) for number, path in enumerate(objects, 1)]
    before = len(os.listdir("/proc/self/fd"))
    loaded = []
    for _ in range(70):
        for number, entry in enumerate(entries, 1):
            module = import_entry(entry)
            assert module.number() == number
            assert module.__file__ == str(entry.module_path)
            loaded.append(module)
    assert len(os.listdir("/proc/self/fd")) == before
    # The file system may reuse a removed file's inode number, but not while the object is loaded.
    shutil.rmtree(entries[0].path)
    again = real(store, "3" * 64, objects[1])
    assert import_entry(again).number() == 2
    assert loaded[0].number() == 1
    gc.collect()


def test_what_is_loaded_is_what_was_verified(
    tmp_path: Path, objects: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replacing files after the verification has no effect, at any moment."""
    store = Store(tmp_path / "cache")
    entry = real(store, "1" * 64, objects[0])
    check = Entry.open

    def exchange_after(self: Entry, name: str) -> int:
        descriptor = check(self, name)
        entry.path.rename(tmp_path / "aside")
        shutil.copytree(real(store, "2" * 64, objects[1]).path, entry.path)
        return descriptor

    with monkeypatch.context() as patch:
        patch.setattr(Entry, "open", exchange_after)
        assert import_entry(entry).number() == 1
    # The entry was replaced between find and load.
    with pytest.raises(EntryChanged, match=r"changed while it was loaded: m\.so isn't the file that was published"):
        import_entry(entry)
    shutil.rmtree(entry.path)
    with pytest.raises(EntryChanged, match=r"changed while it was loaded: .*No such file"):
        import_entry(entry)


def test_an_entry_that_isnt_expected_or_cant_run(tmp_path: Path, objects: list[Path]) -> None:
    store = Store(tmp_path / "cache")
    entry = real(store, "1" * 64, objects[0])
    with pytest.raises(StoreError, match="isn't the build that was requested"):
        import_entry(entry, {"config": {}})
    with pytest.raises(StoreError, match=r"m\.so can't be loaded: .*Remove .*, and it is built here"):
        import_entry(published(store))
    assert import_entry(entry, {"module": "m"}).number() == 1


def test_an_attacker_beside_a_loader(public: Path, objects: list[Path]) -> None:
    """The owner of a parent folder keeps swapping two caches. Nothing is ever loaded from either."""
    parent = folder(public / "parent", MALLORY)
    for number, name in enumerate(("good", "bad")):
        real(Store(public / name), "1" * 64, objects[number])
    cache, other, third = parent / "cache", parent / "other", parent / "third"
    (public / "good").rename(cache)
    (public / "bad").rename(other)
    attacker = os.fork()
    if attacker == 0:
        os.setgid(MALLORY)
        os.setuid(MALLORY)
        while True:
            for old, new in ((cache, third), (other, cache), (third, other)):
                os.rename(old, new)
    try:
        for _ in range(200):
            with pytest.raises(StoreError, match=f"parent, which leads to the kernel cache, belongs to user {MALLORY}"):
                Store(cache).find("1" * 64)
    finally:
        os.kill(attacker, signal.SIGKILL)
        os.waitpid(attacker, 0)
