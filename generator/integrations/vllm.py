"""vLLM: the decode metadata of the sparse indexer, refreshed by one launch.

It has next_n rows per request, each with the length max(s - next_n + j + 1, 0) and the request's row of the block
table. vLLM's block table has one column per block, and the requests of a batch are its first rows. So the block table
itself is the source, and a request's index in the batch is its row there::

    from onelaunch.integrations import vllm

    # once, for objects that a CUDA graph reads
    plan = vllm.bind_backends([indexer_metadata], block_table, next_n=next_n)
    rows = torch.arange(block_table.shape[0], device=block_table.device)

    # each round, before the replay
    plan.run(seq_lens[:num_reqs], rows[:num_reqs])

Rows beyond the batch, which vLLM zeroes, aren't written. vLLM still makes slot mappings, positions and schedules. Its
draft steps advance one object in place, so one launch for all steps would have nothing to write.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..run.checks import check_int
from ..run.plan import Plan, bind
from ..spec.fields import MetadataBuffers
from ..spec.parts import MAX_NEXT_N
from .attributes import has, read

_ADVICE = "onelaunch doesn't know this version of the engine: fill a MetadataBuffers and call onelaunch.bind."


def buffers_from(metadata: Any) -> MetadataBuffers:
    """The tensors of one of the sparse indexer's metadata objects.

    Args:
        metadata: an object with seq_lens ([R] or [bs, next_n]) and a block table with a row for each of them, or with
            such an object as ``decode``.

    Raises:
        ArgumentError: an attribute is missing, or there is no decode part.
    """
    if has(metadata, ("decode",)):
        metadata = metadata.decode
        if metadata is None:
            raise ArgumentError(
                "metadata.decode is None: the batch has no decode requests, so there is nothing to refresh. Bind the "
                "metadata that was captured."
            )
    seq_lens = read("metadata", metadata, ("seq_lens",), _ADVICE)
    table = read("metadata", metadata, ("block_table_tensor", "block_table", "block_tables"), _ADVICE)
    if isinstance(seq_lens, Tensor) and seq_lens.dim() == 2:
        if not seq_lens.is_contiguous():
            raise ArgumentError(
                f"metadata.seq_lens has shape {tuple(seq_lens.shape)} and strides {seq_lens.stride()}; it must be "
                "contiguous."
            )
        seq_lens = seq_lens.view(-1)
    return MetadataBuffers(seqlens_expanded=seq_lens, page_indices=table)


def bind_backends(metadata: Sequence[Any], block_table: Tensor, *, next_n: int, **settings: Any) -> Plan:
    """Binds the sparse indexer's metadata objects, as draft_extend with pages of one block.

    Args:
        metadata: the objects, see buffers_from.
        block_table: int32 [requests, blocks], the source.
        next_n: rows of each request, 1 or more.
        settings: arguments of onelaunch.bind; seq_lens_dtype is torch.int32 if not given.

    Returns:
        A plan; run() takes the lengths, and for each request its row in the block table.

    Raises:
        ArgumentError: see buffers_from and onelaunch.bind.
    """
    check_int("next_n", next_n, 1, MAX_NEXT_N)
    given = {"extent": "full", "seq_lens_dtype": torch.int32, "page_size": 1, **settings}
    if not isinstance(metadata, Sequence):
        raise ArgumentError(f"metadata is a {type(metadata).__name__}; it must be a list of the indexer's objects.")
    buffers = [buffers_from(m) for m in metadata]
    return bind(buffers, req_to_token=block_table, mode="draft_extend", next_n=next_n, **given)
