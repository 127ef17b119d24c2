"""Fakes of what SGLang imports and a machine without a GPU lacks: empty binary modules, and a torch.cuda with a GPU.

``install()`` must run before sglang is imported. Nothing of SGLang's own is replaced: its classes, its Triton kernels
(under Triton's interpreter) and its PyTorch code run as they are.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from empty import VERSION, EmptyModules
from onelaunch.spec.reference_schedules import paged_mqa_schedule

# Modules with compiled code for a GPU, or that only a server needs. Their distributions are not installed.
BINARY = (
    "aiohttp",
    "compressed_tensors",
    "cuda",
    "cutlass",
    "decord",
    "deep_ep",
    "deep_gemm",
    "fastapi",
    "flash_mla",
    "gguf",
    "httpcore2",
    "httpx2",
    "humming",
    "IPython",
    "llguidance",
    "nvshmem",
    "openai",
    "openai_harmony",
    "opentelemetry",
    "outlines",
    "partial_json_parser",
    "pynvml",
    "quack",
    "sentencepiece",
    "sgl_kernel",
    "setproctitle",
    "tilelang",
    "torch_memory_saver",
    "torchvision",
    "triton_kernels",
    "tvm_ffi",
    "uvicorn",
    "xgrammar",
)
# Distributions whose version SGLang queries at import.
DISTRIBUTIONS = ("flashinfer_python", "sgl_deep_gemm", "sgl_flash_mla", "sglang_kernel", "nvidia_cutlass_dsl")


class _Stream:
    cuda_stream = 0
    device = torch.device("cpu")

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: Any) -> bool:
        return False

    def synchronize(self) -> None: ...

    def wait_stream(self, other: Any) -> None: ...


def pretend_cuda(capability: tuple[int, int] = (9, 0), multiprocessors: int = 132) -> None:
    """Makes torch.cuda describe a GPU of this compute capability. Its tensors are CPU tensors."""
    stream = _Stream()
    properties = SimpleNamespace(
        name="a GPU that isn't there",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=multiprocessors,
        total_memory=80 << 30,
        warp_size=32,
        L2_cache_size=50 << 20,
        gcnArchName="",
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        max_threads_per_multi_processor=2048,
        regs_per_multiprocessor=65536,
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "init": None,
        "device_count": 1,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "current_stream": stream,
        "is_current_stream_capturing": False,
        "get_device_name": properties.name,
        "get_device_capability": capability,
        "get_device_properties": properties,
        "mem_get_info": (70 << 30, 80 << 30),
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, _answering(value))
    torch.cuda.Stream = _Stream  # type: ignore[misc,assignment]
    torch.Tensor.pin_memory = lambda self, *a, **k: self  # type: ignore[method-assign]
    # SGLang's launchers assert is_cuda before they launch.
    torch.Tensor.is_cuda = property(lambda self: True)  # type: ignore[assignment,misc]
    for name in ("empty", "zeros", "ones", "full", "arange", "tensor", "as_tensor", "empty_like", "zeros_like"):
        setattr(torch, name, _on_the_cpu(getattr(torch, name)))


def _answering(value: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: value


def _on_the_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    def make(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make


def install() -> None:
    """Adds the empty modules to the import path, after real ones, and patches torch to report a GPU."""
    importlib.import_module("flashinfer_fakes").install()  # first: FlashInfer must not find the empty cutlass
    sys.meta_path.append(EmptyModules(BINARY))
    ask = importlib.metadata.version

    def version(name: str) -> str:
        try:
            return ask(name)
        except importlib.metadata.PackageNotFoundError:
            if name.replace("-", "_") in (*BINARY, *DISTRIBUTIONS):
                return VERSION
            raise

    importlib.metadata.version = version
    pretend_cuda()
    _let_configurations_be_registered_again()
    _replace_compiled_functions()


def _let_configurations_be_registered_again() -> None:
    """SGLang 0.5.17 registers configurations of models that newer versions of transformers have themselves."""
    auto = importlib.import_module("transformers.models.auto.configuration_auto")
    register = auto._LazyConfigMapping.register
    auto._LazyConfigMapping.register = lambda self, key, value, exist_ok=False: register(
        self, key, value, exist_ok=True
    )


def digest(lengths: torch.Tensor, *shape: int) -> torch.Tensor:
    """int32 numbers that differ if the lengths or their shape differ. They stand for a schedule of these lengths."""
    flat = lengths.reshape(-1).to(torch.int64)
    weight = int((flat * (2 * torch.arange(len(flat)) + 3)).sum()) + 7 * lengths.dim() + len(flat)
    count = torch.Size(shape).numel()
    return ((torch.arange(count) + 1) * (weight % 10007 + 1) % 1_000_003).to(torch.int32).reshape(shape)


def _replace_compiled_functions() -> None:
    """Replaces functions compiled for a GPU, which make plans, by digests of the lengths they are called with.

    DeepGEMM's schedule comes from the reference instead, because onelaunch's launch can make it too.
    """
    import deep_gemm

    parts = torch.cuda.get_device_properties(0).multi_processor_count
    deep_gemm.get_num_sms = lambda: parts
    deep_gemm.get_paged_mqa_logits_metadata = lambda lengths, block, sms, **more: torch.tensor(
        paged_mqa_schedule(lengths.flatten().tolist(), sms), dtype=torch.int32
    )

    jit = importlib.import_module("sglang.kernels.jit.utils")

    def load_jit(name: str, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(f"{name} is compiled for a GPU, and the tests have none.")

    # The engine falls back to PyTorch if a kernel can't be compiled. The tests compare with that fallback.
    jit.load_jit = load_jit
    topk = importlib.import_module("sglang.kernels.ops.attention.dsv4.topk")
    topk.plan_topk_v2 = lambda lengths, *more, **keywords: digest(lengths, len(lengths) + 1, 4)
    fixup = importlib.import_module("sglang.kernels.ops.attention.fixup_zero_kv")
    fixup._jit_fixup_module = lambda *args: None

    def get_scheduler_metadata(*, cache_seqlens: torch.Tensor, max_seqlen_k: int, **more: Any) -> torch.Tensor:
        return digest(cache_seqlens + max_seqlen_k, 1 + 4 * len(cache_seqlens))

    importlib.import_module("sgl_kernel.flash_attn").get_scheduler_metadata = get_scheduler_metadata

    def get_mla_metadata(cache_seqlens: torch.Tensor, *more: Any, **keywords: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return digest(cache_seqlens, parts, 8), digest(cache_seqlens, len(cache_seqlens) + 1)

    # Depending on the version, SGLang defines it in its own module or imports it from sgl_kernel, which is empty.
    importlib.import_module("sgl_kernel.flash_mla").get_mla_metadata = get_mla_metadata
    if importlib.util.find_spec("sglang.kernels.ops.attention.flash_mla_interface") is not None:
        importlib.import_module("sglang.kernels.ops.attention.flash_mla_interface").get_mla_metadata = get_mla_metadata
