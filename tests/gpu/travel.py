"""Stored kernels travel: built and packed on a machine without a GPU, run on one with a GPU and without a compiler.

    python tests/gpu/travel.py pack FILE    on a machine with compilers; also writes FILE.json
    python tests/gpu/travel.py run FILE     on a machine with a GPU; writes travel.json beside this file, or to --output

`run` hides the compilers before it unpacks: PATH is an empty folder, and empty file systems are mounted over nvcc's
folders (which needs root). A build would raise an error, and every program that is started is recorded.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# One preset of each strategy and operation.
KERNELS = (
    "nsa-decode-3",
    "nsa-decode-3-full",
    "nsa-copy-3",
    "nsa-draft-extend-3-variable",
    "nsa-target-verify-3-schedule",
    "flashmla-dense-decode-3",
    "flashinfer-decode-3",
)
STARTING = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "pty.spawn",
)


def versions() -> dict[str, Any]:
    """The machine's versions and GPU. Imports torch."""
    import torch
    from onelaunch import __version__

    gpu = torch.cuda.is_available()
    return {
        "onelaunch": __version__,
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if gpu else None,
    }


def pack(file: Path, target: str) -> None:
    """Builds the kernels in a new cache and packs them, both with the command line."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onelaunch.cli.main"]
        environment = {**os.environ, "ONELAUNCH_CACHE_DIR": cache}
        architecture = ["--arch", "90a"] if target == "cuda" else []
        for arguments in (["build", *KERNELS, "--target", target, *architecture], ["cache", "pack", "-o", str(file)]):
            subprocess.run([*command, *arguments], env=environment, check=True)
    file.with_name(f"{file.name}.json").write_text(json.dumps(versions()) + "\n", encoding="utf-8")


def run(file: Path, output: Path, target: str) -> None:
    """Starts travelled() without compilers, and writes its output."""
    from onelaunch.build import toolkit

    found = [Path(nvcc).resolve() for _, nvcc in toolkit._nvcc_candidates() if Path(nvcc).is_absolute()]
    hidden = sorted({str(nvcc.parent) for nvcc in found if nvcc.exists()})
    kept = ("PYTHONPATH", "LD_LIBRARY_PATH")  # the packages, and the driver's libraries
    with tempfile.TemporaryDirectory() as folder:
        for name in ("bin", "home"):
            (Path(folder) / name).mkdir()
        environment = {name: os.environ[name] for name in kept if name in os.environ} | {
            "PATH": f"{folder}/bin",
            "HOME": f"{folder}/home",
            "ONELAUNCH_CACHE_DIR": f"{folder}/cache",
            "ONELAUNCH_JIT": "error",
        }
        child = [sys.executable, "-B", str(HERE / "travel.py"), "travelled", str(file), "--target", target]
        assigned = [f"{name}={value}" for name, value in environment.items()]
        mounts = "".join(f"mount -t tmpfs tmpfs {shlex.quote(place)} && " for place in hidden)
        script = f"{mounts}exec env -i {shlex.join([*assigned, *child])}"
        done = subprocess.run(["unshare", "--mount", "sh", "-c", script], stdout=subprocess.PIPE, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    packed = json.loads(file.with_name(f"{file.name}.json").read_text(encoding="utf-8"))
    output.write_text(json.dumps({"packed_on": packed, **said}, indent=1) + "\n", encoding="utf-8")


def travelled(file: Path, target: str) -> None:
    """Unpacks, loads and runs every kernel, compares with the reference, and prints what happened as JSON."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), list[str]()
    sys.addaudithook(lambda event, arguments: started.append(f"{event} {arguments[0]}") if event in STARTING else None)
    import torch
    from onelaunch import PRESETS
    from onelaunch.build import toolchain
    from onelaunch.cli.main import app
    from onelaunch.errors import ToolchainError
    from onelaunch.inspect.kernels import fingerprint

    sys.path.insert(0, str(HERE.parent))
    import checker
    from cases import BATCH_SHAPES

    lacking: dict[str, None] = {}
    for what, find in (("host_compiler", toolchain.find_host_compiler), ("cuda_toolkit", toolchain.find_toolkit)):
        try:
            raise SystemExit(f"There is still a {what}: {find()}")
        except ToolchainError:
            lacking[what] = None
    app(["cache", "unpack", str(file)], standalone_mode=False)
    device = torch.device(target, 0) if target == "cuda" else torch.device(target)
    kernels = {}
    for name in KERNELS:
        plans = [checker.check(PRESETS[name].replace(target=target), shape, device) for shape in BATCH_SHAPES]
        assert not any(plan.kernel.built for plan in plans)
        kernels[name] = {"fingerprint": fingerprint(PRESETS[name]), "shapes": len(plans)}
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    said = {
        "run_on": {**versions(), **lacking},
        "programs_started": started,
        "page_faults_of_children": after.ru_minflt - before.ru_minflt,
        "kernels": kernels,
    }
    print(json.dumps(said))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["pack", "run", "travelled"])
    parser.add_argument("file", type=Path)
    parser.add_argument("--output", type=Path, default=HERE / "travel.json")
    parser.add_argument("--target", default="cuda", help="cpu shows that the script works where there is no GPU")
    options = parser.parse_args()
    if options.verb == "pack":
        pack(options.file, options.target)
    elif options.verb == "run":
        run(options.file, options.output, options.target)
    else:
        travelled(options.file, options.target)


if __name__ == "__main__":
    main()
