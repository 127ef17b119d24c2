"""SGLang end to end on a GPU, with and without onelaunch: python run.py tokens|times [--bundle FOLDER] [--out FOLDER]

An unmodified engine generates with EAGLE and CUDA graphs; ONELAUNCH_SGLANG=1 is the only difference between off and on.

tokens: all configurations beside one another. The tokens' hash and the number of verify steps must be the same off and
on, and a spoiled draft table must change them. Writes tokens.json.
times: one engine after another, alone on the machine: launches of the metadata methods, their time on the host, and the
time of a step, with onelaunch attached and detached in turns in the same process. Writes times.json.

Needs SGLang 0.5.17 with what it imports, FlashInfer and onelaunch in this environment, or a bundle (see bundle.py) with
what is missing in it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FIRST_PORT = 31000
BACKENDS = ("fa3", "triton", "flashinfer")
ROLES = ("draft", "verify", "draft-extend")


@dataclass(frozen=True)
class Run:
    """One engine.

    Attributes:
        backend: SGLang's attention backend.
        steps: draft steps.
        page: tokens a page.
        plugin: whether onelaunch is asked to attach.
        spoil: whether the draft's table is zeroed after each refresh.
    """

    backend: str
    steps: int = 3
    page: int = 1
    plugin: bool = False
    spoil: bool = False

    @property
    def configuration(self) -> str:
        return f"{self.backend}, {self.steps} steps, page {self.page}"

    @property
    def kind(self) -> str:
        return "spoiled" if self.spoil else "on" if self.plugin else "off"

    @property
    def name(self) -> str:
        return f"{self.backend}-{self.steps}steps-page{self.page}-{self.kind}"


def token_runs() -> list[Run]:
    shapes = [(backend, steps, 1) for backend in BACKENDS for steps in (3, 5)] + [("fa3", 3, 64)]
    runs = [Run(*shape, plugin=plugin) for shape in shapes for plugin in (False, True)]
    return runs + [Run(backend, plugin=True, spoil=True) for backend in BACKENDS]


def time_runs() -> list[Run]:
    return [Run(*shape, plugin=True) for shape in [("fa3", 3), ("triton", 3), ("flashinfer", 3), ("fa3", 5)]]


class Machine:
    """Where engines run: the environment's packages, or a bundle's beside them.

    Args:
        work: a folder for models, caches and results.
        bundle: a folder with site.tar.xz and a wheel of onelaunch, or None.
    """

    def __init__(self, work: Path, bundle: Path | None) -> None:
        self.work, self.bundle = work, bundle
        # How many tokens the longest request generates, how often off and on are timed, and SGLang's arguments.
        self.tokens, self.rounds, self.arguments = 64, 0, []
        self.paths = [str(HERE / "site")]
        self.environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        work.mkdir(exist_ok=True)
        if bundle is not None:
            self._unpack(bundle)
        subprocess.run([sys.executable, str(HERE / "model.py"), str(work / "models")], check=True)

    def _unpack(self, bundle: Path) -> None:
        front = self.work / "front"
        if not front.exists():
            with tarfile.open(bundle / "site.tar.xz") as tar:
                tar.extractall(self.work, filter="data")
        for wheel in bundle.glob("onelaunch-*.whl"):
            zipfile.ZipFile(wheel).extractall(front)
        self.paths.append(str(front))
        nvcc = shutil.which("nvcc")
        assert nvcc is not None, "nvcc isn't there"
        self.environment |= {
            "ENGINES_GPU_BEHIND": str(self.work / "behind"),
            "CUDA_HOME": str(Path(nvcc).resolve().parent.parent),
            "SGLANG_ENABLE_JIT_DEEPGEMM": "0",
            "TVM_FFI_CACHE_DIR": str(self.work / "jit"),
            "TRITON_CACHE_DIR": str(self.work / "triton"),
        }

    def generate(self, run: Run, port: int) -> dict[str, Any]:
        """One engine's result and what the probe saw in it; "error" if it failed."""
        folder = self.work / run.name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        environment = self.environment | {"PROBE_RESULT": str(folder / "probe.json")}
        environment["PROBE_PHASE"] = str(folder / "phase")
        (folder / "phase").write_text("")
        environment["ONELAUNCH_CACHE_DIR"] = str(
            folder / "cache"
        )  # a cold one: it must be built before the capture ends
        environment["ONELAUNCH_SGLANG"] = "1" if run.plugin else "0"
        environment["PROBE_SPOIL"] = "1" if run.spoil else "0"
        paths = list(self.paths)
        if self.bundle is not None:
            flashinfer = run.backend == "flashinfer"
            environment["SGLANG_IS_FLASHINFER_AVAILABLE"] = "true" if flashinfer else "false"
            if flashinfer:
                environment["ENGINES_GPU_FLASHINFER"] = "1"
                environment["FLASHINFER_WORKSPACE_BASE"] = str(folder)
                environment["FLASHINFER_CUDA_ARCH_LIST"] = "9.0a"
                environment["FLASHINFER_USE_CUDA_NORM"] = "1"
                paths.append(str(self.work / "flashinfer"))
            if run.backend == "fa3":
                environment["ENGINES_GPU_STAND_IN"] = "1"
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        command = [
            sys.executable,
            str(HERE / "generate.py"),
            str(self.work / "models"),
            str(folder / "result.json"),
            str(self.tokens),
            str(self.rounds),
        ]
        command += [f"attention_backend={run.backend}", f"speculative_num_steps={run.steps}", f"page_size={run.page}"]
        command += [f"port={port}", f"nccl_port={port + 50}", *self.arguments]
        with (folder / "log").open("w") as log:
            # A failing scheduler kills its parent, so each engine has a session of its own.
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            try:
                code: Any = process.wait(timeout=240)
            except subprocess.TimeoutExpired:
                code = "timeout"
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        print(f"{time.strftime('%T')} {run.name}: {code}", flush=True)
        if not (folder / "result.json").exists() or not (folder / "probe.json").exists():
            return {"error": code, "log": (folder / "log").read_text()[-6000:]}
        found = json.loads((folder / "result.json").read_text())
        return found | {"probe": json.loads((folder / "probe.json").read_text())}


def differences(found: dict[str, dict[str, Any]]) -> list[str]:
    """What is wrong with the results of one configuration by kind; nothing if they are as they must be."""
    wrong = [f"{kind}: {result['error']}" for kind, result in found.items() if "error" in result]
    for kind, result in found.items():
        rounds = result.get("scenarios", {}).values()
        wrong += [
            f"{kind}: the rounds differ: {several}" for several in rounds if several != several[:1] * len(several)
        ]
        wrong += [f"{kind}: {a}" for a in result.get("probe", {}).get("attachments", ()) if a["failed"]]
    if wrong or "off" not in found:
        return wrong
    off = found["off"]["scenarios"]
    for kind in set(found) & {"on", "spoiled"}:
        probe, scenarios = found[kind]["probe"], found[kind]["scenarios"]
        if not any(a["launches"] and not a["failed"] for a in probe["attachments"]):
            wrong.append(f"{kind}: onelaunch isn't attached: {probe['onelaunch']}")
        if probe["built_or_bound_after_capture"]:
            wrong.append(f"{kind}: after the capture {probe['built_or_bound_after_capture']}")
        if kind != "spoiled" and scenarios != off:
            wrong.append(f"{kind}: {scenarios} and off: {off}")
        if kind == "spoiled":
            wrong += [
                f"spoiled: {name} has the same verify steps"
                for name in off
                if _steps(off, name) == _steps(scenarios, name)
            ]
    return wrong


def _steps(scenarios: dict[str, Any], name: str) -> list[int]:
    return [round_["verify_steps"] for round_ in scenarios[name]]


def _host(times: dict[str, Any], role: str) -> float:
    """The host's µs for the metadata of a graph and the copies into its buffers."""
    return sum(float(times.get(name, {}).get("median", 0)) for name in (role, f"{role} copies"))


def table(found: dict[str, dict[str, Any]]) -> str:
    """Off, on, and attached to the graph runners too, side by side: launches and copies of the metadata and of the
    copies into a graph's buffers, their host time and the step's, in µs.

    The last column has all launches and copies before the step's graphs, the engine's preparation included.
    """
    head = [f"{role}: launches + copies, host" for role in ROLES]
    lines = [
        "| configuration | | " + " | ".join(head) + " | step | before the graphs |",
        "|---" * (len(ROLES) + 4) + "|",
    ]
    for configuration, kinds in found.items():
        result = kinds["on"]
        if "error" in result:
            lines.append(f"| {configuration} | failed |")
            continue
        probe = result["probe"]
        times, launches = probe["host_us"], probe["launches"]
        for state in ("off", "on", "runners"):
            if state not in times:
                continue
            cells = []
            for role in ROLES:
                counts = [launches.get(state, {}).get(name, {}) for name in (role, f"{role} copies")]
                kernels, copies = (sum(count.get(kind, 0) for count in counts) for kind in ("kernels", "copies"))
                host, before = (_host(times[each], role) for each in (state, "off"))
                ratio = f" ({before / host:.1f} times less)" if state != "off" and host else ""
                cells.append(f"{kernels} + {copies}, {host:.1f}{ratio}")
            cells.append(str(times[state]["step"]["median"]))
            cells.append(str(sum(sum(names.values()) for names in probe.get("seams", {}).get(state, {}).values())))
            lines.append(f"| {configuration} | {state} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("tokens", "times"))
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--jobs", type=int, default=17, help="engines beside one another, for tokens")
    parser.add_argument("--match", default="", help="only runs with this regular expression in their name")
    given = parser.parse_args(arguments)
    runs = token_runs() if given.what == "tokens" else time_runs()
    runs = [run for run in runs if re.search(given.match, run.name)]
    # One place, which compiled kernels know: they stay for the next run.
    work = Path(tempfile.gettempdir()) / "onelaunch-engines-gpu"
    machine = Machine(work, given.bundle)
    if given.what == "times":
        machine.tokens, machine.rounds, machine.arguments = 256, 3, ["cuda_graph_bs_decode=[4, 16]"]
    print(f"{time.strftime('%T')} unpacked", flush=True)
    found: dict[str, dict[str, Any]] = {run.configuration: {} for run in runs}
    written = threading.Lock()

    def one(number: int) -> None:
        run = runs[number]
        result = machine.generate(run, FIRST_PORT + 100 * number)
        with written:
            found[run.configuration][run.kind] = result
            done = {configuration: kinds for configuration, kinds in found.items() if kinds}
            (given.out / f"{given.what}.json").write_text(json.dumps(done, indent=1) + "\n")

    with ThreadPoolExecutor(given.jobs if given.what == "tokens" else 1) as threads:
        list(threads.map(one, range(len(runs))))
    wrong = {configuration: lines for configuration, kinds in found.items() if (lines := differences(kinds))}
    print(table(found) if given.what == "times" else json.dumps({c: sorted(k) for c, k in found.items()}))
    print(json.dumps(wrong, indent=1) if wrong else "All as it must be.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
