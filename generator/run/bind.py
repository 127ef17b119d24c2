"""bind(): checks N backends' buffers and makes a plan of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..spec.config import KernelConfig
from ..spec.fields import Declaration, Field, MetadataBuffers
from ..spec.parts import MAX_NEXT_N
from .audit import audit_every
from .checks import INT_DTYPES, check_int, check_tensor, dtype_name
from .declared import Declarations, Map, Written
from .destinations import Destinations, NameOf, backend_field, check_backends
from .memory import Region
from .plan import Plan

# What a user declares.
_BESIDE = ("declare", "inputs", "constants", "sources", "maps")
# Settings that make_plan() takes and bind() doesn't: the bench varies them.
_LAUNCH_SHAPE = ("threads", "unroll", "blocks_per_sm")


@dataclass(frozen=True)
class ArgumentNames:
    """The names of arguments in messages, for functions that call them otherwise than bind() does."""

    destination: NameOf = backend_field
    index_topk: str = "index_topk"
    page_size: str = "page_size"


def bind(
    backends: Sequence[MetadataBuffers],
    *,
    req_to_token: Tensor,
    mode: str = "decode",
    index_topk: int = 2048,
    page_size: int | None = None,
    next_n: int = 1,
    seqlen_offsets: Sequence[int] | None = None,
    extent: str = "live",
    max_len: int | None = None,
    seq_lens_dtype: torch.dtype = torch.int64,
    req_pool_indices_dtype: torch.dtype = torch.int64,
    extend: str = "uniform",
    extend_seq_lens_dtype: torch.dtype = torch.int64,
    index_kpool: int = 1,
    page_fill: int | None = None,
    padding_len: int | None = None,
    checked: bool = False,
    schedule_remainder: str = "last",
    schedule_per: str = "request",
    schedule_atoms: int = 0,
    schedule_split_cost: int = 0,
    flashmla_order: str = "2026",
    num_head: int = 32,
    num_kv_head: int = 8,
    max_kv_splits: int = 8,
    device_core_count: int = 132,
    writes: str = "all",
    audit_every: int | None = None,
    declare: Mapping[str, Declaration | Written] | None = None,
    inputs: Mapping[str, torch.dtype] | None = None,
    constants: Mapping[str, int] | None = None,
    sources: Mapping[str, Tensor] | None = None,
    maps: Mapping[str, Map] | None = None,
) -> Plan:
    """Checks N backends' buffers once and returns a plan whose run() refreshes all of them in one launch.

    The first bind of a new configuration builds its kernel. The plan keeps the tensors' memory alive, also where a
    tensor is given other memory later (``set_``, ``.data =``): the plan goes on writing to the memory that was bound.
    Resizing the storage of a bound tensor (``resize_`` beyond its size, ``untyped_storage().resize_``) frees that
    memory. A later run() raises ArgumentError then, but only if its arguments differ from those of the
    last calls, and a captured graph can't notice: don't resize what is bound. A launch on another stream than the
    memory's own must have run before the plan and its tensors are dropped, or these need ``record_stream``.

    Args:
        backends: N MetadataBuffers with the same fields. A tensor that several backends share is written once.
            In target_verify and draft_extend the fields with one element per row have R elements, request after
            request.
        req_to_token: int32 or int64 [pool rows, W], unit inner stride, any row stride.
        mode: "decode"; "target_verify" (a request has next_n rows, and is next_n tokens longer than its seq_len); or
            "draft_extend" (a request has next_n rows, or the number that run() is given; its seq_len includes them).
        index_topk: T, 0 or more.
        page_size: P in tokens, 1 or more; 1 means that real_page_table is page_indices. None is 64, or 1 with
            kv_indices, whose pages have one token.
        next_n: rows per request; 1 in decode, and if extend is "variable".
        seqlen_offsets: the number that is added to seq_lens for each backend, 0 to 32768, such as (1, 2, 3) for three
            draft steps that each see the tokens of the earlier steps; None adds nothing. The tables of each backend are
            written up to its own length. Backends with different offsets can share only a table, and only if all of
            them share it.
        extent: "live" writes the live columns (the first seq_len columns of a row) and leaves the others untouched;
            "full" writes every column below max_len.
        max_len: bound on the columns; None is the width of the narrowest table.
        seq_lens_dtype, req_pool_indices_dtype, extend_seq_lens_dtype: torch.int32 or torch.int64, the dtypes of the
            tensors that run() will get.
        extend: in draft_extend, "uniform" for next_n rows a request, or "variable": run() takes extend_seq_lens.
        index_kpool: k, tokens a pool: only complete pools are clamped at index_topk; for the pooled_* fields.
        page_fill: -1 writes -1 to the dead columns of real_page_table, up to its width; None leaves them untouched.
        padding_len: the length of padding requests, such as SGLang's seq_len_fill_value: all fields are written up to
            run()'s captured_size, as if the batch had as many requests, which have this length (before an offset is
            added), row 0 of req_to_token, and inputs of 0. A declared field with a ``pad`` holds that instead. None:
            only fields with a pad are written there.
        checked: whether the kernel checks rows of the pool and lengths, for plan.check() to raise; a debugging aid.
        schedule_remainder: in paged_mqa_schedule_metadata, "last" for the convention of DeepGEMM since 2026-06,
            "first" for the one before, and for sm_100.
        schedule_per: whether DeepGEMM gets the lengths of "request"s ([bs, n], cache_seqlens) or of "row"s ([R, 1],
            seqlens_expanded) in target_verify and draft_extend.
        schedule_atoms: query atoms of a request in that schedule; 0 for ceil(next_n / 2).
        schedule_split_cost: units of work that a split of 256 tokens is in that schedule, whose entries then begin at a
            request's first token, as on sm_100: next_n in DeepGEMM of 2026-06. 0 for the schedule of sm_90.
        flashmla_order: "2026" or "2025", the order of a row of flashmla_metadata (see reference.flashmla_schedule).
        num_head, num_kv_head, max_kv_splits, device_core_count: for num_kv_splits, as SGLang's Triton backend has them:
            heads of queries, of keys and values, the most splits of a request, and multiprocessors; 1 to 65,536.
        writes: "all" writes every live column. "verified" reads as much, and writes only the tiles of the tables that
            differ from what this plan, or another one of the same tables, wrote last, and perhaps the one in which a
            row ends, which seldom stays the same; kv_indices element by element. It holds as long as nobody else
            writes the tables (then call Plan.forget()) and all of these plans run on one stream at a time. What a tile
            holds is known by a 64-bit hash: a tile that changed is missed with a probability of about 2^-63. "audit"
            is for tables that somebody else writes: run() writes nothing, and compares as Plan.audit() does.
        audit_every: None for no audits, unless $ONELAUNCH_AUDIT_EVERY is set. 0 also builds the audit's kernel, for
            Plan.audit(). k also audits after every k-th run(), for use in production; before an audit, run() raises
            what the previous one found (AuditError), and waits for the device only then. An audit right
            after a refresh finds what the refresh left wrong: a changed tile that verified writes took for unchanged,
            another stream or plan that writes the same memory, a fault of the kernel. It doesn't find a table that was
            overwritten between refresh and use, because the next refresh writes it again: for that, call Plan.audit()
            after the use. A run() that is captured doesn't audit; Plan.audit() itself can be captured.
        declare: fields of your own by name, ``into(vector("base_len + row", dtype="int64"), positions)``; a declaration
            without tensors is for other formulas to name. See ``spec/fields.py`` for what a formula may name.
        inputs: by name the dtype of further inputs that formulas name: run() gets an int [bs] of each.
        constants: by name a number that formulas name.
        sources: by name an int32 or int64 [rows, columns] that formulas look up beside req_to_token, such as vLLM's
            block tables: ``name(column)`` in the request's row of req_pool_indices, or ``name(row, column)``.
        maps: by name a Map that formulas look up: ``full_to_swa(token(base_len))``.

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written or built.
        ToolchainError, CompileError, JitPolicyError, StoreError: see loader.load.
    """
    settings = {
        "mode": mode,
        "index_topk": index_topk,
        "page_size": page_size,
        "next_n": next_n,
        "seqlen_offsets": seqlen_offsets,
        "extent": extent,
        "max_len": max_len,
        "seq_lens_dtype": seq_lens_dtype,
        "req_pool_indices_dtype": req_pool_indices_dtype,
        "extend": extend,
        "extend_seq_lens_dtype": extend_seq_lens_dtype,
        "index_kpool": index_kpool,
        "page_fill": page_fill,
        "padding_len": padding_len,
        "checked": checked,
        "schedule_remainder": schedule_remainder,
        "schedule_per": schedule_per,
        "schedule_atoms": schedule_atoms,
        "schedule_split_cost": schedule_split_cost,
        "flashmla_order": flashmla_order,
        "num_head": num_head,
        "num_kv_head": num_kv_head,
        "max_kv_splits": max_kv_splits,
        "device_core_count": device_core_count,
        "writes": writes,
        "audit_every": audit_every,
        "declare": declare,
        "inputs": inputs,
        "constants": constants,
        "sources": sources,
        "maps": maps,
    }
    return make_plan(backends, req_to_token, settings)


def make_plan(
    backends: Sequence[MetadataBuffers],
    req_to_token: Tensor,
    settings: Mapping[str, Any],
    names: ArgumentNames = ArgumentNames(),
    *,
    keep: bool = True,
) -> Plan:
    """bind() for functions whose arguments have other names, or whose callers keep the tensors alive.

    Args:
        backends, req_to_token: see bind().
        settings: any of the other arguments of bind(), and of threads, unroll and blocks_per_sm.
        names: the names in messages.
        keep: whether the plan keeps the memory of all tensors alive; otherwise the caller does.

    Raises:
        As bind().
    """
    defaults = bind.__kwdefaults__ or {}
    unknown = [name for name in settings if name not in (*defaults, *_LAUNCH_SHAPE)]
    if unknown:
        raise ArgumentError(f"{unknown[0]} isn't an argument of bind(); allowed: {', '.join(defaults)}.")
    facts = {**defaults, **settings}
    _check_numbers(facts, names)
    check_backends(backends)
    declared = Declarations({name: facts.pop(name) for name in _BESIDE}, len(backends))
    scope = {name: Field(name, declared.settings["declare"][name]) for name in declared.tensors}
    kv_indices = any(backend.kv_indices is not None for backend in backends)
    facts["page_size"] = _page_size(facts["page_size"], kv_indices, names)
    fields = {name: (field, declared.tensors[name]) for name, field in scope.items()}
    destinations = Destinations(backends, facts["page_size"], names.destination, facts["mode"], fields)
    facts["seqlen_offsets"] = destinations.check_offsets(facts["seqlen_offsets"])
    check_tensor("req_to_token", req_to_token, dim=2, dtypes=INT_DTYPES, device=destinations.device)
    source = Region.of("req_to_token", req_to_token)
    for region in destinations.regions:
        if region.overlaps(source):
            raise ArgumentError(f"{region.name} overlaps req_to_token in memory; allocate it separately.")
    declared.check_read(destinations.device, destinations.regions)
    max_len, every = facts.pop("max_len"), audit_every(facts.pop("audit_every"))
    for name in ("seq_lens_dtype", "req_pool_indices_dtype", "extend_seq_lens_dtype"):
        facts[name] = dtype_name(facts[name])
    vectorized = "page_indices" in destinations.fields and destinations.same_alignment("page_indices")
    config = KernelConfig.from_dict(
        {
            **facts,
            **declared.settings,
            "strided": destinations.strided(),
            "num_backends": destinations.count,
            "fields": destinations.fields,
            "distinct": destinations.distinct(),
            "dtypes": destinations.dtypes(),
            "req_to_token_dtype": dtype_name(req_to_token.dtype),
            "vector_bytes": 16 if vectorized else 4,
            "target": destinations.device.type,
        }
    )
    columns = destinations.token_columns(config, req_to_token.shape[1])
    if max_len is not None:
        check_int("max_len", max_len, 0, columns, ", the width of the narrowest table")
    return Plan(destinations, config, req_to_token, columns, max_len, keep, declared, every)


def _check_numbers(facts: Mapping[str, Any], names: ArgumentNames) -> None:
    """Checks the numbers and dtypes that don't depend on the buffers."""
    mode, extend = facts["mode"], facts["extend"]
    check_int(names.index_topk, facts["index_topk"], 0, 2**31 - 1)
    check_int("index_kpool", facts["index_kpool"], 1, 2**31 - 1)
    if mode == "decode" or extend == "variable":
        why = " in decode" if mode == "decode" else " with variable extend lengths"
        several = "mode='target_verify' or 'draft_extend'" if mode == "decode" else "extend='uniform'"
        check_int("next_n", facts["next_n"], 1, 1, f"{why}. For several rows per request bind with {several}")
    else:
        check_int("next_n", facts["next_n"], 1, MAX_NEXT_N)
    if extend != "uniform" and mode != "draft_extend":
        raise ArgumentError(f"extend is {extend!r} in {mode}; allowed: 'uniform'. Only draft_extend allows 'variable'.")
    for name in ("seq_lens_dtype", "req_pool_indices_dtype", "extend_seq_lens_dtype"):
        if facts[name] not in INT_DTYPES:
            raise ArgumentError(f"{name} is {facts[name]!r}; allowed: torch.int32, torch.int64.")


def _page_size(page_size: int | None, kv_indices: bool, names: ArgumentNames) -> int:
    if page_size is None:
        return 1 if kv_indices else 64
    check_int(names.page_size, page_size, 1, 2**31 - 1)
    if kv_indices and page_size > 1:
        raise ArgumentError(
            f"{names.page_size} is {page_size} with kv_indices, which has an element for each token; allowed: 1. "
            "Pages of several tokens aren't supported in kv_indptr and kv_indices."
        )
    return page_size
