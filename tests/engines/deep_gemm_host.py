"""Runs DeepGEMM's own schedule kernels on the host, compiled from the engine's wheel's headers (deep_gemm_host.cpp)."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SMS = (1, 7, 66, 132)  # the numbers of SMs that are compiled in
# These headers contain PTX, so empty files replace them. deep_gemm_host.cpp defines what the kernels use of them.
_EMPTY = (
    "deep_gemm/common/math.cuh",
    "deep_gemm/common/types.cuh",
    "deep_gemm/ptx/utils.cuh",
    "cutlass/arch/grid_dependency_control.h",
)


@functools.cache
def _library() -> Any:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    headers = Path(spec.origin).parent / "third_party" / "deep_gemm" / "include"
    with tempfile.TemporaryDirectory() as folder:
        for name in _EMPTY:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        built, source = Path(folder, "deep_gemm_host.so"), Path(__file__).with_suffix(".cpp")
        flags = ("-std=c++20", "-O1", "-w", "-fPIC", "-shared", "-pthread", f"-I{folder}", f"-I{headers}")
        subprocess.run(["g++", *flags, source, "-o", built], check=True)
        return ctypes.CDLL(str(built))


def sm90(context_lens: Tensor, num_sms: int, *, atoms: int) -> Tensor:
    """Runs sm90_paged_mqa_logits_metadata.

    Args:
        context_lens: int32 [bs, n], contiguous.
        num_sms: one of SMS.
        atoms: query atoms of a request.
    """
    out = torch.full((num_sms + 1, 2), -7, dtype=torch.int32)
    _call("sm90_schedule", *context_lens.shape, atoms, num_sms, context_lens, out)
    return out


def sm100(context_lens: Tensor, num_sms: int, *, indices: Tensor) -> Tensor:
    """Runs sm100_paged_mqa_logits_metadata, whose blocks have two query tokens.

    Args:
        context_lens: int32 [tokens, 1].
        num_sms: one of SMS.
        indices: int32 [tokens], the request of each token.
    """
    out = torch.full((num_sms + 1, 2), -7, dtype=torch.int32)
    _call("sm100_schedule", len(context_lens), num_sms, context_lens, indices, out)
    return out


def _call(name: str, *arguments: Any) -> None:
    for argument in arguments:
        assert not isinstance(argument, Tensor) or (argument.is_contiguous() and argument.dtype == torch.int32)
    words = [ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_uint32(a) for a in arguments]
    assert getattr(_library(), name)(*words) == 0, "only SMS are compiled in"
