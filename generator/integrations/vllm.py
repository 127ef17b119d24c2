"""vLLM: the tensors of a draft step, and of the sparse indexer's decode part, refreshed by one launch.

Held against vLLM 0.33.0's own classes and kernels (`make engines ENGINE=vllm`).

**A draft step** of a drafter that advances its metadata in place (``_generate_fused_drafts``)::

    from onelaunch.integrations import vllm

    # once for each captured size, with what the step's metadata was built from
    step = vllm.bind_draft_step(
        indexer_builder, indexer_metadata, block_tables, idx_mapping=idx_mapping, positions=positions,
        sparse=[sparse_metadata],
    )

    # each step, in place of compute_slot_mappings and of these builders' update_draft_decode_metadata
    step.run()

One launch in place of seven on Hopper, of eight where verified tokens are flattened to rows, and of nine on SM100: the
slot mappings of all KV-cache groups; of the indexer the block table (if it isn't the runner's own), the lengths, two
fills (and the indices on SM100), DeepGEMM's schedule and its copy; and the request of each token for sparse MLA. The
launch is part of the drafter's graph, so it saves kernels on the device and no host time: on an H200 16 requests take
4.4 µs instead of 14.9 (tests/engines/gpu/vllm_seam.py). An unmodified vLLM doesn't call it: change its loop or the
builder. A drafter whose builder can't advance in place, such as FlashMLA's sparse one, builds its metadata anew in each
step and has no use for it.

vLLM still advances positions and lengths, which depend on the sampled token, sets current_draft_step, and maps block
tables to a kernel's block size once before the loop. It also still writes what hooks of other builders write (FA3's
scheduler metadata, sparse sliding windows, k-pools).

**The decode part.** If a runner keeps the metadata object that a CUDA graph captured, one launch writes into it what
``build`` would::

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

An unmodified vLLM gains nothing: it calls ``build`` in each step, which does all of this itself, so the plan would only
add a launch. vLLM still makes the metadata object, the split into decodes and prefills, and the slot mappings.

Run the plan for all requests that were captured. Rows of requests beyond the batch become zero, as in vLLM, because the
runner's own lengths and block table are zero there. (In a flattened block table vLLM zeroes only their first column,
and the plan every column.) If requests have different numbers of tokens, the plan leaves rows beyond the last request
as they are; vLLM zeroes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ArgumentError, missing
from ..run.bind import bind
from ..run.declared import Map, into
from ..run.plan import Plan
from ..spec.fields import MetadataBuffers, vector
from ..spec.seams import vllm_request_of_token, vllm_slot_mapping
from .attributes import merged, read

_ADVICE = "onelaunch doesn't know this version of the engine: fill a MetadataBuffers and call onelaunch.bind."

# The builder's attribute, the value that is served, and what any other value means.
_SERVED_STEP = (
    ("dcp_world_size", 1, "decode context parallelism: a rank has only some of the tokens"),
    ("use_pcp", False, "prefill context parallelism gathers the ranks' tokens"),
    ("compress_ratio", 1, "lengths count compressed states"),
)
_SERVED = (*_SERVED_STEP, ("supports_varlen", False, "one kernel of vLLM's writes all of it already (SM100)"))


@dataclass(frozen=True, eq=False)
class DraftStep:
    """A draft step bound to the tensors that it reads and writes. bind_draft_step() makes it.

    Attributes:
        plan: the plan.
        inputs: the arguments of every run.
        slots: the elements of one KV-cache group's slot mapping.
    """

    plan: Plan
    inputs: Mapping[str, Any]
    slots: int

    def run(self, *, tail: bool = True) -> None:
        """One launch on the device's current stream. Capturable.

        Args:
            tail: whether to fill slot mappings with -1 from the step's last request to their end, as vLLM does in each
                step. Later steps of the same batch can pass False, because nothing overwrites the -1.

        Raises:
            ArgumentError, LaunchError: see Plan.run.
        """
        self.plan.run(**self.inputs, captured_size=self.slots if tail else None)


def bind_draft_step(
    builder: Any,
    metadata: Any,
    block_tables: Any,
    *,
    idx_mapping: Tensor,
    positions: Tensor,
    sparse: Sequence[Any] = (),
    schedule: bool = True,
    **settings: Any,
) -> DraftStep:
    """Binds what vLLM's kernels write between two steps of a drafter whose requests have one token each.

    The values are those of BlockTables.compute_slot_mappings and of the builders' update_draft_decode_metadata, for all
    requests that were captured:

    * block_tables.slot_mappings[g], for each KV-cache group g: table[p // block_size] * block_size + p % block_size for
      a request at position p, from its row of block_tables.block_tables[g]; -1 if its idx_mapping is -1, if the
      group's slot mapping is disabled, and after the last request.
    * metadata.decode: block_table, seq_lens, decode_lens and per_req_decode_lens (all 1), and indices on SM100. Tensors
      that are views of the runner's own memory are left out.
    * metadata.decode.schedule_metadata.
    * req_id_per_token of the sparse metadata: the request of each token; of a padding token the last request.

    Args:
        builder: the DeepseekV32IndexerMetadataBuilder that made the metadata.
        metadata: its DeepseekV32IndexerMetadata of the captured step.
        block_tables: vLLM's BlockTables, with any number of KV-cache groups.
        idx_mapping: the drafter's own, int64 [requests or more]: each request's row in the block tables, or -1.
        positions: the drafter's own, int64 [requests or more]: the position of each request's token.
        sparse: metadata of sparse MLA builders, with query_start_loc and req_id_per_token. Token t belongs to request t
            or is padding.
        schedule: whether to write DeepGEMM's schedule. On SM100 it needs schedule_split_cost: 2 * q + 1, where q is 128
            divided by the indexer's heads.
        settings: further arguments of onelaunch.bind. checked=True reports padding, because its row is out of range.

    Raises:
        ArgumentError: an attribute is missing; builder or block_tables have a setting that isn't served; the metadata
            isn't a draft step's; see also onelaunch.bind.
    """
    _check_served("builder", builder, _SERVED_STEP)
    _check_served(
        "block_tables", block_tables, (("cp_size", 1, "context parallelism: a rank has only some of the slots"),)
    )
    decode = read("metadata", metadata, ("decode",), _ADVICE)
    requests, tokens, prefills = (
        read("metadata", metadata, (f"num_{name}",), _ADVICE) for name in ("decodes", "decode_tokens", "prefills")
    )
    if decode is None or prefills or requests != tokens:
        raise ArgumentError(
            f"metadata has {requests} decodes with {tokens} tokens, and {prefills} prefills; in a draft step each "
            "request has one token. Bind the metadata that was built for the draft steps."
        )
    counted = _tensor("builder", builder, "arange_buffer")
    lengths, table, expanded = (
        _tensor("metadata", metadata, "seq_lens")[:requests],
        _tensor("metadata", metadata, "block_table")[:requests],
        _tensor("metadata.decode", decode, "block_table"),
    )
    rows = _tensor("metadata.decode", decode, "seq_lens")
    buffers = MetadataBuffers(
        cache_seqlens=None if _is_view(rows, lengths) else _flat(rows),
        page_indices=None if _is_view(expanded, table) else expanded,
        paged_mqa_schedule_metadata=_tensor("metadata.decode", decode, "schedule_metadata") if schedule else None,
    )
    declare = {
        name: into(vector("1", "request"), _tensor("metadata.decode", decode, name))
        for name in ("decode_lens", "per_req_decode_lens")
    }
    if varlen := read("metadata.decode", decode, ("indices",), _ADVICE) is not None:
        declare["indices"] = into(vector("request", "request"), _tensor("metadata.decode", decode, "indices"))
    if schedule and varlen and "schedule_split_cost" not in settings:
        raise ArgumentError(
            "schedule is True and schedule_split_cost isn't given, which DeepGEMM's schedule depends on here (SM100): "
            "pass 2 * q + 1, where q is 128 divided by the indexer's heads, or schedule=False."
        )
    slots, constants, sources = _slot_mappings(block_tables)
    requests_of, maps = _requests_of_tokens(sparse)
    facts: dict[str, Any] = {
        "extent": "full",
        "page_size": 1,
        "seq_lens_dtype": torch.int32,
        "req_pool_indices_dtype": counted.dtype,
        "schedule_remainder": "first" if varlen else "last",
        "declare": {**slots, **declare, **requests_of},
        "inputs": {"idx": idx_mapping.dtype, "position": positions.dtype, "last": counted.dtype},
        "constants": constants,
        "sources": sources,
        "maps": maps,
    }
    plan = bind([buffers], req_to_token=table, **merged(facts, settings))
    inputs = {
        "idx": idx_mapping[:requests],
        "position": positions[:requests],
        "last": counted[requests - 1].expand(requests),  # an input, so that one kernel serves every captured size
    }
    read_too = {name: tensor for name, tensor in inputs.items() if name in dict(plan.config.inputs)}
    return DraftStep(
        plan,
        {"seq_lens": lengths, "req_pool_indices": counted[:requests], **read_too},
        _tensor("block_tables", block_tables, "slot_mappings").shape[1],
    )


def _slot_mappings(block_tables: Any) -> tuple[dict[str, Any], dict[str, int], dict[str, Tensor]]:
    """declare, constants and sources of the slot mappings of all groups."""
    sizes, tables, enabled = (
        read("block_tables", block_tables, (name,), _ADVICE)
        for name in ("block_sizes", "block_tables", "_slot_mapping_enabled")
    )
    mappings = _tensor("block_tables", block_tables, "slot_mappings")
    declare: dict[str, Any] = {}
    for group in range(len(sizes)):
        declare |= vllm_slot_mapping(group, enabled=enabled[group])
        declare[f"slots_{group}"] = into(declare[f"slots_{group}"], mappings[group])
    constants = {f"size_{group}": size for group, size in enumerate(sizes)}
    label = "block_tables.block_tables[{}]"
    sources = {f"table_{group}": _tensor(label.format(group), table, "gpu") for group, table in enumerate(tables)}
    return declare, constants, sources


def _requests_of_tokens(sparse: Sequence[Any]) -> tuple[dict[str, Any], dict[str, Map]]:
    """declare and maps of the request of each token."""
    declare, maps = {}, {}
    for index, metadata in enumerate(sparse):
        label = f"sparse[{index}]"
        tokens = read(label, metadata, ("num_decode_tokens",), _ADVICE)
        declare[f"request_of_token_{index}"] = into(
            vllm_request_of_token(index), _tensor(label, metadata, "req_id_per_token")[:tokens]
        )
        maps[f"query_end_{index}"] = Map(_tensor(label, metadata, "query_start_loc")[1:])
    return declare, maps


def _check_served(label: str, owner: Any, served: Sequence[tuple[str, Any, str]]) -> None:
    for name, allowed, meaning in served:
        value = read(label, owner, (name,), _ADVICE)
        if value != allowed:
            raise ArgumentError(f"{label}.{name} is {value}: {meaning}. Leave this batch to vLLM.")


def bind_backends(
    builder: Any, metadata: Any, query_start_loc: Tensor, *, schedule: bool = False, **settings: Any
) -> Plan:
    """Binds the tensors of the sparse indexer's decode metadata that one launch can refresh.

    A tensor that is a view of the runner's own memory (see the module) is left out. The block table has a column for
    each block, and its first rows are the batch's. It serves as the plan's req_to_token, and a request's row is its
    index in the batch.

    Args:
        builder: the DeepseekV32IndexerMetadataBuilder that made the metadata.
        metadata: its DeepseekV32IndexerMetadata.
        query_start_loc: int32 [requests + 1 or more], the runner's own: where each request's tokens begin.
        schedule: whether to refresh DeepGEMM's schedule (decode.schedule_metadata) too.
        settings: arguments of onelaunch.bind. extent is "full" and seq_lens_dtype torch.int32 if not given.

    Returns:
        A plan. run() takes the lengths, int32 [requests], and each request's row in the block table; if requests with
        different numbers of tokens were flattened, also each request's number of tokens, int32.

    Raises:
        ArgumentError: an attribute is missing; the builder has a setting that isn't served; the batch has no decode
            requests; see also onelaunch.bind.
    """
    _check_served("builder", builder, _SERVED)
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
    # The builder's own formula: a padding request has no tokens.
    tokens = vector("query_start(request + 1) - query_start(request)", "request")
    per_request = _tensor("metadata.decode", decode, "per_req_decode_lens")
    flattened = read("builder", builder, ("use_flattening",), _ADVICE) or len(rows) != len(per_request)
    facts["declare"] = {
        "per_req_decode_lens": into(tokens, per_request),
        "decode_lens": into(vector("1") if flattened else tokens, _tensor("metadata.decode", decode, "decode_lens")),
    }
    facts["maps"] = {"query_start": Map(query_start_loc)}
    return bind([buffers], req_to_token=table, **merged(facts, settings))


def _rows_of_requests(decode: Any, rows: Tensor) -> dict[str, Any]:
    """The arguments of bind() that say how many rows each request has."""
    if rows.dim() != 2:
        raise ArgumentError(f"metadata.decode.seq_lens has shape {tuple(rows.shape)}; it must be [bs, n] or [rows, 1].")
    if rows.shape[1] > 1:  # native: shorter requests have as many rows as the others
        return {"next_n": rows.shape[1]}
    if read("metadata.decode", decode, ("decode_is_uniform",), _ADVICE):
        return {"next_n": read("metadata.decode", decode, ("write_max_decode_len",), _ADVICE)}
    return {"extend": "variable", "extend_seq_lens_dtype": torch.int32}


def _schedule_facts(rows: Tensor, facts: dict[str, Any]) -> dict[str, Any]:
    """The arguments of bind() for DeepGEMM's schedule. On SM90 vLLM makes all tokens of a request one query atom."""
    if "extend" in facts:
        raise ArgumentError(
            "schedule is True and requests have different numbers of tokens; onelaunch's schedule needs the same "
            "number for each. Pass schedule=False."
        )
    if rows.shape[1] == 1:
        return {"schedule_per": "row"}
    if rows.device.type == "cuda" and torch.cuda.get_device_capability(rows.device)[0] != 9:  # pragma: gpu
        raise ArgumentError(
            f"schedule is True and requests have {rows.shape[1]} tokens on {rows.device}, which isn't SM90; only "
            "DeepGEMM knows how many query atoms that is. Pass schedule=False."
        )
    return {"schedule_atoms": 1}


def _tensor(label: str, owner: Any, name: str) -> Tensor:
    value = read(label, owner, (name,), _ADVICE)
    if not isinstance(value, Tensor):
        raise ArgumentError(f"{label}.{name} is a {type(value).__name__}; it must be a torch.Tensor. {_ADVICE}")
    return value


def _is_view(tensor: Tensor, of: Tensor) -> bool:
    """Whether two tensors share a storage. Then refreshing the other one refreshes this one."""
    return tensor.untyped_storage().data_ptr() == of.untyped_storage().data_ptr()


def _flat(rows: Tensor) -> Tensor:
    if not rows.is_contiguous():
        raise ArgumentError(
            f"metadata.decode.seq_lens has shape {tuple(rows.shape)} and strides {rows.stride()}; it must be "
            "contiguous."
        )
    return rows.view(-1)


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        raise missing(__name__, name, {"buffers_from": "use bind_draft_step() or bind_backends()"})
