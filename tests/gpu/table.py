"""The README's table of measured numbers, made from evidence.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent.parent / "README.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def table(evidence: dict[str, Any]) -> str:
    """Markdown between the two markers."""
    lines = [
        "",
        "Microseconds a call inside a CUDA graph, 3 backends, page 64, top-k 2048, table width 163,911, extent live, "
        f"on an {evidence['device']} (driver {evidence['driver']}, torch {evidence['torch']}):",
        "",
        "| requests x longest | refresh | ideal fan-out | ratio |",
        "|---|---|---|---|",
    ]
    for name, row in evidence["timings"].items():
        lines.append(f"| {name} | {row['refresh_us']:.2f} | {row['ideal_us']:.2f} | {row['ratio']:.2f} |")
    lines += [
        "",
        "Lengths are drawn evenly from half of the named one on (256 x 4k from 1k, 16 x 130k from 100,000 on); those "
        "of 64 x 8192 are all equal.",
    ]
    suite = evidence["tests"]
    mended = f" ({len(suite['mended'])} passed when it was mended and run again)" if suite["mended"] else ""
    tools = ", ".join(evidence["sanitizers"])
    errors = sum(run["errors"] for run in evidence["sanitizers"].values())
    steps = sum(run["steps"] for run in evidence["replays"].values())
    compared = sum(run["verified_steps"] for run in evidence["replays"].values())
    mismatches = sum(run["mismatches"] for run in evidence["replays"].values())
    soak = evidence["soak"].values()
    lines += [
        "",
        f"{suite['passed']:,} GPU tests passed, {suite['failed']} failed{mended}; compute-sanitizer ({tools}) "
        f"found {errors} errors; {steps:,} steps of the two traces were replayed and {compared:,} of them compared, "
        f"with {mismatches} mismatches. "
        f"A soak of {sum(run['finished'] for run in soak):,} requests in CUDA graphs, "
        f"{sum(run['checked_steps'] for run in soak):,} "
        f"steps with every destination checked, found {sum(run['mismatches'] for run in soak)} mismatches.",
        "",
    ]
    return "\n".join(lines)


def with_table(readme: str, evidence: dict[str, Any]) -> str:
    """The README with its table replaced."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(evidence)}\n{END}{after}"


def main() -> None:
    """Rewrites the README."""
    evidence = json.loads((HERE / "evidence.json").read_text(encoding="utf-8"))
    README.write_text(with_table(README.read_text(encoding="utf-8"), evidence), encoding="utf-8")


if __name__ == "__main__":
    main()
