"""The configurations that ship."""

from __future__ import annotations

from .config import KernelConfig
from .values import check_one_of

_WITH_EXPANDED = (*KernelConfig().fields, "seqlens_expanded")

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
    "flashinfer-decode-3": KernelConfig(num_backends=3, fields=("kv_indptr", "kv_indices"), seqlen_offsets=(1, 2, 3)),
}
"""The configurations that ship: their CUDA is in generated/, and each is compiled and run by the tests."""


def preset(name: str) -> KernelConfig:
    """A shipped configuration by name.

    Raises:
        ConfigError: there is no preset of that name.
    """
    check_one_of("the preset's name", name, tuple(PRESETS))
    return PRESETS[name]
