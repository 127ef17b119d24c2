"""Garbage in manifests, packs, notes, TOML files, traces and settings is used, or refused in a sentence.

Each target takes bytes: seeds with some bytes or JSON values changed. An input that raises anything but OnelaunchError
is written to a file. Copy it to tests/data/fuzz/<target>/: every later run tries it first. The sums in a manifest
change with every build. So a kept manifest, alone or in a pack, is a JSON merge patch (RFC 7396).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fuzz_binding
import pytest
from click.testing import CliRunner
from onelaunch import KernelConfig, OnelaunchError
from onelaunch.build import programs
from onelaunch.cache import failures, lock, manifest
from onelaunch.cache import store as stores
from onelaunch.cache.manifest import MANIFEST, Entry
from onelaunch.cache.module import import_entry
from onelaunch.cache.store import Store
from onelaunch.cli.lab.replay.traces import Trace
from onelaunch.cli.main import app
from onelaunch.emit import binding
from onelaunch.load import find, loader, pack, prebuild
from onelaunch.spec.settings import parse_settings

DATA = Path(__file__).parent / "data"
KEPT = DATA / "fuzz"
SMALL = KernelConfig(fields=("cache_seqlens",), target="cpu")
WORDS = (
    b"",
    b"0",
    b"-1",
    b"1e999",
    b"9" * 40,
    b"null",
    b"true",
    b'""',
    b"[]",
    b"{}",
    b"[" * 2000,
    b"\xff",
    b"\0",
    b"\xed\xa0\x80",
)
WORDS += (
    b"NaN",
    b"../x",
    b"'",
    b'"',
    b"\n",
    b"=",
    b",",
    b"[[build]]\n",
    b"\xef\xbb\xbf",
    b"\xd9\xa3",
    b"_",
    b"2" * 5000,
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    0,
    -1,
    2**70,
    1.5,
    1e308,
    float("inf"),
    "",
    "x",
    "../x",
    "\udc80",
    "9" * 5000,
    [],
    {},
    [[]],
)
VALUES += ({"": None}, ["90a", 3], {"size": "1", "sha256": 2}, "0" * 64)


def changed(data: bytes, dice: random.Random) -> bytes:
    """Bytes with one to four changes."""
    out = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        at = dice.randrange(len(out) + 1)
        end = min(len(out), at + dice.choice((0, 1, 2, 8, 64)))
        how = dice.randrange(5)
        if how == 0 and at < len(out):
            out[at] ^= 1 << dice.randrange(8)
        elif how == 1:
            out[at:end] = b""
        elif how == 2:
            out[at:at] = out[at:end] * dice.choice((1, 3))
        elif how == 3:
            out[at:end] = dice.choice(WORDS)
        else:
            out[at:end] = dice.randbytes(end - at)
    return bytes(out)


def changed_value(value: Any, dice: random.Random) -> Any:
    """A JSON value with one value changed, removed or renamed."""
    inside = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not inside or dice.random() < 0.15:
        return dice.choice(VALUES)
    place, copy = dice.choice(inside), value.copy()
    how = dice.random()
    if how < 0.2:
        del copy[place]
    elif how < 0.3 and isinstance(value, dict):
        copy[str(dice.choice(("x", "", "files", "sum", 3)))] = copy.pop(place)
    else:
        copy[place] = changed_value(copy[place], dice)
    return copy


def forged(facts: dict[str, Any], dice: random.Random) -> bytes:
    """A wrong manifest that its sum doesn't give away: the sum is right, and mostly the key, too."""
    other: Any = facts
    for _ in range(dice.randint(1, 3)):
        other = changed_value(other, dice)
    with contextlib.suppress(TypeError, ValueError, AttributeError, KeyError):
        if dice.random() < 0.9:
            other["key"] = manifest.key_of(other["ingredients"])
        return manifest.encode(other)
    return json.dumps(other).encode()


def patched(facts: dict[str, Any], patch: bytes) -> bytes:
    """A manifest with a kept input's merge patch applied; its sum and its key are right."""
    other = _merged(facts, json.loads(patch))
    return manifest.encode({**other, "key": manifest.key_of(other.get("ingredients", {}))})


def _merged(value: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    old = value if isinstance(value, dict) else {}
    new = {name: _merged(old.get(name), change) for name, change in patch.items() if change is not None}
    return {name: known for name, known in old.items() if name not in patch} | new


def packed(files: dict[str, bytes], data: bytes) -> bytes:
    """A pack of one entry that has this manifest."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        key = str(json.loads(data).get("key"))
        index = {"format": pack.FORMAT, "entries": [{"key": key}]}
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            pack._add(archive, pack.INDEX, json.dumps(index).encode())
            for name, content in ({MANIFEST: data} | files).items():
                pack._add(archive, f"entries/{key}/{name}", content)
        return gzip.compress(out.getvalue(), 1)
    return data


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    kernel = loader.load(SMALL, store=Store(tmp_path_factory.mktemp("built") / "cache"))
    return loader.entry_of(kernel)


@pytest.fixture
def target(request: pytest.FixtureRequest, entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr("onelaunch.log._warned", set())
    return TARGETS[request.param](entry, tmp_path, monkeypatch)


# The function under test, the generator of its inputs, and its kept inputs.
Target = tuple[Callable[[bytes], None], Callable[[random.Random], bytes], list[bytes]]


def kept(name: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((KEPT / name).glob("*"))]


def verbs(*commands: str) -> None:
    """Runs these commands; none may end in an unexpected error."""
    for command in commands:
        done = CliRunner().invoke(app, command.split())
        assert done.exit_code in (0, 1, 2), done.output + str(done.stderr)


def manifests(entry: Entry, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    facts = json.loads((entry.path / MANIFEST).read_bytes())
    facts.pop("sum")
    monkeypatch.setenv(stores.CACHE_VARIABLE, str(folder / "cache"))
    store = Store()
    monkeypatch.setattr(loader, "default_store", lambda: store)

    def use(data: bytes) -> None:
        key = entry.key
        with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
            key = key if not manifest.KEY.fullmatch(str(json.loads(data).get("key"))) else json.loads(data)["key"]
        store.folder("entries")
        (store.root / "entries" / key).mkdir(mode=0o700)
        for name in entry.manifest["files"]:
            os.link(entry.path / name, store.root / "entries" / key / name)
        (store.root / "entries" / key / MANIFEST).write_bytes(data)
        (store.root / "entries" / key / MANIFEST).chmod(0o600)
        try:
            found = store.find(key)
            if found is not None:
                assert data == manifest.encode(found.manifest)
                with contextlib.suppress(OnelaunchError):
                    import_entry(found, {"config": SMALL.to_dict(), "archs": []})
                with contextlib.suppress(OnelaunchError):
                    pack.to_bytes([found])
                verbs("cache list", "cache info " + key[:12], "cache verify", "explain nsa-decode-1")
        finally:
            shutil.rmtree(store.root)

    def make(dice: random.Random) -> bytes:
        return forged(facts, dice) if dice.random() < 0.8 else changed(manifest.encode(facts), dice)

    return use, make, [patched(facts, patch) for patch in kept("manifests")]


def packs(entry: Entry, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    facts = json.loads((entry.path / MANIFEST).read_bytes())
    facts.pop("sum")
    files = {name: entry.read(name) for name in entry.manifest["files"]}
    whole = gzip.decompress(pack.to_bytes([entry]))

    def use(data: bytes) -> None:
        store = Store(folder / "cache")
        try:
            done = pack.from_bytes(data, store)
            for found in done.entries:
                assert store.find(found.key) is not None or store.stored_keys() == []
        except OnelaunchError:
            assert store.stored_keys() == [], "a refused pack was stored in part"
        finally:
            shutil.rmtree(store.root, ignore_errors=True)

    def make(dice: random.Random) -> bytes:
        how = dice.random()
        if how < 0.6:
            return packed(files, forged(facts, dice))
        return gzip.compress(changed(whole, dice), 1) if how < 0.9 else changed(gzip.compress(whole, 1), dice)

    return use, make, [packed(files, patched(facts, patch)) for patch in kept("manifests")]


def notes(entry: Entry, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    """The index's notes, the note of the compilers' version answers, lock holders' notes, and failure records."""
    monkeypatch.setenv(stores.CACHE_VARIABLE, str(entry.path.parent.parent))
    store = Store()
    names = {find.Request.of(SMALL, ()).digest, programs.ANSWERS_NOTE}
    record = failures.folder(store, entry.key) / failures.RECORD
    seeds = [store.read_note(name) or {} for name in names]
    seeds.append({"key": entry.key, "id": "1", "message": "m", "command": "c", "log": "l", "source": "s", "when": 3.0})

    def use(data: bytes) -> None:
        record.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        record.parent.parent.chmod(0o700)
        for path in (*(store.root / "index" / f"{name}.json" for name in names), record):
            path.write_bytes(data)
            path.chmod(0o600)
        try:
            with contextlib.suppress(OnelaunchError):
                loader.lookup(SMALL, (), store)
            programs._known_answers()
            programs.answer(Path(sys.executable), lambda path: "an answer")
            failures.recall(store, entry.key)
            failures.mark(store, entry.key)
            descriptor = os.open(record, os.O_RDONLY)
            assert lock._holder(descriptor)
            os.close(descriptor)
        finally:
            shutil.rmtree(record.parent)

    def make(dice: random.Random) -> bytes:
        seed = dice.choice(seeds)
        other = changed_value(changed_value(seed, dice), dice)
        return json.dumps(other).encode() if dice.random() < 0.7 else changed(json.dumps(seed).encode(), dice)

    return use, make, kept("notes")


def toml(entry: Entry, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    seeds = [
        b'[[build]]\npreset = "nsa-decode-3"\narchs = ["90a"]\nset = { page_size = [16, 64], num_backends = [1, 2] }\n',
        b'[[build]]\ntarget = "cpu"\n[build.set]\nfields = "cache_seqlens+page_indices"\nseqlen_offsets = "1+2+3"\n',
    ]

    def use(data: bytes) -> None:
        path = folder / "kernels.toml"
        path.write_bytes(data)
        prebuild.distinct(prebuild.read_matrix(path))

    return use, lambda dice: changed(dice.choice(seeds), dice), kept("toml")


def traces(entry: Entry, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    head = b"".join((DATA / "azure_2023_conversation.csv").read_bytes().splitlines(keepends=True)[:6])

    def use(data: bytes) -> None:
        path = folder / "trace.csv"
        path.write_bytes(data)
        assert len(Trace.load(path)) >= 1

    return use, lambda dice: changed(head, dice), kept("traces")


def settings(entry: Entry, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Target:
    seeds = [SMALL.settings().encode(), b"num_backends=3,page_size=64,mode=decode,threads=256,seqlen_offsets=1+2+3"]

    def use(data: bytes) -> None:
        config = parse_settings(data.decode("utf-8", "surrogateescape"), KernelConfig())
        assert parse_settings(config.settings(), KernelConfig()) == config

    return use, lambda dice: changed(dice.choice(seeds), dice), kept("settings")


TARGETS = {"manifests": manifests, "packs": packs, "notes": notes, "toml": toml, "traces": traces, "settings": settings}
SHORT = {"manifests": 40, "packs": 60, "notes": 150, "toml": 150, "traces": 150, "settings": 150}
LONG = {"manifests": 3_000, "packs": 5_000, "notes": 20_000, "toml": 20_000, "traces": 50_000, "settings": 20_000}


@pytest.mark.parametrize("target", TARGETS, indirect=True)
@pytest.mark.parametrize("counts", [SHORT, pytest.param(LONG, marks=pytest.mark.long)], ids=["short", "long"])
def test_garbage_is_used_or_refused_in_a_sentence(
    target: Target, counts: dict[str, int], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    use, make, seeds = target
    name = request.node.callspec.params["target"]
    # The long form draws new inputs each time. The message of a failure names the seed.
    seed = 0 if counts is SHORT else random.SystemRandom().randrange(2**32)
    dice = random.Random(seed)

    def inputs() -> Iterator[bytes]:
        yield from seeds
        yield from (make(dice) for _ in range(counts[name]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for data in inputs():
            try:
                use(data)
            except OnelaunchError as refusal:
                said = str(refusal)
            except Exception as error:
                saved = tmp_path / hashlib.sha256(data).hexdigest()[:16]
                saved.write_bytes(data)
                raise AssertionError(f"seed {seed}: {error!r}; copy {saved} to {KEPT / name}") from error
            else:
                continue
            assert said.strip(".,;: ")


@pytest.mark.parametrize("calls", [10_000, pytest.param(100_000, marks=pytest.mark.long)])
def test_a_binding_takes_garbage(calls: int, tmp_path: Path) -> None:
    """Under ASan and UBSan the binding refuses garbage, or runs without an error."""
    library = subprocess.run(
        ["c++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(library):
        pytest.skip("this compiler has no runtime of AddressSanitizer")
    (tmp_path / "kernel.cpp").write_text(fuzz_binding.KERNEL)
    text = binding.render_plain_binding("fuzz", fuzz_binding.CALL_WORDS, fuzz_binding.WORDS)
    (tmp_path / "binding.cpp").write_text(text)
    flags = [
        "-std=c++17",
        "-O1",
        "-g",
        "-fPIC",
        "-shared",
        "-fsanitize=address,undefined",
        "-fno-sanitize-recover=undefined",
    ]
    include = sysconfig.get_path("include")
    sources = [str(tmp_path / "kernel.cpp"), str(tmp_path / "binding.cpp")]
    subprocess.run(["c++", *flags, f"-I{include}", *sources, "-o", str(tmp_path / "fuzz.so")], check=True)
    seed = 0 if calls < 100_000 else random.SystemRandom().randrange(2**32)
    done = subprocess.run(
        [sys.executable, str(Path(fuzz_binding.__file__)), str(tmp_path / "fuzz.so"), str(calls), str(seed)],
        env={
            "PATH": os.environ["PATH"],
            "LD_PRELOAD": library,
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            # Python's own allocator would hide its objects from the sanitizer.
            "PYTHONMALLOC": "malloc",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"seed {seed}: {done.stdout[-2000:]}{done.stderr[-8000:]}"
    assert done.stdout.startswith(f"{calls} calls, ")
