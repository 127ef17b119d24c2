"""Configurations that onelaunch doesn't serve, and the attribute that reveals each.

Their tensors follow other rules, so a refresh would write wrong values without an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from ..errors import ArgumentError

_CONTEXT = "sglang.srt.runtime_context"


def _is_set(value: Any) -> bool:
    """Whether an attribute is neither None nor False nor 0."""
    return bool(value)


def _is_there(value: Any) -> bool:
    return value is not None


def _above_one(value: Any) -> bool:
    return (value or 1) > 1


_UNIFIED = "the pool is unified: req_to_token holds virtual ids"
_PART_OF_TOKENS = "decode context parallelism: a rank has only some of the tokens"
_SWA = "a sliding-window pool has a second table and write locations"

# The attribute, the test of its value, what it means, and whether even the tensors that onelaunch does refresh would be
# wrong. The attribute is looked up in the backend and in each of its children. "0.5.17" marks attributes that only
# SGLang 0.5.17 has.
_REFUSED: tuple[tuple[str, Callable[[Any], bool], str, bool], ...] = (
    ("kv_index_translator.is_translating", _is_set, _UNIFIED, True),
    ("kv_index_translator.reads_are_translated", _is_set, _UNIFIED, True),
    ("_unified_hooks.enabled", _is_set, _UNIFIED, True),  # 0.5.17: FA3
    ("_v2p_page_table", _is_there, _UNIFIED, True),  # 0.5.17: TRTLLM-MLA
    ("_translate_kv_loc", _is_there, _UNIFIED, True),  # 0.5.17: Triton
    ("indices_updater_decode._translate_kv_loc_dense", _is_there, _UNIFIED, True),  # 0.5.17: FlashInfer-MLA
    ("draft_window_size", _is_set, "lists leave out the middle of a request", True),
    ("draft_sink_size", _is_set, "lists leave out the middle of a request", True),
    ("is_prefill_aware_swa", _is_set, "tables leave out a part of the prompt", True),
    ("is_encoder_decoder", _is_set, "encoder tokens lie before a request's own", True),
    ("dcp_size", _above_one, _PART_OF_TOKENS, True),
    ("dcp_world_size", _above_one, _PART_OF_TOKENS, True),
    ("_kv_shard_pool", _is_there, "the pool is sharded: a rank has some of the tokens", True),
    ("topk", _above_one, "a draft tree has rows for each branch", False),
    ("window_rail", _is_set, "layers with a sliding window have lists of their own", False),
    ("window_kv_indptr", _is_there, "layers with a sliding window have lists of their own", False),
    ("dllm_attention", _is_there, "diffusion models attend by other metadata", False),
    ("use_sliding_window_kv_pool", _is_set, _SWA, False),
    ("_swa_kv_pool", _is_there, _SWA, False),
    ("has_local_attention", _is_set, "local attention has tables of chunks", False),
    ("expand_encoder_only_verify", _is_set, "encoder layers have their own rows", False),
    ("dsa_index_kpool", _above_one, "k-pools have write plans, which onelaunch doesn't make", False),
    ("hisparse_coordinator", _is_there, "HiSparse moves tokens between pools", False),
)


def _value(owner: Any, path: str) -> Any:
    """The attribute at a dotted path; None if there is none."""
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner


def _context_parallel(backend: Any) -> bool:
    """Whether the process decodes with context parallelism. TRTLLM-MLA reads that from SGLang's context."""
    context = sys.modules.get(_CONTEXT)
    if context is None or not type(backend).__module__.startswith("sglang."):
        return False
    return bool(getattr(context.get_parallel(), "dcp_enabled", False))


def refusal(backend: Any, *, partly: bool = False) -> str:
    """Why a backend isn't served: the attribute and its meaning; "" if it is served.

    Args:
        backend: a multi-step backend with ``attn_backends``, or a single backend.
        partly: whether to accept a backend with tensors that onelaunch doesn't refresh.
    """
    owners = [backend, *(getattr(backend, "attn_backends", None) or ())]
    for path, shows, reason, wrong in _REFUSED:
        if (wrong or not partly) and any(shows(_value(owner, path)) for owner in owners):
            return f"{path} is set: {reason}"
    return f"dcp_enabled is set: {_PART_OF_TOKENS}" if _context_parallel(backend) else ""


def not_served(target: Any, reason: str) -> ArgumentError:
    """The error for an engine's object that is refused for a reason."""
    return ArgumentError(f"{type(target).__name__} isn't served: {reason}. The engine's own code serves it.")


def batch_refusal(forward_batch: Any) -> str:
    """Why a batch isn't served although its backend is; "" if it is served."""
    if getattr(forward_batch, "encoder_lens", None) is not None:
        return "forward_batch.encoder_lens is set: encoder tokens lie before a request's own"
    spec_info = getattr(forward_batch, "spec_info", None)
    if getattr(spec_info, "ragged_verify_layout", None) is not None:
        return "spec_info.ragged_verify_layout is set: requests verify different numbers of tokens"
    return ""


def wide_table_refusal(backend: Any) -> str:
    """Why DSA's page_table_1 must be refreshed: what reads it; "" if no attribute shows a reader.

    Without speculation SGLang itself omits the table under the same conditions. Attention then reads the indices of
    the fused top-k, and the top-k and the indexer read real_page_table.
    """
    for child in getattr(backend, "attn_backends", None) or [backend]:
        topk = getattr(child, "dsa_index_topk", None)
        chooser = getattr(child, "dsa_topk_backend", None)
        version2 = getattr(chooser, "should_use_topk_v2", None)
        if not getattr(child, "use_fused_topk", False):
            return "use_fused_topk is False: the top-k reads it"
        if version2 is None or not version2():
            return "dsa_topk_backend isn't SGLang's top-k v2: the top-k reads it"
        if topk is None or not 0 < topk <= 2048:
            return f"dsa_index_topk is {topk}, above what the fused top-k does (2048): the top-k reads it"
        if (getattr(child, "dsa_index_kpool", None) or 1) > 1:
            return "dsa_index_kpool is above 1: the top-k of pools reads it"
        if getattr(child, "hisparse_coordinator", None) is not None:
            return "hisparse_coordinator is set: HiSparse reads it"
        if (getattr(child, "physical_page_size", None) or getattr(child, "real_page_size", 1)) == 1:
            return "pages have one token: it is the only table"
        if getattr(child, "need_pad_heads", None) is not None:  # set on AMD GPUs only
            return "the indexer of AMD GPUs reads it"
    return ""
