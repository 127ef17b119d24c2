"""What the guide promises of the cache, and the tests that check each promise."""

from __future__ import annotations

import gzip
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from onelaunch import CompileError, StoreError
from onelaunch.cache import collect, failures, manifest, tiers
from onelaunch.cache.manifest import Entry
from onelaunch.cache.store import TAG, Store
from onelaunch.load import pack

PROMISES = {
    "Exactly the bytes that were verified are loaded": ("test_trust.test_what_is_loaded_is_what_was_verified",),
    "No other user can exchange a folder of the cache": (
        "test_trust.test_every_folder_above_is_checked",
        "test_trust.test_an_attacker_beside_a_loader",
        "test_override.test_a_folder_above_that_somebody_else_could_exchange",
    ),
    "Nothing is removed that the cache didn't make": (
        "test_processes.test_nothing_is_removed_from_a_folder_of_somebody_else",
        "test_processes.test_only_names_of_the_caches_own_are_removed",
        "test_promises.test_a_failure_is_forgotten_only_in_a_marked_cache",
    ),
    "An entry is used only for its own configuration": (
        "test_lookup.test_exchanged_notes_are_noticed",
        "test_store.test_an_entry_of_something_else_is_a_miss",
    ),
    "A flipped bit anywhere in an entry or a pack is noticed, or harmless": (
        "test_store.test_every_flipped_bit_is_noticed",
        "test_pack.test_every_flipped_bit_of_a_pack_is_noticed",
        "test_promises.test_every_bit_of_an_entry",
        "test_promises.test_every_bit_of_a_pack",
        "test_fuzz.test_garbage_is_used_or_refused_in_a_sentence",
    ),
    "A failure is remembered only if a compiler refused the source": (
        "test_faults.test_a_source_that_doesnt_compile",
        "test_faults.test_a_compiler_that_fails",
        "test_faults.test_what_is_a_verdict_on_the_source",
    ),
    "A progress line that can't be printed fails nothing": ("test_builder.test_a_progress_line_never_fails_a_build",),
    "What a process leaves when it dies, later ones remove": (
        "test_killed.test_what_killed_processes_leave_is_swept",
        "test_killed.test_a_process_that_is_killed_while_it_builds",
        "test_processes.test_temporary_stores_of_dead_processes_are_swept",
    ),
    "A fork, a signal, a closed stream or a missing HOME never causes a traceback": (
        "test_killed.test_a_process_that_is_killed_while_it_builds",
        "test_failure_modes.test_a_forked_child_builds",
        "test_killed.test_a_signal_during_a_build",
        "test_promises.test_streams",
        "test_builder.test_a_user_without_a_name_and_a_home",
        "test_store.test_no_home_is_a_sentence",
    ),
    "Entries of an earlier version are set aside, and a pack of another format is refused": (
        "test_store.test_entries_of_an_earlier_version_are_set_aside_with_one_warning",
        "test_pack.test_broken_packs_put_nothing_anywhere",
        "test_promises.test_a_cache_that_was_there_is_adopted_by_its_names",
    ),
}
GUIDE = Path(__file__).parent.parent / "GUIDE.md"
KEY = "5" * 64
FACTS = {"symbol": "m", "module": "m", "module_file": "m.so", "source_file": "main.cpp"}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "cache")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiers, "_fallback", None)
    monkeypatch.setattr("onelaunch.log._warned", set())


def publish(store: Store, key: str = KEY, **facts: object) -> Entry:
    with store.staging() as stage:
        (stage / "m.so").write_bytes(b"\x7fELF")
        (stage / "main.cpp").write_bytes(b"int x;\n")
        return store.publish(stage, key, {**FACTS, **facts})


def test_the_guide_makes_these_promises_and_these_tests_are_there() -> None:
    text = " ".join(GUIDE.read_text(encoding="utf-8").split())
    assert [promise for promise in PROMISES if promise not in text] == []
    for test in (test for tests in PROMISES.values() for test in tests):
        module, _, name = test.partition(".")
        assert f"\ndef {name}(" in Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"), test


# -------------------------------------------------------------------------------------------------------- flipped bits


@pytest.mark.long
def test_every_bit_of_an_entry(store: Store) -> None:
    """Flips every bit of the files and the manifest. test_every_flipped_bit_is_noticed flips one bit of each byte."""
    entry, count = publish(store), 0
    for path in sorted(entry.path.iterdir()):
        whole = path.read_bytes()
        for at in range(8 * len(whole)):
            data = bytearray(whole)
            data[at // 8] ^= 1 << at % 8
            path.write_bytes(data)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert store.find(KEY) is None, (path.name, at)
            (aside,) = store.listed("damaged")
            aside.rename(entry.path)
            path.write_bytes(whole)
            count += 1
    assert count > 3_900
    assert store.find(KEY) == entry


@pytest.mark.long
def test_every_bit_of_a_pack(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After any flip the pack is refused as a whole or unpacks to the same content. The quick test flips 500 bits."""
    made_of = {"source": "a"}
    facts = {"archs": [], "config": {}, "ingredients": made_of, "requires": {}}
    data = pack.to_bytes([publish(store, manifest.key_of(made_of), **facts)])
    put: list[str] = []
    content, harmless = gzip.decompress(data), 0
    monkeypatch.setattr(pack, "_put", lambda facts, *_: put.append(facts["key"]))
    monkeypatch.setattr(pack, "_misfit", lambda *_: None)
    for at in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[at // 8] ^= 1 << at % 8
        try:
            pack.from_bytes(bytes(flipped), Store(tmp_path / "other"))
            assert gzip.decompress(bytes(flipped)) == content, at
            harmless += 1
        except StoreError:
            assert put == [], at
        put.clear()
    assert 0 < harmless < 200, "the harmless bits are in gzip's header, its padding and its time stamp"


# ------------------------------------------------------------------------------------------------- what is removed


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
    publish(store)
    (store.root / TAG).unlink()
    if other:
        (store.root / other).write_text("")
    publish(store, "6" * 64)
    assert store.is_marked is not bool(other)
    if other:
        with pytest.raises(StoreError, match=f"has no {TAG} of onelaunch"):
            collect.clear(store)
        assert len(store.stored_keys()) == 2
    else:
        collect.clear(store)
        assert store.stored_keys() == []


# ------------------------------------------------------------------------------------------------- signals, streams

MAIN = [sys.executable, "-m", "onelaunch.cli.main"]
OTHER_VERBS = ("--version", "list", "list --json", "show nsa-decode-1", "describe nsa-decode-1", "cache list", "nosuch")


@pytest.mark.parametrize("verb", ["--help", *(pytest.param(v, marks=pytest.mark.long) for v in OTHER_VERBS)])
def test_streams(verb: str) -> None:
    """Standard streams are closed, full or without a reader. The command prints one sentence at most, no traceback."""
    command = " ".join([*MAIN, verb])
    redirections = (">&-", "2>&-", ">&- 2>&-", "<&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>/dev/full", "| true")
    shell = "\n".join(f"{command} {redirection} & " for redirection in redirections) + "\nwait"
    done = subprocess.run(shell, shell=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    full = "onelaunch: standard output can't be read or written: No space left on device."
    assert done.stderr.splitlines().count(full) == (verb != "nosuch")
