"""Finds every tensor and number reachable from a backend, and compares two backends."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

POISON = -7
# What a replay refreshes, by the last part of the path. Poisoned before each replay, so that stale values differ.
LENGTHS = (
    "cache_seqlens_int32",
    "dsa_cache_seqlens_int32",
    "dsa_seqlens_expanded",
    "paged_mqa_ctx_lens_2d",
    "seq_lens_k",
    "global_seq_lens_k",
    "cuda_graph_draft_extend_seq_lens_k",
    "cuda_graph_num_kv_splits",
)
CUMULATIVE = (
    "cu_seqlens_k",
    "dsa_cu_seqlens_k",
    "kv_indptr",
    "qo_indptr",
    "mask_indptr",
    "cuda_graph_qo_indptr",
    "cuda_graph_qk_indptr",
)
TABLES = (
    "page_table_1",
    "real_page_table",
    "page_table",
    "block_kv_indices",
    "cuda_graph_kv_indices",
    "cuda_graph_custom_mask",
)
# The engine's own steps make these, and must still be called. Poisoned too.
OTHERS = (
    "paged_mqa_schedule_metadata",
    "topk_v2_plan",
    "cuda_graph_mla_metadata",
    "cuda_graph_num_splits",
    "_sched_meta_buf",
)

# Attributes of the environment and of the pool. All backends share them, so they aren't compared.
_ENVIRONMENT = {
    "attn_backends_of",
    "kv_index_translator",
    "model_runner",
    "req_to_token",
    "req_to_token_pool",
    "token_to_kv_pool",
    "token_to_kv_pool_allocator",
    "workspace_buffer",
}


def reachable(backend: Any) -> dict[str, Any]:
    """Tensors and numbers by path, such as "attn_backends[0].decode_cuda_graph_metadata[2].page_table"."""
    found: dict[str, Any] = {}
    _walk(backend, "", found, set())
    return found


def _walk(value: Any, path: str, found: dict[str, Any], seen: set[int]) -> None:
    if isinstance(value, Tensor | int | float | str) or value is None:
        found[path] = value
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, dict):
        items = [(f"[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(f"[{index}]", item) for index, item in enumerate(value)]
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = [(f".{field.name}", getattr(value, field.name)) for field in dataclasses.fields(value)]
    elif type(value).__module__.startswith("sglang.") and hasattr(value, "__dict__"):
        items = [(f".{name}", item) for name, item in vars(value).items() if name not in _ENVIRONMENT]
    else:
        return
    for step, item in items:
        _walk(item, f"{path}{step}".lstrip("."), found, seen)


def last_name(path: str) -> str:
    return path.rpartition(".")[2].partition("[")[0]


def poison(backend: Any) -> None:
    """Poisons what a replay refreshes, except the first 0 of running sums: it is written once, when they are made."""
    for path, value in reachable(backend).items():
        if isinstance(value, Tensor):
            name = last_name(path)
            if name in LENGTHS or name in TABLES or name in OTHERS:
                value.fill_(POISON if value.is_signed() else 256 + POISON)
            elif name in CUMULATIVE:
                value[..., 1:] = POISON


def live_entry(path: str, value: Any) -> tuple[int, ...] | None:
    """The index of an entry that a replay of any batch refreshes; None for anything else."""
    name = last_name(path)
    if not isinstance(value, Tensor) or name not in (*LENGTHS, *CUMULATIVE, *TABLES):
        return None
    return (0,) * (value.dim() - 1) + (int(name in CUMULATIVE),)


def differences(engine: Any, mine: Any) -> list[str]:
    """A sentence for each path whose values differ."""
    wanted, got = reachable(engine), reachable(mine)
    found = [f"{path}: one of the two alone has it" for path in wanted.keys() ^ got.keys()]
    for path in wanted.keys() & got.keys():
        w, g = wanted[path], got[path]
        if not isinstance(w, Tensor):
            if w != g:
                found.append(f"{path}: engine {w!r}, onelaunch {g!r}")
        elif w.shape != g.shape or w.dtype != g.dtype:
            found.append(f"{path}: engine {tuple(w.shape)} {w.dtype}, onelaunch {tuple(g.shape)} {g.dtype}")
        elif not _equal(w, g):
            where = (w != g).nonzero()
            first = tuple(where[0].tolist())
            found.append(
                f"{path}: {len(where)} of {w.numel()} differ, first at {first}: engine {w[first].item()}, onelaunch "
                f"{g[first].item()}"
            )
    return sorted(found)


def _equal(a: Tensor, b: Tensor) -> bool:
    # Unwritten memory may hold NaN.
    return (
        torch.equal(a, b) if a.dtype.is_floating_point is False else bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
    )


def blank_dead_columns(backend: Any, table: str, rows: int, live: Tensor) -> None:
    """Poisons the columns of a table beyond each row's live columns, where the engine writes values that nothing reads.

    Args:
        table: the last part of its path.
        rows: the batch's number of rows. Only tables with as many rows are poisoned.
        live: int64 [rows], the columns that are read.
    """
    for path, value in reachable(backend).items():
        if isinstance(value, Tensor) and last_name(path) == table and value.shape[0] == rows:
            value.masked_fill_(torch.arange(value.shape[1]) >= live[:, None], POISON)
