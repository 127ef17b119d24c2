"""The README's measured numbers: a table from bench.json (one GPU, one run), and a sentence from evidence.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from onelaunch.cli.lab.bench.cases import WIDE
from onelaunch.cli.lab.bench.contenders import CONTENDERS
from onelaunch.cli.lab.bench.selection import QUICK_SHAPES
from onelaunch.cli.lab.bench.summary import markdown, name_of, title, usual

HERE = Path(__file__).parent
README = HERE.parent.parent / "README.md"
# Contenders whose names need an explanation.
EXPLAINED = ("sglang", "sglang-best", "onelaunch-verified")
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def table(evidence: dict[str, Any], bench: dict[str, Any]) -> str:
    """Markdown between the two markers."""
    return "\n".join(["", *_bench(bench), "", _run(evidence), ""])


def _bench(bench: dict[str, Any]) -> list[str]:
    machine = bench["machine"]
    explained = "; ".join(f"{name_of(name, bench)}: {CONTENDERS[name].what}" for name in EXPLAINED)
    return [
        f"{title(bench)} Driver {machine['driver_and_clocks'].split(',')[0]}, torch {machine['torch']}; pages of 64, "
        f"top-k 2048, tables {WIDE:,} wide, lengths drawn evenly from half of the longest on.",
        "",
        *markdown(bench),
        "",
        " ".join(sentence for sentence in (f"{explained}.", _specialization(bench), bench.get("note", "")) if sentence),
        "",
        "![µs of six ways, at four shapes, and of full and verified writes against length](tests/gpu/bench.png)",
    ]


def _specialization(bench: dict[str, Any]) -> str:
    """What specialization alone gains: our kernel compared with itself with arguments in place of constants."""
    took = {(row["implementation"], row["shape"]): row.get("cold_us") for row in bench["rows"] if usual(row)}
    shapes = [shape for shape in QUICK_SHAPES if took.get(("runtime", shape)) and took.get(("onelaunch", shape))]
    if not shapes:
        return ""
    more = ", ".join(f"{took['runtime', shape] / took['onelaunch', shape]:.2f}" for shape in shapes)
    return f"Unspecialized, with N, pages, top-k and fields as arguments, our own kernel takes {more} times as long."


def _run(evidence: dict[str, Any]) -> str:
    """A text that says what was run with these kernels, and what wasn't."""
    suite = evidence["tests"]
    fixed, failing = len(suite["fixed"]), suite["failed"] - len(suite["fixed"])
    again = f", {fixed} of them when they were run again" if fixed else ""
    said = [f"{suite['passed'] + fixed:,} GPU tests passed{again}, {failing} failed"]
    if "sanitizers" in evidence:
        errors = sum(run["errors"] for run in evidence["sanitizers"].values())
        said.append(f"compute-sanitizer ({', '.join(evidence['sanitizers'])}) found {errors} errors")
    if "replays" in evidence:
        replays = evidence["replays"].values()
        names = ("steps", "verified_steps", "finished", "mismatches")
        steps, compared, requests, mismatches = (sum(run[name] for run in replays) for name in names)
        said.append(
            f"{requests:,} requests of two serving traces were replayed in {steps:,} steps, every destination of "
            f"{compared:,} of them compared, with {mismatches} mismatches"
        )
    missing = {"sanitizers": "compute-sanitizer", "replays": "replays of whole traces"}
    if left := [missing[part] for part in evidence.get("not_run", ())]:
        said.append(f"not run with these kernels yet: {', '.join(left)}")
    return "; ".join(said) + "."


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
