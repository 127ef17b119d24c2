"""Fakes of what FlashInfer imports and a machine without a GPU lacks: empty modules, compiled plans and a GPU.

``install()`` must run before flashinfer is imported. Its wrappers and their Python run as they are.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from typing import Any

import fakes
import numpy
import torch
from empty import EmptyModules

# Bindings of GPU libraries, and packages that only a command line or a download needs.
EMPTY = ("cuda", "einops", "nccl", "ninja", "nvshmem", "pynvml", "requests", "tabulate", "tqdm", "tvm_ffi")


# For each call of a compiled plan: the lists on the host that it was given,
planned: list[list[torch.Tensor]] = []
# and its other arguments.
settings: list[list[Any]] = []


def segment_packbits(bits: torch.Tensor, begin: torch.Tensor, to: torch.Tensor, order: str, out: torch.Tensor) -> None:
    """As FlashInfer's kernel of this name: packs each segment's bits, lowest bit first, from a byte boundary on."""
    assert (order, bits.element_size(), begin.dtype, to.dtype) == ("little", 1, torch.int32, torch.int32)
    for first, end, place in zip(begin[:-1].tolist(), begin[1:].tolist(), to[:-1].tolist(), strict=True):
        packed = numpy.packbits(bits[first:end].numpy(), bitorder="little")
        out[place : place + len(packed)] = torch.from_numpy(packed)


class _Compiled:
    """Stands for a module compiled for a GPU. Each of its functions returns numbers that the wrapper only stores."""

    def __getattr__(self, name: str) -> Any:
        if name == "plan_with_staged_workspace_bytes":  # MLA checks whether it exists beside plan
            raise AttributeError(name)

        if name == "segment_packbits":
            return segment_packbits

        def call(*arguments: Any, **keywords: Any) -> torch.Tensor:
            if name == "plan":
                lists = [a for a in arguments if isinstance(a, torch.Tensor) and a.dtype == torch.int32]
                planned.append([one.clone() for one in lists])
                settings.append([a for a in arguments if not isinstance(a, torch.Tensor)])
            return torch.zeros(16, dtype=torch.int64)

        return call


def install() -> None:
    """Adds the empty modules to the import path, after real ones, and patches torch and FlashInfer to report a GPU."""
    sys.meta_path.append(EmptyModules(EMPTY))
    fakes.pretend_cuda()
    torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]
    for name in ("flashinfer.decode", "flashinfer.prefill", "flashinfer.mla"):
        importlib.import_module(name)
    compiled = _Compiled()
    for name, module in list(sys.modules.items()):
        if name.startswith("flashinfer."):
            for attribute in list(vars(module)):
                if attribute.lstrip("_") == "get_compute_capability":
                    setattr(module, attribute, lambda device: (9, 0))
                elif attribute.startswith("get_") and attribute.endswith("_module"):
                    setattr(module, attribute, lambda *arguments, **keywords: compiled)
