"""SGLang's own kernels for the draft steps of its DSA backend, from the wheel that can be imported.

Nothing of SGLang is copied. A refresh by the engine is one launch that computes into temporary tensors, then copies:
DeepseekSparseAttnMultiStepBackend.init_forward_metadata_out_graph, read in SGLang 0.5.23.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from onelaunch import MetadataBuffers
from torch import Tensor

from .sglang_modules import Missing, module

# What one copy of the engine's writes at once, from this number of backends on.
_TOGETHER = 3
_DECODE = 0
_DSA = "kernels.ops.attention.dsa"


@cache
def kernels() -> Any:
    """Modules of SGLang with its metadata kernels: ``metadata``, ``pooled`` and ``copies``.

    ``copies`` is the reason, a string, where what compiles these kernels can't be imported.

    Raises:
        Missing: there is no SGLang, or one without these modules.
    """
    found = SimpleNamespace(metadata=module(f"{_DSA}.metadata"), pooled=module(f"{_DSA}.kpool_metadata.decode"))
    try:
        found.copies = module(f"{_DSA}.fused_metadata_copy")
    except Missing as error:
        found.copies = f"SGLang's compiler of kernels isn't importable: {error.__cause__}"
    return found


def _computed(size: int, columns: int, page_size: int, device: torch.device) -> dict[str, Tensor]:
    """The temporary tensors of a refresh, which the engine allocates in each."""

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    tensors = {
        "cache_seqlens": new(size),
        "cu_seqlens_k": new(size + 1),
        "page_indices": new(size, columns),
        "nsa_cache_seqlens": new(size),
        "nsa_cu_seqlens_k": new(size + 1),
    }
    if page_size > 1:
        tensors["real_page_table"] = new(size, -(-columns // page_size))
    return tensors


def compute(
    kernel: Any,
    to: dict[str, Tensor],
    inputs: tuple[Tensor, Tensor, Tensor],
    columns: int,
    index_topk: int,
    page_size: int,
) -> None:
    """One launch of a kernel of SGLang's that refreshes one backend, or the temporary tensors.

    Args:
        kernel: fused_dsa_decode_metadata of ``metadata``, or fused_dsa_decode_metadata_kpool of ``pooled``.
        to: the tensors that it writes, by onelaunch's names of the fields.
        inputs: seq_lens and req_pool_indices, int [bs], contiguous; req_to_token, int32 [pool rows, W].
        columns: table columns that its grid covers: as the engine calls it, the width of page_table_1.
    """
    seq_lens, req_pool_indices, req_to_token = inputs
    kernel(
        seq_lens=seq_lens,
        req_pool_indices=req_pool_indices,
        req_to_token=req_to_token,
        cache_seqlens=to["cache_seqlens"],
        cu_seqlens_k=to["cu_seqlens_k"],
        page_table_1=to["page_indices"],
        dsa_cache_seqlens=to["nsa_cache_seqlens"],
        dsa_cu_seqlens_k=to["nsa_cu_seqlens_k"],
        real_page_table=to.get("real_page_table", to["page_indices"]),
        bs=seq_lens.numel(),
        max_len=columns,
        dsa_index_topk=index_topk,
        physical_page_size=page_size,
    )


def refresh_each(
    kernel: Any,
    backends: list[MetadataBuffers],
    inputs: tuple[Tensor, Tensor, Tensor],
    columns: int,
    index_topk: int,
    page_size: int,
) -> None:
    """A launch of one of its kernels for each backend, straight into the backend's tensors; see compute()."""
    for backend in backends:
        to = {field.name: tensor for field, tensor in backend.items()}
        compute(kernel, to, inputs, columns, index_topk, page_size)


def refresh(
    backends: list[MetadataBuffers],
    inputs: tuple[Tensor, Tensor, Tensor],
    columns: int,
    index_topk: int,
    page_size: int,
) -> None:
    """A refresh as the engine does it: one computation, one copy to three backends, one to each of the others.

    With fewer than three backends each has a copy of its own.

    Args:
        inputs, columns, index_topk, page_size: as in compute().
    """
    found = kernels()
    size, device = inputs[0].numel(), inputs[0].device
    computed = _computed(size, columns, page_size, device)
    compute(found.metadata.fused_dsa_decode_metadata, computed, inputs, columns, index_topk, page_size)
    source = tuple(computed.get(name) for name in _COPIED)
    together = backends[:_TOGETHER] if len(backends) >= _TOGETHER else []
    if together:
        found.copies.fused_metadata_copy_multi_cuda(
            *source, None, None, *(tensor for backend in together for tensor in _destinations(backend)),
            size, columns, size,
        )  # fmt: skip
    for backend in backends[len(together) :]:
        to = _destinations(backend)
        found.copies.fused_metadata_copy_cuda(
            *source[:4], None, *source[4:], None, None,
            *to[:4], None, *to[4:],
            _DECODE, size, columns, columns, size,
        )  # fmt: skip


# The order of the fields in the copies' arguments. FlashMLA's two follow; they aren't used here.
_COPIED = (
    "cache_seqlens",
    "cu_seqlens_k",
    "page_indices",
    "nsa_cache_seqlens",
    "nsa_cu_seqlens_k",
    "real_page_table",
)


def _destinations(backend: MetadataBuffers) -> tuple[Tensor | None, ...]:
    return (*(getattr(backend, name) for name in _COPIED), None, None)
