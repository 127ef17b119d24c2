"""The place of a refresh in each of SGLang's backends, and the engine's steps that follow it.

The backend's class determines the place. ``after`` runs the engine's remaining steps, with the engine's own functions,
on each child and its metadata.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .captured import SCHEDULE

# The children with their metadata, as Refresher.run returns them, the forward batch, its mode, and whether the launch
# made DeepGEMM's schedules.
After = Callable[[list[tuple[Any, Any]], Any, str, bool], None]


OUT_GRAPH = "init_forward_metadata_out_graph"
IN_GRAPH = "init_forward_metadata_in_graph"
LISTS_KERNEL = "generate_draft_decode_kv_indices"
LISTS_FILL = "_fill_kv_indptr_and_indices"


@dataclass(frozen=True)
class Place:
    """One class of SGLang's.

    Attributes:
        refreshed: what the launch refreshes, for people.
        stays: the engine's steps that are still called, for people.
        modes: the modes that are served; others run the engine's own code.
        after: the steps of ``stays``, where they aren't around the replaced method anyway.
        method: what the launch replaces: all that comes before a replay (OUT_GRAPH), the kernel that a graph records
            (IN_GRAPH), or what fills kv_indptr and kv_indices: a kernel (LISTS_KERNEL) or a method (LISTS_FILL).
        lists: whether it refreshes kv_indptr and kv_indices, which aren't kept for each batch size.
        leave: what the launch leaves to ``after``; see captured.buffers_from.
        whole: the steps after a runner's launch, which refreshes all that the backend has, instead of all of its own
            code; None if that still runs, without what the launch replaces.
    """

    refreshed: str
    stays: str
    modes: tuple[str, ...]
    after: After
    method: str = OUT_GRAPH
    lists: bool = False
    leave: tuple[str, ...] = ()
    whole: After | None = None

    @property
    def methods(self) -> tuple[str, ...]:
        """What the launch replaces on the backend."""
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
            # With one column it is a view of the lengths, and up to date already.
            if metadata.paged_mqa_ctx_lens_2d.data_ptr() != lengths.data_ptr():
                metadata.paged_mqa_ctx_lens_2d.copy_(lengths)
        if child.dsa_decode_impl == "flashmla_kv":
            lengths = metadata.dsa_cache_seqlens_int32
            metadata.flashmla_metadata.slice(slice(0, len(lengths) + 1)).copy_(
                child._compute_flashmla_metadata(cache_seqlens=lengths, seq_len_q=1)
            )
        child.forward_metadata = metadata


def _forward_mode(batch: Any, child: Any) -> Any:
    """The mode that a child sees: a multi-step backend's children decode, whatever the batch does."""
    if batch.forward_mode.is_target_verify() or batch.forward_mode.is_draft_extend_v2():
        return batch.forward_mode
    return sys.modules[type(child).__module__].ForwardMode.DECODE


def _fa3(pairs: list[tuple[Any, Any]], batch: Any, mode: str, schedules: bool) -> None:
    for child, metadata in pairs:
        if metadata.scheduler_metadata is not None:  # a single backend's plain decode has it
            bs, longest = batch.batch_size, batch.seq_lens_cpu if child.needs_cpu_seq_lens else None
            metadata.max_seq_len_k = child.max_context_len if longest is None else int(longest[:bs].max())
            made = child._compute_scheduler_metadata(
                bs, metadata.max_seq_len_k, metadata.cache_seqlens_int32, metadata.cu_seqlens_q
            )
            if made is not None:
                child._sched_meta_buf[: len(made)] = made
                child._sched_meta_buf[len(made) :] = 0
        child.forward_metadata = metadata
        child.forward_metadata_spec_decode_expand = None


def _fa3_of_a_runner(pairs: list[tuple[Any, Any]], batch: Any, mode: str, schedules: bool) -> None:
    _fa3(pairs, batch, mode, schedules)
    if mode == "draft_extend":
        child, metadata = pairs[0]
        lengths = batch.seq_lens_cpu if getattr(child, "needs_cpu_seq_lens", True) else None
        metadata.max_seq_len_k = child.max_context_len if lengths is None else int(lengths[: batch.batch_size].max())
        metadata.max_seq_len_q = int(max(batch.spec_info.extend_seq_lens_cpu))


def _triton_mask(pairs: list[tuple[Any, Any]], batch: Any, mode: str, schedules: bool) -> None:
    """The tree's mask, which is usually in the graph's buffer already: then nothing is copied."""
    mask = None if batch.spec_info is None else batch.spec_info.custom_mask
    if mode == "target_verify" and mask is not None:
        pairs[0][0]._verify_mask.buffer[: len(mask)] = mask


def _triton(pairs: list[tuple[Any, Any]], batch: Any, mode: str, schedules: bool) -> None:
    """The numbers of splits, which all children share."""
    bs, child = batch.batch_size, pairs[-1][0]
    child.get_num_kv_splits(child.cuda_graph_num_kv_splits[:bs], batch.seq_lens[:bs])


def _flashmla(pairs: list[tuple[Any, Any]], batch: Any, mode: str, schedules: bool) -> None:
    """Dense FlashMLA's schedule, which all children have alike, and the object that attention reads."""
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


def _nothing(pairs: list[tuple[Any, Any]], batch: Any, mode: str, schedules: bool) -> None:
    """There are no steps after the launch, or the engine's own code runs them."""


_EVERY_MODE = ("decode", "target_verify", "draft_extend")
_DSA_STAYS = "DeepGEMM's schedule, the top-k plan and sparse FlashMLA's schedule"
_LENGTHS = "lengths, running sums and tables"
_LISTS = "kv_indptr and kv_indices"
_EXTEND_STAYS = "draft extension, whose cu_seqlens_q sums extend_seq_lens"
_PLANS = "FlashInfer's plans on the host"

PLACES = {
    "DeepseekSparseAttnMultiStepBackend": Place(_LENGTHS, _DSA_STAYS, ("decode",), _dsa, whole=_dsa),
    "DeepseekSparseAttnBackend": Place(_LENGTHS, _DSA_STAYS, _EVERY_MODE, _dsa, whole=_dsa),
    "FlashAttentionMultiStepBackend": Place(_LENGTHS, "nothing", ("decode",), _fa3, whole=_fa3),
    "FlashAttentionBackend": Place(
        _LENGTHS, f"scheduler_metadata, and {_EXTEND_STAYS}", ("decode", "target_verify"), _fa3,
        leave=("scheduler_metadata",), whole=_fa3_of_a_runner,
    ),
    "TRTLLMHAAttnMultiStepDraftBackend": Place(_LENGTHS, "nothing", ("decode",), _nothing, IN_GRAPH),
    "TRTLLMHAAttnBackend": Place(_LENGTHS, "nothing", _EVERY_MODE, _nothing, IN_GRAPH),
    "FlashMLAMultiStepDraftBackend": Place(
        "tables", "FlashMLA's schedule", ("decode",), _flashmla, whole=_flashmla
    ),
    "FlashMLABackend": Place("tables and lengths", "FlashMLA's schedule", _EVERY_MODE, _flashmla, whole=_flashmla),
    "TRTLLMMLAMultiStepDraftBackend": Place("tables and lengths", "nothing", ("decode",), _nothing, whole=_nothing),
    "TRTLLMMLABackend": Place("tables and lengths", "nothing", _EVERY_MODE, _nothing, whole=_nothing),
    "TritonMultiStepDraftBackend": Place(
        _LISTS, "the numbers of splits", ("decode",), _triton, lists=True, whole=_triton
    ),
    "TritonAttnBackend": Place(
        _LISTS, "qo_indptr, masks and the numbers of splits", _EVERY_MODE, _nothing, LISTS_FILL, lists=True,
        whole=_triton_mask,
    ),
    "FlashInferMultiStepDraftBackend": Place(_LISTS, _PLANS, ("decode",), _nothing, LISTS_KERNEL, lists=True),
    "FlashInferMLAMultiStepDraftBackend": Place(_LISTS, _PLANS, ("decode",), _nothing, LISTS_KERNEL, lists=True),
}  # fmt: skip
