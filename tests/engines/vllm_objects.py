"""vLLM's metadata builders and block tables on a CPU, and the runner's buffers that they read."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

WIDTH = 9  # blocks of a request
MAX_REQUESTS = 16
MAX_TOKENS = 128
# What one launch refreshes of the indexer's metadata, and what stays vLLM's, for the table of results.
INDEXER = (
    "decode: lengths, block table, numbers of tokens, DeepGEMM's schedule",
    "prefills, the object itself; slot mappings but in draft steps",
)


def builder(next_n: int, *, adaptive: bool = False, tokens_per_state: int = 1) -> Any:
    """A DeepseekV32IndexerMetadataBuilder for next_n - 1 speculative tokens.

    Args:
        adaptive: with adaptive verification, so that requests have different numbers of tokens.
        tokens_per_state: above 1 as in DeepSeek-V4, where lengths are compressed.
    """
    from vllm.config import CUDAGraphMode
    from vllm.v1.attention.backends.mla.indexer import DeepseekV32IndexerMetadataBuilder
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    speculative = SimpleNamespace(num_speculative_tokens=next_n - 1, enable_adaptive_verification=adaptive)
    config = _config(
        next_n,
        speculative_config=speculative if next_n > 1 else None,
        attention_config=SimpleNamespace(
            resolve_indexer_kv_dtype=lambda default: default,
            sparse_mla_prefill_workspace_factor=5,
            indexer_tp_shard_min_rows=1,
        ),
        model_config=SimpleNamespace(max_model_len=64 * WIDTH),
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.FULL),
    )
    spec = MLAAttentionSpec(
        block_size=64 * tokens_per_state,
        num_kv_heads=1,
        head_size=132,
        dtype=torch.uint8,
        tokens_per_state=tokens_per_state,
    )
    return DeepseekV32IndexerMetadataBuilder(spec, ["layer"], config, torch.device("cpu"), block_table_width=WIDTH)


def sparse_builder(next_n: int) -> Any:
    """A FlashAttnMLASparseMetadataBuilder for the same drafter."""
    from vllm.v1.attention.backends.mla.flashattn_mla_sparse import FlashAttnMLASparseMetadataBuilder
    from vllm.v1.kv_cache_interface import MLAAttentionSpec

    dims = {"q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    config = _config(
        next_n,
        speculative_config=SimpleNamespace(num_speculative_tokens=next_n - 1, parallel_drafting=False),
        attention_config=SimpleNamespace(hisparse_config=None),
        model_config=SimpleNamespace(
            hf_text_config=SimpleNamespace(index_topk=64, v_head_dim=128, **dims),
            dtype=torch.bfloat16,
            max_model_len=64 * WIDTH,
            get_num_attention_heads=lambda parallel: 128,
            model_arch_config=SimpleNamespace(total_num_attention_heads=128),
        ),
        cache_config=SimpleNamespace(block_size=64, cache_dtype="auto"),
        compilation_config=SimpleNamespace(static_forward_context={"layer": SimpleNamespace(prefill_backend=None)}),
    )
    spec = MLAAttentionSpec(block_size=64, num_kv_heads=1, head_size=576, dtype=torch.bfloat16)
    return FlashAttnMLASparseMetadataBuilder(spec, ["layer"], config, torch.device("cpu"))


def _config(next_n: int, **more: Any) -> Any:
    """What builders read of a VllmConfig, which itself needs a model."""
    return SimpleNamespace(
        scheduler_config=SimpleNamespace(max_num_batched_tokens=MAX_TOKENS, max_num_seqs=MAX_REQUESTS),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            tensor_parallel_size=1,
            prefill_context_parallel_size=1,
            cp_kv_cache_interleave_size=1,
        ),
        num_speculative_tokens=next_n - 1,
        **more,
    )


def block_tables(sizes: tuple[int, ...], **settings: Any) -> Any:
    """BlockTables with a KV-cache group for each block size, all blocks different."""
    from vllm.v1.worker.gpu.block_table import BlockTables

    widths = [64 * WIDTH // size for size in sizes]
    tables = BlockTables(list(sizes), MAX_REQUESTS, MAX_TOKENS, widths, torch.device("cpu"), **settings)
    for group, table in enumerate(tables.block_tables):
        blocks = torch.arange(table.gpu.numel(), dtype=torch.int32).view(table.gpu.shape)
        table.gpu.copy_(1 + (blocks * 7919 + group) % 10_007)
    return tables


class Runner:
    """The buffers that a model runner keeps for all batches, and what it hands to a builder."""

    def __init__(self) -> None:
        self.seq_lens = torch.zeros(MAX_REQUESTS, dtype=torch.int32)
        self.block_table = torch.zeros((MAX_REQUESTS, WIDTH), dtype=torch.int32)
        self.query_start_loc = torch.zeros(MAX_REQUESTS + 1, dtype=torch.int32)

    def fill(self, lengths: tuple[int, ...], query_lens: tuple[int, ...]) -> None:
        """A batch's rows; those behind it are zero, and have no tokens where query_lens says nothing of them."""
        self.seq_lens.zero_()
        self.seq_lens[: len(lengths)] = torch.tensor(lengths, dtype=torch.int32)
        self.block_table.zero_()
        blocks = torch.arange(len(lengths) * WIDTH, dtype=torch.int32).view(-1, WIDTH)
        self.block_table[: len(lengths)] = 1 + (blocks * 7919 + sum(lengths)) % 10_007
        ends = torch.tensor(query_lens, dtype=torch.int32).cumsum(0)
        self.query_start_loc[0] = 0
        self.query_start_loc[1 : len(ends) + 1] = ends
        self.query_start_loc[len(ends) + 1 :] = ends[-1]

    def metadata(self, requests: int, tokens: int, longest: int) -> Any:
        """CommonAttentionMetadata of the first requests, padded to a number of tokens."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        starts = self.query_start_loc[: requests + 1]
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts.clone(),
            seq_lens=self.seq_lens[:requests],
            seq_lens_cpu_upper_bound=self.seq_lens[:requests].clone(),
            num_reqs=requests,
            num_actual_tokens=tokens,
            max_query_len=longest,
            max_seq_len=int(self.seq_lens.max()),
            block_table_tensor=self.block_table[:requests],
            slot_mapping=torch.arange(tokens),
        )

    def owns(self, tensor: Tensor) -> bool:
        """Whether the tensor is the runner's own memory."""
        mine = {t.untyped_storage().data_ptr() for t in (self.seq_lens, self.block_table, self.query_start_loc)}
        return tensor.untyped_storage().data_ptr() in mine
