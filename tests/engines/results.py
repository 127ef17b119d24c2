"""What was compared with engines' own code, and the tables that show it: python results.py ENGINE [--write]

A test that compared two objects ends with record(); `make engines` names the file that it appends to. Then this script
compares the run's records with the committed results/ENGINE.json, and fails if they differ. With --write it writes the
records there instead, and both tables: README's groups classes with equal results, GUIDE's has a row for each class
with modes and sizes. The tables are made from all of results/, so every class in them was tested.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
README, GUIDE = ROOT / "README.md", ROOT / "GUIDE.md"
FOLDER = HERE / "results"
BEGIN, END = "<!-- engines: begin -->", "<!-- engines: end -->"
# Names the file that a run's records are appended to. If unset, nothing is recorded.
VARIABLE = "ONELAUNCH_ENGINE_RESULTS"


def record(kind: str, refreshed: str, stays: str, mode: str, **facts: int) -> None:
    """Records that one launch wrote the same values as a class of the engine.

    Args:
        kind: the class's name.
        refreshed, stays: what the launch refreshes, and what the engine still does.
        mode: the forward mode.
        facts: numbers that vary between tests, such as page=64.
    """
    if file := os.environ.get(VARIABLE):
        line = json.dumps({"class": kind, "refreshed": refreshed, "stays": stays, "mode": mode, "facts": facts})
        with open(file, "a", encoding="utf-8") as out:  # one write per line, so that test processes can share the file
            out.write(f"{line}\n")


def collected(lines: Iterable[str]) -> dict[str, Any]:
    """The records by class: what is refreshed and what stays, and for each mode the values of each fact."""
    classes: dict[str, Any] = {}
    for text in lines:
        line = json.loads(text)
        row = classes.setdefault(line["class"], {"refreshed": line["refreshed"], "stays": line["stays"], "modes": {}})
        facts = row["modes"].setdefault(line["mode"], {})
        for name, value in line["facts"].items():
            facts[name] = sorted({*facts.get(name, ()), value})
    # Sorted, since test processes append in any order.
    for row in classes.values():
        row["modes"] = {mode: dict(sorted(facts.items())) for mode, facts in sorted(row["modes"].items())}
    return dict(sorted(classes.items()))


def table(results: list[dict[str, Any]]) -> str:
    """Markdown between GUIDE's two markers. Versions of an engine whose classes have the same results share a row."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        for name, row in result["classes"].items():
            held = "; ".join(_held(mode, facts) for mode, facts in row["modes"].items())
            rows.setdefault((result["engine"], name, row["refreshed"], row["stays"], held), []).append(
                result["version"]
            )
    lines = ["", "| engine | class | one launch refreshes | stays the engine's | held against its own code |"]
    lines.append("|---|---|---|---|---|")
    for (engine, name, refreshed, stays, held), versions in sorted(rows.items()):
        lines.append(f"| {engine} {', '.join(versions)} | `{name}` | {refreshed} | {stays} | yes: {held} |")
    beside = sorted({f"torch {result['torch']} on CPython {result['python']}" for result in results})
    lines += ["", f"Run beside {' and '.join(beside)}.", ""]
    return "\n".join(lines)


def _held(mode: str, facts: dict[str, list[int]]) -> str:
    values = [f"{name} {', '.join(map(str, numbers))}" for name, numbers in facts.items()]
    return f"{mode} ({'; '.join(values)})" if values else mode


def short_table(results: list[dict[str, Any]]) -> str:
    """Markdown between README's two markers. Classes that differ only in modes and sizes share a row."""
    versions: dict[tuple[str, ...], list[str]] = {}
    for result in results:
        for name, row in result["classes"].items():
            versions.setdefault((result["engine"], name, row["refreshed"], row["stays"]), []).append(result["version"])
    rows: dict[tuple[str, ...], list[str]] = {}
    for (engine, name, *about), those in versions.items():
        rows.setdefault((f"{engine} {', '.join(those)}", *about), []).append(f"`{name}`")
    lines = ["", "| engine | class, held against its own code | one launch refreshes | stays the engine's |"]
    lines.append("|---|---|---|---|")
    for (engine, *about), names in sorted(rows.items()):
        lines.append(f"| {engine} | {', '.join(sorted(names))} | {' | '.join(about)} |")
    return "\n".join([*lines, ""])


def between(text: str, made: str) -> str:
    """The text with the part between its two markers replaced."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{made}\n{END}{after}"


def written(results: list[dict[str, Any]]) -> dict[Path, str]:
    """README and GUIDE with their tables replaced."""
    made = {README: short_table(results), GUIDE: table(results)}
    return {path: between(path.read_text(encoding="utf-8"), text) for path, text in made.items()}


def committed() -> list[dict[str, Any]]:
    """The results of all engines."""
    return [json.loads(file.read_text(encoding="utf-8")) for file in sorted(FOLDER.glob("*.json"))]


def main() -> None:
    engine, *write = sys.argv[1:]
    package, _, number = engine.partition("-")
    classes = collected(Path(os.environ[VARIABLE]).read_text(encoding="utf-8").splitlines())
    file = FOLDER / f"{engine}.json"
    if not write:
        known = json.loads(file.read_text(encoding="utf-8"))["classes"] if file.exists() else {}
        if known != classes:
            changed = sorted(name for name in known.keys() | classes.keys() if known.get(name) != classes.get(name))
            sys.exit(f"{file} differs from this run in {', '.join(changed)}. Run: make engines ENGINE={engine} WRITE=1")
        return
    name = {"sglang": "SGLang", "vllm": "vLLM", "flashinfer": "FlashInfer"}[package]
    made = {"engine": name, "version": number, "torch": version("torch"), "python": platform.python_version()}
    file.write_text(json.dumps({**made, "classes": classes}, indent=1) + "\n", encoding="utf-8")
    for path, text in written(committed()).items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
