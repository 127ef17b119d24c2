"""Lets an engine start on a machine that has only some of SGLang's packages. Python imports this file at start-up.

On a machine with all of SGLang 0.5.17's packages it changes one thing: that version registers configurations that
later versions of transformers have themselves.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
# Packages that come after the machine's own on sys.path; see bundle.py.
BEHIND = os.environ.get("ENGINES_GPU_BEHIND", "")
if BEHIND and BEHIND not in sys.path:
    sys.path.append(BEHIND)
sys.path.append(str(HERE.parent.parent))

from empty import EmptyModules  # noqa: E402

# flashinfer.norm is absent, so that sgl_kernel runs its own kernels.
sys.meta_path.append(EmptyModules(("flashinfer", "deep_gemm", "xgrammar"), absent=("flashinfer.norm",)))


class _After(importlib.abc.MetaPathFinder):
    """Calls a function with a module right after its import."""

    def __init__(self, steps: dict[str, Callable[[Any], None]]) -> None:
        self._steps = steps

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        step = self._steps.get(name)
        spec = importlib.machinery.PathFinder.find_spec(name, path) if step else None
        if step is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            execute(module)
            step(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class _Instead(importlib.abc.MetaPathFinder):
    """Imports another file in place of a module."""

    def __init__(self, name: str, file: Path) -> None:
        self._name, self._file = name, file

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self._name:
            return None
        return importlib.util.spec_from_file_location(name, self._file)


def _register_again(module: Any) -> None:
    register = module._LazyConfigMapping.register
    module._LazyConfigMapping.register = lambda self, key, value, exist_ok=False: register(
        self, key, value, exist_ok=True
    )


def _own_kernels(module: Any) -> None:
    module._has_flashinfer = False


_steps = {"transformers.models.auto.configuration_auto": _register_again}
if BEHIND:  # the bundle has only the FlashInfer modules that attention needs
    _steps |= {"sgl_kernel.elementwise": _own_kernels, "sgl_kernel.sampling": _own_kernels}
sys.meta_path.insert(0, _After(_steps))
if os.environ.get("ENGINES_GPU_STAND_IN"):
    sys.meta_path.insert(0, _Instead("sgl_kernel.flash_attn", HERE / "flash_attn.py"))
