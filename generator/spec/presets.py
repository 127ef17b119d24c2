"""The configurations that ship."""

from __future__ import annotations

from ..errors import ConfigError, did_you_mean
from .config import KernelConfig
from .fields import vector
from .seams import (
    DRAFT_BUFFERS,
    DRAFT_EXTEND_BUFFERS,
    FLASHINFER,
    INPUTS,
    VERIFY_BUFFERS,
    draft_extend,
    draft_step,
    verify,
    vllm_request_of_token,
    vllm_slot_mapping,
)

_WITH_EXPANDED = (*KernelConfig().fields, "seqlens_expanded")

_VLLM_STEP = {
    **vllm_slot_mapping(0),
    **vllm_slot_mapping(1),
    "decode_lens": vector("1", "request"),
    "per_req_decode_lens": vector("1", "request"),
    "request_of_token_0": vllm_request_of_token(0),
}

_FLASHINFER = ("page_indptr", "pages", "last_page_len", "qo_indptr")

_FA3 = ("cache_seqlens", "cu_seqlens_k", "real_page_table")
_CHAIN = ("positions", "out_cache_loc", "retrieve_index", "retrieve_next_token", "retrieve_next_sibling", "mask")
_LAYOUT = ("prefix_lens", "extend_seq_lens", "seq_lens", "extend_start_loc", "positions")
_TOKENS = 4


PRESETS: dict[str, KernelConfig] = {
    "nsa-decode-1": KernelConfig(),
    "nsa-decode-2": KernelConfig(num_backends=2),
    "nsa-decode-3": KernelConfig(num_backends=3),
    "nsa-decode-7": KernelConfig(num_backends=7),
    "nsa-decode-64": KernelConfig(num_backends=64),
    "nsa-decode-3-full": KernelConfig(num_backends=3, extent="full"),
    "nsa-decode-3-page1": KernelConfig(num_backends=3, page_size=1),
    "nsa-decode-3-page16": KernelConfig(num_backends=3, page_size=16),
    "nsa-decode-3-unaligned": KernelConfig(num_backends=3, vector_bytes=4),
    "nsa-decode-3-int32": KernelConfig(num_backends=3, seq_lens_dtype="int32", req_pool_indices_dtype="int32"),
    "nsa-decode-3-int64": KernelConfig(num_backends=3, req_to_token_dtype="int64"),
    "nsa-decode-3-pages-only": KernelConfig(
        num_backends=3,
        fields=("cache_seqlens", "cu_seqlens_k", "nsa_cache_seqlens", "nsa_cu_seqlens_k", "real_page_table"),
    ),
    "nsa-decode-3-lengths-only": KernelConfig(
        num_backends=3, fields=("cache_seqlens", "cu_seqlens_k", "nsa_cache_seqlens", "nsa_cu_seqlens_k")
    ),
    "nsa-precompute": KernelConfig(extent="full"),
    "nsa-copy-1": KernelConfig(operation="copy"),
    "nsa-copy-3": KernelConfig(operation="copy", num_backends=3),
    "nsa-copy-3-rows": KernelConfig(operation="copy", num_backends=3, mode="target_verify", fields=_WITH_EXPANDED),
    "nsa-target-verify-3": KernelConfig(num_backends=3, mode="target_verify", next_n=4, fields=_WITH_EXPANDED),
    "nsa-draft-extend-3": KernelConfig(num_backends=3, mode="draft_extend", next_n=4, fields=_WITH_EXPANDED),
    "nsa-draft-extend-3-variable": KernelConfig(
        num_backends=3, mode="draft_extend", extend="variable", fields=_WITH_EXPANDED
    ),
    "nsa-decode-3-kpool": KernelConfig(
        num_backends=3, index_kpool=4, fields=(*KernelConfig().fields, "pooled_cache_seqlens", "pooled_real_page_table")
    ),
    "nsa-decode-3-checked": KernelConfig(num_backends=3, checked=True),
    "fa3-decode-3": KernelConfig(
        num_backends=3, fields=("cache_seqlens", "cu_seqlens_k", "real_page_table"), seqlen_offsets=(1, 2, 3)
    ),
    "trtllm-mha-decode-3": KernelConfig(
        num_backends=3,
        fields=("cache_seqlens", "cu_seqlens_k", "real_page_table"),
        seqlen_offsets=(1, 2, 3),
        page_size=32,
    ),
    "flashmla-decode-3": KernelConfig(num_backends=3, fields=("cache_seqlens", "real_page_table"), page_fill=-1),
    "nsa-decode-3-schedule": KernelConfig(
        num_backends=3, fields=(*KernelConfig().fields, "paged_mqa_schedule_metadata")
    ),
    "nsa-target-verify-3-schedule": KernelConfig(
        num_backends=3,
        mode="target_verify",
        next_n=4,
        schedule_per="row",
        fields=(*_WITH_EXPANDED, "paged_mqa_schedule_metadata"),
    ),
    "flashmla-dense-decode-3": KernelConfig(
        num_backends=3,
        fields=("cache_seqlens", "real_page_table", "flashmla_metadata", "num_splits"),
        page_fill=-1,
    ),
    "sglang-draft-2": KernelConfig(
        num_backends=2,
        fields=(*_FA3, *DRAFT_BUFFERS),
        distinct=tuple((name, 1) for name in DRAFT_BUFFERS),
        declare=draft_step(3),
        inputs=INPUTS,
        seqlen_offsets=(1, 2),
        padding_len=1,
    ),
    "sglang-verify": KernelConfig(
        fields=(*_FA3, *VERIFY_BUFFERS),
        declare=verify(_TOKENS),
        inputs=INPUTS,
        constants={"draft_tokens": _TOKENS},
        seqlen_offsets=(_TOKENS,),
        padding_len=1,
    ),
    "sglang-verify-chain": KernelConfig(
        fields=_CHAIN, declare=verify(_TOKENS), inputs=INPUTS, constants={"draft_tokens": _TOKENS}
    ),
    "sglang-draft-extend": KernelConfig(
        fields=(*_FA3, "cu_seqlens_q", *DRAFT_EXTEND_BUFFERS),
        declare=draft_extend(_TOKENS),
        inputs=INPUTS,
        constants={"draft_tokens": _TOKENS},
        seq_lens_dtype="int32",
        seqlen_offsets=(_TOKENS,),
        padding_len=1 - _TOKENS,
    ),
    "sglang-draft-extend-layout": KernelConfig(
        fields=_LAYOUT, declare=draft_extend(_TOKENS), inputs=INPUTS, constants={"draft_tokens": _TOKENS}
    ),
    "vllm-draft-step": KernelConfig(
        fields=(
            *("cache_seqlens", "page_indices", "paged_mqa_schedule_metadata"),
            *("slots_0", "slots_1", "decode_lens", "per_req_decode_lens", "request_of_token_0"),
        ),
        declare=_VLLM_STEP,
        extent="full",
        page_size=1,
        seq_lens_dtype="int32",
        req_pool_indices_dtype="int32",
        inputs={"idx": "int64", "position": "int64", "last": "int32"},
        constants={"size_0": 64, "size_1": 16},
        sources={"table_0": "int32", "table_1": "int32"},
        maps={"query_end_0": ("int32", 0)},
    ),
    "flashinfer-pages-3": KernelConfig(
        num_backends=3,
        fields=(*_FLASHINFER, *("host_page_indptr", "host_last_page_len", "host_qo_indptr")),
        declare={**FLASHINFER, **{f"host_{name}": FLASHINFER[name] for name in _FLASHINFER if name != "pages"}},
        seqlen_offsets=(1, 2, 3),
        page_size=16,
        constants={"query_len": 1},
    ),
    "flashinfer-decode-3": KernelConfig(num_backends=3, fields=("kv_indptr", "kv_indices"), seqlen_offsets=(1, 2, 3)),
    "triton-decode-3": KernelConfig(
        num_backends=3,
        fields=("kv_indptr", "kv_indices", "num_kv_splits"),
        distinct=(("num_kv_splits", 1),),
        dtypes=(("kv_indices", "int64"),),
        seqlen_offsets=(1, 2, 3),
    ),
}
"""The shipped configurations. Their CUDA is in generated/, and the tests compile and run each of them."""

PURPOSES: dict[str, str] = {
    "nsa-decode-1": "DSA with one backend",
    "nsa-decode-2": "DeepSeek sparse attention (DSA, NSA) with two draft steps",
    "nsa-decode-3": "DSA with three draft steps; the usual case",
    "nsa-decode-7": "DSA with seven draft steps",
    "nsa-decode-64": "64 backends in one launch",
    "nsa-decode-3-full": "all columns below max_len, as the functions that take lists write them",
    "nsa-decode-3-page1": "pages of one token",
    "nsa-decode-3-page16": "pages of 16 tokens",
    "nsa-decode-3-unaligned": "tables whose rows aren't aligned to 16 bytes",
    "nsa-decode-3-int32": "seq_lens and req_pool_indices of int32",
    "nsa-decode-3-int64": "req_to_token of int64",
    "nsa-decode-3-pages-only": "without the wide table page_indices",
    "nsa-decode-3-lengths-only": "lengths and running sums; no table",
    "nsa-precompute": "what precompute_decode_metadata_cuda runs",
    "nsa-copy-1": "what fused_metadata_copy_cuda runs, to one backend",
    "nsa-copy-3": "the same, to three backends",
    "nsa-copy-3-rows": "the same, to three backends, with several rows per request",
    "nsa-target-verify-3": "verification of four tokens per request, one row each",
    "nsa-draft-extend-3": "draft extension by four tokens per request",
    "nsa-draft-extend-3-variable": "draft extension by a different number of tokens per request",
    "nsa-decode-3-kpool": "pools of four tokens (index_kpool)",
    "nsa-decode-3-checked": "checks rows and lengths, and reports those out of range",
    "fa3-decode-3": "SGLang's FA3 with three draft steps, pages of 64",
    "trtllm-mha-decode-3": "SGLang's TRTLLM-MHA with three draft steps, pages of 32",
    "flashmla-decode-3": "FlashMLA and TRTLLM-MLA: -1 in columns after the live ones",
    "nsa-decode-3-schedule": "DSA with DeepGEMM's schedule in the same launch",
    "nsa-target-verify-3-schedule": "verification with DeepGEMM's schedule, one item per row",
    "flashmla-dense-decode-3": "dense FlashMLA with its schedule in the same launch",
    "sglang-draft-2": "SGLang's draft step: a padded graph's input buffers and FA3's two backends of three draft steps",
    "sglang-verify": "SGLang's verification of four tokens: a padded graph's input buffers and FA3's tensors",
    "sglang-verify-chain": "SGLang's chain of four tokens: positions, write locations, retrieve indices, mask",
    "sglang-draft-extend": "SGLang's draft extension by four tokens: a padded graph's buffers and FA3's tensors",
    "sglang-draft-extend-layout": "SGLang's draft extension: prefix, extend, new lengths, starts and positions",
    "vllm-draft-step": "vLLM's drafter with two KV-cache groups: slot mappings, sparse indexer, schedule",
    "flashinfer-pages-3": "FlashInfer: what the plans of three wrappers read, pages of 16, on the host too",
    "flashinfer-decode-3": "FlashInfer: flattened indices of three draft steps",
    "triton-decode-3": "SGLang's Triton attention with three draft steps: the same, and the steps' split counts",
}
"""The purpose of each preset, in one line."""


# Removed presets, with the reason; kept for one release.
_GONE = {"vllm-decode-3": "vLLM's draft steps advance one object in place; vllm-draft-step is one of these steps"}


def preset(name: str) -> KernelConfig:
    """A shipped configuration by name.

    Raises:
        ConfigError: there is no preset of that name; the message suggests the nearest one.
    """
    if name in _GONE:
        raise ConfigError(f"The preset {name!r} is gone since 0.2: {_GONE[name]}.")
    if name not in PRESETS:
        raise ConfigError(
            f"There is no preset {name!r}.{did_you_mean(name, PRESETS)}\n`onelaunch list` prints all of them."
        )
    return PRESETS[name]
