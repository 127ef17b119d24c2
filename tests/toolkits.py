"""Toolkits and compilers made of shell scripts, on a machine that has nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from onelaunch.build import toolchain
from onelaunch.build import toolkit as toolkits

HOST_CONFIG = """
#if __GNUC__ > 14
#error -- unsupported GNU version! gcc versions later than 14 are not supported!
#endif
#if (__clang_major__ >= 20) || (__clang_major__ < 3)
#error -- unsupported clang version! clang version must be less than 20 and greater than 3.2 .
#endif
"""
GCC_12 = "g++ (GCC) 12.2.0"


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def compiler(path: Path, version: str = GCC_12) -> Path:
    return script(path, f"echo '{version}'; echo 'a second line'")


def touch(path: Path, text: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def toolkit(
    home: Path, version: str = "13.0.88", include: str = "include", lib: str = "lib64", report: bool = True
) -> Path:
    """A complete toolkit. Its nvcc reports its own folder unless report is False."""
    release = ".".join(version.split(".")[:2])
    top = f"echo '#$ _HERE_={home}/bin'; echo '#$ TOP={home}/bin/..'" if report else "exit 1"
    script(
        home / "bin" / "nvcc",
        f"""echo "$@" >> {home}/calls
case "$1" in
--version) echo 'Cuda compilation tools, release {release}, V{version}'; echo 'Build cuda_{release}.r/c.1';;
--dryrun) {{ {top}; }} >&2;;
--help) echo "Allowed: 'sm_80','sm_90','sm_90a','sm_100','sm_100a','sm_100f'";;
esac""",
    )
    touch(home / include / "cuda_runtime.h")
    touch(home / include / "crt" / "host_config.h", HOST_CONFIG)
    touch(home / lib / "libcudart_static.a")
    script(home / "nvvm" / "bin" / "cicc", "")
    return home


def make_bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the machine look as if it had a C++ compiler at tmp_path/bin/c++ and nothing else."""
    for name in ("CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX", "CXX", "ONELAUNCH_CUDA_ARCH"):
        monkeypatch.delenv(name, raising=False)
    compiler(tmp_path / "bin" / "c++")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "bin" / "python"))
    monkeypatch.setattr(toolkits, "SYSTEM_ROOT", tmp_path / "local")
    monkeypatch.setenv("ONELAUNCH_CACHE_DIR", str(tmp_path / "cache"))
    # sys.path leads to pip's toolkits. So does an imported namespace package, which keeps its own path.
    monkeypatch.delitem(sys.modules, "nvidia", raising=False)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if "site-packages" not in entry])
    toolchain.reset()
