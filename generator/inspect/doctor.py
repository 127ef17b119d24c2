"""The tools of this machine, whether they fit together, and whether a kernel builds, loads and runs."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .. import torch_version
from ..build import binary, toolchain
from ..cache.store import Store
from ..cache.tiers import prebuilt
from ..cache.trust import check_ancestors, check_owner
from ..errors import OnelaunchError, ToolchainError
from ..load import loader
from ..spec.config import KernelConfig
from ..spec.fields import MetadataBuffers
from ..variables import CACHE_VARIABLE, VARIABLES

_MIN_FREE_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Row:
    """One finding.

    Attributes:
        name: the thing that was examined.
        level: "ok"; "note", which prevents nothing; "fix", which prevents builds or runs.
        value: what was found.
        origin: where it comes from, or what to do.
    """

    name: str
    level: str
    value: str
    origin: str


def examine() -> list[Row]:
    """All findings, in the order in which to fix them. Compiles in a temporary folder, which takes seconds."""
    rows = [Row("Python", "ok", platform.python_version(), sys.executable or "embedded in another program")]
    try:
        torch_version.check()
    except ToolchainError as error:
        return [*rows, Row("torch", "fix", "not usable", str(error))]
    # Imported here for start-up time: `onelaunch doctor --help` needs none of it.
    import torch

    cuda = str(getattr(torch.version, "cuda", None) or "none")
    rows.append(Row("torch", "ok", f"{torch.__version__} (CUDA {cuda})", str(Path(str(torch.__file__)).parent)))
    rows += [
        Row(name, "fix" if value == toolchain.NOT_USABLE else "ok", value, origin)
        for name, value, origin in toolchain.describe()
    ]
    rows += [Row(name, "ok", repr(name.read()), name.meaning) for name in VARIABLES if name.read()]
    has = binary.host()
    rows += _versions(cuda, has)
    rows += _cache()
    rows.append(_trial("a kernel for the CPU", KernelConfig(fields=("cache_seqlens",), target="cpu"), "cpu"))
    if not any(row.level == "fix" and row.name != "cache" for row in rows):
        where = "cuda" if torch.cuda.is_available() else ""
        rows.append(_trial("a kernel for the GPU", KernelConfig(fields=("cache_seqlens",)), where))
    if not has.get("driver"):
        # Without a GPU, CUDA's tools are needed only to build kernels for other machines.
        rows = [
            Row(row.name, "note", row.value, row.origin)
            if row.level == "fix" and row.name in ("CUDA toolkit", "nvcc with host compiler")
            else row
            for row in rows
        ]
    return rows


def first_to_fix(rows: list[Row]) -> Row | None:
    """The finding to begin with, or None."""
    return next((row for row in rows if row.level == "fix"), None)


def _versions(cuda: str, has: dict[str, object]) -> list[Row]:
    rows = []
    driver = str(has.get("driver", ""))
    rows.append(Row("NVIDIA driver", "ok" if driver else "note", driver or "none", "/proc/driver/nvidia/version"))
    try:
        toolkit = toolchain.find_toolkit()
    except ToolchainError:
        return rows
    if cuda != "none" and cuda.split(".")[0] != toolkit.version.split(".")[0]:
        advice = f"torch is for CUDA {cuda}; kernels hold their own CUDA runtime, so this prevents nothing by itself"
        rows.append(Row("nvcc with torch", "note", toolkit.version, advice))
    elif cuda != "none":
        rows.append(Row("nvcc with torch", "ok", f"{toolkit.version} and {cuda}", "one CUDA release"))
    least = binary.oldest_driver(toolkit.version, toolchain.architectures())
    if driver:
        fits = binary.numbers(driver) >= binary.numbers(least)
        advice = f"kernels of CUDA {toolkit.version} need driver {least} or later"
        rows.append(Row("nvcc with driver", "ok" if fits else "fix", f"{toolkit.version} and {driver}", advice))
    return rows


def _cache() -> list[Row]:
    store = loader.default_store()
    source = CACHE_VARIABLE if CACHE_VARIABLE.read() else "the platform's cache folder"
    rows: list[Row] = []
    try:
        rows += [Row("prebuilt", "ok", str(tier.root), f"{len(tier.stored_keys())} entries") for tier in prebuilt()]
        folder = store.root
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        check_ancestors(folder / "cache")
        if folder == store.root:
            check_owner(folder)
        room = shutil.disk_usage(folder).free
    except (OSError, OnelaunchError) as error:
        return [*rows, Row("cache", "fix", store.place or "the platform's cache folder", str(error))]
    if not os.access(folder, os.W_OK):
        return [*rows, Row("cache", "note", f"{store.root} (can't be written)", f"set {CACHE_VARIABLE}")]
    if room < _MIN_FREE_BYTES:
        return [*rows, Row("cache", "fix", f"{store.root}, {room // 2**20} MB free", "free some space")]
    return [*rows, Row("cache", "ok", f"{store.root}, {len(store.stored_keys())} entries", source)]


def _trial(name: str, config: KernelConfig, device: str) -> Row:
    """Builds a small kernel in a temporary folder, and runs it if there is a device for it."""
    # Imported here for start-up time, as above.
    import torch

    from ..run.bind import bind

    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="onelaunch-doctor-") as folder:
        try:
            kernel = loader.load(config, None, Store(Path(folder)))
            built = time.perf_counter() - start
        except (OnelaunchError, OSError) as error:
            return Row(name, "fix", "doesn't build", str(error))
    del kernel
    if not device:
        return Row(name, "ok", f"built in {built:.2f} s", "there is no GPU to run it on")
    out = torch.full((3,), -1, dtype=torch.int32, device=device)
    pool = torch.zeros(1, 1, dtype=torch.int32, device=device)
    start = time.perf_counter()
    run: Callable[..., object] = bind([MetadataBuffers(cache_seqlens=out)], req_to_token=pool).run
    run(torch.tensor([5, 6], device=device), torch.tensor([0, 0], device=device))
    got = out.tolist()
    if got != [5, 6, -1]:
        return Row(name, "fix", f"built in {built:.2f} s, wrote {got}", "it must write [5, 6, -1]; please report it")
    return Row(name, "ok", f"built in {built:.2f} s, ran", f"{time.perf_counter() - start:.2f} s to load and run it")
