"""Everything that needs a GPU, in one call: the tests, compute-sanitizer, the replay of both traces, timings.

Writes evidence.json beside this file (or to the path given as the first argument) and prints a short table last.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import soak
import torch
from onelaunch import PRESETS, __version__
from onelaunch.cli.lab.bench import baselines
from onelaunch.cli.lab.bench.cuda_meter import CudaMeter
from onelaunch.cli.lab.bench.scene import Scene
from onelaunch.inspect.kernels import fingerprint

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TRACES = ("azure_2023_conversation", "mooncake_conversation")
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
SANITIZED = (
    "nsa-decode-3",
    "nsa-decode-3-full",
    "nsa-decode-3-unaligned",
    "nsa-decode-3-int64",
    "nsa-decode-3-pages-only",
    "nsa-decode-3-page16",
    "nsa-precompute",
    "nsa-copy-3",
    "nsa-copy-3-rows",
    "nsa-target-verify-3",
    "nsa-draft-extend-3-variable",
    "nsa-decode-3-kpool",
    "nsa-decode-3-checked",
    "fa3-decode-3",
    "flashmla-decode-3",
)
# batch, low and high length
TIMED = {
    "1 x 4k": (1, 2048, 4096),
    "8 x 8k": (8, 4096, 8192),
    "32 x 4k": (32, 2048, 4096),
    "64 x 8k": (64, 4096, 8192),
    "64 x 8192": (64, 8192, 8192),
    "128 x 32k": (128, 16384, 32768),
    "256 x 4k": (256, 1024, 4096),
    "16 x 130k": (16, 100_000, 130_000),
}
WIDTH = 163_911


def tests(only: Sequence[str]) -> dict[str, Any]:
    """The GPU tests of the suite, or those named."""
    report = Path(tempfile.mkdtemp()) / "report.xml"
    workers = str(max(1, min(14, (os.cpu_count() or 2) - 2)))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-n",
        workers,
        "--tb=short",
        f"--junitxml={report}",
        *(only or [str(ROOT / "tests")]),
    ]
    start = time.time()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], flush=True)
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    failures = [
        f"{(case.get('classname') or '').replace('.', '/')}.py::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "failures": sorted(failures),
        "mended": [],
        "skipped": sorted(
            f"{case.get('classname')}.{case.get('name')}: {skip.get('message')}"
            for case in suite.iter("testcase")
            for skip in case.iter("skipped")
        ),
        "seconds": round(time.time() - start, 1),
    }


def sanitize(tool: str) -> dict[str, Any]:
    """compute-sanitizer over a reduced matrix."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    command = [program, "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, str(HERE / "cases.py"), *SANITIZED]
    start = time.time()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    summary = re.search(r"(?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?)", done.stdout)
    cases = re.search(r"cases (\d+)", done.stdout)
    if not summary or not cases or done.returncode:
        print(f"--- {tool}, exit code {done.returncode}\n{done.stdout[-2500:]}{done.stderr[-1500:]}", flush=True)
    found = int(summary[1] or summary[2]) if summary else -1
    return {
        "errors": found if cases and not done.returncode else found or -1,
        "cases": int(cases[1]) if cases else 0,
        "seconds": round(time.time() - start, 1),
    }


def sanitizers() -> dict[str, Any]:
    """Every tool, at the same time."""
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        return dict(zip(TOOLS, pool.map(sanitize, TOOLS), strict=True))


def replay(trace: str) -> dict[str, Any]:
    """A serving trace, each step refreshed on the GPU."""
    command = [sys.executable, "-m", "onelaunch.cli.main", "replay", str(ROOT / "tests" / "data" / f"{trace}.csv")]
    command += ["--device", "cuda", "--step-ms", "200", "--json", "-"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(
            f"--- replay of {trace}, exit code {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-2000:]}",
            flush=True,
        )
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def timings() -> dict[str, Any]:
    """Microseconds a call in a CUDA graph, N=3, page 64, table width 163911, side by side with the ideal fan-out."""
    generator = torch.Generator().manual_seed(3)
    out: dict[str, Any] = {}
    meter = CudaMeter()
    for name, (bs, low, high) in TIMED.items():
        lengths = torch.randint(low, high + 1, (bs,), generator=generator).tolist()
        sets = max(6, min(24, int(3 * 60e6 // (sum(lengths) * 16)) + 1))
        scene = Scene(lengths, 3, WIDTH, 64, sets)
        ideal = min(meter.graph_us(*meter.capture(baselines.ideal_calls(scene, "live", u), 10.0)) for u in (1, 2, 4))
        refresh = meter.graph_us(*meter.capture(scene.refresh_calls(), 10.0))
        host = meter.host_us({"refresh": scene.refresh_calls()[0]})["refresh"]
        out[name] = {
            "refresh_us": round(refresh, 2),
            "ideal_us": round(ideal, 2),
            "ratio": round(refresh / ideal, 2),
            "host_us": round(host, 2),
            "bytes": scene.bytes(),
            "buffer_sets": sets,
        }
        del scene
        torch.cuda.empty_cache()
    return out


def soaks(folder: Path) -> dict[str, Any]:
    """Both traces in full, 3 and 7 backends, through CUDA graphs replayed in random order; every step checked."""
    out: dict[str, Any] = {}
    for trace in sorted(folder.glob("*_conversation.csv")):
        for backends in (3, 7):
            name = f"{trace.stem}, {backends} backends"
            out[name] = soak.soak(
                trace, backends, torch.device("cuda", torch.cuda.current_device()), max_batch=256, context_len=16384
            )
            print(name, out[name], flush=True)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=HERE / "evidence.json", help="where the evidence goes")
    parser.add_argument(
        "--traces", type=Path, default=ROOT / "tests" / "data" / "full", help="folder of the traces to soak with"
    )
    parser.add_argument(
        "--only", choices=["soak", "tests", "failed"], help="run this part alone and add it to the evidence there is"
    )
    options = parser.parse_args()
    path: Path = options.path
    fingerprints = {name: fingerprint(config) for name, config in PRESETS.items()}
    os.environ.setdefault("ONELAUNCH_TEST_CACHE", tempfile.mkdtemp(prefix="onelaunch-gpu-"))
    os.environ["ONELAUNCH_CACHE_DIR"] = os.environ["ONELAUNCH_TEST_CACHE"]
    if options.only:
        known: dict[str, Any] = json.loads((HERE / "evidence.json").read_text(encoding="utf-8"))
        if known["kernels"] != fingerprints:
            sys.exit("The kernels have changed since the evidence was taken. Run everything: make gpu")
        if options.only == "soak":
            known["soak"] = soaks(options.traces)
        elif options.only == "tests":
            known["tests"] = tests([])
        else:  # a failure stays on record, beside what passed when it was mended and run again
            open_failures = sorted(set(known["tests"]["failures"]) - set(known["tests"]["mended"]))
            again = tests(open_failures)["failures"] if open_failures else []
            known["tests"]["mended"] = sorted(set(known["tests"]["failures"]) - set(again))
        path.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        left = len(known["tests"]["failures"]) - len(known["tests"]["mended"])
        return 1 if left or any(run["mismatches"] for run in known["soak"].values()) else 0
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    partial = path.with_suffix(".partial.json")
    evidence: dict[str, Any] = {
        "onelaunch": __version__,
        "device": torch.cuda.get_device_name(),
        "devices": torch.cuda.device_count(),
        "driver": driver.stdout.split("\n")[0].strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
        "kernels": fingerprints,
    }
    if partial.exists():
        begun: dict[str, Any] = json.loads(partial.read_text(encoding="utf-8"))
        if all(begun[name] == evidence[name] for name in ("kernels", "device", "driver", "torch", "cuda")):
            evidence = begun
            print(f"going on where {partial.name} ends", flush=True)
    for part, run in (
        ("timings", timings),
        ("tests", lambda: tests([])),
        ("sanitizers", sanitizers),
        ("replays", lambda: {trace: replay(trace) for trace in TRACES}),
        ("soak", lambda: soaks(options.traces)),
    ):
        if part not in evidence:
            evidence[part] = run()
        # A run that is cut short keeps what it has, where nobody takes it for the evidence, and the next one goes on.
        partial.write_text(json.dumps(evidence, indent=1) + "\n", encoding="utf-8")
    partial.unlink()
    path.write_text(json.dumps(evidence, indent=1) + "\n", encoding="utf-8")

    print(f"\n{evidence['device']}, driver {evidence['driver']}, torch {evidence['torch']}")
    suite = evidence["tests"]
    print(f"tests       {suite['passed']} passed, {suite['failed']} failed, {len(suite['skipped'])} skipped")
    for tool, run in evidence["sanitizers"].items():
        print(f"{tool:11} {run['errors']} errors in {run['cases']} cases, {run['seconds']} s")
    for trace, run in evidence["replays"].items():
        print(f"replay      {trace}: {run['mismatches']} mismatches in {run['steps']} steps")
    for name, run in evidence["soak"].items():
        print(f"soak        {name}: {run['mismatches']} mismatches in {run['steps']} steps")
    print("shape        refresh   ideal   ratio   host (us)")
    for name, row in evidence["timings"].items():
        print(f"{name:11} {row['refresh_us']:8.2f} {row['ideal_us']:7.2f} {row['ratio']:7.2f} {row['host_us']:7.2f}")
    bad = suite["failed"] or any(run["errors"] for run in evidence["sanitizers"].values())
    bad = bad or any(run["mismatches"] for part in ("replays", "soak") for run in evidence[part].values())
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
