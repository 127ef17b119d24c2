"""onelaunch: refresh the attention metadata of N draft backends in one CUDA launch.

A configuration becomes a key, the key becomes emitted CUDA, the CUDA becomes a module, the module binds to buffers,
and the bound plan is one launch.
"""

from __future__ import annotations

import sys

if sys.platform != "linux":
    raise ImportError(f"onelaunch runs on Linux only, and this is {sys.platform}.")

from .emit.render import render
from .errors import (
    ArgumentError,
    CompileError,
    ConfigError,
    JitPolicyError,
    LaunchError,
    OnelaunchError,
    StoreError,
    ToolchainError,
)
from .load.distribute import distribute
from .load.loader import Kernel, freeze
from .run.api import (
    fused_metadata_copy_cuda,
    fused_metadata_precompute_and_broadcast_cuda,
    precompute_decode_metadata_cuda,
    precompute_draft_extend_metadata_cuda,
    precompute_target_verify_metadata_cuda,
    specialize,
)
from .run.groups import Groups, bind_groups
from .run.plan import Plan, bind
from .run.schedules import sparse_flashmla_metadata
from .spec import reference
from .spec.config import KernelConfig
from .spec.fields import FIELDS, Field, MetadataBuffers
from .spec.presets import PRESETS, preset

__version__ = "0.1.0"

__all__ = [
    "FIELDS",
    "PRESETS",
    "ArgumentError",
    "CompileError",
    "ConfigError",
    "Field",
    "Groups",
    "JitPolicyError",
    "Kernel",
    "KernelConfig",
    "LaunchError",
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
    "precompute_decode_metadata_cuda",
    "precompute_draft_extend_metadata_cuda",
    "precompute_target_verify_metadata_cuda",
    "preset",
    "reference",
    "render",
    "sparse_flashmla_metadata",
    "specialize",
]
