"""The meaning of every field, in plain PyTorch. The kernels must agree with it element for element.

The formulas are those of SGLang's DSA/NSA attention backend, for the modes decode, target_verify and draft_extend. The
code is written for clarity: whole-tensor operations, every row as wide as the longest. It works on any device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .fields import MetadataBuffers
from .reference_schedules import flashmla_schedule, paged_mqa_schedule


def running_sum(values: Tensor) -> Tensor:
    """int32 [n] -> int32 [n + 1]: 0, then the inclusive running sum, wrapping at 2^32 as int32 sums do."""
    out = torch.zeros(values.numel() + 1, dtype=torch.int32, device=values.device)
    out[1:] = torch.cumsum(values, dim=0, dtype=torch.int32)
    return out


@dataclass(frozen=True)
class Rows:
    """The rows of a batch in the per-row fields, request after request.

    Attributes:
        request: int64 [R], the request that a row belongs to.
        live: int64 [R], the live columns of the row's tables. May exceed int32; callers clamp it to the table's width.
    """

    request: Tensor
    live: Tensor


def nsa_lengths(lengths: Tensor, *, index_topk: int, index_kpool: int = 1) -> Tensor:
    """The lengths that sparse attention sees.

    With pools of k tokens only complete pools are clamped, and the incomplete tail is always added:
    min(floor(length / k) * k, T) + length mod k.
    """
    tail = lengths % index_kpool
    return (lengths - tail).clamp(max=index_topk) + tail


def lengths(
    seq_lens: Tensor,
    *,
    mode: str = "decode",
    index_topk: int,
    next_n: int = 1,
    extend_seq_lens: Tensor | None = None,
    seqlen_offset: int = 0,
    index_kpool: int = 1,
) -> tuple[dict[str, Tensor], Rows]:
    """The fields that follow from the lengths alone, and the rows of the per-row fields.

    With s a request's length, n ``next_n``, q its extend length and j the index of a row in its request:

    * decode: one row per request. cache_seqlens = s, seqlens_expanded is the same tensor.
    * target_verify: n rows per request. cache_seqlens = s + n, seqlens_expanded = max(s + j + 1, 0); all n table rows
      have s + n live columns.
    * draft_extend: q rows per request, none where q is 0. s includes the draft's tokens, so cache_seqlens = s;
      seqlens_expanded = max(s - q + j + 1, 0), because a padding request has s = 1 < q.

    pooled_cache_seqlens = floor(cache_seqlens / k).

    nsa_cache_seqlens follows from seqlens_expanded, one element per row. Running sums begin with 0.

    Args:
        seq_lens: int32 or int64 [bs]; truncated to int32.
        mode: "decode", "target_verify" or "draft_extend".
        index_topk: T.
        next_n: n of target_verify, and every q of draft_extend where extend_seq_lens is None.
        extend_seq_lens: int [bs], q of each request in draft_extend; negative values count as 0.
        seqlen_offset: added to every length, for a draft step that sees the tokens of the steps before it.
        index_kpool: tokens per pool, see nsa_lengths.

    Returns:
        int32 tensors by field name, and the rows.

    Raises:
        ValueError: an unknown mode.
    """
    s = seq_lens.to(torch.int32) + seqlen_offset
    bs, device = s.numel(), s.device
    if mode == "decode":
        cache, per_request = s, torch.ones(bs, dtype=torch.int64, device=device)
    elif mode == "target_verify":
        cache, per_request = s + next_n, torch.full((bs,), next_n, dtype=torch.int64, device=device)
    elif mode == "draft_extend":
        cache = s
        uniform = torch.full((bs,), next_n, dtype=torch.int64, device=device)
        per_request = uniform if extend_seq_lens is None else extend_seq_lens.to(torch.int64).clamp(min=0)
    else:
        raise ValueError(f"mode is {mode!r}; allowed: 'decode', 'target_verify', 'draft_extend'.")
    request = torch.repeat_interleave(torch.arange(bs, device=device), per_request)
    first_row = torch.cumsum(per_request, dim=0) - per_request
    place = (torch.arange(request.numel(), device=device) - first_row[request]).to(torch.int32)
    if mode == "decode":
        expanded = cache
    elif mode == "target_verify":
        expanded = (s[request] + place + 1).clamp(min=0)
    else:
        expanded = (s[request] - per_request[request].to(torch.int32) + place + 1).clamp(min=0)
    nsa = nsa_lengths(expanded, index_topk=index_topk, index_kpool=index_kpool)
    values = {
        "cache_seqlens": cache,
        "cu_seqlens_k": running_sum(cache),
        "nsa_cache_seqlens": nsa,
        "nsa_cu_seqlens_k": running_sum(nsa),
        "seqlens_expanded": expanded,
        "pooled_cache_seqlens": pooled_lengths(cache, index_kpool),
    }
    added = seqlen_offset + (next_n if mode == "target_verify" else 0)
    return values, Rows(request, (seq_lens.to(torch.int32).to(torch.int64) + added)[request])


def pooled_lengths(cache_seqlens: Tensor, index_kpool: int) -> Tensor:
    """int32 [bs] -> int32 [bs]: complete pools of index_kpool tokens."""
    return torch.div(cache_seqlens, index_kpool, rounding_mode="floor")


def pooled_page_table(real_page_table: Tensor, index_kpool: int) -> Tensor:
    """int32 [rows, pages] -> int32 [rows, ceil(pages / k)]: column c is real_page_table[:, c * k] // k."""
    return page_row(real_page_table, index_kpool)


def page_row(tokens: Tensor, page_size: int) -> Tensor:
    """int [..., columns] of tokens -> int32 [..., ceil(columns / page_size)]: the page of each page's first token."""
    return torch.div(tokens[..., ::page_size], page_size, rounding_mode="floor").to(torch.int32)


def kv_lengths(seq_lens: Tensor, added: int) -> Tensor:
    """int [bs] -> int64 [bs]: the tokens that each request has in kv_indices, max(s, 0) + added."""
    return seq_lens.to(torch.int32).clamp(min=0).to(torch.int64) + added


def kv_splits(lengths: Tensor, num_head: int, num_kv_head: int, max_kv_splits: int, device_core_count: int) -> Tensor:
    """int [..., bs] -> int32 [..., bs]: into how many splits Triton's attention cuts the tokens of each request.

    With M and m the longest and the shortest length, and m = M where they differ by less than a quarter of m, splits
    are so short that M has min(ceil(M / m), max_kv_splits) of them, and also min(ceil(cores / blocks), max_kv_splits).
    Here cores is device_core_count * max(log2(M / 64), 1) in float32, truncated, and blocks are those of the attention
    without splits: one for each request and query head, or for up to 16 heads with the same keys.

    Source: SGLang 0.5.23's get_num_kv_splits_triton (kernels/ops/attention/metadata.py), with a row a request. It
    divides by the shortest length; here a length below 1 counts as 1.

    Args:
        lengths: of a batch; of several, one a row.
        num_head, num_kv_head: heads of queries, and of keys and values.
        max_kv_splits: bounds the splits that have equal lengths.
        device_core_count: multiprocessors.
    """
    if lengths.shape[-1] == 0:
        return lengths.to(torch.int32)
    tokens = lengths.to(torch.int64).clamp(min=1)
    longest, shortest = tokens.amax(-1, keepdim=True), tokens.amin(-1, keepdim=True)
    shortest = torch.where(longest * 8 < shortest * 10, longest, shortest)
    even = ceil_div(longest, shortest).clamp(max=max_kv_splits)
    doublings = torch.log2(longest.to(torch.float32) / 64).clamp(min=1)
    cores = (doublings * device_core_count).to(torch.int64)
    heads_a_block = min(16, num_head // num_kv_head)
    blocks = tokens.shape[-1] * -(-num_head // heads_a_block)
    filling = ceil_div(cores, torch.full_like(cores, blocks)).clamp(max=max_kv_splits)
    splits = torch.maximum(ceil_div(tokens, ceil_div(longest, even)), ceil_div(tokens, ceil_div(longest, filling)))
    return splits.to(torch.int32)


def ceil_div(value: Tensor, divisor: Tensor) -> Tensor:
    """int [...], int [...] above 0 -> int [...]: the quotient, rounded up."""
    return -torch.div(-value, divisor, rounding_mode="floor")


def refresh(
    backends: Sequence[MetadataBuffers],
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    *,
    mode: str = "decode",
    index_topk: int,
    page_size: int,
    extent: str,
    max_len: int | None = None,
    next_n: int = 1,
    extend_seq_lens: Tensor | None = None,
    seqlen_offsets: Sequence[int] | None = None,
    index_kpool: int = 1,
    page_fill: int | None = None,
    schedule_remainder: str = "last",
    schedule_per: str = "request",
    schedule_atoms: int = 0,
    schedule_split_cost: int = 0,
    flashmla_order: str = "2026",
    num_head: int = 32,
    num_kv_head: int = 8,
    max_kv_splits: int = 8,
    device_core_count: int = 132,
) -> None:
    """Refreshes the backends in place, and writes exactly the elements that a kernel must write.

    Args:
        backends: destinations; a field that is None isn't written.
        seq_lens, req_pool_indices: int32 or int64 [bs].
        req_to_token: int32 or int64 [pool rows, W].
        mode, next_n, extend_seq_lens, index_kpool: see lengths.
        index_topk, page_size: T and P.
        extent: "live" writes the live columns of a row, "full" all columns below ``max_len``.
        max_len: bound on the columns; None is the width of the narrowest table.
        seqlen_offsets: one offset per backend, added to its lengths; None is no offset.
        page_fill: written to the columns of real_page_table that aren't live, up to its width; None writes nothing.
        schedule_remainder, schedule_per, schedule_atoms, schedule_split_cost: of paged_mqa_schedule_metadata, see
            paged_mqa_schedule. With "request" its items are the requests' cache_seqlens, of schedule_atoms atoms each,
            or if that is 0 ceil(next_n / 2), with a split cost next_n; with "row" the rows' seqlens_expanded, of one.
            With pools of k tokens lengths are in pools, max(floor(length / k), 1).
        flashmla_order: of flashmla_metadata, which schedules the requests' cache_seqlens.
        num_head, num_kv_head, max_kv_splits, device_core_count: of num_kv_splits, see kv_splits. Its lengths are
            seq_lens without offsets.

    Raises:
        ValueError: an unknown mode, extent, remainder or order.
    """
    if extent not in ("live", "full"):
        raise ValueError(f"extent is {extent!r}; allowed: 'live', 'full'.")
    # The longest last: backends that share a table have the live columns of the longest of them, whatever their order.
    offsets = seqlen_offsets or [0] * len(backends)
    for buffers, offset in sorted(zip(backends, offsets, strict=True), key=lambda pair: pair[1]):
        values, rows = lengths(
            seq_lens,
            mode=mode,
            index_topk=index_topk,
            next_n=next_n,
            extend_seq_lens=extend_seq_lens,
            seqlen_offset=offset,
            index_kpool=index_kpool,
        )
        for name, value in values.items():
            destination = getattr(buffers, name)
            if destination is not None:
                destination[: value.numel()] = value
        _schedule(
            buffers,
            values,
            schedule_remainder,
            "request" if mode == "decode" else schedule_per,
            schedule_atoms or (next_n if schedule_split_cost else (next_n + 1) // 2),
            schedule_split_cost,
            flashmla_order,
            index_kpool,
        )
        if buffers.num_kv_splits is not None:
            buffers.num_kv_splits[: seq_lens.numel()] = kv_splits(
                seq_lens.to(torch.int32), num_head, num_kv_head, max_kv_splits, device_core_count
            )
        added = offset + (next_n if mode == "target_verify" else 0)
        _csr(buffers, kv_lengths(seq_lens, added), req_pool_indices, req_to_token, max_len)
        columns = _columns(buffers, req_to_token, page_size, index_kpool, max_len)
        counts = torch.full_like(rows.live, columns) if extent == "full" else rows.live.clamp(0, columns)
        total = counts.numel()
        longest = int(counts.max()) if total else 0
        tokens = req_to_token[:, :longest][req_pool_indices.long()[rows.request]]
        written = torch.arange(longest, device=counts.device) < counts[:, None]
        if buffers.page_indices is not None:
            _write(buffers.page_indices[:total, :longest], tokens.to(torch.int32), written)
        # With pages of one token real_page_table is page_indices itself.
        if buffers.real_page_table is not None and page_size > 1:
            pages = page_row(tokens, page_size)
            _write(buffers.real_page_table[:total, : pages.shape[1]], pages, written[:, ::page_size])
            if page_fill is not None:
                buffers.real_page_table[:total, pages.shape[1] :] = page_fill
                _write(
                    buffers.real_page_table[:total, : pages.shape[1]],
                    torch.full_like(pages, page_fill),
                    ~written[:, ::page_size],
                )
        if buffers.pooled_real_page_table is not None:
            pools = pooled_page_table(page_row(tokens, page_size), index_kpool)
            where = written[:, ::page_size][:, ::index_kpool]
            _write(buffers.pooled_real_page_table[:total, : pools.shape[1]], pools, where)


def _schedule(
    buffers: MetadataBuffers,
    values: dict[str, Tensor],
    remainder: str,
    per: str,
    atoms: int,
    split_cost: int,
    order: str,
    index_kpool: int,
) -> None:
    if buffers.paged_mqa_schedule_metadata is not None:
        schedule = buffers.paged_mqa_schedule_metadata
        items = values["cache_seqlens"]
        if per == "row":
            items, atoms = values["seqlens_expanded"], 1
        if index_kpool > 1:
            items = pooled_lengths(items, index_kpool).clamp(min=1)
        entries = paged_mqa_schedule(
            items.tolist(), schedule.shape[0] - 1, atoms=atoms, remainder=remainder, split_cost=split_cost
        )
        schedule.copy_(torch.tensor(entries, dtype=torch.int32))
    if buffers.flashmla_metadata is not None:
        cache = values["cache_seqlens"].tolist()
        metadata, splits = flashmla_schedule(cache, buffers.flashmla_metadata.shape[0], order=order)
        buffers.flashmla_metadata.copy_(torch.tensor(metadata, dtype=torch.int32))
        if buffers.num_splits is not None:
            buffers.num_splits[: len(splits)] = torch.tensor(splits, dtype=torch.int32)


def _csr(
    buffers: MetadataBuffers, tokens: Tensor, req_pool_indices: Tensor, req_to_token: Tensor, max_len: int | None
) -> None:
    """Writes kv_indptr, and to kv_indices the tokens of all requests one after the other, up to its capacity."""
    ends = torch.cumsum(tokens, dim=0)
    if buffers.kv_indptr is not None:
        buffers.kv_indptr[0] = 0
        buffers.kv_indptr[1 : tokens.numel() + 1] = ends.to(torch.int32)
    if buffers.kv_indices is None:
        return
    width = req_to_token.shape[1] if max_len is None else min(max_len, req_to_token.shape[1])
    capacity = buffers.kv_indices.numel()
    for row, count, end in zip(req_pool_indices.tolist(), tokens.tolist(), ends.tolist(), strict=True):
        begin = end - count
        written = max(min(count, width, capacity - begin), 0)
        buffers.kv_indices[begin : begin + written] = req_to_token[row, :written].to(buffers.kv_indices.dtype)


def _write(destination: Tensor, values: Tensor, where: Tensor) -> None:
    destination.copy_(torch.where(where, values, destination))


def _columns(
    buffers: MetadataBuffers, req_to_token: Tensor, page_size: int, index_kpool: int, max_len: int | None
) -> int:
    widths = [req_to_token.shape[1]]
    if buffers.page_indices is not None:
        widths.append(buffers.page_indices.shape[1])
    elif buffers.real_page_table is not None:
        widths.append(buffers.real_page_table.shape[1] * page_size)
    elif buffers.pooled_real_page_table is not None:
        widths.append(buffers.pooled_real_page_table.shape[1] * page_size * index_kpool)
    if max_len is not None:
        widths.append(max_len)
    return min(widths)


def copy(
    precomputed: MetadataBuffers,
    destinations: Sequence[MetadataBuffers],
    *,
    bs: int,
    rows: int | None = None,
    columns: int | None = None,
    page_columns: int | None = None,
) -> None:
    """Copies the first ``bs`` requests, and their rows, of every field that a destination has.

    Args:
        precomputed: the source; has every field that a destination has.
        destinations: written in place.
        bs: requests; running sums have one element more.
        rows: rows in the fields with one element per row; None is ``bs``, as in decode.
        columns, page_columns: columns of page_indices and real_page_table; None is the source's width.
    """
    limits = {"page_indices": columns, "real_page_table": page_columns}
    for buffers in destinations:
        for field, destination in buffers.items():
            source: Tensor = getattr(precomputed, field.name)
            height = bs if rows is None or field.per == "request" else rows
            if field.kind == "table":
                limit = limits.get(field.name)
                count = source.shape[1] if limit is None else limit
                destination[:height, :count] = source[:height, :count]
            else:
                count = height + (field.kind == "running_sum")
                destination[:count] = source[:count]
