"""Fakes of what vLLM imports and a machine without a GPU lacks, as fakes.py makes them for SGLang.

``install()`` must run before vllm is imported. Of vLLM itself only the compiled operator modules are replaced. Its
classes, its Triton kernels (under Triton's interpreter) and its PyTorch code run unchanged. DeepGEMM's schedule comes
from DeepGEMM's own kernel (deep_gemm_host.py), and on a GPU from DeepGEMM itself.
"""

from __future__ import annotations

import functools
import importlib.metadata
import sys
import types
from typing import Any

import deep_gemm_host
import fakes
from empty import VERSION, EmptyModules
from torch import Tensor

_SERVER = ("cpuinfo", "prometheus_client", "uvloop")
# vLLM brings its own copy.
_OWN = ("deep_gemm",)
# Linked with the driver. Nothing here runs attention.
_OPERATORS = ("vllm._C_stable_libtorch", "vllm.vllm_flash_attn._vllm_fa2_C")


def install(*, gpu: bool = False) -> None:
    """Adds the empty modules to the import path, after real ones, and patches torch and vLLM to report a GPU.

    Args:
        gpu: whether there is a real GPU, so that none is pretended.
    """
    names = [name for name in (*fakes.BINARY, *_SERVER) if name not in _OWN]
    sys.meta_path.append(EmptyModules(names))
    ask = importlib.metadata.version

    @functools.wraps(ask)
    def version(name: str) -> str:
        try:
            return ask(name)
        except importlib.metadata.PackageNotFoundError:
            if name in names:
                return VERSION
            raise

    importlib.metadata.version = version
    if not gpu:
        fakes.pretend_cuda()
    for operators in _OPERATORS:
        sys.modules[operators] = types.ModuleType(operators)
    import vllm.platforms
    from vllm.platforms import cuda

    vllm.platforms._current_platform = cuda.NonNvmlCudaPlatform()
    import vllm.v1.worker.gpu.buffer_utils

    # This replaces a compiled operator of vLLM. Without a GPU the host tensor itself is the device's view. On a GPU a
    # copy will do, because the measured code doesn't read it.
    vllm.v1.worker.gpu.buffer_utils.get_accelerator_view_from_cpu_tensor = lambda tensor: (
        tensor.cuda() if gpu else tensor
    )
    if not gpu:
        import vllm.utils.deep_gemm

        vllm.utils.deep_gemm._lazy_init = lambda: None
        vllm.utils.deep_gemm._get_paged_mqa_logits_metadata_impl = _schedule


def _schedule(context_lens: Tensor, block_size: int, num_slots: int, indices: Any = None) -> Tensor:
    """DeepGEMM's schedule, as its host code computes it: on sm_90 a request is one atom."""
    if indices is None:
        return deep_gemm_host.sm90(context_lens, num_slots, atoms=1)
    return deep_gemm_host.sm100(context_lens, num_slots, indices=indices)
