"""What FlashInfer imports and a machine without a GPU can't have: empty modules, compiled plans and a GPU.

``install()`` must run before flashinfer is imported. Its wrappers and their Python run as they are.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

import fakes
import torch
from empty import EmptyModules

# Bindings of a GPU's libraries, and what only a command line or a download needs.
EMPTY = ("cuda", "einops", "nccl", "ninja", "nvshmem", "pynvml", "requests", "tabulate", "tqdm", "tvm_ffi")


# The lists that each call of a compiled plan was given, on the host.
planned: list[list[torch.Tensor]] = []


class _Compiled:
    """A module that is compiled for a GPU. Whatever is called in it returns numbers that the wrapper only keeps."""

    def __getattr__(self, name: str) -> Any:
        if name == "plan_with_staged_workspace_bytes":  # MLA asks whether it is there, beside plan
            raise AttributeError(name)

        def call(*arguments: Any, **keywords: Any) -> torch.Tensor:
            if name == "plan":
                lists = [a for a in arguments if isinstance(a, torch.Tensor) and a.dtype == torch.int32]
                planned.append([one.clone() for one in lists])
            return torch.zeros(16, dtype=torch.int64)

        return call


def install() -> None:
    """Puts the empty modules behind real ones, and the pretended GPU into torch and FlashInfer."""
    sys.meta_path.append(EmptyModules(EMPTY))
    fakes.pretend_cuda()
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]
    for name in ("flashinfer.decode", "flashinfer.prefill", "flashinfer.mla"):
        importlib.import_module(name)
    compiled = _Compiled()
    for name, module in list(sys.modules.items()):
        if name.startswith("flashinfer."):
            for attribute in list(vars(module)):
                if attribute == "get_compute_capability":
                    setattr(module, attribute, lambda device: (9, 0))
                elif attribute.startswith("get_") and attribute.endswith("_module"):
                    setattr(module, attribute, lambda *arguments, **keywords: compiled)
