"""The GPU architectures that a build is for."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Sequence

from ..errors import ToolchainError
from ..variables import ARCHITECTURE_VARIABLE
from .toolkit import CudaToolkit, known_architectures

DEFAULT_ARCHITECTURES = ("90a",)


def architectures(device: int | None = None) -> tuple[str, ...]:
    """The architectures to build for, such as ("90a",).

    Args:
        device: index of the CUDA device to build for. With None no GPU is queried: CUDA isn't initialised and
            torch isn't imported.

    $ONELAUNCH_CUDA_ARCH, a comma-separated list such as "90a,100a", takes precedence. Otherwise the result is the
    device's architecture, or ("90a",) if no device is given or no GPU is visible.

    Raises:
        ToolchainError: $ONELAUNCH_CUDA_ARCH can't be read, or there is no such device.
    """
    if wanted := ARCHITECTURE_VARIABLE.read():
        names = (_parsed(name, f"{ARCHITECTURE_VARIABLE}={wanted!r}") for name in wanted.split(","))
        return tuple(dict.fromkeys(names))
    if device is None:
        return DEFAULT_ARCHITECTURES
    import torch  # only here: a build for a named architecture needs no torch

    if not torch.cuda.is_available():
        return DEFAULT_ARCHITECTURES
    try:
        major, minor = torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError) as error:
        raise ToolchainError(
            f"CUDA device {device} doesn't answer which architecture it has: {error}. Use one of the"
            f" {torch.cuda.device_count()} visible devices, or set {ARCHITECTURE_VARIABLE}."
        ) from error
    return _of_capability(major, minor)


def current_architectures() -> tuple[str, ...]:
    """architectures() for the current CUDA device, or for None if no GPU is visible. Initialises CUDA.

    Queries the driver if torch isn't imported yet, because importing it takes seconds.

    Raises:
        ToolchainError: see architectures().
    """
    if ARCHITECTURE_VARIABLE.read():
        return architectures()
    if "torch" not in sys.modules:
        capability = _capability_of_the_first_device()
        return _of_capability(*capability) if capability else DEFAULT_ARCHITECTURES
    import torch

    return architectures(torch.cuda.current_device() if torch.cuda.is_available() else None)


def _capability_of_the_first_device() -> tuple[int, int] | None:
    """What the driver says of the first visible device, the current one of a new process; None if there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    # Each returns 0 if it succeeded. 75 and 76 are CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
    failed = (
        driver.cuInit(0)
        or driver.cuDeviceGet(ctypes.byref(device), 0)
        or driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        or driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    )
    return None if failed else (major.value, minor.value)


def _of_capability(major: int, minor: int) -> tuple[str, ...]:
    # From 9.0 on, "a" enables the instructions that only this architecture has.
    return (f"{major}{minor}{'a' if major >= 9 else ''}",)


def gencode_flags(archs: Sequence[str], toolkit: CudaToolkit | None = None) -> list[str]:
    """nvcc flags: ("90a",) gives ["-gencode=arch=compute_90a,code=sm_90a"]; so do "9.0a" and "sm_90a".

    Raises:
        ToolchainError: an architecture can't be read, none is given, or the toolkit's nvcc doesn't know it.
    """
    if not archs:
        raise ToolchainError('No architecture was given to build for: name at least one, such as "90a".')
    names = list(dict.fromkeys(_parsed(arch, "the list of architectures") for arch in archs))
    known = known_architectures(toolkit.nvcc) if toolkit else ()
    for name in names:
        if known and toolkit and name not in known:
            raise ToolchainError(
                f"nvcc {toolkit.version} ({toolkit.nvcc}) can't build for architecture {name!r}; it supports"
                f" {', '.join(known)}. Choose one of these, or a newer toolkit with CUDA_HOME."
            )
    return [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]


def _parsed(name: str, source: str) -> str:
    plain = name.strip().removeprefix("sm_").replace(".", "")
    if not re.fullmatch(r"\d{2,3}[af]?", plain):
        raise ToolchainError(f"{name.strip()!r} in {source} isn't an architecture; write 90a, 100a or 89.")
    return plain
