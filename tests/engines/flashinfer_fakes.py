"""What FlashInfer imports and a machine without a GPU can't have: empty modules, compiled plans and a GPU.

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

# Bindings of a GPU's libraries, and what only a command line or a download needs.
EMPTY = ("cuda", "einops", "nccl", "ninja", "nvshmem", "pynvml", "requests", "tabulate", "tqdm", "tvm_ffi")


# The lists that each call of a compiled plan was given, on the host.
planned: list[list[torch.Tensor]] = []
# And its numbers.
settings: list[list[Any]] = []


def segment_packbits(bits: torch.Tensor, begin: torch.Tensor, to: torch.Tensor, order: str, out: torch.Tensor) -> None:
    """What FlashInfer's kernel of this name does: each segment's bits, from the lowest of a byte, at a byte's edge."""
    assert (order, bits.element_size(), begin.dtype, to.dtype) == ("little", 1, torch.int32, torch.int32)
    for first, end, place in zip(begin[:-1].tolist(), begin[1:].tolist(), to[:-1].tolist(), strict=True):
        packed = numpy.packbits(bits[first:end].numpy(), bitorder="little")
        out[place : place + len(packed)] = torch.from_numpy(packed)


class _Compiled:
    """A module that is compiled for a GPU. Whatever is called in it returns numbers that the wrapper only keeps."""

    def __getattr__(self, name: str) -> Any:
        if name == "plan_with_staged_workspace_bytes":  # MLA asks whether it is there, beside plan
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
                if attribute.lstrip("_") == "get_compute_capability":
                    setattr(module, attribute, lambda device: (9, 0))
                elif attribute.startswith("get_") and attribute.endswith("_module"):
                    setattr(module, attribute, lambda *arguments, **keywords: compiled)
