"""What a refresh of the stand-ins of engines' objects must leave in their tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import stand_ins
import support
import torch
from onelaunch import MetadataBuffers
from onelaunch.spec import reference
from support import POISON
from torch import Tensor

WIDTH = 331
LENGTHS = {1: [97], 4: [0, 5, 331, 64], 3: [1, 200, 77]}


def pool(device: torch.device | str = "cpu", width: int = WIDTH) -> Tensor:
    return support.token_pool(9, width, strides="odd", device=device)


def expected(
    forward: SimpleNamespace, source: Tensor, backends: list[dict[str, Tensor]], **facts: Any
) -> list[dict[str, Tensor]]:
    """What the reference writes to poisoned tensors of these shapes."""
    bs = forward.batch_size
    wanted = [{name: torch.full(t.shape, POISON, dtype=torch.int32) for name, t in b.items()} for b in backends]
    reference.refresh(
        [MetadataBuffers(**b) for b in wanted],
        forward.seq_lens[:bs].cpu(),
        forward.req_pool_indices[:bs].cpu(),
        source.cpu(),
        **{"extent": "live", "index_topk": 70, "page_size": 64, **facts},
    )
    return wanted


def assert_refreshed(forward: SimpleNamespace, source: Tensor, backends: list[dict[str, Tensor]], **facts: Any) -> None:
    wanted = expected(forward, source, backends, **facts)
    for index, (got, want) in enumerate(zip(backends, wanted, strict=True)):
        for name, tensor in got.items():
            assert torch.equal(tensor.cpu(), want[name]), f"backend {index}: {name}"


def dsa_tensors(metadata: Any, prefix: str = "dsa", mode: str = "decode") -> dict[str, Tensor]:
    """The fields of a DSA metadata object. Written out here, so that the test doesn't use the integration's table."""
    found = {
        "cache_seqlens": metadata.cache_seqlens_int32,
        "cu_seqlens_k": metadata.cu_seqlens_k,
        "page_indices": metadata.page_table_1,
        "nsa_cache_seqlens": getattr(metadata, f"{prefix}_cache_seqlens_int32"),
        "nsa_cu_seqlens_k": getattr(metadata, f"{prefix}_cu_seqlens_k"),
    }
    if metadata.page_size > 1:
        found["real_page_table"] = metadata.real_page_table
    if mode != "decode":
        found["seqlens_expanded"] = getattr(metadata, f"{prefix}_seqlens_expanded")
    return found


def mha_tensors(metadata: Any) -> dict[str, Tensor]:
    return {
        "cache_seqlens": metadata.cache_seqlens_int32,
        "cu_seqlens_k": metadata.cu_seqlens_k,
        "real_page_table": metadata.page_table,
    }


def poison(multi: stand_ins.MultiStep) -> None:
    """Fills the tables that batch sizes share, as if another batch size had left its values there."""
    for child in multi.attn_backends[: multi.captured]:
        child.decode_cuda_graph_metadata["page_table"].fill_(POISON)


def captured(multi: stand_ins.MultiStep) -> stand_ins.MultiStep:
    multi.init_cuda_graph_state(max_bs=4)
    multi.capture(4)
    return multi
