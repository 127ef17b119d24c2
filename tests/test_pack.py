"""Packs: unpacked by another Python, without a compiler; entries that can't run there are refused."""

from __future__ import annotations

import gzip
import io
import json
import os
import platform
import random
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import pytest
from click.testing import CliRunner
from entries import published
from onelaunch import KernelConfig, StoreError
from onelaunch.build import binary
from onelaunch.cache import manifest
from onelaunch.cache.manifest import MANIFEST
from onelaunch.cache.store import Store
from onelaunch.cli.main import app
from onelaunch.load import loader, pack
from processes import light_package

SMALL = KernelConfig(fields=("cache_seqlens",), target="cpu")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("built") / "cache")
    loader.load(SMALL, store=store)
    return store


@pytest.fixture(autouse=True)
def _unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_loaded", {})


@pytest.fixture
def data(built: Store) -> bytes:
    return pack.to_bytes(built.entries())


def other_python() -> Iterator[str]:
    """Python interpreters of another minor version that work."""
    roots = [Path(sys.base_prefix).parent]
    names = [f"python3.{minor}" for minor in (12, 13, 14, 11) if minor != sys.version_info.minor]
    for name in names:
        for path in [shutil.which(name), *(str(p) for root in roots for p in sorted(root.glob(f"*/bin/{name}")))]:
            if path and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0:
                yield path


def test_a_pack_runs_in_another_python_without_any_compiler(data: bytes, tmp_path: Path) -> None:
    """It unpacks, finds, loads and runs the kernel there. Without torch, it passes plain addresses of two lengths."""
    python = next(other_python(), None)
    if python is None:
        pytest.skip("there is no Python of another minor version")
    (tmp_path / "kernels.tar.gz").write_bytes(data)
    (tmp_path / "bin").mkdir()
    libraries = tmp_path / "libraries"
    libraries.mkdir()
    for module in (jinja2, markupsafe):
        (libraries / module.__name__).symlink_to(Path(str(module.__file__)).parent)
    code = f"""
import array, json, sys
from pathlib import Path
from onelaunch.spec import layout
from onelaunch.load import loader, pack
from onelaunch.build import toolchain
from onelaunch.spec.config import KernelConfig
from onelaunch.errors import ToolchainError
from onelaunch.cache.store import Store
try:
    toolchain.find_host_compiler()
    raise SystemExit("there is a compiler")
except ToolchainError:
    pass
store = Store(Path({str(tmp_path / "cache")!r}))
done = pack.read_file(Path({str(tmp_path / "kernels.tar.gz")!r}), store)
assert not done.refused, done.refused
config = KernelConfig(fields=("cache_seqlens",), target="cpu")
kernel = loader.load(config, store=store)
lengths, out = array.array("q", [5, 6]), array.array("i", [-1, -1, -1])
words = dict.fromkeys(layout.param_words(config), 0)
known = {{"seq_lens": lengths.buffer_info()[0], "seq_lens_stride": 1, "batch_size": 2}}
print(json.dumps({{"version": sys.version_info[:2], "words": list(words), "call": list(layout.call_words(config))}}))
call = list(layout.call_words(config))
rest = [out.buffer_info()[0] if "cache_seqlens" in name else known.get(name, 0) for name in words if name not in call]
plan = kernel.module.bind(rest)
plan.launch(*[known.get(name, 0) for name in call], 0)
print(json.dumps(list(out)))
"""
    done = subprocess.run(
        [python, "-c", code],
        env={
            "PATH": str(tmp_path / "bin"),
            "HOME": str(tmp_path),
            "PYTHONPATH": os.pathsep.join([str(light_package(tmp_path)), str(libraries)]),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts, out = done.stdout.splitlines()
    assert tuple(json.loads(facts)["version"]) != sys.version_info[:2]
    assert json.loads(out) == [5, 6, -1], facts


def test_a_pack_is_used_whatever_compilers_there_are(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "cache")
    done = pack.from_bytes(data, store)
    assert [entry.manifest["symbol"] for entry in done.entries] == [SMALL.symbol]
    monkeypatch.setattr(loader.toolchain, "find_tools", lambda target: pytest.fail("no compiler is looked for"))
    assert loader.load(SMALL, store=store).path.is_relative_to(store.root)
    # Unpacking again changes nothing.
    assert pack.from_bytes(data, store).entries == done.entries


def test_equal_entries_give_equal_bytes(built: Store, data: bytes) -> None:
    assert pack.to_bytes(built.entries()) == data
    with pytest.raises(StoreError, match="nothing to pack"):
        pack.to_bytes([])


def rewritten(data: bytes, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        members = [(member, archive.extractfile(member).read()) for member in archive]  # type: ignore[union-attr]
    change(members)
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for member, content in members:
            member.size = len(content) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def rename(members: list[Any], name: str) -> None:
    members[1][0].name = name


def link(members: list[Any]) -> None:
    members[-1][0].type, members[-1][0].linkname = tarfile.SYMTYPE, "/etc/passwd"


def edit(members: list[Any], end: str, change: Callable[[bytes], bytes]) -> None:
    for index, (member, content) in enumerate(members):
        if member.name.endswith(end):
            members[index] = (member, change(content))


BAD_PATHS = ["../../evil.so", "/etc/evil.so", "entries/" + "0" * 64 + "/../evil.so", "entries/short/x", "index/x.json"]


@pytest.mark.parametrize("name", BAD_PATHS)
def test_paths_that_lead_out_are_refused(data: bytes, tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / "cache")
    with pytest.raises(StoreError, match="isn't the path of a file in an entry"):
        pack.from_bytes(rewritten(data, lambda members: rename(members, name)), store)
    assert not store.root.exists()


def members(*pairs: tuple[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in pairs:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def an_index(**facts: Any) -> tuple[str, bytes]:
    return pack.INDEX, json.dumps({"format": pack.FORMAT, "entries": [], **facts}).encode()


def a_second_entry(m: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    """Adds a second entry to the index: the files of the first one under another key."""
    index = json.loads(m[0][1])
    index["entries"].append({"key": "9" * 64})
    m[0] = (m[0][0], json.dumps(index).encode())
    for member, content in m[1:]:
        copy = tarfile.TarInfo(re.sub("[0-9a-f]{64}", "9" * 64, member.name))
        m.append((copy, content))


def without_archs(content: bytes) -> bytes:
    return manifest.encode({name: fact for name, fact in json.loads(content).items() if name not in ("sum", "archs")})


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "not a pack": lambda data: b"something else",
    "cut off": lambda data: data[: len(data) // 2],
    "cut off at its end": lambda data: data[:-5],
    "a wrong sum at its end": lambda data: data[:-6] + bytes([data[-6] ^ 1]) + data[-5:],
    "a link": lambda data: rewritten(data, link),
    "another format": lambda data: rewritten(
        data, lambda m: edit(m, pack.INDEX, lambda c: c.replace(b'"format": 2', b'"format": 9'))
    ),
    "tampered": lambda data: rewritten(data, lambda m: edit(m, ".so", lambda c: c[:-1] + b"\0\1")),
    "a file too many": lambda data: rewritten(data, lambda m: m.append((tarfile.TarInfo(m[1][0].name + "2"), b"x"))),
    "a file twice": lambda data: rewritten(data, lambda m: m.append(m[-1])),
    "an entry too few": lambda data: rewritten(data, lambda m: m.__delitem__(slice(1, None))),
    "a good entry before a damaged one": lambda data: rewritten(data, a_second_entry),
    "a manifest that isn't complete": lambda data: rewritten(
        data,
        lambda m: edit(
            m,
            MANIFEST,
            lambda c: manifest.encode({k: v for k, v in json.loads(c).items() if k not in ("sum", "archs")}),
        ),
    ),
    "no manifest": lambda data: rewritten(data, lambda m: m.__delitem__(1)),
    "an index of a list": lambda data: members((pack.INDEX, b"[]")),
    "an index of something else": lambda data: members(an_index(entries=[3]), ("entries/" + "0" * 64 + "/x", b"")),
    "a deep index": lambda data: members((pack.INDEX, b"[" * 100_000)),
    "empty": lambda data: gzip.compress(b""),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_packs_put_nothing_anywhere(data: bytes, tmp_path: Path, how: str) -> None:
    store = Store(tmp_path / "cache")
    with pytest.raises(StoreError, match=r"The pack (can't be read|is damaged)"):
        pack.from_bytes(BROKEN[how](data), store)
    assert not store.root.exists()


@pytest.mark.parametrize(
    "every", [False, pytest.param(True, marks=pytest.mark.long)], ids=["500 of a real one", "all of a small one"]
)
def test_every_flipped_bit_of_a_pack_is_noticed(
    every: bool, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pack is refused whole, or its content is the same (bits of gzip's header, padding and time stamp)."""
    if every:
        data = small_pack(Store(tmp_path / "small"))
    chosen, put, content = random.Random(0), [], gzip.decompress(data)
    monkeypatch.setattr(pack, "_put", lambda facts, *_: put.append(facts["key"]))
    monkeypatch.setattr(pack, "_misfit", lambda *_: None)
    harmless = 0
    for bit in range(8 * len(data)) if every else [chosen.randrange(8 * len(data)) for _ in range(500)]:
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        refused = ""
        try:
            pack.from_bytes(bytes(flipped), Store(tmp_path / "cache"))
            harmless += 1
        except StoreError as error:
            refused = str(error)
        assert refused == "" or refused.startswith(("The pack can't be read: ", "The pack is damaged: "))
        assert bool(put) == (refused == "")
        assert refused or gzip.decompress(bytes(flipped)) == content, f"bit {bit} of {8 * len(data)}"
        put.clear()
    assert harmless < 200
    assert harmless > 0 or not every


def small_pack(store: Store) -> bytes:
    made_of = {"source": "a"}
    files = {"m.so": b"\x7fELF", "main.cpp": b"int x;\n"}
    return pack.to_bytes([published(store, manifest.key_of(made_of), files, ingredients=made_of, requires={})])


def bomb(size: int) -> bytes:
    """A small pack whose one file unpacks to ``size`` zero bytes."""
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as file:
        head, chunk = tarfile.TarInfo("entries/" + "0" * 64 + "/x.so"), bytes(2**20)
        head.size = size
        file.write(gzip.decompress(members(an_index()))[:1024])
        file.write(head.tobuf())
        for _ in range(size // len(chunk)):
            file.write(chunk)
    return out.getvalue()


def test_a_pack_that_swells_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The excess is in one file, in many files, or after the end of the archive."""
    monkeypatch.setattr(pack, "MAX_BYTES", 2**23)
    large = bomb(2**25)
    assert len(large) < 2**18
    many = members(an_index(), *((f"entries/{'0' * 64}/{number}.so", bytes(2**20)) for number in range(9)))
    after = members(an_index()) + gzip.compress(bytes(2**24))
    for data in (large, many, after):
        with pytest.raises(StoreError, match=f"The pack can't be read: it holds more than {2**23} bytes"):
            pack.from_bytes(data, Store(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_entries_that_are_no_pack(built: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entries have more bytes than a pack holds, or one changed after it was found."""
    entries = list(built.entries())
    with monkeypatch.context() as patch:
        patch.setattr(pack, "MAX_BYTES", 1000)
        with pytest.raises(StoreError, match="a pack holds 500; name fewer keys"):
            pack.to_bytes(entries)
    (entry,) = (replace(entry, path=tmp_path / "copy") for entry in entries)
    shutil.copytree(entries[0].path, entry.path)
    (entry.path / "main.cpp").write_text("")
    with pytest.raises(StoreError, match=r"changed while it was packed: main\.cpp isn't the file that was published"):
        pack.to_bytes([entry])


HERE = {"machine": "x86_64", "glibc": "2.36", "driver": "570.86", "capabilities": ["9.0"]}
NEEDS = {"machine": "x86_64", "glibc": "2.34", "driver": "570.26"}


@pytest.mark.parametrize(
    ("needs", "archs", "reason"),
    [
        ({}, ("90a",), None),
        ({}, ("100a", "90a"), None),
        ({"machine": "aarch64"}, ("90a",), "it is for aarch64 and this machine is x86_64"),
        ({"glibc": "2.38"}, ("90a",), "it needs glibc 2.38 or later and this machine has 2.36"),
        ({"driver": "580.65"}, ("90a",), "it needs the NVIDIA driver 580.65 or later and this machine has 570.86"),
        ({}, ("100a",), "it holds code for sm_100a and this machine's GPUs have compute capability 9.0"),
        ({}, ("89",), "it holds code for sm_89 and this machine's GPUs have compute capability 9.0"),
        ({}, (), None),
    ],
)
def test_misfits(needs: dict[str, str], archs: tuple[str, ...], reason: str | None) -> None:
    assert binary.misfit({**NEEDS, **needs}, archs, HERE) == reason
    # A machine without a GPU accepts any CUDA kernel: it may be building a container image.
    if "driver" in needs:
        assert binary.misfit({**NEEDS, **needs}, archs, {"machine": "x86_64", "glibc": "2.36"}) is None


def test_what_cant_run_here_is_refused_and_the_rest_taken(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(binary, "host", lambda: {**HERE, "machine": "riscv64"})
        done = pack.from_bytes(data, store)
    assert done.entries == ()
    assert done.refused == ((SMALL.symbol, "it is for x86_64 and this machine is riscv64"),)
    render = sys.modules["onelaunch.emit.render"]
    old = render.render
    monkeypatch.setattr(render, "render", lambda config: old(config) + "// newer\n")
    assert "another version of onelaunch emitted its source" in pack.from_bytes(data, store).refused[0][1]


@pytest.mark.nvcc
def test_a_cuda_pack_says_what_it_needs_and_what_it_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Registers and architectures come from the manifest, so that they are known without a toolkit."""
    store = Store(tmp_path / "cache")
    config = KernelConfig(fields=("cache_seqlens",))
    kernel = loader.load(config, ("90a", "100a"), store)
    needs = kernel.manifest["requires"]
    assert binary.numbers(needs["driver"]) >= (570,)
    assert binary.numbers(needs["glibc"]) >= (2, 17)
    if binary.find_cuobjdump(None) is None:
        pytest.skip("there is no cuobjdump, in the toolkit, on PATH or in triton's wheel")
    assert set(kernel.resources) == {"90a", "100a"}
    assert all(taken["spill_bytes"] == 0 and taken["registers"] > 0 for taken in kernel.resources.values())
    # An object for two architectures serves a process that requests one of them.
    loader._loaded.clear()
    monkeypatch.setattr("onelaunch.build.compile.build", lambda *a, **k: pytest.fail("nothing is built"))
    assert loader.load(config, ("100a",), store).key == kernel.key


def test_the_verbs(built: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "kernels.tar.gz"
    monkeypatch.setattr(loader, "default_store", lambda: built)
    result = CliRunner().invoke(app, ["cache", "pack", "-o", str(file)])
    assert result.exit_code == 0, result.output
    assert f"machine {platform.machine()}" in result.output
    other = Store(tmp_path / "cache")
    monkeypatch.setattr(loader, "default_store", lambda: other)
    result = CliRunner().invoke(app, ["cache", "unpack", str(file)])
    assert result.exit_code == 0, result.output
    assert other.stored_keys() == built.stored_keys()
    packed = json.loads(CliRunner().invoke(app, ["cache", "pack", "-o", str(tmp_path / "again"), "--json"]).stdout)
    unpacked = json.loads(CliRunner().invoke(app, ["cache", "unpack", str(file), "--json"]).stdout)
    assert [row["key"] for row in packed["entries"]] == other.stored_keys()
    assert sorted(row["key"] for row in unpacked["entries"]) == other.stored_keys()
    assert unpacked["refused"] == {}
    result = CliRunner().invoke(app, ["cache", "unpack", str(tmp_path / "missing")])
    assert result.exit_code == 2
    assert "can't be unpacked: No such file" in result.output
    monkeypatch.setattr(binary, "host", lambda: {**HERE, "machine": "riscv64"})
    result = CliRunner().invoke(app, ["cache", "unpack", str(file)])
    assert result.exit_code == 1
    assert "is refused: it is for x86_64" in result.output
