"""What gc, clear, sweep and the bound remove: names of the cache's own, in a folder that the cache has marked."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from entries import KEY, published
from onelaunch import CompileError, StoreError
from onelaunch.cache import collect, failures, files
from onelaunch.cache.store import TAG, Store

pytestmark = pytest.mark.usefixtures("fresh_process")


def test_nothing_is_removed_from_a_folder_of_somebody_else(tmp_path: Path) -> None:
    """A user names a project's folder by mistake. Builds go there; gc, clear, sweep and the bound leave its files."""
    root = tmp_path / "project"
    for name in ("src", "staging/release.1.0123456789ab", "index", "failed/0123456789abcdef", "damaged", "locks"):
        (root / name).mkdir(parents=True)
    root.chmod(0o700)
    for name in ("index/page.json", "failed/0123456789abcdef/a.log", f"locks/{KEY}.lock", "damaged/goods"):
        (root / name).write_text("")
    for path in root.rglob("*"):
        path.chmod(0o700)
        os.utime(path, (0, 0))
    before = sorted(root.rglob("*"))
    store = Store(root)
    path = published(store).path
    assert not store.is_marked
    for remove in (lambda: collect.collect(store, 0, 0.0), lambda: collect.clear(store)):
        with pytest.raises(StoreError) as caught:
            remove()
        assert str(caught.value) == (
            f"Nothing is removed from {root}, because it has no {TAG} of onelaunch: something else was in it before "
            f"the cache. Use an empty folder; or, if all of it is the cache's, copy the {TAG} of another cache into it."
        )
    with pytest.warns(UserWarning, match="is above ONELAUNCH_CACHE_MAX_SIZE"):
        collect.bound(store, "", 0)
    assert store.sweep() == []
    assert set(before) <= set(root.rglob("*"))
    assert path.is_dir()
    # Another program's CACHEDIR.TAG doesn't mark the folder as onelaunch's cache.
    (root / TAG).write_text("Signature: 8a477f597d28d172789f06886806bc55\n# made by cargo\n")
    assert not store.is_marked


def test_only_names_of_the_caches_own_are_removed(store: Store, tmp_path: Path) -> None:
    """Symbolic links are not followed, whether they lead out of the cache or stay within it."""
    published(store)
    treasure = tmp_path / "treasure"
    (treasure / ("7" * 64)).mkdir(parents=True)
    (treasure / ("7" * 64) / "gold").write_text("")
    own = [
        store.folder("damaged") / f"{KEY[:16]}.01234567",
        store.folder("failed") / KEY[:16],
        store.folder("staging") / "elsewhere.1.0123456789ab",
    ]
    for path in own:
        path.mkdir()
        (path / "link").symlink_to(treasure)
        os.utime(path, (0, 0))
    others = [
        store.root / name
        for name in ("damaged/mine", "failed/mine", "staging/mine", "entries/mine", "index/mine.txt", "mine")
    ]
    store.folder("index")
    for path in others:
        path.write_text("")
        os.utime(path, (0, 0))
    (store.folder("entries") / ("7" * 64)).symlink_to(treasure / ("7" * 64))
    (store.root / "stamps").rename(tmp_path / "stamps")
    (store.root / "stamps").symlink_to(tmp_path / "stamps")
    stamp = tmp_path / "stamps" / ("7" * 64)
    stamp.write_text("")
    done = collect.collect(store, 0, 0.0)
    assert set(done.keys) == {KEY, "7" * 64}, "the link itself has a name of the cache's own, so it is removed"
    assert (treasure / ("7" * 64) / "gold").exists()
    assert stamp.exists()
    assert not any(path.exists() for path in own)
    assert all(path.exists() for path in others)
    published(store)
    assert collect.clear(store) > 0
    assert store.stored_keys() == []
    assert all(path.exists() for path in others)
    assert published(store).path.is_dir()
    assert collect.clear(Store(tmp_path / "none")) == 0


def test_a_cache_is_marked_when_it_is_made(tmp_path: Path) -> None:
    """A cache made by an earlier version is marked too, and so is the root of a file system, which has lost+found."""
    for name, content in (("new", ()), ("earlier", ("entries", "stamps")), ("disk", ("lost+found",))):
        for folder in content:
            (tmp_path / name / folder).mkdir(parents=True, mode=0o700)
        store = Store(tmp_path / name)
        published(store)
        assert store.is_marked, name
        assert (store.root / TAG).read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55\n")
    (store.root / TAG).chmod(0o666)
    assert not store.is_marked, "a mark that every user can write proves nothing"


def test_a_failure_is_forgotten_only_in_a_marked_cache(tmp_path: Path) -> None:
    """Without the mark the folder may belong to another program, whatever its name."""
    for marked in (True, False):
        store = Store(tmp_path / str(marked))
        store.root.mkdir(mode=0o700)
        if not marked:
            (store.root / "thesis.tex").write_text("")
        error = CompileError("no", key=KEY, command="", log=Path("l"), source=Path("s"), lasting=True)
        failures.folder(store, KEY).mkdir(mode=0o700, parents=True)
        failures.folder(store, KEY).parent.chmod(0o700)
        store.folder("failed")
        failures.remember(store, error)
        assert failures.recall(store, KEY) is not None
        failures.forget(store, KEY)
        assert failures.folder(store, KEY).exists() is not marked
        assert (store.root / TAG).exists() is marked


@pytest.mark.parametrize("other", ["", "thesis.tex", "entries.old"])
def test_a_cache_that_was_there_is_adopted_by_its_names(store: Store, other: str) -> None:
    """Earlier versions made caches without a mark. Such a folder is marked if every name in it is the cache's own."""
    published(store)
    (store.root / TAG).unlink()
    if other:
        (store.root / other).write_text("")
    published(store, "6" * 64)
    assert store.is_marked is not bool(other)
    if other:
        with pytest.raises(StoreError, match=f"has no {TAG} of onelaunch"):
            collect.clear(store)
        assert len(store.stored_keys()) == 2
    else:
        collect.clear(store)
        assert store.stored_keys() == []


def test_clear_beside_a_process_that_makes_the_cache(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder exists before its mark. A clear() in between removes nothing and raises nothing."""
    cleared = []

    def replace(path: Path, content: str, mode: int) -> None:
        cleared.append(collect.clear(Store(store.root)))
        replace_file(path, content, mode)

    replace_file = files.replace
    monkeypatch.setattr(files, "replace", replace)
    published(store)
    assert cleared
    assert set(cleared) == {0}
    assert store.stored_keys() == [KEY]
