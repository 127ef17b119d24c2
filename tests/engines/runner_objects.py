"""SGLang's own graph runners of a speculative step on a CPU, without graphs: the work before a replay is SGLang's.

The constructors capture graphs, so the objects are made without them and get the attributes that the methods read.
"""

from __future__ import annotations

import contextlib
import dataclasses
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import objects
import torch
from objects import Batch
from torch import Tensor

CAPTURED = (2, 5)
WORKER = "sglang.srt.speculative.eagle_worker_common"
DRAFTER = "sglang.srt.speculative.eagle_worker_v2"
BATCHES = "sglang.srt.model_executor.forward_batch_info"
LOCATIONS, LOCATE = "sglang.kernels.ops.speculative.cache_locs", "assign_extend_cache_locs_uniform_func"
HIDDEN = 8
# A graph's buffers with an element per token, and per request.
TOKENS = ("input_ids", "positions", "out_cache_loc")
REQUESTS = ("seq_lens", "req_pool_indices")
# Of the requests of batches, one after the other.
LENGTHS = ((7, 30), (64,), (1, 90, 33, 5, 570), (128, 3, 65))


class _Graph:
    """Stands for a runner's graph: a replay runs what the backend recorded and keeps the buffers' contents."""

    def __init__(self, made: Any, backend: Any, mode: str) -> None:
        self.made, self.backend, self.mode = made, backend, mode
        self.replays = 0

    def can_run(self, *arguments: Any) -> bool:
        return True

    def replay(self, key: Any, forward_batch: Any) -> Any:
        self.replays += 1
        return self.made(key)


def _model_runner(pool: Tensor, backend: Any) -> Any:
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    return SimpleNamespace(
        model_config=SimpleNamespace(vocab_size=1000, model_is_mrope=False),
        spec_algorithm=SpeculativeAlgorithm.from_string("EAGLE"),
        device_timer=None,
        canary_manager=None,
        req_to_token_pool=SimpleNamespace(req_to_token=pool),
        attn_backend=backend,
        device=objects.device(),
        hisparse_coordinator=None,
        lora_manager=None,
        is_draft_worker=True,
        server_args=SimpleNamespace(speculative_use_rejection_sampling=False),
        war_fastpath_read_done_event=None,
        token_to_kv_pool=None,
    )


def _runner(module: str, name: str, attention: Any, pool: Tensor, width: int, **attributes: Any) -> Any:
    kind = getattr(import_module(module), name)
    made = object.__new__(kind)
    common = {
        "model_runner": _model_runner(pool, attention),
        "deepep_adapter": SimpleNamespace(replay=lambda: None),
        "captured_req_width": width,
        "require_mlp_tp_gather": False,
        "require_gathered_buffer": False,
        "require_mlp_sync": False,
        "require_attn_tp_gather": False,
        "disable_padding": False,
        "capture_bs": list(CAPTURED),
        "max_bs": max(CAPTURED),
        "seq_len_fill_value": objects.FILL,
        "topk": 1,
        "attn_backend": attention,
        "device_module": SimpleNamespace(Event=lambda: SimpleNamespace(record=lambda: None)),
        "_metadata_glue": None,
        "model_context": contextlib.nullcontext,
    }
    for attribute, value in {**common, **attributes}.items():
        setattr(made, attribute, value)
    return made


def _buffers(kind: Any, **tensors: Tensor) -> Any:
    empty: dict[str, Any] = {field.name: None for field in dataclasses.fields(kind)}
    return kind(**{name: tensor for name, tensor in {**empty, **tensors}.items() if name in empty})


def _captured(backend: Any, mode: str, tokens: int) -> None:
    rows = 1 if mode == "decode" else tokens
    backend.init_cuda_graph_state(max(CAPTURED), max(CAPTURED) * rows)
    for bs in CAPTURED:
        batch = Batch((objects.FILL,) * bs, bs, mode, tokens, masked="FlashInfer" in type(backend).__name__).make()
        backend.init_forward_metadata_out_graph(batch, in_capture=True)
        backend.init_forward_metadata_in_graph(batch)


def draft_runner(name: str, pool: Tensor, page: int, steps: int) -> Any:
    """EAGLEDraftCudaGraphRunner over a family's multi-step backend."""
    module = "sglang.srt.speculative.eagle_draft_cuda_graph_runner"
    backend = objects.backend(name, pool, page=page, steps=steps)
    _captured(backend, "decode", 1)
    count = max(CAPTURED)
    buffers = _buffers(
        import_module(module).EagleDraftInputBuffers,
        input_ids=torch.zeros(count, dtype=torch.int64),
        req_pool_indices=torch.zeros(count, dtype=torch.int64),
        out_cache_loc=torch.zeros(count * steps, dtype=torch.int64),
        positions=torch.zeros(count, dtype=torch.int64),
        mrope_positions=torch.zeros((3, count), dtype=torch.int64),
        seq_lens=torch.ones(count, dtype=torch.int64),
        seq_lens_cpu=torch.ones(count, dtype=torch.int64, device="cpu"),
        extend_seq_lens=torch.ones(count, dtype=torch.int32),
        topk_p=torch.zeros((count, 1)),
        topk_index=torch.zeros((count, 1), dtype=torch.int64),
        hidden_states=torch.zeros((count, HIDDEN)),
    )
    graph = _Graph(lambda key: (torch.zeros((key.size, 1), dtype=torch.int64),) * 3 + (None,), backend, "decode")
    worker = object.__new__(import_module(DRAFTER).EagleDraftWorker)
    made = _runner(
        module,
        "EAGLEDraftCudaGraphRunner",
        backend,
        pool,
        1,
        eagle_worker=worker,
        speculative_num_steps=steps,
        draft_attn_backend=backend,
        buffers=buffers,
        backend=graph,
        temperatures=torch.ones((count, 1)),
    )
    # Only the attributes that its draft() reads. Without a target model it makes no verification input.
    worker.__dict__.update(
        cuda_graph_runner=made,
        draft_runner=made.model_runner,
        draft_attn_backend=backend,
        req_to_token_pool=made.model_runner.req_to_token_pool,
        topk=1,
        speculative_num_steps=steps,
        speculative_num_draft_tokens=steps + 1,
        seed_dsa_topk_from_draft_extend=False,
        tree_mask_mode=None,
        device=objects.device(),
        target_worker=SimpleNamespace(model_runner=SimpleNamespace(kv_index_translator=None)),
    )
    return made


def extend_runner(name: str, pool: Tensor, page: int, tokens: int) -> Any:
    """EAGLEDraftExtendCudaGraphRunner over a family's single backend."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    module = "sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner"
    backend = objects.backend(name, pool, page=page, draft_tokens=tokens)
    _captured(backend, "draft_extend", tokens)
    count = max(CAPTURED)
    buffers = _buffers(
        import_module(module).EagleDraftExtendInputBuffers,
        input_ids=torch.zeros(count * tokens, dtype=torch.int64),
        req_pool_indices=torch.zeros(count, dtype=torch.int64),
        out_cache_loc=torch.ones(count * tokens, dtype=torch.int64),
        positions=torch.zeros(count * tokens, dtype=torch.int64),
        mrope_positions=torch.zeros((3, count * tokens), dtype=torch.int64),
        hidden_states=torch.zeros((count * tokens, HIDDEN)),
        seq_lens=torch.ones(count, dtype=torch.int64),
        seq_lens_cpu=torch.ones(count, dtype=torch.int64, device="cpu"),
        extend_seq_lens=torch.full((count,), tokens, dtype=torch.int32),
        num_correct_drafts=torch.full((count,), tokens, dtype=torch.int32),
        num_accept_tokens=torch.full((count,), tokens, dtype=torch.int32),
        select_index=torch.arange(1, count + 1) * tokens - 1,
        next_token_logits_buffer=torch.zeros(1),
    )
    output = SimpleNamespace(next_token_logits=torch.zeros((64, 1)), hidden_states=torch.zeros((64, 1)))
    return _runner(
        module,
        "EAGLEDraftExtendCudaGraphRunner",
        backend,
        pool,
        tokens,
        forward_mode=ForwardMode.DRAFT_EXTEND_V2,
        draft_extend_attn_backend=backend,
        extend_seq_lens_cpu=[tokens] * count,
        eagle_worker=SimpleNamespace(),
        buffers=buffers,
        backend=_Graph(lambda key: output, backend, "draft_extend"),
    )


def verify_runner(name: str, pool: Tensor, page: int, tokens: int) -> Any:
    """The target's DecodeCudaGraphRunner, which verifies, over a family's single backend."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    registries = import_module("sglang.srt.model_executor.cuda_graph_buffer_registry")
    backend = objects.backend(name, pool, page=page, draft_tokens=tokens)
    _captured(backend, "target_verify", tokens)
    count = max(CAPTURED)
    registry = registries.build_decode_registry(
        device=torch.device(objects.device()),
        max_bs=count,
        max_num_token=count * tokens,
        seq_len_fill_value=objects.FILL,
        cache_loc_dtype=torch.int64,
        register_global_num_tokens=False,
        share_pool=False,
    )
    slots = {slot: registry.get_slot(slot).buffer for slot in (*TOKENS, *REQUESTS, "seq_lens_cpu")}
    made = _runner(
        "sglang.srt.model_executor.runner.decode_cuda_graph_runner",
        "DecodeCudaGraphRunner",
        backend,
        pool,
        tokens,
        buffers=SimpleNamespace(
            **slots, mamba_track_indices=None, mamba_track_mask=None, encoder_lens=None, num_token_non_padded=None
        ),
        buffer_registry=registry,
        capture_forward_mode=ForwardMode.TARGET_VERIFY,
        ragged_verify_mode=None,
        dllm_uses_input_embeds=False,
        dllm_input_preparation=None,
        enable_two_batch_overlap=False,
        enable_pdmux=False,
        is_encoder_decoder=False,
        attention_graph_variants=None,
        record_nolora_graph=False,
        _validate_capture_hidden_mode=lambda batch: None,
    )
    made.model_runner.is_draft_worker = False
    return made


def draft_worker(name: str, pool: Tensor, page: int, tokens: int) -> Any:
    """EagleDraftWorker without a graph for the extension. Its target uses the family's single backend."""
    target = verify_runner(name, pool, page, tokens)
    worker = object.__new__(import_module(DRAFTER).EagleDraftWorker)
    count, steps = max(CAPTURED), tokens - 1
    draft = _model_runner(pool, SimpleNamespace(init_forward_metadata=lambda batch: None))
    worker.__dict__.update(
        target_worker=SimpleNamespace(model_runner=target.model_runner),
        draft_runner=draft,
        req_to_token_pool=draft.req_to_token_pool,
        topk=1,
        speculative_num_steps=steps,
        speculative_num_draft_tokens=tokens,
        seed_dsa_topk_from_draft_extend=False,
        cuda_graph_runner_for_draft_extend=None,
        plan_stream=None,
        plan_stream_ctx=contextlib.nullcontext(),
        tree_mask_mode=import_module("sglang.srt.speculative.eagle_utils").default_tree_mask_mode(),
        device=objects.device(),
        _topk1_parents_prealloc=torch.arange(-1, steps - 1).repeat(count, 1),
        _topk1_score_indices_prealloc=torch.arange(steps).repeat(count, 1),
    )
    target.model_runner.decode_cuda_graph_runner = target
    draft.forward = lambda batch: SimpleNamespace(
        logits_output=SimpleNamespace(next_token_logits=torch.eye(64), hidden_states=torch.arange(64)[:, None])
    )
    return worker


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
