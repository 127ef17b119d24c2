"""onelaunch: refresh the attention metadata of N draft backends in one CUDA launch.

A configuration is rendered as CUDA, the CUDA is built into a module, the module is bound to buffers, and the bound plan
refreshes them in one launch.

Importing this package imports no torch, no jinja2 and no numpy: names that need them are imported when they are first
used (PEP 562).
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if sys.platform != "linux":
    raise ImportError(f"onelaunch runs on Linux only, and this is {sys.platform}.")
if "t" in sys.abiflags:
    raise ImportError("onelaunch doesn't support free-threaded Python yet. Use a Python built with the GIL.")

from .errors import (
    ArgumentError,
    AuditError,
    CompileError,
    ConfigError,
    JitPolicyError,
    LaunchError,
    OnelaunchError,
    StoreError,
    ToolchainError,
)
from .spec.config import KernelConfig
from .spec.fields import FIELDS, Field, MetadataBuffers, packed, running_sum, table, vector
from .spec.presets import PRESETS, preset

if TYPE_CHECKING:
    from .emit.render import render
    from .load.distribute import distribute
    from .load.loader import Kernel, freeze
    from .load.specialize import specialize
    from .run.api import (
        fused_metadata_copy_cuda,
        fused_metadata_precompute_and_broadcast_cuda,
        precompute_decode_metadata_cuda,
        precompute_draft_extend_metadata_cuda,
        precompute_target_verify_metadata_cuda,
    )
    from .run.bind import bind
    from .run.declared import Map, into
    from .run.groups import Groups, bind_groups
    from .run.plan import Plan
    from .run.schedules import paged_mqa_schedule, sparse_flashmla_metadata
    from .spec import reference

__version__ = "0.2.0"

# The same names for the interpreter, each with the module that it is imported from at its first use.
_LAZY = {
    "Groups": "run.groups",
    "Map": "run.declared",
    "into": "run.declared",
    "Kernel": "load.loader",
    "Plan": "run.plan",
    "bind": "run.bind",
    "bind_groups": "run.groups",
    "distribute": "load.distribute",
    "freeze": "load.loader",
    "fused_metadata_copy_cuda": "run.api",
    "fused_metadata_precompute_and_broadcast_cuda": "run.api",
    "paged_mqa_schedule": "run.schedules",
    "precompute_decode_metadata_cuda": "run.api",
    "precompute_draft_extend_metadata_cuda": "run.api",
    "precompute_target_verify_metadata_cuda": "run.api",
    "reference": "spec.reference",
    "render": "emit.render",
    "sparse_flashmla_metadata": "run.schedules",
    "specialize": "load.specialize",
}

__all__ = [
    "FIELDS",
    "PRESETS",
    "ArgumentError",
    "AuditError",
    "CompileError",
    "ConfigError",
    "Field",
    "Groups",
    "JitPolicyError",
    "Kernel",
    "KernelConfig",
    "LaunchError",
    "Map",
    "MetadataBuffers",
    "OnelaunchError",
    "Plan",
    "StoreError",
    "ToolchainError",
    "bind",
    "bind_groups",
    "distribute",
    "freeze",
    "fused_metadata_copy_cuda",
    "fused_metadata_precompute_and_broadcast_cuda",
    "into",
    "packed",
    "paged_mqa_schedule",
    "precompute_decode_metadata_cuda",
    "precompute_draft_extend_metadata_cuda",
    "precompute_target_verify_metadata_cuda",
    "preset",
    "reference",
    "render",
    "running_sum",
    "sparse_flashmla_metadata",
    "specialize",
    "table",
    "vector",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_LAZY[name]}", __name__)
    value = getattr(module, name, module)  # `reference` is the module itself
    globals()[name] = value  # from now on the name is found without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
