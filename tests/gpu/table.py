"""The README's measured numbers: a table from bench.json, one GPU and one run, and a sentence from evidence.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onelaunch.cli.lab.bench.contenders import CONTENDERS
from onelaunch.cli.lab.bench.summary import markdown, name_of, title

HERE = Path(__file__).parent
README = HERE.parent.parent / "README.md"
# Contenders whose names don't say all.
EXPLAINED = ("sglang", "sglang-best", "onelaunch-verified")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def table(evidence: dict[str, Any], bench: dict[str, Any]) -> str:
    """Markdown between the two markers."""
    machine = bench["machine"]
    lines = [
        "",
        f"{title(bench)} Driver {machine['driver_and_clocks'].split(',')[0]}, torch {machine['torch']}; pages of 64, "
        "top-k 2048, tables 163,911 wide.",
        "",
        *markdown(bench),
        "",
        "Lengths are drawn evenly from half of the longest on. "
        + "; ".join(f"{name_of(name, bench)}: {CONTENDERS[name].what}" for name in EXPLAINED)
        + ".",
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


def with_table(readme: str, evidence: dict[str, Any], bench: dict[str, Any]) -> str:
    """The README with its table replaced."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{table(evidence, bench)}\n{END}{after}"


def main() -> None:
    """Rewrites the README."""
    evidence, bench = (
        json.loads((HERE / name).read_text(encoding="utf-8")) for name in ("evidence.json", "bench.json")
    )
    README.write_text(with_table(README.read_text(encoding="utf-8"), evidence, bench), encoding="utf-8")


if __name__ == "__main__":
    main()
