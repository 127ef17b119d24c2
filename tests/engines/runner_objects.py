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
DRAFTER = "sglang.srt.speculative.eagle_worker_v2"
HIDDEN = 8
# A graph's buffers with an element per token, and per request.
TOKENS = ("input_ids", "positions", "out_cache_loc")
REQUESTS = ("seq_lens", "req_pool_indices")


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
