"""A refresh of all backends in Triton, in one launch: every token is read once, and written N times.

Its grid depends on no length, so that a graph may hold it: programs stride over the live chunks of their request. With
TRITON_INTERPRET=1, set before this is imported, it runs on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from onelaunch import MetadataBuffers
from torch import Tensor

# Columns a program takes at once, its warps, the programs on an SM, and whether tiles begin at 16 bytes of a
# destination. What is measured is the best of them.
CHOICES = ((512, 4, 8, False), (1024, 4, 8, False), (1024, 4, 8, True), (2048, 8, 4, True))
_SCAN = 256  # requests that are summed at once


@triton.jit(do_not_specialize=["batch_size", "columns", "splits"])  # type: ignore[untyped-decorator]
def _refresh(  # type: ignore[no-untyped-def]  # pragma: gpu
    seq_lens,
    req_pool_indices,
    req_to_token,
    pool_stride,
    cache_seqlens,
    cu_seqlens_k,
    nsa_cache_seqlens,
    nsa_cu_seqlens_k,
    page_indices,
    page_indices_stride,
    real_page_table,
    real_page_table_stride,
    batch_size,
    columns,
    splits,
    backends: tl.constexpr,
    index_topk: tl.constexpr,
    page_shift: tl.constexpr,
    live_only: tl.constexpr,
    scan: tl.constexpr,
    block: tl.constexpr,
    aligned: tl.constexpr,
):
    program = tl.program_id(0) - 1
    if program < 0:
        # One program has the lengths and their running sums, in blocks with a carry.
        for n in tl.static_range(backends):
            tl.store(cu_seqlens_k[n], 0)
            tl.store(nsa_cu_seqlens_k[n], 0)
        carry = 0
        nsa_carry = 0
        for first in range(0, batch_size, scan):
            request = first + tl.arange(0, scan)
            present = request < batch_size
            length = tl.load(seq_lens + request, mask=present, other=0).to(tl.int32)
            nsa = tl.minimum(length, index_topk)
            sums = carry + tl.cumsum(length, 0)
            nsa_sums = nsa_carry + tl.cumsum(nsa, 0)
            for n in tl.static_range(backends):
                tl.store(cache_seqlens[n] + request, length, mask=present)
                tl.store(nsa_cache_seqlens[n] + request, nsa, mask=present)
                tl.store(cu_seqlens_k[n] + 1 + request, sums, mask=present)
                tl.store(nsa_cu_seqlens_k[n] + 1 + request, nsa_sums, mask=present)
            carry += tl.sum(length, 0)
            nsa_carry += tl.sum(nsa, 0)
    else:
        row = program // splits
        # Both are read before either is used.
        length = tl.load(seq_lens + row)
        source = req_to_token + tl.load(req_pool_indices + row).to(tl.int64) * pool_stride
        end = columns
        if live_only:
            end = tl.minimum(length.to(tl.int32), columns)
        to = row.to(tl.int64) * page_indices_stride
        to_page = row.to(tl.int64) * real_page_table_stride
        # Tiles begin at 16 bytes of the destination, so that four words are stored at once.
        offset = (to % 4).to(tl.int32) if aligned else 0
        for tile in range((program % splits) * block, end + offset, splits * block):
            first = tile - offset
            column = first + tl.arange(0, block)
            if aligned and first >= 0 and first + block <= end:
                tokens = tl.load(source + column)
                begin = tl.multiple_of(to + first, 4)
                for n in tl.static_range(backends):
                    tl.store(page_indices[n] + begin + tl.arange(0, block), tokens)
            else:
                present = (column >= 0) & (column < end)
                tokens = tl.load(source + column, mask=present, other=0)
                for n in tl.static_range(backends):
                    tl.store(page_indices[n] + to + column, tokens, mask=present)
            if page_shift > 0:
                # A page's number follows from its first token, which this program has just read.
                page = ((first + (1 << page_shift) - 1) >> page_shift) + tl.arange(0, block >> page_shift)
                token = tl.load(source + (page << page_shift), mask=(page << page_shift) < end, other=0)
                for n in tl.static_range(backends):
                    to_word = real_page_table[n] + to_page + page
                    tl.store(to_word, token >> page_shift, mask=(page << page_shift) < end)


def refresh(
    backends: Sequence[MetadataBuffers],
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    *,
    index_topk: int,
    page_size: int,
    live_only: bool,
    block: int,
    warps: int,
    programs: int,
    aligned: bool,
) -> None:
    """Refreshes all backends, which have every decode field but seqlens_expanded, in one launch.

    Args:
        backends: all of one shape and one row stride.
        seq_lens, req_pool_indices: int [bs], contiguous.
        req_to_token: int32 [pool rows, W].
        page_size: a power of two up to ``block``; with 1 there is no real_page_table.
        live_only: whether columns after the live ones stay as they are.
        block, warps, aligned: see CHOICES.
        programs: about how many there are; each request has at least one.
    """
    wide, real = backends[0].page_indices, backends[0].real_page_table
    assert wide is not None
    columns = min(wide.shape[1], req_to_token.shape[1])
    batch_size = seq_lens.numel()
    splits = max(1, min(triton.cdiv(columns, block), programs // batch_size))
    # Without pages their table isn't read; any tensors will do.
    pages = tuple(b.page_indices if real is None else b.real_page_table for b in backends)
    kernel: Any = _refresh
    kernel[(batch_size * splits + 1,)](
        seq_lens,
        req_pool_indices,
        req_to_token,
        req_to_token.stride(0),
        tuple(b.cache_seqlens for b in backends),
        tuple(b.cu_seqlens_k for b in backends),
        tuple(b.nsa_cache_seqlens for b in backends),
        tuple(b.nsa_cu_seqlens_k for b in backends),
        tuple(b.page_indices for b in backends),
        wide.stride(0),
        pages,
        0 if real is None else real.stride(0),
        batch_size,
        columns,
        splits,
        backends=len(backends),
        index_topk=index_topk,
        page_shift=0 if real is None else page_size.bit_length() - 1,
        live_only=live_only,
        scan=_SCAN,
        block=block,
        aligned=aligned,
        num_warps=warps,
    )


def multiprocessors(device: torch.device) -> int:
    """How many SMs a device has; one on a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
