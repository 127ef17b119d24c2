"""vLLM: the decode tensors of the sparse indexer, refreshed by one launch.

Held against vLLM 0.33.0's own DeepseekV32IndexerMetadataBuilder (`make engines ENGINE=vllm`). Where a runner keeps a
metadata object that a CUDA graph has captured, one launch writes into it what ``build`` would::

    from onelaunch.integrations import vllm

    # once, for the metadata that was captured
    plan = vllm.bind_backends(builder, indexer_metadata, query_start_loc, schedule=True)
    rows = torch.arange(seq_lens.shape[0], device=seq_lens.device)

    # each round, before the replay, with as many requests as were captured
    plan.run(seq_lens[:num_reqs], rows[:num_reqs])

What that gains depends on how the builder passes a request's next_n tokens to the kernel:

* One token a request: lengths and block table are the runner's own. vLLM's two launches for decode_lens and
  per_req_decode_lens, and two for the schedule, become one.
* Native (next_n of 2 or 4 on Hopper): the block table is the runner's own. Those four, and five for the lengths,
  [bs, next_n], become one.
* Flattened to a row for each token (other next_n, or adaptive verification): those four, a Triton kernel for lengths
  and table, and a fill become one.
* Varlen (SM100): refused, because one Triton kernel of vLLM's writes all of it already.

What it can't gain: an unmodified vLLM calls ``build`` in each step, which does all of this itself, so that calling the
plan too only adds a launch. The metadata object, the split into decodes and prefills and slot mappings stay vLLM's.
Draft steps have one object, which advances in place in their graph, so a launch for all N steps has nothing to write
to.

Rows of requests beyond the batch come out as vLLM writes them, zeros, because the runner's own lengths and block table
are zero there: run the plan for all requests that were captured. (Of a flattened block table vLLM zeroes the first
column there, and the plan every column.) Where requests have different numbers of tokens, rows beyond the last
request's are left as they are, which vLLM zeroes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..run.declared import Map, into
from ..run.plan import Plan, bind
from ..spec.fields import MetadataBuffers, vector
from .attributes import read

_ADVICE = "onelaunch doesn't know this version of the engine: fill a MetadataBuffers and call onelaunch.bind."

# The builder's attribute, the value that is served, and what another one means.
_SERVED = (
    ("dcp_world_size", 1, "a rank of decode context parallelism has some of the tokens only"),
    ("use_pcp", False, "prefill context parallelism gathers the ranks' tokens"),
    ("compress_ratio", 1, "lengths count compressed states"),
    ("supports_varlen", False, "one kernel of vLLM's writes all of it already (SM100)"),
)


def bind_backends(
    builder: Any, metadata: Any, query_start_loc: Tensor, *, schedule: bool = False, **settings: Any
) -> Plan:
    """Binds what a launch can refresh of the sparse indexer's decode metadata.

    A tensor that is the runner's own (see above) is left out. The block table has a column for each block, and its
    first rows are the batch's. So it is the plan's req_to_token, and a request's row is its place in the batch.

    Args:
        builder: the DeepseekV32IndexerMetadataBuilder that made the metadata.
        metadata: its DeepseekV32IndexerMetadata.
        query_start_loc: int32 [requests + 1 or more], the runner's own, where each request's tokens begin.
        schedule: whether to refresh decode.schedule_metadata, DeepGEMM's, too.
        settings: arguments of onelaunch.bind. extent is "full" and seq_lens_dtype torch.int32 if not given.

    Returns:
        A plan. run() takes the lengths, int32 [requests], and for each request its row in the block table; also each
        request's number of tokens, int32, where those were different and were flattened.

    Raises:
        ArgumentError: an attribute is missing; the builder has what isn't served; the batch has no decode requests; and
            see onelaunch.bind.
    """
    for name, served, meaning in _SERVED:
        value = read("builder", builder, (name,), _ADVICE)
        if value != served:
            raise ArgumentError(f"builder.{name} is {value}: {meaning}. Leave this batch to vLLM.")
    decode = read("metadata", metadata, ("decode",), _ADVICE)
    if decode is None:
        raise ArgumentError(
            "metadata.decode is None: the batch has no decode requests, so there is nothing to refresh. Bind the "
            "metadata that was captured."
        )
    seq_lens, table = (_tensor("metadata", metadata, name) for name in ("seq_lens", "block_table"))
    rows, expanded = (_tensor("metadata.decode", decode, name) for name in ("seq_lens", "block_table"))
    facts: dict[str, Any] = {
        "extent": "full",
        "page_size": 1,
        "mode": "draft_extend",
        "seq_lens_dtype": torch.int32,
        **_rows_of_requests(decode, rows),
    }
    if schedule:
        facts |= _schedule_facts(rows, facts)
    buffers = MetadataBuffers(
        seqlens_expanded=None if _is_view(rows, seq_lens) else _flat(rows),
        page_indices=None if _is_view(expanded, table) else expanded,
        paged_mqa_schedule_metadata=_tensor("metadata.decode", decode, "schedule_metadata") if schedule else None,
    )
    # As the builder has it, also where a padding request has no tokens.
    tokens = vector("query_start(request + 1) - query_start(request)", "request")
    per_request = _tensor("metadata.decode", decode, "per_req_decode_lens")
    flattened = read("builder", builder, ("use_flattening",), _ADVICE) or len(rows) != len(per_request)
    facts["declare"] = {
        "per_req_decode_lens": into(tokens, per_request),
        "decode_lens": into(vector("1") if flattened else tokens, _tensor("metadata.decode", decode, "decode_lens")),
    }
    facts["maps"] = {"query_start": Map(query_start_loc)}
    return bind([buffers], req_to_token=table, **{**facts, **settings})


def _rows_of_requests(decode: Any, rows: Tensor) -> dict[str, Any]:
    """How many rows requests have, as arguments of bind()."""
    if rows.dim() != 2:
        raise ArgumentError(f"metadata.decode.seq_lens has shape {tuple(rows.shape)}; it must be [bs, n] or [rows, 1].")
    if rows.shape[1] > 1:  # native, where shorter requests have as many rows
        return {"next_n": rows.shape[1]}
    if read("metadata.decode", decode, ("decode_is_uniform",), _ADVICE):
        return {"next_n": read("metadata.decode", decode, ("write_max_decode_len",), _ADVICE)}
    return {"extend": "variable", "extend_seq_lens_dtype": torch.int32}


def _schedule_facts(rows: Tensor, facts: dict[str, Any]) -> dict[str, Any]:
    """DeepGEMM's convention, as arguments of bind(): on SM90 all tokens of a request are one query atom in vLLM."""
    if "extend" in facts:
        raise ArgumentError(
            "schedule is True and requests have different numbers of tokens; onelaunch schedules rows of requests that "
            "have equally many. Pass schedule=False."
        )
    if rows.shape[1] == 1:
        return {"schedule_per": "row"}
    if rows.device.type == "cuda" and torch.cuda.get_device_capability(rows.device)[0] != 9:  # pragma: gpu
        raise ArgumentError(
            f"schedule is True and requests have {rows.shape[1]} tokens on {rows.device}, which isn't of SM90; only "
            "DeepGEMM knows how many atoms they are there. Pass schedule=False."
        )
    return {"schedule_atoms": 1}


def _tensor(label: str, owner: Any, name: str) -> Tensor:
    value = read(label, owner, (name,), _ADVICE)
    if not isinstance(value, Tensor):
        raise ArgumentError(f"{label}.{name} is a {type(value).__name__}; it must be a torch.Tensor. {_ADVICE}")
    return value


def _is_view(tensor: Tensor, of: Tensor) -> bool:
    """Whether the tensor is memory of another one, whose values it then has without a refresh."""
    return tensor.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


def _flat(rows: Tensor) -> Tensor:
    if not rows.is_contiguous():
        raise ArgumentError(
            f"metadata.decode.seq_lens has shape {tuple(rows.shape)} and strides {rows.stride()}; it must be "
            "contiguous."
        )
    return rows.view(-1)
