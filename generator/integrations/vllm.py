"""vLLM: lengths and block tables of several metadata objects, refreshed by one launch.

vLLM's block table has a column a block, and a batch's requests are its first rows. So the source of the tables is the
block table itself, a request's row in it is its place in the batch, and a table is a copy of the rows.

A draft that builds one metadata object a step, each a token further (``AttentionMetadataBuilder.build_for_drafting``
for the first, then lengths + 1)::

    from onelaunch.integrations import vllm

    # once, for objects that a CUDA graph reads
    plan = vllm.bind_backends(metadata_of_steps, block_table, seqlen_offsets=range(1, len(metadata_of_steps) + 1))
    rows = torch.arange(block_table.shape[0], device=block_table.device)

    # each round, before the replay
    plan.run(seq_lens[:num_reqs], rows[:num_reqs])

The sparse indexer's decode metadata has next_n rows a request, with lengths max(s - next_n + j + 1, 0)::

    plan = vllm.bind_backends([indexer_metadata.decode], block_table, next_n=next_n)
    plan.run(seq_lens[:num_reqs], rows[:num_reqs])

Where vLLM keeps one persistent object for all steps and adds 1 to its lengths in place there is nothing to gain. Slot
mappings, positions and schedules stay vLLM's. Lengths beyond the model's longest aren't clamped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..run.plan import Plan, bind
from ..spec.fields import MetadataBuffers
from .attributes import read

_ADVICE = "onelaunch doesn't know this version of the engine: fill a MetadataBuffers and call onelaunch.bind."


def buffers_from(metadata: Any, *, next_n: int = 1) -> MetadataBuffers:
    """The tensors of one of vLLM's metadata objects.

    Args:
        metadata: CommonAttentionMetadata (seq_lens, block_table_tensor), a backend's (seq_lens, block_table or
            block_tables), or one with a ``decode`` part, which is read then.
        next_n: rows of a request. With several, seq_lens is one length a row, [R] or [bs, next_n].

    Raises:
        ArgumentError: an attribute isn't there.
    """
    decode = getattr(metadata, "decode", None)
    if decode is not None:
        metadata = decode
    seq_lens = read("metadata", metadata, ("seq_lens",), _ADVICE)
    table = read("metadata", metadata, ("block_table_tensor", "block_table", "block_tables"), _ADVICE)
    if next_n == 1:
        return MetadataBuffers(cache_seqlens=seq_lens, page_indices=table)
    if isinstance(seq_lens, Tensor) and seq_lens.dim() == 2:
        if not seq_lens.is_contiguous():
            raise ArgumentError(
                f"metadata.seq_lens has shape {tuple(seq_lens.shape)} and strides {seq_lens.stride()}; it must be "
                "contiguous."
            )
        seq_lens = seq_lens.view(-1)
    return MetadataBuffers(seqlens_expanded=seq_lens, page_indices=table)


def bind_backends(metadata: Sequence[Any], block_table: Tensor, *, next_n: int = 1, **facts: Any) -> Plan:
    """Binds the metadata objects of several draft steps or backends.

    Args:
        metadata: the objects, see buffers_from.
        block_table: int32 [requests, blocks], the source. A table that is a view of its first rows isn't written.
        next_n: rows of a request; several are refreshed as draft_extend's.
        facts: arguments of onelaunch.bind, such as seqlen_offsets; seq_lens_dtype is torch.int32 if not given.

    Returns:
        A plan; run() takes the lengths, and for each request its row in the block table.

    Raises:
        ArgumentError: see buffers_from and onelaunch.bind.
    """
    buffers = [buffers_from(m, next_n=next_n) for m in metadata]
    if all(_same_start(b.page_indices, block_table) for b in buffers):
        for b in buffers:
            b.page_indices = None
    given = {"extent": "full", "seq_lens_dtype": torch.int32, "page_size": 1, **facts}
    if "seqlen_offsets" in given and given["seqlen_offsets"] is not None:
        given["seqlen_offsets"] = list(given["seqlen_offsets"])
    if next_n > 1:
        given |= {"mode": "draft_extend", "next_n": next_n}
    return bind(buffers, req_to_token=block_table, **given)


def _same_start(table: Any, source: Tensor) -> bool:
    return isinstance(table, Tensor) and table.data_ptr() == source.data_ptr() and table.stride() == source.stride()
