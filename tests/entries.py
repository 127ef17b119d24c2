"""Entries of a store, made without a compiler: their objects are a few bytes and can't be loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onelaunch.cache.manifest import Entry
from onelaunch.cache.store import Store

KEY = "5" * 64
FACTS = {"symbol": "m", "module": "m", "module_file": "m.so", "source_file": "main.cpp"}
FACTS |= {"config": {"num_backends": 3}, "archs": ["90a", "100a"]}
FILES = {"m.so": b"\x7fELF object", "main.cpp": b"int x;\n", "build.ninja": b"rule\n", "b.log": b"", "c.cu": b"//\n"}


def fill(stage: Path, content: dict[str, bytes] = FILES) -> Path:
    for name, data in content.items():
        (stage / name).write_bytes(data)
    return stage


def published(store: Store, key: str = KEY, content: dict[str, bytes] = FILES, **facts: Any) -> Entry:
    with store.staging() as stage:
        return store.publish(fill(stage, content), key, {**FACTS, **facts})
