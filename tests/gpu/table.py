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
        "Lengths are drawn evenly from half of the named one on; one request has the named length.",
    ]
    suite = evidence["tests"]
    fixed = f" ({len(suite['fixed'])} passed when it was fixed and run again)" if suite["fixed"] else ""
    tools = ", ".join(evidence["sanitizers"])
    errors = sum(run["errors"] for run in evidence["sanitizers"].values())
    replays = evidence["replays"].values()
    steps, compared, requests = (sum(run[name] for run in replays) for name in ("steps", "verified_steps", "finished"))
    mismatches = sum(run["mismatches"] for run in replays)
    lines += [
        "",
        f"{suite['passed']:,} GPU tests passed, {suite['failed']} failed{fixed}; compute-sanitizer ({tools}) "
        f"found {errors} errors; {requests:,} requests of two serving traces were replayed in {steps:,} steps, "
        f"every destination of {compared:,} of them compared, with {mismatches} mismatches.",
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
