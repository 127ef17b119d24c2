"""Batches of requests that go through the steps of SGLang's own speculative worker, on a CPU, without models."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import objects
import torch
from runner_objects import DRAFTER, HIDDEN
from torch import Tensor

WORKER = "sglang.srt.speculative.eagle_worker_common"
BATCHES = "sglang.srt.model_executor.forward_batch_info"
LOCATIONS, LOCATE = "sglang.kernels.ops.speculative.cache_locs", "assign_extend_cache_locs_uniform_func"
# Of the requests of batches, one after the other.
LENGTHS = ((7, 30), (64,), (1, 90, 33, 5, 570), (128, 3, 65))


def extension_batch(batch: Any, *arguments: Any, extend_position_info: Any = None, **keywords: Any) -> Any:
    """Replaces ForwardBatch.init_new for a draft extension: makes only what the engine's preparation reads."""
    batches = import_module(BATCHES)
    prefix, extends = (
        torch.tensor(each, dtype=torch.int32) if isinstance(each, list) else each
        for each in (batch.prefix_lens, batch.extend_lens)
    )
    if extend_position_info is None:
        extend_position_info = batches.compute_position("triton", prefix, extends, batch.extend_num_tokens)
    return SimpleNamespace(
        batch_size=len(batch.seq_lens),
        forward_mode=batch.forward_mode,
        input_ids=batch.input_ids,
        seq_lens=batch.seq_lens,
        seq_lens_cpu=batch.seq_lens_cpu,
        seq_lens_sum=None,
        req_pool_indices=batch.req_pool_indices,
        out_cache_loc=batch.out_cache_loc,
        out_cache_loc_virtual=None,
        positions=extend_position_info[0],
        extend_start_loc=extend_position_info[1],
        extend_prefix_lens=prefix,
        extend_seq_lens=extends,
        extend_seq_lens_cpu=batch.extend_lens if isinstance(batch.extend_lens, list) else None,
        mrope_positions=None,
        mamba_track_indices=None,
        encoder_lens=None,
        kv_loc_plan=None,
        kv_loc_cols=None,
        mark_forward_metadata_ready=lambda: None,
        spec_info=batch.spec_info,
    )


@dataclasses.dataclass
class Request:
    """A batch of real requests, and the values that models would have computed.

    Attributes:
        lengths: those of the requests.
        seed: for the random values.
        served: whether onelaunch serves the batch: it has no tree and no ragged verification.
    """

    lengths: tuple[int, ...]
    seed: int
    served: bool = True

    def __post_init__(self) -> None:
        random = torch.Generator(objects.device()).manual_seed(self.seed)
        count = len(self.lengths)
        self.rows = torch.randperm(objects.POOL_ROWS, generator=random)[:count] + 1
        self.topk_p = torch.rand((count, 1), generator=random)
        self.topk_index = torch.randint(1, 1000, (count, 1), generator=random)
        self.hidden = torch.rand((64, HIDDEN), generator=random)
        self.tokens = torch.randint(1, 1000, (count * 16,), generator=random)
        self.accepted = torch.randint(1, 4, (count,), generator=random, dtype=torch.int32)

    def draft(self, runner: Any, page: int, *, cpu_lengths: bool = True) -> None:
        """Does what the engine's worker does in a draft step: write locations, positions, copies, refresh, replay."""
        worker = import_module(WORKER)
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        lengths = torch.tensor(self.lengths)
        spec_info = SimpleNamespace(
            topk_p=self.topk_p,
            topk_index=self.topk_index,
            draft_probs=None,
            hidden_states=self.hidden[: len(lengths)],
            dsa_topk_indices=None,
            num_tokens_per_req=1,
            is_draft_input=lambda: True,
            is_verify_input=lambda: False,
            kv_indptr=None,
            kv_indices=None,
            window_kv_indptr=None,
            window_kv_indices=None,
            ragged_verify_layout=None if self.served else SimpleNamespace(),
        )
        batch = SimpleNamespace(
            seq_lens=lengths,
            seq_lens_cpu=lengths.clone().cpu() if cpu_lengths else None,
            req_pool_indices=self.rows.clone(),
            forward_mode=ForwardMode.DECODE,
            token_to_kv_pool_allocator=SimpleNamespace(page_size=page),
            device=objects.device(),
            multimodal_inputs=[None] * len(lengths),
            spec_info=spec_info,
        )

        def init_new(batch: Any, *arguments: Any, **keywords: Any) -> Any:
            return SimpleNamespace(
                batch_size=len(batch.seq_lens),
                forward_mode=batch.forward_mode,
                actual_forward_mode=None,
                seq_lens=batch.seq_lens,
                seq_lens_cpu=batch.seq_lens_cpu,
                seq_lens_sum=sum(self.lengths) if cpu_lengths else None,
                req_pool_indices=batch.req_pool_indices,
                out_cache_loc=batch.out_cache_loc,
                out_cache_loc_virtual=None,
                origin_out_cache_loc=None,
                positions=spec_info.positions,
                input_ids=None,
                mrope_positions=None,
                rids_int=None,
                bootstrap_room_ids_int=None,
                sampling_info=SimpleNamespace(is_all_greedy=True),
                mark_forward_metadata_ready=lambda: None,
                encoder_lens=None,
                global_num_tokens_cpu=None,
                kv_loc_plan=None,
                kv_loc_cols=None,
                spec_info=spec_info,
            )

        kept, drafter = worker.ForwardBatch, import_module(DRAFTER)
        verify = drafter.build_eagle_verify_input
        worker.ForwardBatch = SimpleNamespace(init_new=init_new)
        drafter.build_eagle_verify_input = lambda *arguments, **keywords: None
        try:
            runner.eagle_worker.draft(batch)
        finally:
            worker.ForwardBatch, drafter.build_eagle_verify_input = kept, verify

    def extend(self, runner: Any, tokens: int, *, cpu_lengths: bool) -> Any:
        """Does what the engine's worker does in a draft extension, from the verification's results."""
        worker, batches = import_module(WORKER), import_module(BATCHES)
        lengths = torch.tensor(self.lengths)
        spec_info = objects.extend_input(
            len(lengths),
            tokens,
            hidden_states=self.hidden[: len(lengths) * tokens],
            num_accept_tokens=self.accepted,
            num_tokens_for_logprob_per_req=tokens,
        )
        spec_info.ragged_verify_layout = None if self.served else SimpleNamespace()
        batch = SimpleNamespace(
            seq_lens=lengths,
            seq_lens_cpu=lengths.clone().cpu() if cpu_lengths else None,
            req_pool_indices=self.rows.clone(),
            out_cache_loc=self.window(runner, tokens),
            forward_mode=batches.ForwardMode.DECODE,
            model_config=runner.model_runner.model_config,
            multimodal_inputs=[None] * len(lengths),
        )

        kept, worker.ForwardBatch = worker.ForwardBatch, SimpleNamespace(init_new=extension_batch)
        try:
            made = worker.prepare_for_draft_extend(
                spec_info,
                batch,
                self.tokens[: len(lengths) * tokens],
                tokens,
                runner.model_runner,
                SimpleNamespace(can_run_graph=lambda batch: True),
                return_hidden_states_before_norm=False,
            )
        finally:
            worker.ForwardBatch = kept
        index = torch.arange(len(lengths)) * tokens + self.accepted - 1
        runner.execute(made, *((index,) if hasattr(runner.buffers, "select_index") else ()))
        return made

    def window(self, runner: Any, tokens: int) -> Tensor:
        """The write locations of a verification, by the engine's own kernel."""
        made: Tensor = getattr(import_module(LOCATIONS), LOCATE)(
            req_pool_indices=self.rows,
            req_to_token=runner.model_runner.req_to_token_pool.req_to_token,
            start_offset=torch.tensor(self.lengths),
            batch_size=len(self.lengths),
            draft_token_num=tokens,
            device=objects.device(),
        )
        return made

    def verify(self, runner: Any, tokens: int, *, cpu_lengths: bool = True) -> Any:
        """Does what precedes a verification's replay: write locations, copies, refresh."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        lengths = torch.tensor(self.lengths)
        count = len(lengths) * tokens
        masked = "FlashInfer" in type(runner.attn_backend).__name__
        spec_info = objects.verify_input(lengths, tokens, topk=1 if self.served else 2, masked=masked, seed=self.seed)
        batch = SimpleNamespace(
            needs_forward_metadata_init=lambda: True,
            batch_size=len(lengths),
            forward_mode=ForwardMode.TARGET_VERIFY,
            input_ids=self.tokens[:count],
            positions=(lengths[:, None] + torch.arange(tokens)).flatten(),
            out_cache_loc=self.window(runner, tokens),
            out_cache_loc_virtual=None,
            seq_lens=lengths,
            seq_lens_cpu=lengths.clone().cpu() if cpu_lengths else None,
            seq_lens_sum=sum(self.lengths) if cpu_lengths else None,
            req_pool_indices=self.rows.clone(),
            max_seq_len_host=None,
            max_seq_len_override=None,
            lora_ids=None,
            encoder_lens=None,
            global_num_tokens_cpu=None,
            can_run_decode_cuda_graph=True,
            num_token_non_padded=None,
            num_token_non_padded_cpu=None,
            global_num_token_non_padded=None,
            kv_loc_plan=None,
            kv_loc_cols=None,
            spec_info=spec_info,
        )
        runner.load_batch(batch)
        return batch
