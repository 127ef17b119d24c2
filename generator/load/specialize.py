"""specialize(): the kernel of a configuration, built or loaded, without buffers."""

from __future__ import annotations

from collections.abc import Sequence

from .. import torch_version
from ..errors import ArgumentError
from ..spec.config import KernelConfig
from .loader import Kernel, load


def specialize(config: KernelConfig, arch: str | Sequence[str] | None = None) -> Kernel:
    """Loads the kernel of a configuration from the cache, or builds it.

    Args:
        config: the configuration.
        arch: GPU architectures such as "90a" or ("90a", "100a"); None is the current device's, or 90a where there
            is no GPU.

    Returns:
        The kernel, with ``source``, ``key``, ``path`` and ``resources``.

    Raises:
        ArgumentError: an argument is of another type.
        ToolchainError, CompileError, JitPolicyError, StoreError: see loader.load.
    """
    if not isinstance(config, KernelConfig):
        raise ArgumentError(
            f"config is a {type(config).__name__}; it must be a KernelConfig, such as onelaunch.preset('nsa-decode-3')."
        )
    archs = (arch,) if isinstance(arch, str) else arch
    if archs is not None and not (isinstance(archs, Sequence) and all(isinstance(name, str) for name in archs)):
        raise ArgumentError(f'arch is {arch!r}; it must be None, or names of GPU architectures such as "90a".')
    torch_version.check()
    return load(config, archs)
