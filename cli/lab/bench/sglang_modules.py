"""Single modules of SGLang, imported without its packages, whose __init__ would import the whole server."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

# Packages on the way to the kernels' modules.
_PACKAGES = (
    "kernels",
    "kernels.jit",
    "kernels.ops",
    "kernels.ops.attention",
    "kernels.ops.attention.dsa",
    "kernels.ops.attention.dsa.kpool_metadata",
    "kernels.ops.attention.dsv4",
    "kernels.ops.speculative",
    "srt",
    "srt.utils",
)
_OTHER_DEVICES = ("is_cpu", "is_hip", "is_musa", "is_npu", "is_xpu", "is_gfx95_supported")


class Missing(Exception):
    """A module of SGLang can't be imported; the message says why."""


@cache
def module(name: str) -> Any:
    """The module ``sglang.<name>``.

    Raises:
        Missing: there is no SGLang, or one without this module or without what it imports.
    """
    if "sglang" not in sys.modules:
        _make_packages()
    try:
        return importlib.import_module(f"sglang.{name}")
    except ImportError as error:
        raise Missing(f"this SGLang has no such kernels: {error}") from error


def version() -> str:
    """The version of the SGLang that is measured; "" if there is none."""
    try:
        return str(module("version").__version__)
    except Missing:
        return ""


def _make_packages() -> None:
    """Puts SGLang's packages into sys.modules without executing them.

    Kernels' modules import a few functions of ``sglang.srt.utils``, which needs a server's packages.
    """
    found = importlib.util.find_spec("sglang")
    if found is None or not found.submodule_search_locations:
        raise Missing("SGLang isn't importable")
    root = Path(next(iter(found.submodule_search_locations)))
    for name in ("", *_PACKAGES):
        place = root.joinpath(*name.split(".")) if name else root
        if not place.is_dir():
            continue
        full = f"sglang.{name}" if name else "sglang"
        spec = importlib.util.spec_from_file_location(
            full, place / "__init__.py", submodule_search_locations=[str(place)]
        )
        assert spec is not None
        sys.modules[full] = importlib.util.module_from_spec(spec)
    common = sys.modules["sglang.srt.utils.common"] = ModuleType("sglang.srt.utils.common")
    functions = {name: lambda: False for name in _OTHER_DEVICES} | {
        "is_cuda": lambda: torch.version.cuda is not None,
        "get_cuda_version": lambda: tuple(map(int, str(torch.version.cuda).split("."))),
        "next_power_of_2": lambda number: 1 << (number - 1).bit_length() if number > 1 else 1,
    }
    for replaced in (common, sys.modules.get("sglang.srt.utils")):
        vars(replaced or common).update(functions)
