"""SGLang end to end on a GPU, with and without onelaunch: python run.py tokens times seams [--bundle FOLDER] ...

An unmodified engine generates with EAGLE and CUDA graphs; ONELAUNCH_SGLANG=1 is the only difference between off and on.

tokens: all configurations at the same time. The tokens' hash and the number of verify steps must be the same off and
on, and a spoiled draft table must change the verify steps. Writes tokens.json.
times: one engine after another, alone on the machine: launches of the metadata methods, their time on the host, and the
time of a step, with onelaunch attached and detached in turns in the same process. Writes times.json.
seams: the engine's own sequence before each graph and ours, alone: see seams.py. Writes seams.json.

All processes start at the same time, because starting takes longest. A timed process waits until all are up and the
tokens are generated, and then for its turn. During a turn all other processes are stopped.

Needs SGLang 0.5.17 with what it imports, FlashInfer and onelaunch in this environment, or a bundle (see bundle.py) with
what is missing in it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
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
from collections.abc import Iterator, Sequence
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
        plugin: whether onelaunch is requested to attach.
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
    return [Run(backend, plugin=True) for backend in BACKENDS]


class Engine:
    """A process with a folder for its files. It has a session of its own, since a failing scheduler kills its parent.

    Args:
        folder: holds its files: "log", and for a timed process "up" and "turn" (see turn.py).
        command, environment: start the process.
        limit: seconds until it must be up or have ended, and again from its turn until it must end.
    """

    def __init__(self, folder: Path, command: list[str], environment: dict[str, str], limit: float) -> None:
        self.folder, self._limit, self._latest = folder, limit, time.monotonic() + limit
        with (folder / "log").open("w") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def up(self) -> None:
        """Returns when the process waits for its turn, has ended, or has reached the limit."""
        up = self.folder / "up"
        while self._process.poll() is None and not up.exists() and time.monotonic() < self._latest:
            time.sleep(0.05)

    def ended(self, *files: str) -> dict[str, Any]:
        """The JSON that the process wrote, by file; "error" if it failed."""
        try:
            code: Any = self._process.wait(timeout=self._limit)
        except subprocess.TimeoutExpired:
            code = "timeout"
        finally:
            self.signal(signal.SIGKILL)
        print(f"{time.strftime('%T')} {self.folder.name}: {code}", flush=True)
        places = [self.folder / file for file in files]
        if not all(place.exists() for place in places):
            return {"error": code, "log": (self.folder / "log").read_text()[-6000:]}
        return {place.stem: json.loads(place.read_text()) for place in places}


class Machine:
    """Where engines run: the environment's packages, or a bundle's beside them.

    Args:
        work: a folder for models, caches and results.
        bundle: a folder with site.tar.xz and a wheel of onelaunch, or None.
        limit: see Engine.
    """

    def __init__(self, work: Path, bundle: Path | None, limit: float) -> None:
        self.work, self.bundle, self._limit = work, bundle, limit
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

    def generate(self, run: Run, port: int, rounds: int = 0) -> Engine:
        """Starts an engine that generates and is watched by the probe.

        Args:
            run: the engine's settings.
            port: the first of 100 ports for it.
            rounds: how often each of the probe's states is timed in its turn; 0 only generates tokens.
        """
        folder = self._folder(f"{'timed-' if rounds else ''}{run.name}")
        environment = self._environment(folder, run.backend)
        environment |= {"PROBE_RESULT": str(folder / "probe.json"), "PROBE_PHASE": str(folder / "phase")}
        (folder / "phase").write_text("")
        environment["ONELAUNCH_SGLANG"] = "1" if run.plugin else "0"
        environment["PROBE_SPOIL"] = "1" if run.spoil else "0"
        command = [sys.executable, str(HERE / "generate.py"), str(self.work / "models"), str(folder / "result.json")]
        command += [str(256 if rounds else 64), str(rounds)]
        command += [f"attention_backend={run.backend}", f"speculative_num_steps={run.steps}", f"page_size={run.page}"]
        command += [f"port={port}", f"nccl_port={port + 50}"]
        return Engine(folder, command + ["cuda_graph_bs_decode=[4, 16]"] * bool(rounds), environment, self._limit)

    def seams(self, backend: str) -> Engine:
        """Starts seams.py for "flashinfer", or with "fa3" for all others, whose attention kernels don't run."""
        folder = self._folder(f"seams-{backend}")
        command = [sys.executable, str(HERE / "seams.py"), str(folder / "seams.json")]
        command += ["--flashinfer"] * (backend == "flashinfer")
        return Engine(folder, command, self._environment(folder, backend), self._limit)

    def _folder(self, name: str) -> Path:
        folder = self.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def _environment(self, folder: Path, backend: str) -> dict[str, str]:
        # A cold cache, to test that onelaunch builds its kernels before the capture ends.
        environment = self.environment | {"ONELAUNCH_CACHE_DIR": str(folder / "cache")}
        paths = list(self.paths)
        if self.bundle is not None:
            flashinfer = backend == "flashinfer"
            environment["SGLANG_IS_FLASHINFER_AVAILABLE"] = "true" if flashinfer else "false"
            if flashinfer:
                environment["ENGINES_GPU_FLASHINFER"] = "1"
                environment["FLASHINFER_WORKSPACE_BASE"] = str(folder)
                environment["FLASHINFER_CUDA_ARCH_LIST"] = "9.0a"
                environment["FLASHINFER_USE_CUDA_NORM"] = "1"
                paths.append(str(self.work / "flashinfer"))
            if backend == "fa3":
                environment["ENGINES_GPU_STAND_IN"] = "1"
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        return environment


def in_turns(engines: Sequence[Engine]) -> Iterator[Engine]:
    """Yields each engine in its turn, while all others are stopped. All must be up."""
    for engine in engines:
        for other in engines:
            other.signal(signal.SIGSTOP)
        engine.signal(signal.SIGCONT)
        (engine.folder / "turn").touch()
        yield engine


def differences(found: dict[str, dict[str, Any]]) -> list[str]:
    """The faults in one configuration's results, which are given by kind. Empty if there are none."""
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
    """Host time in µs for a graph's metadata and for the copies into its buffers."""
    return sum(float(times.get(name, {}).get("median", 0)) for name in (role, f"{role} copies"))


def table(found: dict[str, dict[str, Any]]) -> str:
    """A table of the states off, attached to the backends alone, and on. For the metadata and the copies into a graph's
    buffers it has launches, copies and host time; then the step's time. Times are in µs.

    The last column counts all launches and copies before the step's graphs, including the engine's preparation.
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
        for state in ("off", "backends", "on"):
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


NAMES = {
    "fa3": "FA3, its attention kernel a stand-in",
    "triton": "Triton",
    "flashinfer": "FlashInfer, whose plan on the host stays",
}


def guide_rows(found: dict[str, dict[str, Any]]) -> str:
    """GUIDE's rows of a run: off → with the backends attached → on.

    Launches and copies before a step's graphs; host time for metadata and for copies into the graphs' buffers; the
    step's time with its lower decile in brackets, because a slow phase of the host can fall into one state's turn.
    """
    lines = []
    for configuration, kinds in found.items():
        probe = kinds["on"]["probe"]
        columns: list[list[str]] = [[], [], []]
        for state in ("off", "backends", "on"):
            times = probe["host_us"][state]
            columns[0].append(f"{sum(sum(names.values()) for names in probe['seams'][state].values())}")
            columns[1].append(f"{sum(_host(times, role) for role in ROLES):,.0f}")
            columns[2].append(f"{times['step']['median']:,.0f} ({times['step']['p10']:,.0f})")
        cells = " | ".join(" → ".join(column) for column in columns)
        lines.append(f"| {NAMES[configuration.partition(',')[0]]} | {cells} |")
    return "\n".join(lines)


def seam_table(found: dict[str, Any]) -> str:
    """A table of each seam: the engine's own sequence beside onelaunch's; medians in µs."""
    lines = [
        "| seam | | launches | host | device | in a graph: host | device |",
        "|---" * 7 + "|",
    ]
    for name, sides in found["seams"].items():
        for side in ("engine", "onelaunch"):
            numbers = sides.get(side)
            if numbers is None:
                lines.append(f"| {name} | {side} | failed |")
                continue
            graph = [
                numbers.get(key, {}).get("median", "not capturable") for key in ("graph_host_us", "graph_device_us")
            ]
            cells = [
                numbers.get("launches"),
                numbers["eager_host_us"]["median"],
                numbers.get("eager_device_us"),
                *graph,
            ]
            lines.append(f"| {name} | {side} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=("tokens", "times", "seams"))
    parser.add_argument("--bundle", type=Path)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--jobs", type=int, default=17, help="engines beside one another, for tokens")
    parser.add_argument("--match", default="", help="only engines with this regular expression in their name")
    parser.add_argument("--rounds", type=int, default=3, help="how often each state is timed, for times")
    parser.add_argument("--limit", type=float, default=240, help="seconds that an engine may take, and once more timed")
    given = parser.parse_args(arguments)
    runs, timed = (
        [run for run in each() if name in given.what and re.search(given.match, run.name)]
        for name, each in (("tokens", token_runs), ("times", time_runs))
    )
    # A fixed folder, because compiled kernels depend on its path; the next run reuses them.
    work = Path(tempfile.gettempdir()) / "onelaunch-engines-gpu"
    machine = Machine(work, given.bundle, given.limit)
    print(f"{time.strftime('%T')} unpacked", flush=True)
    ports = itertools.count(FIRST_PORT, 100)
    waiting = [machine.generate(run, next(ports), given.rounds) for run in timed]
    if "seams" in given.what:
        waiting += [machine.seams("fa3"), machine.seams("flashinfer")]
    written = threading.Lock()
    tokens: dict[str, dict[str, Any]] = {run.configuration: {} for run in runs}
    times: dict[str, dict[str, Any]] = {run.configuration: {} for run in timed}

    def write(name: str, found: dict[str, Any]) -> None:
        (given.out / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")

    def generated(run: Run, port: int) -> None:
        found = result(machine.generate(run, port))
        with written:
            tokens[run.configuration][run.kind] = found
            write("tokens", tokens)

    with ThreadPoolExecutor(given.jobs) as threads:
        list(threads.map(generated, runs, [next(ports) for _ in runs]))
    for engine in waiting:
        engine.up()
    print(f"{time.strftime('%T')} up", flush=True)
    seams: dict[str, Any] = {}
    for engine, run in zip(in_turns(waiting), [*timed, None, None], strict=False):
        if run is None:
            ended = engine.ended("seams.json")
            found = ended.get("seams", {"seams": {engine.folder.name: ended}})
            seams = found | {"seams": seams.get("seams", {}) | found["seams"]}
            write("seams", seams)
        else:
            times[run.configuration][run.kind] = result(engine)
            write("times", times)
    wrong = {c: lines for found in (tokens, times) for c, kinds in found.items() if (lines := differences(kinds))}
    wrong |= {name: [str(each)] for name, each in seams.get("seams", {}).items() if each.get("different") != []}
    failed = any("error" in result for kinds in times.values() for result in kinds.values())
    rows = guide_rows(times) if times and not failed else ""
    for each in (table(times) if times else "", rows, seam_table(seams) if seams else ""):
        print(each)
    print(json.dumps(wrong, indent=1) if wrong else "All as it must be.")
    return bool(wrong)


def result(engine: Engine) -> dict[str, Any]:
    """An engine's result with the probe's; "error" if the engine failed."""
    found = engine.ended("result.json", "probe.json")
    return found if "error" in found else found["result"] | {"probe": found["probe"]}


if __name__ == "__main__":
    sys.exit(main())
