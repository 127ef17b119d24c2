"""Everything that needs a GPU, in one run: correctness, compute-sanitizer, whole serving traces, timings.

    python tests/gpu/run.py [PATH]

Writes evidence.json beside this file (or to PATH): the results, and for each preset the fingerprint of the kernel that
was run. A test fails if a shipped kernel's fingerprint isn't there. Prints a short table at the end. With --two-devices
it runs only the tests that need two GPUs, and writes two_devices.json.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from onelaunch import PRESETS, __version__
from onelaunch.cli.lab.bench import baselines, cuda_meter
from onelaunch.cli.lab.bench.cases import SHAPES, Case, parse_shape, wide_enough
from onelaunch.inspect.kernels import fingerprint

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
TRACES = ROOT / "tests" / "data" / "full"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# The tools instrument only the emitted kernels. PyTorch's kernels compute and compare the reference, aren't under test,
# and took most of the time: racecheck of the two cases with declared fields took 17 s with them and 6 s without. Only
# initcheck instruments them too, because it must know what they wrote.
INSTRUMENTED = "onelaunch_"


def run_tests(marker: str, only: Sequence[str] = ()) -> xml.etree.ElementTree.Element:
    """Runs the tests with a marker, or the named ones. Returns the suite's report."""
    report = Path(tempfile.mkdtemp()) / "report.xml"
    workers = str(max(1, min(14, (os.cpu_count() or 2) - 2)))
    command = [sys.executable, "-m", "pytest", "-m", marker, "-q", "-n", workers, "--tb=short"]
    command += [f"--junitxml={report}", *(only or [str(ROOT / "tests")])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout[-6000:], flush=True)
    suite = xml.etree.ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    return suite


def has_failed(case: xml.etree.ElementTree.Element) -> bool:
    return case.find("failure") is not None or case.find("error") is not None


def gpu_tests(only: Sequence[str] = ()) -> dict[str, Any]:
    """Runs the suite's GPU tests, or the named ones. Returns their results."""
    start = time.time()
    suite = run_tests("gpu", only)
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    failures = [
        f"{(case.get('classname') or '').replace('.', '/')}.py::{case.get('name')}"
        for case in suite.iter("testcase")
        if has_failed(case)
    ]
    return {
        "passed": counts["tests"] - failed - counts["skipped"],
        "failed": failed,
        "failures": sorted(failures),
        "fixed": [],
        "skipped": sorted(
            f"{case.get('classname')}.{case.get('name')}: {skip.get('message')}"
            for case in suite.iter("testcase")
            for skip in case.iter("skipped")
        ),
        "seconds": round(time.time() - start, 1),
    }


def two_devices() -> dict[str, Any]:
    """Runs the tests that need two GPUs, which other runs skip by name. Returns their results."""
    cases = list(run_tests("two_devices").iter("testcase"))
    passed = [case for case in cases if not has_failed(case) and case.find("skipped") is None]
    return {
        **machine(),
        "passed": sorted(f"{case.get('classname')}.{case.get('name')}" for case in passed),
        "failed": sorted(f"{case.get('classname')}.{case.get('name')}" for case in cases if has_failed(case)),
    }


def run_cases() -> None:
    """Runs one configuration of each strategy and each field kind on two shapes, to be run under compute-sanitizer.

    Larger shapes run the same code, but racecheck would need a quarter of an hour for them.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    import checker
    from cases import SANITIZED, STRATEGIES

    for config in STRATEGIES.values():
        assert INSTRUMENTED in config.symbol
        for shape in SANITIZED:
            checker.check(config, shape, torch.device("cuda", 0))
    torch.cuda.synchronize()
    print(f"cases {len(STRATEGIES) * len(SANITIZED)}")


def sanitize(tool: str) -> dict[str, Any]:
    """Runs run_cases() under one tool of compute-sanitizer."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    only = [] if tool == "initcheck" else ["--kernel-name", f"kernel_substring={INSTRUMENTED}"]
    command = [program, "--tool", tool, *only, "--error-exitcode", "9"]
    command += [sys.executable, str(HERE / "run.py"), "--cases"]
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
    """Runs all tools at the same time, after building the kernels."""
    subprocess.run([sys.executable, str(HERE / "run.py"), "--cases"], cwd=ROOT, check=True)
    with ThreadPoolExecutor(len(TOOLS)) as pool:
        return dict(zip(TOOLS, pool.map(sanitize, TOOLS), strict=True))


def replay(trace: Path, backends: int, writes: str, threads: int) -> dict[str, Any]:
    """Replays a whole serving trace without waiting between steps. Pages and pool rows are reused, requests preempted.

    Every destination of every step is compared with the reference.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "onelaunch.cli.main", "replay", str(trace), "--device", "cuda", "--json", "-"]
    command += ["--backends", str(backends), "--max-batch", "256", "--step-ms", "1e6", "--verify", "every"]
    command += ["--preempt-probability", "0.002", "--writes", writes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        print(f"--- {trace.name}, exit code {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-2000:]}", flush=True)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def replays() -> dict[str, Any]:
    """Replays both whole traces, with 3 and with 7 backends, and with verified writes, all at the same time.

    Each replay gets its share of the cores, because torch would give all cores to each.
    """
    traces = sorted(TRACES.glob("*_conversation.csv"))
    runs = {f"{trace.stem}, {n} backends": (trace, n, "all") for trace in traces for n in (3, 7)}
    runs |= {f"{trace.stem}, 3 backends, verified": (trace, 3, "verified") for trace in traces}
    threads = max(1, (os.cpu_count() or 1) // len(runs))
    with ThreadPoolExecutor(len(runs)) as pool:
        return dict(zip(runs, pool.map(lambda run: replay(*run, threads), runs.values()), strict=True))


def timings() -> dict[str, Any]:
    """Microseconds per call in a CUDA graph, beside the ideal fan-out: the bench's shapes, N = 3, page 64, extent live.

    Each call finds the GPU's caches warm from the call before.
    """
    out: dict[str, Any] = {}
    meter = cuda_meter.CudaMeter(seconds=0.15)
    for name in SHAPES:
        batch, length = parse_shape(name)
        case = Case(batch, length, width=wide_enough(length))
        scene = meter.scene(case, case.lengths())
        ideal = min(statistics.median(meter.warm_us(call)) for call in baselines.ideal(scene, case))
        call = scene.refresh_call()
        refresh = statistics.median(meter.warm_us(call))
        host = meter.host_us({"refresh": call})["refresh"]
        out[name] = {
            "refresh_us": round(refresh, 2),
            "ideal_us": round(ideal, 2),
            "ratio": round(refresh / ideal, 2),
            "host_us": round(host, 2),
            "bytes": scene.bytes(),
        }
        del scene, call
        torch.cuda.empty_cache()
    return out


PARTS = {"timings": timings, "tests": gpu_tests, "sanitizers": sanitizers, "replays": replays}


def machine() -> dict[str, Any]:
    """The machine and the versions that the evidence was taken on."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False)
    return {
        "onelaunch": __version__,
        "device": torch.cuda.get_device_name(),
        "devices": torch.cuda.device_count(),
        "driver": driver.stdout.split("\n")[0].strip(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }


def write(path: Path, evidence: dict[str, Any]) -> None:
    path.write_text(json.dumps(evidence, indent=1) + "\n", encoding="utf-8")


def run_again(evidence: dict[str, Any], part: str) -> None:
    """Repeats one part of an earlier run, or its failed tests: those that pass now are listed as fixed."""
    if part != "failed":
        evidence[part] = PARTS[part]()
        return
    suite = evidence["tests"]
    still_failing = sorted(set(suite["failures"]) - set(suite["fixed"]))
    failing = gpu_tests(still_failing)["failures"] if still_failing else []
    suite["fixed"] = sorted(set(suite["failures"]) - set(failing))


def print_table(evidence: dict[str, Any]) -> None:
    print(f"\n{evidence['device']}, driver {evidence['driver']}, torch {evidence['torch']}")
    suite = evidence["tests"]
    print(f"tests       {suite['passed']} passed, {suite['failed']} failed, {len(suite['skipped'])} skipped")
    for tool, run in evidence["sanitizers"].items():
        print(f"{tool:11} {run['errors']} errors in {run['cases']} cases, {run['seconds']} s")
    for trace, run in evidence["replays"].items():
        print(f"replay      {trace}: {run['mismatches']} mismatches in {run['steps']} steps")
    print("shape        refresh   ideal   ratio   host (us)")
    for name, row in evidence["timings"].items():
        print(f"{name:11} {row['refresh_us']:8.2f} {row['ideal_us']:7.2f} {row['ratio']:7.2f} {row['host_us']:7.2f}")


def clean(evidence: dict[str, Any]) -> bool:
    """Whether every test has passed, if need be when repeated, and nothing else found a fault."""
    suite = evidence["tests"]
    return (
        len(suite["failures"]) == len(suite["fixed"])
        and not any(run["errors"] for run in evidence["sanitizers"].values())
        and not any(run["mismatches"] for run in evidence.get("replays", {}).values())
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=HERE / "evidence.json", help="where the evidence goes")
    parser.add_argument(
        "--only", choices=[*PARTS, "failed"], help="run this part alone and add it to the evidence there is"
    )
    parser.add_argument("--two-devices", action="store_true", help="run what needs two GPUs alone")
    parser.add_argument("--cases", action="store_true", help="run the sanitizers' cases, without a sanitizer")
    options = parser.parse_args()
    if options.cases:
        run_cases()
        return 0
    if options.two_devices:
        found = two_devices()
        write(HERE / "two_devices.json", found)
        return 1 if found["failed"] or not found["passed"] else 0
    path: Path = options.path
    fingerprints = {name: fingerprint(config) for name, config in PRESETS.items()}
    os.environ.setdefault("ONELAUNCH_TEST_CACHE", tempfile.mkdtemp(prefix="onelaunch-gpu-"))
    os.environ["ONELAUNCH_CACHE_DIR"] = os.environ["ONELAUNCH_TEST_CACHE"]
    if options.only:
        evidence: dict[str, Any] = json.loads((HERE / "evidence.json").read_text(encoding="utf-8"))
        if evidence["kernels"] != fingerprints:
            sys.exit("The kernels have changed since the evidence was taken. Run everything: make gpu")
        run_again(evidence, options.only)
        write(path, evidence)
        return 0 if clean(evidence) else 1
    evidence = {**machine(), "kernels": fingerprints}
    # An interrupted run leaves its results in a file of its own, and the next run continues from there.
    partial = path.with_suffix(".partial.json")
    if partial.exists():
        earlier: dict[str, Any] = json.loads(partial.read_text(encoding="utf-8"))
        if all(earlier[name] == evidence[name] for name in ("kernels", "device", "driver", "torch", "cuda")):
            evidence = earlier
            print(f"continuing {partial.name}", flush=True)
    for part, run in PARTS.items():
        if part not in evidence:
            evidence[part] = run()
        write(partial, evidence)
    partial.unlink()
    write(path, evidence)
    print_table(evidence)
    return 0 if clean(evidence) else 1


if __name__ == "__main__":
    sys.exit(main())
