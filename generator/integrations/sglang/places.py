"""Where each of SGLang's backend classes refreshes its metadata, and the engine's steps that follow.

``after`` runs those steps on each child and its metadata, with the engine's own functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .captured import SCHEDULE
from .wrappers import host_lengths, plan_on_the_host

# Arguments: the children with their metadata, as Refresher.run returns them; the forward batch; its mode; whether the
# launch made DeepGEMM's schedules.
After = Callable[[list[tuple[Any, Any]], Any, str, bool], None]
# Arguments: the backend, the forward batch and its mode.
Inputs = Callable[[Any, Any, str], tuple[Tensor, ...] | None]

OUT_GRAPH = "init_forward_metadata_out_graph"
IN_GRAPH = "init_forward_metadata_in_graph"
LISTS_KERNEL = "generate_draft_decode_kv_indices"


@dataclass(frozen=True)
class Place:
    """One backend class of SGLang's.

    Attributes:
        refreshed: a description of what the launch refreshes.
        stays: a description of the engine's steps that still run.
        modes: the modes that are served; others run the engine's own code.
        after: runs the steps of ``stays``; None if there are none, or if the engine's code around the replaced method
            still runs them.
        method: what the launch replaces: everything before a replay (OUT_GRAPH), the kernel that a graph records
            (IN_GRAPH), or the kernel that fills kv_indptr and kv_indices (LISTS_KERNEL).
        lists: whether it refreshes kv_indptr and kv_indices, which aren't kept for each batch size.
        leave: what the launch leaves to ``after``; see captured.buffers_from.
        extends: whether a draft extension without a graph is served too; see extension.py.
        inputs: makes the further inputs of a launch, or returns None if the engine's own code must run; None if the
            launch has no further inputs.
    """

    refreshed: str
    stays: str
    modes: tuple[str, ...]
    after: After | None = None
    method: str = OUT_GRAPH
    lists: bool = False
    leave: tuple[str, ...] = ()
    extends: bool = False
    inputs: Inputs | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods that are replaced on the backend."""
        return (OUT_GRAPH, IN_GRAPH) if self.method == IN_GRAPH else (self.method,)


def _dsa(pairs: list[tuple[Any, Any]], batch: Any, mode: str, schedules: bool) -> None:
    for child, metadata in pairs:
        child.set_dsa_prefill_impl(forward_batch=None)
        if getattr(metadata, SCHEDULE, None) is not None:
            lengths = child._build_paged_mqa_schedule_2d_ctx_lens(
                _forward_mode(batch, child),
                metadata.cache_seqlens_int32,
                metadata.dsa_seqlens_expanded,
                batch.batch_size,
            )
            if not schedules:
                child._refresh_paged_mqa_schedule_metadata(metadata, lengths)
            child._refresh_topk_v2_plan(metadata)
            # With one column it is a view of the lengths, so it is up to date.
            if metadata.paged_mqa_ctx_lens_2d.data_ptr() != lengths.data_ptr():
                metadata.paged_mqa_ctx_lens_2d.copy_(lengths)
        if child.dsa_decode_impl == "flashmla_kv":
            lengths = metadata.dsa_cache_seqlens_int32
            metadata.flashmla_metadata.slice(slice(0, len(lengths) + 1)).copy_(
                child._compute_flashmla_metadata(cache_seqlens=lengths, seq_len_q=1)
            )
        child.forward_metadata = metadata


def _forward_mode(batch: Any, child: Any) -> Any:
    """The mode that a child sees: the children of a multi-step backend always decode."""
    if batch.forward_mode.is_target_verify() or batch.forward_mode.is_draft_extend_v2():
        return batch.forward_mode
    return sys.modules[type(child).__module__].ForwardMode.DECODE


def _fa3_steps(pairs: list[tuple[Any, Any]], batch: Any, mode: str, schedules: bool) -> None:
    for child, metadata in pairs:
        child.forward_metadata = metadata


def _fa3(pairs: list[tuple[Any, Any]], batch: Any, mode: str, schedules: bool) -> None:
    ((child, metadata),) = pairs
    child.forward_metadata = metadata
    if mode == "target_verify" or (mode == "decode" and metadata.scheduler_metadata is None):
        return
    bs, longest = batch.batch_size, batch.seq_lens_cpu if getattr(child, "needs_cpu_seq_lens", True) else None
    metadata.max_seq_len_k = child.max_context_len if longest is None else int(longest[:bs].max())
    if mode == "draft_extend":
        extended = batch.spec_info.extend_seq_lens_cpu
        metadata.max_seq_len_q = max(extended) if extended else batch.spec_info.num_tokens_per_req
        return
    made = child._compute_scheduler_metadata(
        bs, metadata.max_seq_len_k, metadata.cache_seqlens_int32, metadata.cu_seqlens_q
    )
    if made is not None:
        child._sched_meta_buf[: len(made)] = made
        child._sched_meta_buf[len(made) :] = 0


def _extended(backend: Any, batch: Any, mode: str) -> tuple[Tensor, ...] | None:
    """In draft_extend the number of tokens that each request is extended by."""
    if mode != "draft_extend":
        return ()
    extended = getattr(batch.spec_info, "extend_seq_lens_tensor", None)
    return None if extended is None else (extended,)


def _triton_steps(pairs: list[tuple[Any, Any]], batch: Any, mode: str, schedules: bool) -> None:
    """Computes the split counts, which all children share."""
    bs, child = batch.batch_size, pairs[-1][0]
    child.get_num_kv_splits(child.cuda_graph_num_kv_splits[:bs], batch.seq_lens[:bs])


def _triton_inputs(backend: Any, batch: Any, mode: str) -> tuple[Tensor, ...] | None:
    """As _extended; None unless each request has the captured number of tokens."""
    if mode != "decode" and batch.spec_info.num_tokens_per_req != backend.num_draft_tokens:
        return None
    return _extended(backend, batch, mode)


def _triton(pairs: list[tuple[Any, Any]], batch: Any, mode: str, schedules: bool) -> None:
    """Computes the split counts in decode, and copies the mask in a verification."""
    ((child, _),) = pairs
    if mode == "target_verify":
        mask = batch.spec_info.custom_mask
        # If SGLang's worker wrote the mask into this buffer itself, there is nothing to copy.
        if mask is not None and mask is not child.verify_mask.buffer:
            child.verify_mask.buffer[: mask.shape[0]] = mask
    elif mode == "decode":
        bs = batch.batch_size
        # Newer versions have a third argument.
        uneven = [child.cuda_graph_uneven_batch] if hasattr(child, "cuda_graph_uneven_batch") else []
        child.get_num_kv_splits(child.cuda_graph_num_kv_splits[:bs], batch.seq_lens[:bs], *uneven)


def _flashmla(pairs: list[tuple[Any, Any]], batch: Any, mode: str, schedules: bool) -> None:
    """Makes dense FlashMLA's schedule, which is the same for all children, and the object that attention reads."""
    bs, child = batch.batch_size, pairs[0][0]
    engine = sys.modules[type(child).__module__]
    rows = 1 if mode == "decode" else child.num_draft_tokens
    added = rows if mode == "target_verify" else 0
    lengths, columns = batch.seq_lens[:bs].to(torch.int32), None
    if added:
        lengths = lengths + added
    if batch.seq_lens_cpu is not None:
        columns = -(-(int(batch.seq_lens_cpu[:bs].max()) + added) // engine.PAGE_SIZE)
    made = engine.get_mla_metadata(lengths, rows * child.num_q_heads, 1, is_fp8_kvcache=child.is_fp8_kvcache)
    for child, table in pairs:
        kept = child.cuda_graph_mla_metadata[: len(made[0])], child.cuda_graph_num_splits[: bs + 1]
        for old, new in zip(kept, made, strict=True):
            old.copy_(new)
        child.cuda_graph_mla_metadata_view, child.cuda_graph_num_splits_view = kept
        child.forward_metadata = engine.FlashMLADecodeMetadata(
            *kept, child.cuda_graph_kv_indices[:bs, :columns], table.seq_lens_k
        )


_EVERY_MODE = ("decode", "target_verify", "draft_extend")
_DSA_STAYS = "DeepGEMM's schedule, the top-k plan and sparse FlashMLA's schedule"
_LENGTHS = "lengths, running sums and tables"
_LISTS = "kv_indptr and kv_indices"
_PLANS = "FlashInfer's plans on the host"

PLACES = {
    "DeepseekSparseAttnMultiStepBackend": Place(_LENGTHS, _DSA_STAYS, ("decode",), _dsa),
    "DeepseekSparseAttnBackend": Place(_LENGTHS, _DSA_STAYS, _EVERY_MODE, _dsa),
    "FlashAttentionMultiStepBackend": Place(_LENGTHS, "nothing", ("decode",), _fa3_steps),
    "FlashAttentionBackend": Place(
        _LENGTHS, "scheduler_metadata", _EVERY_MODE, _fa3, leave=("scheduler_metadata",), extends=True,
        inputs=_extended,
    ),
    "TRTLLMHAAttnMultiStepDraftBackend": Place(_LENGTHS, "nothing", ("decode",), method=IN_GRAPH),
    "TRTLLMHAAttnBackend": Place(_LENGTHS, "nothing", _EVERY_MODE, method=IN_GRAPH),
    "FlashMLAMultiStepDraftBackend": Place("tables", "FlashMLA's schedule", ("decode",), _flashmla),
    "FlashMLABackend": Place("tables and lengths", "FlashMLA's schedule", _EVERY_MODE, _flashmla),
    "TRTLLMMLAMultiStepDraftBackend": Place("tables and lengths", "nothing", ("decode",)),
    "TRTLLMMLABackend": Place("tables and lengths", "nothing", _EVERY_MODE),
    "TritonMultiStepDraftBackend": Place("kv_indptr, kv_indices and split counts", "nothing", ("decode",), lists=True),
    "TritonAttnBackend": Place(
        "kv_indptr, kv_indices, qo_indptr and mask_indptr", "masks and split counts", _EVERY_MODE, _triton,
        lists=True, inputs=_triton_inputs,
    ),
    "FlashInferMultiStepDraftBackend": Place(
        _LISTS, _PLANS, ("decode",), plan_on_the_host, lists=True, inputs=host_lengths
    ),
    "FlashInferAttnBackend": Place(
        "kv_indptr, kv_indices, qo_indptr and mask_indptr", f"masks, their packing and {_PLANS}", _EVERY_MODE,
        plan_on_the_host, lists=True, inputs=host_lengths,
    ),
    "FlashInferMLAMultiStepDraftBackend": Place(_LISTS, _PLANS, ("decode",), method=LISTS_KERNEL, lists=True),
}  # fmt: skip
# A multi-step Triton backend whose split counts the launch can't make.
WITHOUT_SPLITS = Place(_LISTS, "split counts", ("decode",), _triton_steps, lists=True)
