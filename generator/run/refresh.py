"""The common part of the refresh functions: the plans that they remember, and what binds one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..spec.fields import MetadataBuffers
from . import bind
from .checks import INT_DTYPES, check_tensor
from .destinations import NameOf
from .plan import Plan
from .remembered import RememberedPlans

# The fields of the lists that fused_metadata_precompute_and_broadcast_cuda takes, in the order that backends_of_lists
# expects.
LISTS = (
    "cache_seqlens",
    "cu_seqlens_k",
    "page_indices",
    "nsa_cache_seqlens",
    "nsa_cu_seqlens_k",
    "real_page_table",
    "seqlens_expanded",
)

# Turns a call's destinations into backends; also returns the names of their fields in messages.
BackendsOf = Callable[[Any], tuple[list[MetadataBuffers], NameOf]]

# By make()'s arguments, of which the first 5 are Plan.run's.
plans = RememberedPlans(passed=5, inputs=3)


def make(arguments: tuple[Any, ...], backends_of: BackendsOf) -> Plan:
    """Binds the plan for these arguments, and remembers it.

    Args:
        arguments: seq_lens, req_pool_indices, extend_seq_lens, max_len and captured_size as in Plan.run, extent, mode,
            nsa_index_topk, real_page_size, next_n and req_to_token as in fused_metadata_precompute_and_broadcast_cuda,
            and the destinations, as ``backends_of`` takes them: lists of tensors or one MetadataBuffers.
        backends_of: turns the destinations into backends.

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written.
    """
    seq_lens, req_pool_indices, extend_seq_lens, _, _, extent, mode, *sizes = arguments[:10]
    nsa_index_topk, real_page_size, next_n = sizes
    req_to_token, *destinations = arguments[10:]
    check_tensor("seq_lens", seq_lens, dim=1, dtypes=INT_DTYPES)
    check_tensor("req_pool_indices", req_pool_indices, dim=1, dtypes=INT_DTYPES)
    settings: dict[str, Any] = {
        "mode": mode,
        "index_topk": nsa_index_topk,
        "page_size": real_page_size,
        "extent": extent,
        "seq_lens_dtype": seq_lens.dtype,
        "req_pool_indices_dtype": req_pool_indices.dtype,
        "next_n": next_n,
    }
    if extend_seq_lens is not None:
        check_tensor("extend_seq_lens", extend_seq_lens, dim=1, dtypes=INT_DTYPES)
        if mode != "draft_extend":
            raise ArgumentError(f"extend_seq_lens is a tensor and mode is {mode!r}; it is for 'draft_extend' only.")
        settings |= {"extend": "variable", "extend_seq_lens_dtype": extend_seq_lens.dtype}
    backends, name_of = backends_of(destinations)
    names = bind.ArgumentNames(name_of, index_topk="nsa_index_topk", page_size="real_page_size")
    plan = bind.make_plan(backends, req_to_token, settings, names, keep=False)
    plans.keep(plan, *arguments)
    return plan


def backend_of_out(out: Sequence[MetadataBuffers]) -> tuple[list[MetadataBuffers], NameOf]:
    """The one backend that the precompute functions write to."""
    return [*out], lambda index, name: f"out.{name}"


def backends_of_lists(lists: Sequence[Any]) -> tuple[list[MetadataBuffers], NameOf]:
    """The backends of lists in the order of LISTS.

    Raises:
        ArgumentError: an argument isn't a list of tensors, or the lists have different lengths.
    """
    given: dict[str, Sequence[Tensor]] = {}
    for name, tensors in zip(LISTS, lists, strict=True):
        if tensors is None:
            continue
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise ArgumentError(f"{name}_list is a {type(tensors).__name__}; it must be a list of tensors or None.")
        given[name] = tensors
    if not given:
        raise ArgumentError("every list is None; give at least one list of destinations.")
    first = next(iter(given))
    count = len(given[first])
    for name, tensors in given.items():
        if len(tensors) != count:
            raise ArgumentError(
                f"{name}_list has {len(tensors)} tensors and {first}_list has {count}; all lists must have one tensor "
                "for each backend."
            )
        for index, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise ArgumentError(f"{name}_list[{index}] is a {type(tensor).__name__}; it must be a torch.Tensor.")
    backends = [MetadataBuffers(**{name: tensors[index] for name, tensors in given.items()}) for index in range(count)]
    return backends, lambda index, name: f"{name}_list[{index}]"


def allocate(bs: int, rows: int, max_len: int, page_size: int, device: torch.device, mode: str) -> MetadataBuffers:
    """New buffers with exactly the shapes that a precompute function writes."""

    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    cache, table = new(bs), new(rows, max_len)
    return MetadataBuffers(
        cache_seqlens=cache,
        cu_seqlens_k=new(bs + 1),
        page_indices=table,
        nsa_cache_seqlens=new(rows),
        nsa_cu_seqlens_k=new(rows + 1),
        real_page_table=table if page_size == 1 else new(rows, -(-max_len // page_size)),
        seqlens_expanded=cache if mode == "decode" else new(rows),
    )
