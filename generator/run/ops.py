"""The functions of api.py and schedules.py as operators of torch, which torch.compile puts into a graph in their place.

``torch.ops.onelaunch`` has one for each of them, registered when its file is imported: a process that loads a saved
graph imports onelaunch.run.api or onelaunch.run.schedules first. The operators only write to tensors that they are
given, so their fake implementation does nothing, and ``out=None`` is allocated in the graph, where the compiler plans
the memory. Outside of torch.compile the functions don't use the operators: the dispatcher would only cost time.

A MetadataBuffers is passed as its tensors and their names, such as "page_indices,cache_seqlens=seqlens_expanded". A
tensor that is two fields is passed once, because an operator must not write to one tensor under two names.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..spec.fields import MetadataBuffers

# The functions' signatures, written out: torch.library.infer_schema doesn't accept all of these types in every version.
_INPUTS = "Tensor seq_lens, Tensor req_pool_indices, Tensor req_to_token"
_NUMBERS = "SymInt max_len, SymInt nsa_index_topk, SymInt real_page_size"
# Not "mode": torch itself passes an argument of that name when it calls an operator for a dispatch mode.
_ROWS = 'str forward_mode="decode", SymInt next_n=1, Tensor? extend_seq_lens=None'
_SCHEMAS = {
    "fused_metadata_precompute_and_broadcast_cuda": (
        f"({_INPUTS}, Tensor(a!)[]? cache_seqlens_list, Tensor(b!)[]? cu_seqlens_k_list,"
        " Tensor(c!)[]? page_indices_list, Tensor(d!)[]? nsa_cache_seqlens_list, Tensor(e!)[]? nsa_cu_seqlens_k_list,"
        f' Tensor(f!)[]? real_page_table_list=None, *, {_NUMBERS}, str extent="full", {_ROWS},'
        " Tensor(g!)[]? seqlens_expanded_list=None) -> ()"
    ),
    "precompute_decode_metadata_cuda": f"({_INPUTS}, Tensor(a!)[] out, str out_fields, *, {_NUMBERS}, {_ROWS}) -> ()",
    "fused_metadata_copy_cuda": (
        "(Tensor[] precomputed, str precomputed_fields, Tensor(a!)[] destinations, str destinations_fields, *,"
        " SymInt? bs=None, SymInt? max_len=None, SymInt? real_page_size=None,"
        ' str forward_mode="decode", SymInt? next_n=None, SymInt? rows=None) -> ()'
    ),
    "paged_mqa_schedule": (
        "(Tensor context_lens, SymInt num_sms, Tensor(a!) out, str? convention=None, SymInt split_cost=0) -> ()"
    ),
}


def register(fused: Callable[..., None], precompute: Callable[..., Any], copy: Callable[..., None]) -> None:
    """Registers api.py's operators. Cheap enough for an import: nothing of torch.compile is imported.

    Args:
        fused: fused_metadata_precompute_and_broadcast_cuda.
        precompute: the common implementation of precompute_decode_metadata_cuda and its siblings for other modes.
        copy: fused_metadata_copy_cuda.
    """

    def fused_into(*args: Any, forward_mode: str = "decode", **kwargs: Any) -> None:
        fused(*args, mode=forward_mode, **kwargs)

    def precompute_into(*args: Any, forward_mode: str = "decode", **kwargs: Any) -> None:
        *inputs, out, fields = args
        precompute(*inputs, mode=forward_mode, **kwargs, out=_unpack(out, fields))

    def copy_packed(
        precomputed: Sequence[Tensor],
        fields: str,
        destinations: Sequence[Tensor],
        each: str,
        *,
        forward_mode: str = "decode",
        **kwargs: Any,
    ) -> None:
        rest = iter(destinations)
        targets = [_unpack([next(rest) for _ in _names(fields)], fields) for fields in each.split(";")]
        copy(_unpack(precomputed, fields), targets, mode=forward_mode, **kwargs)

    define("fused_metadata_precompute_and_broadcast_cuda", fused_into)
    define("precompute_decode_metadata_cuda", precompute_into)
    define("fused_metadata_copy_cuda", copy_packed)


def define(name: str, function: Callable[..., None]) -> None:
    """Registers one operator, whose signature _SCHEMAS has."""
    operation = f"onelaunch::{name}"
    torch.library.define(operation, _SCHEMAS[name])
    # One implementation for every device, so that the function's own checks refuse what doesn't fit.
    torch.library.impl(operation, "default", function)
    # The fake one. torch.library.register_fake does the same, but searches every loaded module for its caller.
    torch.library.impl(operation, "meta", lambda *args, **kwargs: None)


def precompute(out: MetadataBuffers, *args: Any, **kwargs: Any) -> None:
    """precompute_decode_metadata_cuda, or its variant for another mode, in a graph; writes to ``out``."""
    torch.ops.onelaunch.precompute_decode_metadata_cuda(*args, *_pack(out), **kwargs)


def copy(precomputed: MetadataBuffers, destinations: Sequence[MetadataBuffers], **kwargs: Any) -> None:
    """fused_metadata_copy_cuda, in a graph."""
    packed = [_pack(destination) for destination in destinations]
    torch.ops.onelaunch.fused_metadata_copy_cuda(
        *_pack(precomputed), [t for tensors, _ in packed for t in tensors], ";".join(f for _, f in packed), **kwargs
    )


def _pack(buffers: MetadataBuffers) -> tuple[list[Tensor], str]:
    tensors: list[Tensor] = []
    names: list[str] = []
    for field, tensor in buffers.items():
        same = [index for index, known in enumerate(tensors) if known is tensor]
        if same:
            names[same[0]] += f"={field.name}"
        else:
            tensors.append(tensor)
            names.append(field.name)
    return tensors, ",".join(names)


def _unpack(tensors: Sequence[Tensor], fields: str) -> MetadataBuffers:
    named = zip(tensors, _names(fields), strict=True)
    return MetadataBuffers(**{name: tensor for tensor, names in named for name in names.split("=")})


def _names(fields: str) -> list[str]:
    return fields.split(",") if fields else []
