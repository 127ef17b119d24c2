"""SGLang's own attention backends on a CPU, and the objects they need: a model runner, a token pool, a batch.

Tensors are made on PyTorch's default device, which gpu/seams.py changes.

Only plain data is made up here. Everything with behaviour (backends, ForwardMode, translators, kernels) is SGLang's.
"""

from __future__ import annotations

import dataclasses
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PAGES = (64, 32, 16, 1)
POOL_ROWS = 12
CONTEXT = 640
# Speculative decoding lets a length overshoot the context, so SGLang's pool is wider than that.
WIDTH = CONTEXT + 60
HEADS = 16
# The length of padding requests: what get_cuda_graph_seq_len_fill_value() of the backends in FAMILIES returns.
FILL = 1

# SGLang 0.5.17 has no translator: there each backend translates KV indices itself.
HAS_TRANSLATOR = find_spec("sglang.srt.mem_cache.kv_index_translator") is not None

_settings: Any = None
_alone = ExitStack()


def device() -> str:
    """The type of the device that tensors are made on."""
    return torch.get_default_device().type


@dataclass(frozen=True)
class Family:
    """One of SGLang's attention backends.

    Attributes:
        module: the module that defines it.
        multi, single: its multi-step draft class and its single-step class; "" where this project serves none.
        mla: whether its models use multi-head latent attention.
        pages: which of PAGES it supports. DSA has pages of 64 on NVIDIA's GPUs and of 1 on AMD's; others are refused by
            the engine itself.
        in_graph: whether the metadata kernel is recorded in the graph.
    """

    module: str
    multi: str
    single: str
    mla: bool
    pages: tuple[int, ...]
    in_graph: bool = False


FAMILIES = {
    "dsa": Family("dsa_backend", "DeepseekSparseAttnMultiStepBackend", "DeepseekSparseAttnBackend", True, (64, 1)),
    "fa3": Family(
        "flashattention_backend", "FlashAttentionMultiStepBackend", "FlashAttentionBackend", False, (64, 32, 16, 1)
    ),
    "trtllm_mha": Family(
        "trtllm_mha_backend", "TRTLLMHAAttnMultiStepDraftBackend", "TRTLLMHAAttnBackend", False, (64, 32, 16), True
    ),
    "flashmla": Family("flashmla_backend", "FlashMLAMultiStepDraftBackend", "FlashMLABackend", True, (64,)),
    "trtllm_mla": Family("trtllm_mla_backend", "TRTLLMMLAMultiStepDraftBackend", "TRTLLMMLABackend", True, (64, 32)),
    "triton": Family("triton_backend", "TritonMultiStepDraftBackend", "TritonAttnBackend", False, (1, 16, 32, 64)),
    "flashinfer": Family(
        "flashinfer_backend", "FlashInferMultiStepDraftBackend", "FlashInferAttnBackend", False, (1, 16, 32, 64)
    ),
    "flashinfer_mla": Family("flashinfer_mla_backend", "FlashInferMLAMultiStepDraftBackend", "", True, (1, 16, 32, 64)),
}


def settings(**fields: Any) -> None:
    """Installs server arguments in place of the last call's."""
    from sglang.srt.runtime_context import get_context, get_parallel

    global _settings
    if _settings is not None:
        _settings.restore()
    _settings = get_context().override_server_args(**fields)
    _settings.install()
    # This process is rank 0 of one. SGLang 0.5.17 accepts such an override only within a `with`.
    parallel = get_parallel()
    for rank in ("tp", "attn_tp", "attn_cp", "attn_dp", "attn_dcp", "dcp", "pp"):
        alone = {f"{rank}_rank": 0, f"{rank}_size": 1}
        if hasattr(parallel, "override_permanently"):
            parallel.override_permanently(**alone)
        else:
            _alone.enter_context(parallel.override(**alone))


def token_pool(page: int, seed: int) -> Tensor:
    """req_to_token, int32 [POOL_ROWS + 1, WIDTH], with whole pages in random order. Row 0 is for padding: all 0."""
    generator = torch.Generator(device()).manual_seed(seed)
    pages = -(-WIDTH // page)
    order = torch.randperm((POOL_ROWS + 1) * pages, generator=generator).view(POOL_ROWS + 1, pages) + 1
    tokens = (order[:, :, None] * page + torch.arange(page)).reshape(POOL_ROWS + 1, -1)[:, :WIDTH]
    tokens[0] = 0
    return tokens.to(torch.int32).contiguous()


class _KVPool(SimpleNamespace):
    """The attributes of a KV cache that backends read in their constructors."""

    def get_kv_cache_quant_method(self) -> Any:
        from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import KVCacheAttentionAccessKind

        access = SimpleNamespace(kind=KVCacheAttentionAccessKind.PLAIN, scale_recipe=None)
        return SimpleNamespace(resolve_attention_access=lambda *a, **k: access, supports_attention=lambda *a: True)

    def get_key_buffer(self, layer: int) -> Tensor:
        return torch.zeros(1, 1, 64)

    get_value_buffer = get_key_buffer


def model_runner(req_to_token: Tensor, *, page: int, mla: bool, draft: bool, index_topk: int = 256) -> Any:
    """The model runner that a backend's constructor takes."""
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.runtime_context import get_context
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    hf_config = SimpleNamespace(
        architectures=["DeepseekV32ForCausalLM"],
        model_type="of the tests",
        index_topk=index_topk,
        index_kpool=1,
        num_attention_heads=HEADS,
        num_key_value_heads=4,
        num_hidden_layers=2,
        attn_logit_softcapping=None,
        hidden_size=64,
        head_dim=64,
    )
    hf_config.get_text_config = lambda: hf_config
    model_config = SimpleNamespace(
        hf_config=hf_config,
        hf_text_config=hf_config,
        context_len=CONTEXT,
        num_attention_heads=HEADS,
        num_key_value_heads=4,
        num_hidden_layers=2,
        get_num_kv_heads=lambda *a: 4,
        get_max_num_attention_heads=lambda *a: HEADS,
        hidden_size=64,
        head_dim=64,
        v_head_dim=128,
        swa_v_head_dim=128,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        kv_lora_rank=512,
        scaling=1.0,
        dtype=torch.bfloat16,
        attention_arch=AttentionArch.MLA if mla else AttentionArch.MHA,
        is_encoder_decoder=False,
        is_local_attention_model=False,
        is_hybrid_swa=False,
        is_multimodal=False,
        linear_attn_registry_result=None,
        sliding_window_size=None,
    )
    pool = _KVPool(
        size=4096,
        dtype=torch.bfloat16,
        page_size=page,
        index_page_size=page,
        start_layer=0,
        layer_transfer_counter=None,
        kv_cache_dim=576,
        dsa_kv_cache_store_fp8=False,
    )
    allocator = SimpleNamespace(get_kvcache=lambda: pool, page_size=page)
    runner = SimpleNamespace(
        device=device(),
        gpu_id=0,
        page_size=page,
        model_config=model_config,
        model=SimpleNamespace(modules=list),
        token_to_kv_pool=pool,
        token_to_kv_pool_allocator=allocator,
        req_to_token_pool=SimpleNamespace(size=POOL_ROWS, req_to_token=req_to_token),
        is_draft_worker=draft,
        ps=SimpleNamespace(tp_size=1, attn_cp_size=1),
        spec_algorithm=SpeculativeAlgorithm.from_string("EAGLE"),
        server_args=get_context().server_args,
        decode_num_tokens_per_req=lambda *a: 4,
        max_running_requests=POOL_ROWS,
        max_total_num_tokens=4096,
        dtype=torch.bfloat16,
        kv_cache_dtype=torch.bfloat16,
        kv_cache_dtype_str="auto",
        prefill_attention_backend_str="of the tests",
        decode_attention_backend_str="of the tests",
        sliding_window_size=None,
        attention_chunk_size=None,
        is_hybrid_swa=False,
        hisparse_coordinator=None,
    )
    if HAS_TRANSLATOR:
        translators = import_module("sglang.srt.mem_cache.kv_index_translator")
        runner.kv_index_translator = translators.KVIndexTranslator(
            req_to_token=req_to_token,
            token_to_kv_pool_allocator=allocator,
            token_to_kv_pool=pool,
            page_size=page,
            device=device(),
            is_draft_worker=draft,
        )
    return runner


def backend(
    name: str, req_to_token: Tensor, *, page: int, steps: int = 0, draft_tokens: int = 4, draft: bool = False
) -> Any:
    """A backend of a family: the multi-step backend for draft steps, or the single one for verification and extension.

    Args:
        steps: speculative_num_steps, one more than the steps drafted in the graph; 0 for a single backend.
        draft_tokens: speculative_num_draft_tokens.
        draft: whether a single backend belongs to the draft model, as it does for draft extension.
    """
    family = FAMILIES[name]
    settings(
        device="cuda",
        page_size=page,
        speculative_algorithm="EAGLE",
        speculative_eagle_topk=1,
        speculative_num_steps=steps or 3,
        speculative_num_draft_tokens=draft_tokens,
    )
    runner = model_runner(req_to_token, page=page, mla=family.mla, draft=draft or bool(steps))
    module = import_module(f"sglang.srt.layers.attention.{family.module}")
    made = getattr(module, family.multi)(runner, 1, steps) if steps else getattr(module, family.single)(runner)
    assert (made.attn_backends[0] if steps else made).get_cuda_graph_seq_len_fill_value() == FILL
    return made


class _DraftInput(SimpleNamespace):
    """The attributes of a batch's spec_info that backends read."""

    def is_draft_input(self) -> bool:
        return True

    def is_verify_input(self) -> bool:
        return False


def verify_input(lengths: Tensor, tokens: int, *, topk: int = 1, masked: bool = False, seed: int = 0) -> Any:
    """SGLang's verification input.

    Args:
        lengths: those of the real requests, without the draft's tokens.
        masked: whether it has the mask that FlashInfer's attention reads. Here the mask is random, not a tree's: any
            draft token may see any other one.
    """
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    mask = None
    if masked:
        random = torch.Generator(device()).manual_seed(seed)
        seen = [torch.ones((tokens, length + tokens), dtype=torch.bool) for length in lengths.tolist()]
        for each in seen:
            each[:, -tokens:] = torch.rand((tokens, tokens), generator=random) < 0.5
        mask = torch.cat([each.flatten() for each in seen])
    empty: dict[str, Any] = {field.name: None for field in dataclasses.fields(EagleVerifyInput)}
    return EagleVerifyInput(
        **{**empty, "topk": topk, "draft_token_num": tokens, "num_tokens_per_req": tokens, "custom_mask": mask}
    )


def extend_input(count: int, tokens: int, **fields: Any) -> Any:
    """SGLang's draft extension input for ``count`` requests, padding included. By default each accepts one token."""
    from sglang.srt.speculative.eagle_info import EagleDraftExtendInput

    accepted = fields.pop("num_accept_tokens", None)
    accepted = torch.ones(count, dtype=torch.int32) if accepted is None else accepted
    made = EagleDraftExtendInput(
        num_correct_drafts=accepted - 1, num_accept_tokens=accepted, num_tokens_per_req=tokens, **fields
    )
    made.custom_mask = None
    return made


@dataclass(frozen=True)
class Batch:
    """A recipe for forward batches, so that two equal ones can be made.

    Attributes:
        lengths: those of the real requests.
        captured: the batch size of the graph; requests after the real ones are padding.
        mode: onelaunch's name of the forward mode.
        tokens: draft tokens of a request.
        drafting: whether the batch has a spec_info; a target model's plain decode has none.
        masked: whether a verification has a mask.
    """

    lengths: tuple[int, ...]
    captured: int
    mode: str
    tokens: int
    seed: int = 0
    drafting: bool = True
    masked: bool = False

    def make(self, *, cpu_lengths: bool = True) -> Any:
        """A forward batch as a graph runner passes it to a backend: the runner's own buffers, with padding."""
        from sglang.srt.model_executor.forward_batch_info import ForwardMode

        modes = {
            "decode": ForwardMode.DECODE,
            "target_verify": ForwardMode.TARGET_VERIFY,
            "draft_extend": ForwardMode.DRAFT_EXTEND_V2,
        }
        bs, real = self.captured, len(self.lengths)
        extended = torch.full((bs,), self.tokens, dtype=torch.int32)
        generator = torch.Generator(device()).manual_seed(self.seed)
        seq_lens = torch.tensor([*self.lengths, *[FILL] * (bs - real)], dtype=torch.int64)
        rows = torch.randperm(POOL_ROWS, generator=generator)[:bs] + 1
        rows[real:] = 0
        tokens = bs * (1 if self.mode == "decode" else self.tokens)
        # Padded requests of a draft graph have position 0 although their length is 1.
        positions = torch.where(torch.arange(bs) < real, seq_lens, 0) if self.mode == "decode" else torch.zeros(tokens)
        spec_info = self._spec_info(extended)
        spec_info.ragged_verify_layout = None
        spec_info.extend_seq_lens_tensor = extended if self.mode == "draft_extend" else None
        spec_info.extend_seq_lens_cpu = extended.tolist() if self.mode == "draft_extend" else None
        for name in ("kv_indptr", "kv_indices", "window_kv_indptr", "window_kv_indices"):
            setattr(spec_info, name, None)
        return SimpleNamespace(
            batch_size=bs,
            forward_mode=modes[self.mode],
            actual_forward_mode=None,
            seq_lens=seq_lens,
            seq_lens_cpu=seq_lens.clone().cpu() if cpu_lengths else None,
            seq_lens_sum=int(seq_lens.sum()) if cpu_lengths else None,
            req_pool_indices=rows,
            positions=positions.to(torch.int64),
            out_cache_loc=torch.arange(tokens * 8),
            out_cache_loc_virtual=None,
            origin_out_cache_loc=None,
            input_ids=torch.zeros(tokens, dtype=torch.int64),
            extend_seq_lens=extended,
            encoder_lens=None,
            kv_loc_plan=None,
            kv_loc_cols=None,
            spec_info=spec_info if self.drafting else None,
        )

    def _spec_info(self, extended: Tensor) -> Any:
        if self.mode == "target_verify":
            lengths = torch.tensor(self.lengths)
            return verify_input(lengths, self.tokens, masked=self.masked, seed=self.seed)
        if self.mode == "draft_extend":
            return extend_input(self.captured, self.tokens)
        return _DraftInput(num_tokens_per_req=self.tokens, num_accept_tokens=None, custom_mask=None)
