"""Stand-ins for the engines' objects: their attributes, shapes, dtypes and aliases, without their computations.

Modelled on SGLang's attention backends (DSA and its old NSA names, FA3, TRTLLM-MHA, FlashMLA, TRTLLM-MLA). A
capture leaves poison where a replay must write.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from support import POISON
from torch import Tensor


def new(*shape: int, device: Any = "cpu") -> Tensor:
    return torch.full(shape, POISON, dtype=torch.int32, device=device)


class ForwardMode:
    """SGLang's ForwardMode, of which only the predicates matter."""

    def __init__(self, name: str) -> None:
        self.name = name

    def is_decode_or_idle(self) -> bool:
        return self.name in ("DECODE", "IDLE")

    def is_target_verify(self) -> bool:
        return self.name == "TARGET_VERIFY"

    def is_draft_extend_v2(self) -> bool:
        return self.name == "DRAFT_EXTEND_V2"

    def is_draft_extend(self) -> bool:
        return self.name == "DRAFT_EXTEND"


def metadata_class(prefix: str) -> type:
    """DSAMetadata, or with the prefix "nsa" NSAMetadata: frozen, as in SGLang."""
    plain = ("page_size", "cache_seqlens_int32", "max_seq_len_q", "max_seq_len_k", "cu_seqlens_q", "cu_seqlens_k")
    tables = ("page_table_1", "real_page_table")
    prefixed = ("cache_seqlens_int32", "cu_seqlens_q", "cu_seqlens_k", "seqlens_expanded")
    derived = ("flashmla_metadata", "paged_mqa_schedule_metadata", "paged_mqa_ctx_lens_2d", "topk_v2_plan")
    names = (*plain, *tables, *(f"{prefix}_{name}" for name in prefixed), *derived)
    fields = [(name, Any, dataclasses.field(default=None)) for name in names]
    return dataclasses.make_dataclass(f"{prefix.upper()}Metadata", fields, frozen=True)


class DSABackend:
    """One backend: a child of the multi-step one, or the target's, or the one that extends."""

    sm100 = False

    def __init__(
        self,
        pool: Tensor,
        *,
        page_size: int = 64,
        prefix: str = "dsa",
        step: int = 0,
        n: int = 4,
        index_topk: int = 70,
    ) -> None:
        self.req_to_token, self.real_page_size, self.prefix = pool, page_size, prefix
        self.device, self.topk, self.speculative_step_id = pool.device, 1, step
        self.speculative_num_draft_tokens = n
        setattr(self, f"{prefix}_index_topk", index_topk)
        self.decode_cuda_graph_metadata: dict[Any, Any] = {}
        self.forward_metadata: Any = None
        self.calls: list[str] = []

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        table = new(max_num_tokens, self.req_to_token.shape[1], device=self.device)
        self.decode_cuda_graph_metadata = {
            "cache_seqlens": torch.ones(max_num_tokens, dtype=torch.int32, device=self.device),
            "cu_seqlens_q": torch.arange(max_bs + 1, dtype=torch.int32, device=self.device),
            "page_table": table,
            "flashmla_metadata": None,
        }

    def capture(self, bs: int, mode: str = "decode") -> None:
        """Tables are rows of one buffer for all batch sizes; every other tensor belongs to this batch size."""
        rows = bs if mode == "decode" else bs * self.speculative_num_draft_tokens
        table = self.decode_cuda_graph_metadata["page_table"][:rows, :]
        pages = -(-table.shape[1] // self.real_page_size)
        cache = new(bs, device=self.device)
        expanded = cache if mode == "decode" else new(rows, device=self.device)
        per_mode = {
            "cache_seqlens_int32": new(rows, device=self.device),
            "cu_seqlens_q": torch.arange(rows + 1, dtype=torch.int32, device=self.device),
            "cu_seqlens_k": new(rows + 1, device=self.device),
            "seqlens_expanded": expanded,
        }
        self.decode_cuda_graph_metadata[bs] = metadata_class(self.prefix)(
            page_size=self.real_page_size,
            cache_seqlens_int32=cache,
            max_seq_len_q=1,
            max_seq_len_k=table.shape[1],
            cu_seqlens_q=self.decode_cuda_graph_metadata["cu_seqlens_q"][: bs + 1],
            cu_seqlens_k=new(bs + 1, device=self.device),
            page_table_1=table,
            # with page_size 1 they are one object
            real_page_table=table if self.real_page_size == 1 else new(rows, pages, device=self.device),
            paged_mqa_schedule_metadata=new(5, 2, device=self.device),
            paged_mqa_ctx_lens_2d=self._build_paged_mqa_schedule_2d_ctx_lens(
                ForwardMode(mode.upper()), cache, expanded, bs
            ),
            **{f"{self.prefix}_{name}": tensor for name, tensor in per_mode.items()},
        )

    def _build_paged_mqa_schedule_2d_ctx_lens(
        self, forward_mode: ForwardMode, cache_seqlens: Tensor, seqlens_expanded: Tensor, bs: int
    ) -> Tensor:
        """A view, except for target verification on SM100."""
        if forward_mode.is_target_verify() and self.sm100:
            return cache_seqlens.view(-1, 1).expand(-1, self.speculative_num_draft_tokens).contiguous()
        return (cache_seqlens if forward_mode.is_decode_or_idle() else seqlens_expanded).view(-1, 1)

    def set_dsa_prefill_impl(self, forward_batch: Any) -> None:
        self.calls.append("prefill_impl")

    def _refresh_paged_mqa_schedule_metadata(self, metadata: Any, lengths: Tensor) -> None:
        # In place, as the engine does: the graph has captured the address.
        metadata.paged_mqa_schedule_metadata.fill_(int(lengths.sum()))

    def _refresh_topk_v2_plan(self, metadata: Any) -> None:
        self.calls.append("topk_plan")


class MultiStep:
    """A multi-step draft backend.

    Args:
        children: attn_backends. ``captured`` of them take part in graphs: often all but the last.
    """

    def __init__(self, children: Sequence[Any], captured: int) -> None:
        self.attn_backends, self.captured = list(children), captured
        self.speculative_num_steps = captured + 1

    def init_cuda_graph_state(self, max_bs: int) -> None:
        for child in self.attn_backends[: self.captured]:
            child.init_cuda_graph_state(max_bs, max_bs)

    def capture(self, bs: int) -> None:
        for child in self.attn_backends[: self.captured]:
            child.capture(bs)


def dsa(pool: Tensor, count: int = 3, **facts: Any) -> MultiStep:
    return MultiStep([DSABackend(pool, step=i, **facts) for i in range(count)], count)


@dataclass
class MHAMetadata:
    """FlashAttentionMetadata, and TRTLLMMHAMetadata: the fields that both have."""

    cache_seqlens_int32: Any = None
    max_seq_len_q: int = 1
    max_seq_len_k: int = 0
    cu_seqlens_q: Any = None
    cu_seqlens_k: Any = None
    page_table: Any = None
    swa_page_table: Any = None


class FlashInferMultiStep:
    """FlashInferMultiStepDraftBackend, TritonMultiStepDraftBackend: two tensors, one row per step, for all batch sizes.

    They have one more row than children, which nothing reads.
    """

    def __init__(self, pool: Tensor, *, steps: int = 4, max_bs: int = 4, topk: int = 1) -> None:
        self.topk, self.speculative_num_steps, self.max_bs = topk, steps, max_bs
        self.kv_indptr = new(steps, max_bs + 1, device=pool.device)
        self.attn_backends = [SimpleNamespace(req_to_token=pool) for _ in range(steps - 1)]
        self.req_to_token_pool = SimpleNamespace(req_to_token=pool)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        width = self.req_to_token_pool.req_to_token.shape[1]
        self.cuda_graph_kv_indices = new(self.speculative_num_steps, max_bs * (width + 9), device=self.kv_indptr.device)


class MHABackend:
    """FlashAttentionBackend or TRTLLMHAAttnBackend: a dictionary of captures per mode, a row of pages per request."""

    def __init__(self, pool: Tensor, *, page_size: int = 16, step: int = 0, n: int = 4, topk: int = 1) -> None:
        self.req_to_token, self.page_size, self.device = pool, page_size, pool.device
        self.topk, self.speculative_step_id, self.speculative_num_draft_tokens = topk, step, n
        self.decode_cuda_graph_metadata: dict[Any, Any] = {}
        self.target_verify_metadata: dict[Any, Any] = {}
        self.draft_extend_metadata: dict[Any, Any] = {}
        self.forward_metadata: Any = None

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        pages = -(-self.req_to_token.shape[1] // self.page_size)
        for graphs in (self.decode_cuda_graph_metadata, self.target_verify_metadata, self.draft_extend_metadata):
            graphs["cache_seqlens"] = new(max_bs, device=self.device)
            graphs["cu_seqlens_k"] = new(max_bs + 1, device=self.device)
            graphs["page_table"] = new(max_bs, pages, device=self.device)

    def capture(self, bs: int, mode: str = "decode") -> None:
        graphs = {
            "decode": self.decode_cuda_graph_metadata,
            "target_verify": self.target_verify_metadata,
            "draft_extend": self.draft_extend_metadata,
        }[mode]
        graphs[bs] = MHAMetadata(
            cache_seqlens_int32=graphs["cache_seqlens"][:bs],
            cu_seqlens_q=torch.arange(bs + 1, dtype=torch.int32, device=self.device),
            cu_seqlens_k=graphs["cu_seqlens_k"][: bs + 1],
            page_table=graphs["page_table"][:bs, :],
        )


def mha(pool: Tensor, count: int = 3, **facts: Any) -> MultiStep:
    """One more child than take part."""
    return MultiStep([MHABackend(pool, step=i, **facts) for i in range(count + 1)], count)


class FlashMLABackend:
    """Keeps no metadata per batch size, only the block table; its parent class's metadata is of another kind."""

    def __init__(self, pool: Tensor) -> None:
        self.req_to_token, self.device, self.topk = pool, pool.device, 1
        self.decode_cuda_graph_metadata: dict[Any, Any] = {}

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.cuda_graph_kv_indices = new(max_bs, self.req_to_token.shape[1] // 64 + 3, device=self.device)

    def capture(self, bs: int) -> None:
        self.forward_metadata = SimpleNamespace(block_kv_indices=self.cuda_graph_kv_indices[:bs, :1])


@dataclass
class TRTLLMMLADecodeMetadata:
    block_kv_indices: Any = None
    max_seq_len_k: Any = None
    max_seq_len_q: Any = None
    seq_lens_k: Any = None


class TRTLLMMLABackend:
    """Captures of every mode in one dictionary; it has lengths only where they differ from the batch's."""

    def __init__(self, pool: Tensor, *, page_size: int = 32, n: int = 4) -> None:
        self.req_to_token, self.page_size, self.num_draft_tokens, self.device = pool, page_size, n, pool.device
        self.decode_cuda_graph_metadata: dict[Any, Any] = {}

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.cuda_graph_kv_indices = torch.zeros(8, dtype=torch.int32, device=self.device)  # the parent's, flat
        self.decode_cuda_graph_kv_indices = new(
            max_bs, self.req_to_token.shape[1] // self.page_size + 5, device=self.device
        )

    def capture(self, bs: int, mode: str = "decode") -> None:
        self.decode_cuda_graph_metadata[bs] = TRTLLMMLADecodeMetadata(
            block_kv_indices=self.decode_cuda_graph_kv_indices[:bs, :],
            seq_lens_k=None if mode == "decode" else new(bs, device=self.device),
        )


def batch(pool: Tensor, lengths: Sequence[int], spare: int = 0) -> SimpleNamespace:
    """A ForwardBatch; ``spare`` elements lie behind the batch, as in the graph runner's input buffers."""
    generator = torch.Generator().manual_seed(len(lengths))
    rows = torch.randperm(pool.shape[0] - 1, generator=generator)[: len(lengths)] + 1
    seq_lens = torch.tensor([*lengths, *[1] * spare], dtype=torch.int64)
    return SimpleNamespace(
        batch_size=len(lengths),
        seq_lens=seq_lens.to(pool.device),
        seq_lens_cpu=seq_lens,
        req_pool_indices=torch.cat([rows, rows.new_zeros(spare)]).to(pool.device),
    )
