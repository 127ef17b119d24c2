"""Packs what a GPU machine without a network needs besides its own packages: python bundle.py FOLDER

Writes FOLDER/site.tar.xz and a wheel of onelaunch, for `run.py --bundle FOLDER`. The machine has CPython 3.12, torch
2.11 for CUDA 13, triton 3.6, transformers 5.17, nvcc and ninja. The archive has three folders: ``front``, which comes
before the machine's packages (SGLang without models and tests, and sgl_kernel without the libraries that aren't for
SM90), ``behind``, which comes after them, and ``flashinfer`` with the modules that attention needs, built here.

The wheels come from the package index, at the pinned versions of requirements.txt, and aren't redistributed. Needs
torch 2.11 or later, nvcc, ninja, xz and some 2 GB of disk.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent.parent
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (17, 24, 26, 27, 28, 31, 34, 35)] + [
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
]
MODELS = ("__init__", "registry", "deepseek_v2", "deepseek_common", "utils", "llama", "llama_eagle", "llama_eagle3",
          "torch_native_llama")  # fmt: skip
# The files of a package that are left out, and the folder that it goes to. Other packages go to "behind" as a whole.
DROPPED = {
    "sglang": re.compile(r"sglang/(multimodal_gen|test|eval|benchmark)/|/(grpc|server|multimodal)/_core\..*so$|\.md$"),
    "sglang_kernel": re.compile(r"triton_kernels/|sgl_kernel/(flash_ops|flashmla_ops|infllm_ops|spatial_ops|sm100/)"),
    "flashinfer_python": re.compile(r"flashinfer/data/(cutlass|cccl|include|spdlog)/|^build_"),
}
FOLDERS = {"sglang": "front", "sglang_kernel": "front", "flashinfer_python": "flashinfer"}
_MODEL = re.compile(r"sglang/srt/models/([^/.]+)")


def download(folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--require-hashes", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    subprocess.run([*command, "-d", str(folder), "-r", str(HERE / "requirements.txt")], check=True)


def unpack(wheel: Path, folder: Path, drop: Callable[[str], bool]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if not drop(name)])


def dropped(package: str) -> Callable[[str], bool]:
    pattern = DROPPED.get(package)

    def drop(name: str) -> bool:
        model = _MODEL.match(name)
        return bool(pattern and pattern.search(name)) or bool(model and model[1] not in MODELS)

    return drop


def build_flashinfer(wheels: Path, target: Path) -> None:
    """Builds FlashInfer's attention modules for SM90, and puts them where FlashInfer looks for prebuilt modules.

    They need tvm-ffi, but no particular version of Python or torch.
    """
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        unpack(next(wheels.glob("flashinfer_python-*.whl")), work / "whole", lambda name: False)
        ffi = re.search(r"apache-tvm-ffi==(\S+)", (HERE / "requirements.txt").read_text())
        assert ffi is not None
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(work / "ffi")]
        subprocess.run([*command, f"apache-tvm-ffi=={ffi[1]}", "tabulate", "nvidia-ml-py", "requests"], check=True)
        nvcc = shutil.which("nvcc")
        assert nvcc is not None, "nvcc isn't there"
        # The linker needs libcuda, which only a machine with a driver has.
        (work / "stub").mkdir()
        command = ["c++", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(work / "stub" / "libcuda.so"), "-x", "c"]
        subprocess.run([*command, os.devnull], check=True)
        home = os.environ.get("CUDA_HOME", str(Path(nvcc).resolve().parent.parent))
        environment = dict(os.environ) | {
            "CUDA_HOME": home,
            "LIBRARY_PATH": f"{work / 'stub'}:{home}/lib64",
            "PYTHONPATH": f"{work / 'whole'}:{work / 'ffi'}",
            "FLASHINFER_CUDA_ARCH_LIST": "9.0a",
            "FLASHINFER_WORKSPACE_BASE": str(work / "built"),
            "MAX_JOBS": str(os.cpu_count()),
        }
        subprocess.run([sys.executable, str(HERE / "flashinfer_modules.py")], env=environment, check=True)
        for library in (work / "built").rglob("cached_ops/*/*.so"):
            place = target / "flashinfer" / "data" / "aot" / library.parent.name
            place.mkdir(parents=True)
            shutil.copy2(library, place)


def site_packages(out: Path) -> None:
    wheels = Path(os.environ.get("ENGINES_GPU_WHEELS", out / "wheels"))
    out.mkdir(parents=True, exist_ok=True)
    if not wheels.exists():
        download(wheels)
    with tempfile.TemporaryDirectory() as name:
        site = Path(name)
        for wheel in sorted(wheels.glob("*.whl")):
            package = wheel.name.partition("-")[0]
            unpack(wheel, site / FOLDERS.get(package, "behind"), dropped(package))
        build_flashinfer(wheels, site / "flashinfer")
        with tarfile.open(out / "site.tar", "w") as tar:
            for folder in ("front", "behind", "flashinfer"):
                tar.add(site / folder, folder)
    subprocess.run(["xz", "-T0", "-6", "-f", str(out / "site.tar")], check=True)


def wheel_of_onelaunch(out: Path) -> None:
    for old in out.glob("onelaunch-*.whl"):
        old.unlink()
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "-w", str(out), str(ROOT)], check=True)


def main() -> None:
    out = Path(sys.argv[1])
    if not (out / "site.tar.xz").exists():
        site_packages(out)
    wheel_of_onelaunch(out)
    for file in sorted(out.iterdir()):
        print(f"{file.stat().st_size / 1e6:8.1f} MB {file.name}")


if __name__ == "__main__":
    main()
