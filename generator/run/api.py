"""The functions that engines call, under the names and with the arguments that engines use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ..errors import ArgumentError
from ..spec.fields import MetadataBuffers
from ..spec.parts import MAX_NEXT_N
from . import ops
from .checks import INT_DTYPES, MAX_BATCH, check_int, check_tensor
from .copy_plan import CopyPlan
from .destinations import Destinations
from .refresh import allocate, backend_of_out, backends_of_lists, make, plans
from .remembered import RememberedPlans

copy_plans = RememberedPlans(passed=4)


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

    The tensors may be on a CUDA device or on the CPU, but all on the same one. If a list is None, its field isn't
    written. In target_verify and draft_extend a request has several rows, R in all, request after request.

    A call finds its plan by the tensors' addresses, shapes and strides, except those of seq_lens, req_pool_indices and
    extend_seq_lens. Other memory needs a new plan: binding one takes a thousand times as long.

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
        max_len: columns to write, at most the width of the narrowest table.
        nsa_index_topk: clamp of the NSA lengths.
        real_page_size: tokens per page of real_page_table.
        extent: "full" writes every column below max_len, "live" only the live columns: the first seq_len of a row.
        mode: "decode", "target_verify" or "draft_extend".
        next_n: rows of each request in the last two, if extend_seq_lens is None.
        extend_seq_lens: int32 or int64 [bs], the rows of each request in draft_extend, each 0 or more; the caller
            guarantees that the destinations have room for their sum.

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written.
        LaunchError: CUDA refused the launch.
        Others as bind(), where a call needs a new plan.
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
    arguments = plans.run(
        seq_lens,
        req_pool_indices,
        extend_seq_lens,
        max_len,
        None,  # captured_size
        extent,
        mode,
        nsa_index_topk,
        real_page_size,
        next_n,
        req_to_token,
        cache_seqlens_list,  # and the others in the order of LISTS
        cu_seqlens_k_list,
        page_indices_list,
        nsa_cache_seqlens_list,
        nsa_cu_seqlens_k_list,
        real_page_table_list,
        seqlens_expanded_list,
    )
    if arguments is not None:
        make(arguments, backends_of_lists).run(seq_lens, req_pool_indices, extend_seq_lens, max_len=max_len)


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
        real_page_size: tokens per page of real_page_table; 1 makes it the same tensor as page_indices.
        out: where to write; None allocates every field at its exact shape. Newly allocated memory needs a new plan:
            binding one takes a thousand times as long as a call that finds its plan.

    Returns:
        ``out``, or new buffers. There seqlens_expanded is the same tensor as cache_seqlens, because decode makes them
        equal.

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written.
        LaunchError: CUDA refused the launch.
        Others as bind(), where a call needs a new plan.
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
    """precompute_decode_metadata_cuda for a step that verifies next_n tokens per request: R = bs * next_n rows.

    Args:
        next_n: rows of each request, and the number of tokens that is added to its seq_len.
        The others as in precompute_decode_metadata_cuda.

    Returns:
        ``out``, or new buffers.

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written.
        LaunchError: CUDA refused the launch.
        Others as bind(), where a call needs a new plan.
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
    """precompute_decode_metadata_cuda for a step that extends every request by some tokens, one row per token.

    Args:
        next_n: rows of each request, if extend_seq_lens is None.
        extend_seq_lens: int32 or int64 [bs], the rows of each request, each 0 or more.
        rows: the sum of extend_seq_lens, needed to allocate. Reading it from the device would wait for the device.
        The others as in precompute_decode_metadata_cuda.

    Returns:
        ``out``, or new buffers.

    Raises:
        ArgumentError, ConfigError: an argument doesn't fit; nothing was written.
        LaunchError: CUDA refused the launch.
        Others as bind(), where a call needs a new plan.
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
                "rows is None; to allocate the fields, give the sum of extend_seq_lens as rows, or give out."
            )
        else:
            check_int("rows", rows, 0, MAX_BATCH)
        out = allocate(seq_lens.numel(), rows, max_len, real_page_size, seq_lens.device, mode)
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
    arguments = plans.run(
        seq_lens,
        req_pool_indices,
        extend_seq_lens,
        max_len,
        None,  # captured_size
        "full",
        mode,
        nsa_index_topk,
        real_page_size,
        next_n,
        req_to_token,
        out,
    )
    if arguments is not None:
        make(arguments, backend_of_out).run(seq_lens, req_pool_indices, extend_seq_lens, max_len=max_len)
    return out


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
        bs: requests to copy; None copies all that ``precomputed`` has.
        max_len: columns of page_indices to copy; None copies the source's whole width.
        real_page_size: bounds the columns of real_page_table at ceil(max_len / real_page_size); None copies the
            source's whole width.
        mode: "decode", "target_verify" or "draft_extend"; in the last two requests have several rows.
        next_n: rows of each request, if all have the same number; with ``bs`` it gives the number of rows to copy.
        rows: rows to copy of the fields with one element per row, if extend lengths vary; None copies all that
            ``precomputed`` has.

    Raises:
        ArgumentError: an argument doesn't fit; nothing was written.
        LaunchError: CUDA refused the launch.
        Others as bind(), where a call needs a new plan.
    """
    if not is_dynamo_compiling():
        if mode != "decode" or next_n is not None or rows is not None:
            rows = _rows_of(bs, mode, next_n, rows)
        if copy_plans.run(bs, max_len, real_page_size, rows, mode, precomputed, destinations) is None:
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
    shared = precomputed.real_page_table is not None and precomputed.real_page_table is precomputed.page_indices
    page_size = 1 if shared else 2
    name_of = _destination if targets is destinations else _single_destination
    made = CopyPlan(precomputed, Destinations(targets, page_size, name_of, mode), keep=False, mode=mode)
    copy_plans.keep(made, bs, max_len, real_page_size, rows, mode, precomputed, destinations)
    made.run(bs=bs, max_len=max_len, page_size=real_page_size, rows=rows)


def _destination(index: int, name: str) -> str:
    return f"destinations[{index}].{name}"


def _single_destination(index: int, name: str) -> str:
    return f"destinations.{name}"


def _rows_of(bs: int | None, mode: str, next_n: int | None, rows: int | None) -> int | None:
    """The number of rows to copy; None for all rows of the source."""
    if mode == "decode":
        if rows is not None or next_n not in (None, 1):
            raise ArgumentError(f"next_n is {next_n} and rows is {rows}; in decode a request has one row. Omit both.")
    elif rows is None and next_n is not None:
        check_int("next_n", next_n, 1, MAX_NEXT_N)
        if bs is not None:
            rows = check_int("bs", bs, 0, MAX_BATCH) * next_n
    elif rows is None and bs is not None:
        raise ArgumentError(f"bs is {bs} in {mode}, and next_n and rows are None; give one of them too.")
    return rows


ops.register(fused_metadata_precompute_and_broadcast_cuda, _precompute, fused_metadata_copy_cuda)
