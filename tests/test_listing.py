"""onelaunch list: presets and their builds."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from onelaunch import PRESETS, KernelConfig, preset
from onelaunch.cache.store import MANIFEST, Store
from onelaunch.cli.main import app
from onelaunch.load import loader
from onelaunch.spec.presets import PURPOSES

OTHER = KernelConfig(fields=("cache_seqlens",), target="cpu", num_backends=2)
LENGTHS = preset("nsa-decode-3-lengths-only").replace(target="cpu")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store(tmp_path / "cache")
    monkeypatch.setattr(loader, "_loaded", {})
    monkeypatch.setattr(loader, "default_store", lambda: store)
    return store


def invoke(*words: str) -> Any:
    result = CliRunner().invoke(app, ["list", *words])
    assert result.exit_code == 0, result.output
    return result


def test_nothing_built(store: Store) -> None:
    lines = invoke().stdout.splitlines()
    assert [tuple(line.split(maxsplit=1)) for line in lines] == list(PURPOSES.items())
    assert list(PURPOSES) == list(PRESETS)
    assert invoke().stderr == "Nothing is built. `onelaunch build PRESET` builds one.\n"
    found = json.loads(invoke("--json").stdout)
    assert [kernel["preset"] for kernel in found["presets"]] == list(PRESETS)
    assert all(kernel["symbol"] == PRESETS[kernel["preset"]].symbol for kernel in found["presets"])
    assert found["others"] == []
    assert not store.root.exists(), "listing wrote to the cache"


def test_what_is_built_where_it_is_found(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, other = (loader.load(config, store=store) for config in (LENGTHS, OTHER))
    os.utime(lengths.path.parent / MANIFEST, (1e9, 1e9))
    found = json.loads(invoke("--json").stdout)
    (row,) = [row for kernel in found["presets"] for row in kernel["builds"]]
    assert row["key"] == lengths.key
    assert row["archs"] == []
    assert (
        row["bytes"]
        == loader.entry_of(lengths).size
        == sum(path.stat().st_size for path in lengths.path.parent.iterdir() if path.name != MANIFEST)
    )
    assert row["built"].startswith("2001-09-0")
    assert not row["edited"]
    assert [row["key"] for row in found["others"]] == [other.key]
    text = invoke().stdout
    lines = text.splitlines()
    (at,) = [n for n, line in enumerate(lines) if line.startswith("nsa-decode-3-lengths-only")]
    assert lines[at + 1].split()[0] == lengths.key[:12]
    assert lines[at + 1].split()[-1] == "cpu"
    assert text.splitlines()[-2] == "other builds"
    assert text.splitlines()[-1].split()[-1] == OTHER.symbol
    # `list` and `cache list` show the same entries, and a prebuilt folder's are shown, too.
    listed = json.loads(CliRunner().invoke(app, ["cache", "list", "--json"]).stdout)
    assert {row["key"] for row in listed} == {lengths.key, other.key}
    assert row in listed
    monkeypatch.setenv("ONELAUNCH_PREBUILT", str(store.root))
    elsewhere = Store(tmp_path / "elsewhere")
    monkeypatch.setattr(loader, "default_store", lambda: elsewhere)
    assert json.loads(invoke("--json").stdout) == found
