"""Properties of a built object: its requirements of a host, and its kernels' resources."""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# NVIDIA's "CUDA Compatibility", page "Minor Version Compatibility", table 1: code of any minor release of CUDA 12 runs
# from driver 525 on, of CUDA 13 from 580 on. The full numbers are those of 12.0 and 13.0 in "CUDA Toolkit and
# Corresponding Driver Versions" in the CUDA Toolkit Release Notes, table for Linux.
_DRIVER_OF_MAJOR = {12: "525.60.13", 13: "580.65.06"}
# The same table: the driver of the first release that could build for an architecture, 12.8 and 12.9.
_DRIVER_OF_ARCH = {"100": "570.26", "101": "570.26", "120": "570.26", "103": "575.51.03", "121": "575.51.03"}


def find_cuobjdump(toolkit_home: Path | None = None) -> Path | None:
    """The program that reads GPU code from objects, see find_program."""
    return find_program("cuobjdump", toolkit_home)


def find_program(name: str, toolkit_home: Path | None = None) -> Path | None:
    """cuobjdump or nvdisasm: from the toolkit, else from PATH, else from triton's wheel."""
    if toolkit_home is not None and (toolkit_home / "bin" / name).is_file():
        return toolkit_home / "bin" / name
    if found := shutil.which(name):
        return Path(found)
    # Finds the folder only; triton isn't imported.
    spec = importlib.util.find_spec("triton")
    for location in (spec.submodule_search_locations or ()) if spec else ():
        program = Path(location) / "backends" / "nvidia" / "bin" / name
        if program.is_file():
            return program
    return None


def resources(module: Path, program: Path | None) -> dict[str, dict[str, int]]:
    """The resources of each architecture's kernel; {} without GPU code or cuobjdump.

    Spilled registers are in the stack frame or in local memory; spill_bytes is an upper bound of their bytes.
    """
    if program is None:
        return {}
    done = subprocess.run(
        [str(program), "--dump-resource-usage", str(module)], capture_output=True, text=True, check=False
    )
    out: dict[str, dict[str, int]] = {}
    arch = ""
    for line in done.stdout.splitlines():
        if found := re.search(r"arch = sm_(\w+)", line):
            arch = found[1]
        if "REG:" in line:
            numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            out[arch] = {
                "registers": numbers["REG"],
                "stack_bytes": numbers["STACK"],
                "shared_bytes": numbers["SHARED"],
                "local_bytes": numbers["LOCAL"],
                "spill_bytes": numbers["STACK"] + numbers["LOCAL"],
            }
    return out


def requirements(module: Path, archs: Sequence[str], cuda: str | None) -> dict[str, Any]:
    """The requirements of an object: machine, libc, libstdc++ and, for GPU code, the driver.

    Args:
        module: the shared object.
        archs: its GPU architectures.
        cuda: version of the toolkit that it was built with, such as "13.0.88".
    """
    # Symbol versions are NUL-terminated strings in the object's string table.
    data = module.read_bytes()
    needs: dict[str, Any] = {"machine": platform.machine()}
    for name, prefix in (("glibc", rb"GLIBC_"), ("libstdcxx", rb"GLIBCXX_")):
        versions = re.findall(rb"\0" + prefix + rb"(\d+(?:\.\d+)+)(?=\0)", data)
        if versions:
            needs[name] = max((v.decode() for v in versions), key=numbers)
    if cuda is not None:
        needs["driver"] = oldest_driver(cuda, archs)
    return needs


def oldest_driver(cuda: str, archs: Sequence[str]) -> str:
    """The oldest driver that runs code of a CUDA release for these architectures."""
    known = [_DRIVER_OF_MAJOR.get(numbers(cuda)[0], max(_DRIVER_OF_MAJOR.values(), key=numbers))]
    known += [_DRIVER_OF_ARCH[a.rstrip("af")] for a in archs if a.rstrip("af") in _DRIVER_OF_ARCH]
    return max(known, key=numbers)


def host() -> dict[str, Any]:
    """This host's values for requirements(). Unknown ones are omitted. CUDA isn't initialised."""
    found: dict[str, Any] = {"machine": platform.machine()}
    library, version = platform.libc_ver()
    if library == "glibc":
        found["glibc"] = version
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
        if driver := re.search(r"\b(\d{3,}\.\d+(\.\d+)?)\b", text):
            found["driver"] = driver[1]
    except OSError:
        return found
    if program := shutil.which("nvidia-smi"):
        done = subprocess.run(
            [program, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
        found["capabilities"] = sorted(set(re.findall(r"^(\d+\.\d+)\s*$", done.stdout, re.M)))
    return found


def misfit(needs: Mapping[str, Any], archs: Sequence[str], has: Mapping[str, Any]) -> str | None:
    """The reason why an object can't run on a host, as the end of a sentence; None if there is none."""
    if needs.get("machine") != has["machine"]:
        return f"it is for {needs.get('machine')} and this machine is {has['machine']}"
    for name, label in (("glibc", "glibc"), ("driver", "the NVIDIA driver")):
        if name in needs and name in has and numbers(has[name]) < numbers(needs[name]):
            return f"it needs {label} {needs[name]} or later and this machine has {has[name]}"
    capabilities = has.get("capabilities") or []
    if archs and capabilities and not any(runs_on(arch, cap) for arch in archs for cap in capabilities):
        names = ", ".join(f"sm_{arch}" for arch in archs)
        return f"it holds code for {names} and this machine's GPUs have compute capability {', '.join(capabilities)}"
    return None


def runs_on(arch: str, capability: str) -> bool:
    """Whether code for an architecture such as "90a" runs on a device of a capability such as "9.0"."""
    plain = arch.rstrip("af")
    major, minor = plain[:-1], plain[-1]
    has_major, _, has_minor = capability.partition(".")
    # Code for an "a" architecture runs on exactly that one; other code also on later minor versions of the same major.
    return major == has_major and (minor == has_minor if arch.endswith("a") else int(minor) <= int(has_minor))


def numbers(text: str) -> tuple[int, ...]:
    """The numbers of a version, for comparisons. Only garbage has longer ones, which are cut into several."""
    return tuple(int(number) for number in re.findall(r"\d{1,9}", text))
