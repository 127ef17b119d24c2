"""generated/: the emitted CUDA of every preset, kept true to the templates."""

from __future__ import annotations

import difflib
from pathlib import Path

from onelaunch.emit.render import render
from onelaunch.spec.presets import PRESETS

from .common import write_whole


def emitted() -> dict[str, str]:
    """File name to text, for every preset."""
    return {f"{name}.cu": render(config) for name, config in PRESETS.items()}


def write_folder(folder: Path) -> list[Path]:
    """Writes what changed, removes what no preset emits; returns the files that were touched."""
    folder.mkdir(exist_ok=True)
    wanted = emitted()
    touched = []
    for path in sorted(folder.glob("*.cu")):
        if path.name not in wanted:
            path.unlink()
            touched.append(path)
    for name, text in wanted.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            write_whole(path, text)
            touched.append(path)
    return touched


def check_folder(folder: Path) -> str:
    """A unified diff from what is in the folder to what the templates emit; "" if they agree."""
    wanted = emitted()
    kept = {path.name: path.read_text(encoding="utf-8") for path in folder.glob("*.cu")}
    parts: list[str] = []
    for name in sorted(wanted.keys() | kept.keys()):
        old, new = kept.get(name, ""), wanted.get(name, "")
        parts += difflib.unified_diff(
            old.splitlines(keepends=True), new.splitlines(keepends=True), f"{folder}/{name}", f"emitted/{name}"
        )
    return "".join(parts)
