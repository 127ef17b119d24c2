"""The functions that engines call, by the names they know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..errors import ArgumentError
from ..load import loader
from ..spec.config import KernelConfig
from ..spec.fields import MetadataBuffers
from ..spec.parts import MAX_NEXT_N
from . import ops, plan
from .checks import INT_DTYPES, MAX_BATCH, check_int, check_tensor

_MAX_PLANS = 256
# The fields of the lists that fused_metadata_precompute_and_broadcast_cuda takes.
LISTS = (
    "cache_seqlens",
    "cu_seqlens_k",
    "page_indices",
    "nsa_cache_seqlens",
    "nsa_cu_seqlens_k",
    "real_page_table",
    "seqlens_expanded",
)


class _Plans:
    """Plans by what a binding tells of the arguments that they were made for.

    Of a tensor that is the address, shape, strides, dtype and device, so one that changed in place, or that took
    another's place, is another argument. Plans hold addresses only: whoever calls with a tensor keeps it alive.

    Attributes:
        find: find(arguments...): the plan that was kept for equal arguments, or None.
    """

    find: Callable[..., Any]

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all plans."""
        self._memo: Any = None  # of the binding of a kernel; any of them tells the same
        self.find = lambda *arguments: None

    def keep(self, made: Any, *arguments: Any) -> None:
        """Keeps a plan, and lets the one go that wasn't used for longest."""
        if self._memo is None:
            self._memo = made.kernel.module.memo(_MAX_PLANS)
            self.find = self._memo.find
        self._memo.keep(made, *arguments)


_refreshes, _copies = _Plans(), _Plans()


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
    mode: str = "decode",
    next_n: int = 1,
    extend_seq_lens: Tensor | None = None,
    seqlens_expanded_list: Sequence[Tensor] | None = None,
) -> None:
    """Computes the metadata of a step and writes it to N backends, in one launch.

    Works on CUDA and on CPU tensors; all must be on one device. A list that is None is left out. In target_verify and
    draft_extend a request has several rows, request after request, R in all.

    Args:
        seq_lens, req_pool_indices: int32 or int64 [bs].
        req_to_token: int32 or int64 [pool rows, W].
        cache_seqlens_list: N int32 tensors [bs or more].
        cu_seqlens_k_list: N int32 tensors [bs + 1 or more].
        nsa_cache_seqlens_list, seqlens_expanded_list: N int32 tensors [bs or more; R or more].
        nsa_cu_seqlens_k_list: N int32 tensors [bs + 1 or more; R + 1 or more].
        page_indices_list: N int32 tensors [bs or R or more, max_len or more].
        real_page_table_list: N int32 tensors [bs or R or more, ceil(w / real_page_size) or more], where w is the
            columns that both page_indices and req_to_token have.
        max_len: columns to write, at most the width of every table.
        nsa_index_topk: clamp of the NSA lengths.
        real_page_size: tokens a page of real_page_table.
        extent: "full" writes every column below max_len, "live" those below a request's length.
        mode: "decode", "target_verify" or "draft_extend".
        next_n: rows of each request in the last two, unless extend_seq_lens says it.
        extend_seq_lens: int32 or int64 [bs], the rows of each request in draft_extend, zeros among them; the caller
            keeps their sum within the rows of the destinations.

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written.
    """
    if is_dynamo_compiling():
        torch.ops.onelaunch.fused_metadata_precompute_and_broadcast_cuda(
            seq_lens,
            req_pool_indices,
            req_to_token,
            cache_seqlens_list,
            cu_seqlens_k_list,
            page_indices_list,
            nsa_cache_seqlens_list,
            nsa_cu_seqlens_k_list,
            real_page_table_list,
            max_len=max_len,
            nsa_index_topk=nsa_index_topk,
            real_page_size=real_page_size,
            extent=extent,
            forward_mode=mode,
            next_n=next_n,
            extend_seq_lens=extend_seq_lens,
            seqlens_expanded_list=seqlens_expanded_list,
        )
        return
    lists = (  # in the order of LISTS
        cache_seqlens_list,
        cu_seqlens_k_list,
        page_indices_list,
        nsa_cache_seqlens_list,
        nsa_cu_seqlens_k_list,
        real_page_table_list,
        seqlens_expanded_list,
    )
    _refresh(
        lists,
        _backends,
        seq_lens,
        req_pool_indices,
        req_to_token,
        extend_seq_lens,
        max_len,
        nsa_index_topk,
        real_page_size,
        extent,
        mode,
        next_n,
    )


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
        out: where to write; None allocates every field at its exact shape, and binds a plan to wherever that is, which
            takes a thousand times as long as a call that finds its plan.

    Returns:
        ``out``, or new buffers. seqlens_expanded is the very tensor of cache_seqlens, as decode defines it.

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written.
    """
    return _precompute(seq_lens, req_pool_indices, req_to_token, max_len, nsa_index_topk, real_page_size, out)


def precompute_target_verify_metadata_cuda(
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    *,
    max_len: int,
    nsa_index_topk: int,
    real_page_size: int,
    next_n: int,
    out: MetadataBuffers | None = None,
) -> MetadataBuffers:
    """precompute_decode_metadata_cuda for a step that verifies next_n tokens a request: R = bs * next_n rows.

    Args:
        next_n: rows of each request, and tokens that its length has more than seq_lens says.
        The others as in precompute_decode_metadata_cuda.

    Returns:
        ``out``, or new buffers.

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written.
    """
    return _precompute(
        seq_lens,
        req_pool_indices,
        req_to_token,
        max_len,
        nsa_index_topk,
        real_page_size,
        out,
        mode="target_verify",
        next_n=next_n,
    )


def precompute_draft_extend_metadata_cuda(
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    *,
    max_len: int,
    nsa_index_topk: int,
    real_page_size: int,
    next_n: int = 1,
    extend_seq_lens: Tensor | None = None,
    rows: int | None = None,
    out: MetadataBuffers | None = None,
) -> MetadataBuffers:
    """precompute_decode_metadata_cuda for a step that extends every request by some tokens, a row each.

    Args:
        next_n: rows of each request, where extend_seq_lens is None.
        extend_seq_lens: int32 or int64 [bs], the rows of each request, zeros among them.
        rows: the sum of extend_seq_lens, needed to allocate; the caller knows it without asking the device.
        The others as in precompute_decode_metadata_cuda.

    Returns:
        ``out``, or new buffers.

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written.
    """
    return _precompute(
        seq_lens,
        req_pool_indices,
        req_to_token,
        max_len,
        nsa_index_topk,
        real_page_size,
        out,
        mode="draft_extend",
        next_n=next_n,
        extend_seq_lens=extend_seq_lens,
        rows=rows,
    )


def _precompute(
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    max_len: int,
    nsa_index_topk: int,
    real_page_size: int,
    out: MetadataBuffers | None,
    mode: str = "decode",
    next_n: int = 1,
    extend_seq_lens: Tensor | None = None,
    rows: int | None = None,
) -> MetadataBuffers:
    if out is None:
        check_tensor("seq_lens", seq_lens, dim=1, dtypes=INT_DTYPES)
        check_tensor("req_to_token", req_to_token, dim=2, dtypes=INT_DTYPES, device=seq_lens.device)
        check_int("max_len", max_len, 0, req_to_token.shape[1], ", the width of req_to_token")
        check_int("real_page_size", real_page_size, 1, 2**31 - 1)
        if extend_seq_lens is None:
            rows = seq_lens.numel() * check_int("next_n", next_n, 1, MAX_NEXT_N)
        elif rows is None:
            raise ArgumentError(
                "rows is None; to allocate the fields for extend_seq_lens their sum is needed. Give it, or out."
            )
        else:
            check_int("rows", rows, 0, MAX_BATCH)
        out = _allocate(seq_lens.numel(), rows, max_len, real_page_size, seq_lens.device, mode)
    elif not isinstance(out, MetadataBuffers):
        raise ArgumentError(f"out is a {type(out).__name__}; it must be a MetadataBuffers or None.")
    if is_dynamo_compiling():
        ops.precompute(
            out,
            seq_lens,
            req_pool_indices,
            req_to_token,
            max_len=max_len,
            nsa_index_topk=nsa_index_topk,
            real_page_size=real_page_size,
            forward_mode=mode,
            next_n=next_n,
            extend_seq_lens=extend_seq_lens,
        )
        return out
    _refresh(
        (out,),
        _out,
        seq_lens,
        req_pool_indices,
        req_to_token,
        extend_seq_lens,
        max_len,
        nsa_index_topk,
        real_page_size,
        "full",
        mode,
        next_n,
    )
    return out


def _refresh(
    destinations: tuple[Any, ...],
    backends: Callable[[tuple[Any, ...]], tuple[list[MetadataBuffers], plan.NameOf]],
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    extend_seq_lens: Tensor | None,
    max_len: int,
    nsa_index_topk: int,
    real_page_size: int,
    extent: str,
    mode: str,
    next_n: int,
) -> None:
    """Runs the plan of these tensors, bound at the first call.

    Args:
        destinations: what ``backends`` makes the buffers and their names of.
        The others as in fused_metadata_precompute_and_broadcast_cuda.
    """
    try:
        arguments: tuple[Any, ...] = (
            seq_lens.dtype,
            req_pool_indices.dtype,
            None if extend_seq_lens is None else extend_seq_lens.dtype,
            extent,
            mode,
            nsa_index_topk,
            real_page_size,
            next_n,
            req_to_token,
            destinations,
        )
        known = _refreshes.find(*arguments)
    except AttributeError:  # one is no tensor: what comes next says so
        arguments, known = (), None
    if known is None:
        check_tensor("seq_lens", seq_lens, dim=1, dtypes=INT_DTYPES)
        check_tensor("req_pool_indices", req_pool_indices, dim=1, dtypes=INT_DTYPES)
        extends: dict[str, Any] = {}
        if extend_seq_lens is not None:
            check_tensor("extend_seq_lens", extend_seq_lens, dim=1, dtypes=INT_DTYPES)
            if mode != "draft_extend":
                raise ArgumentError(f"extend_seq_lens is a tensor and mode is {mode!r}; they are for 'draft_extend'.")
            extends = {"extend": "variable", "extend_seq_lens_dtype": extend_seq_lens.dtype}
        buffers, name_of = backends(destinations)
        known = plan.make_plan(
            buffers,
            req_to_token,
            mode=mode,
            index_topk=nsa_index_topk,
            page_size=real_page_size,
            extent=extent,
            max_len=None,
            seq_lens_dtype=seq_lens.dtype,
            req_pool_indices_dtype=req_pool_indices.dtype,
            next_n=next_n,
            name_of=name_of,
            topk_name="nsa_index_topk",
            page_size_name="real_page_size",
            keep=False,
            **extends,
        )
        _refreshes.keep(known, *arguments)
    known.run(seq_lens, req_pool_indices, extend_seq_lens, max_len=max_len)


def fused_metadata_copy_cuda(
    precomputed: MetadataBuffers,
    destinations: MetadataBuffers | Sequence[MetadataBuffers],
    *,
    bs: int | None = None,
    max_len: int | None = None,
    real_page_size: int | None = None,
    mode: str = "decode",
    next_n: int | None = None,
    rows: int | None = None,
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
        mode: "decode", "target_verify" or "draft_extend"; in the last two requests have several rows.
        next_n: rows of each request, if it is one number for all; with ``bs`` it says how many rows to copy.
        rows: rows to copy of the fields with an element a row, where extend lengths vary; None is what
            ``precomputed`` holds.

    Raises:
        ArgumentError: an argument doesn't fit; nothing was written.
    """
    if not is_dynamo_compiling():
        known = _copies.find(mode, precomputed, destinations)
        if known is not None:
            if mode != "decode" or next_n is not None or rows is not None:
                rows = _rows_of(bs, mode, next_n, rows)
            known.run(bs=bs, max_len=max_len, page_size=real_page_size, rows=rows)
            return
    if not isinstance(precomputed, MetadataBuffers):
        raise ArgumentError(f"precomputed is a {type(precomputed).__name__}; it must be a MetadataBuffers.")
    targets: Any = (destinations,) if isinstance(destinations, MetadataBuffers) else destinations
    if not isinstance(targets, Sequence) or not all(isinstance(target, MetadataBuffers) for target in targets):
        raise ArgumentError(f"destinations is {targets!r}; it must be a MetadataBuffers or a list of them.")
    if not targets:
        raise ArgumentError("destinations is empty; give at least one MetadataBuffers.")
    if is_dynamo_compiling():
        ops.copy(
            precomputed,
            targets,
            bs=bs,
            max_len=max_len,
            real_page_size=real_page_size,
            forward_mode=mode,
            next_n=next_n,
            rows=rows,
        )
        return
    rows = _rows_of(bs, mode, next_n, rows)
    shared = precomputed.real_page_table is not None and precomputed.real_page_table is precomputed.page_indices
    page_size = 1 if shared else 2
    name_of = _destination if targets is destinations else _single_destination
    made = plan.CopyPlan(precomputed, plan.Destinations(targets, page_size, name_of, mode), keep=False, mode=mode)
    _copies.keep(made, mode, precomputed, destinations)
    made.run(bs=bs, max_len=max_len, page_size=real_page_size, rows=rows)


def _destination(index: int, name: str) -> str:
    return f"destinations[{index}].{name}"


def _single_destination(index: int, name: str) -> str:
    return f"destinations.{name}"


def _rows_of(bs: int | None, mode: str, next_n: int | None, rows: int | None) -> int | None:
    """The rows that a copy is asked for, None for all that there are."""
    if mode == "decode":
        if rows is not None or next_n not in (None, 1):
            raise ArgumentError(f"next_n is {next_n} and rows is {rows}; in decode a request is a row: leave them out.")
    elif rows is None and next_n is not None:
        check_int("next_n", next_n, 1, MAX_NEXT_N)
        if bs is not None:
            rows = check_int("bs", bs, 0, MAX_BATCH) * next_n
    elif rows is None and bs is not None:
        raise ArgumentError(f"bs is {bs} in {mode}, and next_n and rows are None; give one of them too.")
    return rows


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


def _out(destinations: tuple[Any, ...]) -> tuple[list[MetadataBuffers], plan.NameOf]:
    """The one backend that precompute functions write to, and the names of its fields in messages."""
    return [destinations[0]], lambda index, name: f"out.{name}"


def _backends(lists: tuple[Any, ...]) -> tuple[list[MetadataBuffers], plan.NameOf]:
    """The backends of lists in the order of LISTS, and the names of their fields in messages."""
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
    for name, tensors in given.items():
        if len(tensors) != len(given[first]):
            raise ArgumentError(
                f"{name}_list has {len(tensors)} tensors and {first}_list has {len(given[first])}; all lists must "
                "have one tensor a backend."
            )
        for index, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor):
                raise ArgumentError(f"{name}_list[{index}] is a {type(tensor).__name__}; it must be a torch.Tensor.")
    backends = [
        MetadataBuffers(**{name: tensors[index] for name, tensors in given.items()})
        for index in range(len(given[first]))
    ]
    return backends, lambda index, name: f"{name}_list[{index}]"


def _allocate(bs: int, rows: int, max_len: int, page_size: int, device: torch.device, mode: str) -> MetadataBuffers:
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


ops.register(fused_metadata_precompute_and_broadcast_cuda, _precompute, fused_metadata_copy_cuda)
