"""The functions that engines call, by the names they know."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import loader, plan
from .checks import check_int, check_tensor
from .config import KernelConfig
from .errors import ArgumentError
from .fields import FIELDS, MetadataBuffers

_T = TypeVar("_T")
_MAX_PLANS = 256
# Plans by what they are specialized and bound to. They hold addresses only: whoever calls with a tensor keeps it alive.
_plans: OrderedDict[Any, Any] = OrderedDict()


def fused_metadata_precompute_and_broadcast_cuda(
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    cache_seqlens_list: Sequence[Tensor] | None,
    cu_seqlens_k_list: Sequence[Tensor] | None,
    page_indices_list: Sequence[Tensor] | None,
    nsa_cache_seqlens_list: Sequence[Tensor] | None,
    nsa_cu_seqlens_k_list: Sequence[Tensor] | None,
    real_page_table_list: Sequence[Tensor] | None = None,
    *,
    max_len: int,
    nsa_index_topk: int,
    real_page_size: int,
    extent: str = "full",
) -> None:
    """Computes the metadata of a decode step and writes it to N backends, in one launch.

    Works on CUDA and on CPU tensors; all must be on one device. A list that is None is left out.

    Args:
        seq_lens, req_pool_indices: int32 or int64 [bs].
        req_to_token: int32 or int64 [pool rows, W].
        cache_seqlens_list, nsa_cache_seqlens_list: N int32 tensors [bs or more].
        cu_seqlens_k_list, nsa_cu_seqlens_k_list: N int32 tensors [bs + 1 or more].
        page_indices_list: N int32 tensors [bs or more, max_len or more].
        real_page_table_list: N int32 tensors [bs or more, ceil(max_len / real_page_size) or more].
        max_len: columns to write, at most the width of every table.
        nsa_index_topk: clamp of the NSA lengths.
        real_page_size: tokens a page of real_page_table.
        extent: "full" writes every column below max_len, "live" those below a request's length.

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written.
    """
    lists = {
        "cache_seqlens": cache_seqlens_list,
        "cu_seqlens_k": cu_seqlens_k_list,
        "page_indices": page_indices_list,
        "nsa_cache_seqlens": nsa_cache_seqlens_list,
        "nsa_cu_seqlens_k": nsa_cu_seqlens_k_list,
        "real_page_table": real_page_table_list,
    }
    key = (
        _identity(req_to_token),
        tuple(map(_identities, lists.values())),
        getattr(seq_lens, "dtype", None),
        getattr(req_pool_indices, "dtype", None),
        _number(nsa_index_topk),
        _number(real_page_size),
        extent,
    )

    def make() -> plan.Plan:
        check_tensor("seq_lens", seq_lens, dim=1, dtypes=(torch.int32, torch.int64))
        check_tensor("req_pool_indices", req_pool_indices, dim=1, dtypes=(torch.int32, torch.int64))
        return plan.make_plan(
            _backends(lists),
            req_to_token,
            mode="decode",
            index_topk=nsa_index_topk,
            page_size=real_page_size,
            extent=extent,
            max_len=None,
            seq_lens_dtype=seq_lens.dtype,
            req_pool_indices_dtype=req_pool_indices.dtype,
            name_of=lambda index, name: f"{name}_list[{index}]",
            topk_name="nsa_index_topk",
            page_size_name="real_page_size",
            keep=False,
        )

    _remembered(key, make).run(seq_lens, req_pool_indices, max_len=max_len)


def precompute_decode_metadata_cuda(
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    *,
    max_len: int,
    nsa_index_topk: int,
    real_page_size: int,
    out: MetadataBuffers | None = None,
) -> MetadataBuffers:
    """Computes the metadata of a decode step once, in one launch, for fused_metadata_copy_cuda to copy.

    Args:
        seq_lens, req_pool_indices: int32 or int64 [bs].
        req_to_token: int32 or int64 [pool rows, W].
        max_len: columns of page_indices, at most W.
        nsa_index_topk: clamp of the NSA lengths.
        real_page_size: tokens a page of real_page_table; 1 makes it the same tensor as page_indices.
        out: where to write; None allocates every field at its exact shape.

    Returns:
        ``out``, or new buffers. seqlens_expanded is the very tensor of cache_seqlens, as decode defines it.

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written.
    """
    if out is None:
        check_tensor("seq_lens", seq_lens, dim=1, dtypes=(torch.int32, torch.int64))
        check_tensor("req_to_token", req_to_token, dim=2, dtypes=(torch.int32, torch.int64), device=seq_lens.device)
        check_int("max_len", max_len, 0, req_to_token.shape[1], ", the width of req_to_token")
        check_int("real_page_size", real_page_size, 1, 2**31 - 1)
        out = _allocate(seq_lens.numel(), max_len, real_page_size, seq_lens.device)
    elif not isinstance(out, MetadataBuffers):
        raise ArgumentError(f"out is a {type(out).__name__}; it must be a MetadataBuffers or None.")
    destination = out
    key = (
        _identity(req_to_token),
        tuple(_identity(getattr(destination, name)) for name in FIELDS),
        getattr(seq_lens, "dtype", None),
        getattr(req_pool_indices, "dtype", None),
        _number(nsa_index_topk),
        _number(real_page_size),
    )

    def make() -> plan.Plan:
        check_tensor("seq_lens", seq_lens, dim=1, dtypes=(torch.int32, torch.int64))
        check_tensor("req_pool_indices", req_pool_indices, dim=1, dtypes=(torch.int32, torch.int64))
        return plan.make_plan(
            [destination],
            req_to_token,
            mode="decode",
            index_topk=nsa_index_topk,
            page_size=real_page_size,
            extent="full",
            max_len=None,
            seq_lens_dtype=seq_lens.dtype,
            req_pool_indices_dtype=req_pool_indices.dtype,
            name_of=lambda index, name: f"out.{name}",
            topk_name="nsa_index_topk",
            page_size_name="real_page_size",
            keep=False,
        )

    _remembered(key, make).run(seq_lens, req_pool_indices, max_len=max_len)
    return out


def fused_metadata_copy_cuda(
    precomputed: MetadataBuffers,
    destinations: MetadataBuffers | Sequence[MetadataBuffers],
    *,
    bs: int | None = None,
    max_len: int | None = None,
    real_page_size: int | None = None,
) -> None:
    """Copies precomputed metadata to one or N destinations, in one launch.

    Every field that the destinations have is copied; all destinations have the same fields.

    Args:
        precomputed: the source, from precompute_decode_metadata_cuda.
        destinations: one MetadataBuffers, or N.
        bs: requests to copy; None is what ``precomputed`` holds.
        max_len: columns of page_indices to copy; None is the source's width.
        real_page_size: bounds the columns of real_page_table at ceil(max_len / real_page_size); None copies the
            source's whole width.

    Raises:
        ArgumentError: an argument doesn't fit; nothing was written.
    """
    if not isinstance(precomputed, MetadataBuffers):
        raise ArgumentError(f"precomputed is a {type(precomputed).__name__}; it must be a MetadataBuffers.")
    if real_page_size is not None:
        check_int("real_page_size", real_page_size, 1, 2**31 - 1)
    one = isinstance(destinations, MetadataBuffers)
    targets = [destinations] if isinstance(destinations, MetadataBuffers) else destinations
    if not isinstance(targets, Sequence) or not all(isinstance(target, MetadataBuffers) for target in targets):
        raise ArgumentError(f"destinations is {targets!r}; it must be a MetadataBuffers or a list of them.")
    if not targets:
        raise ArgumentError("destinations is empty; give at least one MetadataBuffers.")
    key = ("copy", one, tuple(tuple(_identity(getattr(b, name)) for name in FIELDS) for b in (precomputed, *targets)))

    def make() -> plan.CopyPlan:
        def name_of(index: int, name: str) -> str:
            return f"destinations.{name}" if one else f"destinations[{index}].{name}"

        shared = precomputed.real_page_table is not None and precomputed.real_page_table is precomputed.page_indices
        page_size = 1 if shared else 2
        return plan.CopyPlan(precomputed, plan.Destinations(targets, page_size, name_of), keep=False)

    _remembered(key, make).run(bs=bs, max_len=max_len, page_size=real_page_size)


def specialize(config: KernelConfig, arch: str | Sequence[str] | None = None) -> loader.Kernel:
    """Renders a configuration, and builds it or loads it from the store.

    Args:
        config: the configuration.
        arch: GPU architectures such as "90a" or ("90a", "100a"); None is the current device's, or 90a where there
            is no GPU.

    Returns:
        The kernel, with ``source``, ``key``, ``path`` and ``resources``.

    Raises:
        ToolchainError, CompileError, JitPolicyError, StoreError: see loader.load.
    """
    return loader.load(config, (arch,) if isinstance(arch, str) else arch)


def _backends(lists: dict[str, Sequence[Tensor] | None]) -> list[MetadataBuffers]:
    given: dict[str, Sequence[Tensor]] = {}
    for name, tensors in lists.items():
        if tensors is None:
            continue
        if isinstance(tensors, Tensor) or not isinstance(tensors, Sequence):
            raise ArgumentError(f"{name}_list is a {type(tensors).__name__}; it must be a list of tensors or None.")
        given[name] = tensors
    if not given:
        raise ArgumentError("every list is None; give at least one list of destinations.")
    first = next(iter(given))
    for name, tensors in given.items():
        if len(tensors) != len(given[first]):
            raise ArgumentError(
                f"{name}_list has {len(tensors)} tensors and {first}_list has {len(given[first])}; all lists must "
                "have one tensor a backend."
            )
        for index, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise ArgumentError(f"{name}_list[{index}] is a {type(tensor).__name__}; it must be a torch.Tensor.")
    return [MetadataBuffers(**{name: tensors[i] for name, tensors in given.items()}) for i in range(len(given[first]))]


def _allocate(bs: int, max_len: int, page_size: int, device: torch.device) -> MetadataBuffers:
    def new(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    cache, table = new(bs), new(bs, max_len)
    return MetadataBuffers(
        cache_seqlens=cache,
        cu_seqlens_k=new(bs + 1),
        page_indices=table,
        nsa_cache_seqlens=new(bs),
        nsa_cu_seqlens_k=new(bs + 1),
        real_page_table=table if page_size == 1 else new(bs, -(-max_len // page_size)),
        seqlens_expanded=cache,
    )


def _identity(tensor: Any) -> Any:
    """What a plan depends on in a tensor. Anything else is kept as it is, for the checks to refuse."""
    if isinstance(tensor, Tensor) and tensor.layout is torch.strided:
        return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
    return None if tensor is None else id(tensor)


def _identities(tensors: Any) -> Any:
    try:
        return tuple(map(_identity, tensors))
    except TypeError:
        return None if tensors is None else id(tensors)


def _number(value: Any) -> Any:
    """A number that a plan depends on. True and 16.0 must not find the plan of 1 and 16, which was checked."""
    return value if type(value) is int else (type(value), id(value))


def _remembered(key: Any, make: Callable[[], _T]) -> _T:
    try:
        made: _T | None = _plans.get(key)
    except TypeError:  # something in it can't be hashed, so it is nothing that the checks accept
        return make()
    if made is None:
        made = make()
        _plans[key] = made
        if len(_plans) > _MAX_PLANS:
            _plans.popitem(last=False)
    else:
        _plans.move_to_end(key)
    return made
