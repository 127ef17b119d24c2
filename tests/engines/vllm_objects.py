"""vLLM's metadata builders and block tables, and the buffers of the runner and the drafter that they read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from onelaunch.integrations import vllm
from onelaunch.integrations.vllm import DraftStep
from torch import Tensor

POISON = -7
# vllm_seam.py sets these before it makes any object.
DEVICE = "cpu"
WIDTH = 9  # blocks per request
MAX_REQUESTS = 16
MAX_TOKENS = 128
SIZES = (64, 16)  # block sizes of the KV-cache groups
# For the table of results: what one launch refreshes of the indexer's metadata, and what vLLM still does.
INDEXER = (
    "decode: lengths, block table, numbers of tokens, DeepGEMM's schedule",
    "prefills, the object itself; slot mappings but in draft steps",
)


def builder(next_n: int, *, adaptive: bool = False, tokens_per_state: int = 1) -> Any:
    """A DeepseekV32IndexerMetadataBuilder for next_n - 1 speculative tokens.

    Args:
        adaptive: with adaptive verification, so that requests have different numbers of tokens.
        tokens_per_state: above 1 for compressed lengths, as in DeepSeek-V4.
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
    return DeepseekV32IndexerMetadataBuilder(spec, ["layer"], config, torch.device(DEVICE), block_table_width=WIDTH)


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
    return FlashAttnMLASparseMetadataBuilder(spec, ["layer"], config, torch.device(DEVICE))


def _config(next_n: int, **more: Any) -> Any:
    """The attributes of a VllmConfig that builders read. A real VllmConfig needs a model."""
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
    """BlockTables with a KV-cache group for each block size. All blocks are different."""
    from vllm.v1.worker.gpu.block_table import BlockTables

    widths = [64 * WIDTH // size for size in sizes]
    tables = BlockTables(list(sizes), MAX_REQUESTS, MAX_TOKENS, widths, torch.device(DEVICE), **settings)
    for group, table in enumerate(tables.block_tables):
        blocks = torch.arange(table.gpu.numel(), dtype=torch.int32, device=DEVICE).view(table.gpu.shape)
        table.gpu.copy_(1 + (blocks * 7919 + group) % 10_007)
    return tables


class Runner:
    """The buffers that a model runner keeps for all batches, and the metadata it passes to a builder."""

    def __init__(self) -> None:
        self.seq_lens = torch.zeros(MAX_REQUESTS, dtype=torch.int32, device=DEVICE)
        self.block_table = torch.zeros((MAX_REQUESTS, WIDTH), dtype=torch.int32, device=DEVICE)
        self.query_start_loc = torch.zeros(MAX_REQUESTS + 1, dtype=torch.int32, device=DEVICE)

    def fill(self, lengths: tuple[int, ...], query_lens: tuple[int, ...]) -> None:
        """Fills the rows of a batch. Later rows are zero, and have no tokens unless query_lens gives them some."""
        self.seq_lens.zero_()
        self.seq_lens[: len(lengths)] = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
        self.block_table.zero_()
        blocks = torch.arange(len(lengths) * WIDTH, dtype=torch.int32, device=DEVICE).view(-1, WIDTH)
        self.block_table[: len(lengths)] = 1 + (blocks * 7919 + sum(lengths)) % 10_007
        ends = torch.tensor(query_lens, dtype=torch.int32, device=DEVICE).cumsum(0)
        self.query_start_loc[0] = 0
        self.query_start_loc[1 : len(ends) + 1] = ends
        self.query_start_loc[len(ends) + 1 :] = ends[-1]

    def metadata(self, requests: int, tokens: int, longest: int) -> Any:
        """CommonAttentionMetadata of the first requests, padded to a number of tokens."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        starts = self.query_start_loc[: requests + 1]
        return CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts.clone().cpu(),
            seq_lens=self.seq_lens[:requests],
            seq_lens_cpu_upper_bound=self.seq_lens[:requests].clone().cpu(),
            num_reqs=requests,
            num_actual_tokens=tokens,
            max_query_len=longest,
            max_seq_len=int(self.seq_lens.max()),
            block_table_tensor=self.block_table[:requests],
            slot_mapping=torch.arange(tokens, device=DEVICE),
        )

    def owns(self, tensor: Tensor) -> bool:
        """Whether the tensor is in the runner's own memory."""
        mine = {t.untyped_storage().data_ptr() for t in (self.seq_lens, self.block_table, self.query_start_loc)}
        return tensor.untyped_storage().data_ptr() in mine


class Drafter:
    """One set of buffers, and the metadata of a graph captured for a number of requests.

    Args:
        next_n: tokens of a verified request. In a draft step a request has one token.
        captured: the captured number of requests.
    """

    def __init__(self, next_n: int, captured: int, sizes: tuple[int, ...] = SIZES, **tables: Any) -> None:
        self.captured, self.runner = captured, Runner()
        self.tables = block_tables(sizes, **tables)
        self.positions = torch.zeros(MAX_TOKENS, dtype=torch.int64, device=DEVICE)
        self.idx_mapping = torch.full((MAX_REQUESTS,), -1, device=DEVICE)
        self.builder, self.sparse_builder = builder(next_n), sparse_builder(next_n)
        self.begin((1,) * captured)
        # vLLM caches each token's request for all builders of a batch, so each builder gets its own metadata here.
        self.metadata = self.builder.build(0, self.runner.metadata(captured, captured, 1))
        self.sparse = self.sparse_builder.build(0, self.runner.metadata(captured, captured, 1))

    def begin(self, lengths: tuple[int, ...], *, dummy: bool = False) -> None:
        """Begins the first draft step of requests with these lengths. Request i has row 2 * i + 1 of the block tables.

        Args:
            dummy: whether no request has a row, as in a dummy run.
        """
        requests = len(lengths)
        self.runner.fill(lengths, (1,) * requests)
        self.positions[:requests] = self.runner.seq_lens[:requests] - 1
        self.idx_mapping.fill_(-1)
        if not dummy:
            self.idx_mapping[:requests] = (torch.arange(requests, device=DEVICE) * 2 + 1) % MAX_REQUESTS

    def advance(self) -> None:
        """Advances all captured requests by the sampled token, as _update_draft_inputs_kernel does."""
        longest = 64 * WIDTH
        for tensor, most in ((self.positions, longest - 1), (self.runner.seq_lens, longest)):
            live = tensor[: self.captured]
            live.copy_((live + 1).clamp(max=most))

    def step(self) -> None:
        """Makes the engine's own launches before a step."""
        n = self.captured
        starts = self.runner.query_start_loc[: n + 1]
        self.tables.compute_slot_mappings(self.idx_mapping[:n], starts, self.positions[:n], n)
        self.builder.update_draft_decode_metadata(self.metadata)
        self.sparse_builder.update_draft_decode_metadata(self.sparse)

    def bind(self, **settings: Any) -> DraftStep:
        return vllm.bind_draft_step(
            self.builder,
            self.metadata,
            self.tables,
            idx_mapping=self.idx_mapping,
            positions=self.positions,
            **{"sparse": [self.sparse], **settings},
        )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "slot_mappings", self.tables.slot_mappings
        for label, owner in (("metadata", self.metadata), ("decode", self.metadata.decode), ("sparse", self.sparse)):
            for field in dataclasses.fields(owner):
                value = getattr(owner, field.name)
                # slot_mapping belongs to the runner and stays as it was at the capture.
                if isinstance(value, Tensor) and field.name != "slot_mapping":
                    yield f"{label}.{field.name}", value

    def destinations(self) -> dict[str, Tensor]:
        """The tensors that a step writes: all except the runner's own memory."""
        return {name: tensor for name, tensor in self.tensors() if not self.runner.owns(tensor)}


def differences(engine: Drafter, mine: Drafter) -> list[str]:
    """The names of the tensors that differ."""
    pairs = list(zip(engine.tensors(), mine.tensors(), strict=True))
    assert all(name == other and a.shape == b.shape and a.dtype == b.dtype for (name, a), (other, b) in pairs)
    return [name for (name, wanted), (_, got) in pairs if not torch.equal(wanted, got)]


def poison(*drafters: Drafter) -> None:
    for drafter in drafters:
        for tensor in drafter.destinations().values():
            tensor.fill_(POISON)
