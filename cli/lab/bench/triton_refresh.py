"""A refresh of one backend in Triton, in the manner of the engines' own: a launch per backend, a program per chunk.

It gathers through the token pool, skips chunks without live columns, and isn't specialized to the batch
size. With TRITON_INTERPRET=1, set before this is imported, it runs on the CPU.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from onelaunch import MetadataBuffers
from torch import Tensor

# Columns a program, and its warps. What is measured is the best of them.
CHOICES = ((512, 4), (1024, 4), (2048, 8))
_SCAN = 256  # requests that are summed at once


@triton.jit(do_not_specialize=["batch_size", "columns"])  # type: ignore[untyped-decorator]
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
    index_topk: tl.constexpr,
    page_shift: tl.constexpr,
    live_only: tl.constexpr,
    scan: tl.constexpr,
    block: tl.constexpr,
):
    chunk = tl.program_id(0)
    row = tl.program_id(1) - 1
    if row < 0:
        # One program has the lengths and their running sums, in blocks with a carry.
        if chunk == 0:
            tl.store(cu_seqlens_k, 0)
            tl.store(nsa_cu_seqlens_k, 0)
            carry = 0
            nsa_carry = 0
            for first in range(0, batch_size, scan):
                request = first + tl.arange(0, scan)
                present = request < batch_size
                length = tl.load(seq_lens + request, mask=present, other=0).to(tl.int32)
                nsa = tl.minimum(length, index_topk)
                tl.store(cache_seqlens + request, length, mask=present)
                tl.store(nsa_cache_seqlens + request, nsa, mask=present)
                tl.store(cu_seqlens_k + 1 + request, carry + tl.cumsum(length, 0), mask=present)
                tl.store(nsa_cu_seqlens_k + 1 + request, nsa_carry + tl.cumsum(nsa, 0), mask=present)
                carry += tl.sum(length, 0)
                nsa_carry += tl.sum(nsa, 0)
    else:
        end = columns
        if live_only:
            end = tl.minimum(tl.load(seq_lens + row).to(tl.int32), columns)
        first = chunk * block
        if first < end:
            source = req_to_token + tl.load(req_pool_indices + row).to(tl.int64) * pool_stride
            column = first + tl.arange(0, block)
            tokens = tl.load(source + column, mask=column < end, other=0)
            to = page_indices + row.to(tl.int64) * page_indices_stride
            tl.store(to + column, tokens, mask=column < end)
            if page_shift > 0:
                # A page's number follows from its first token, which this program has just read.
                page = (first >> page_shift) + tl.arange(0, block >> page_shift)
                begin = page << page_shift
                token = tl.load(source + begin, mask=begin < end, other=0)
                to = real_page_table + row.to(tl.int64) * real_page_table_stride
                tl.store(to + page, token >> page_shift, mask=begin < end)


def refresh(
    backend: MetadataBuffers,
    seq_lens: Tensor,
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    *,
    index_topk: int,
    page_size: int,
    live_only: bool,
    block: int,
    warps: int,
) -> None:
    """Refreshes one backend, which has every decode field but seqlens_expanded: one launch.

    Args:
        seq_lens, req_pool_indices: int [bs], contiguous.
        req_to_token: int32 [pool rows, W].
        page_size: a power of two up to ``block``; with 1 there is no real_page_table.
        live_only: whether columns after the live ones stay as they are.
        block, warps: see CHOICES.
    """
    wide, real = backend.page_indices, backend.real_page_table
    assert wide is not None
    columns = min(wide.shape[1], req_to_token.shape[1])
    batch_size = seq_lens.numel()
    kernel: Any = _refresh
    kernel[(triton.cdiv(columns, block), batch_size + 1)](
        seq_lens,
        req_pool_indices,
        req_to_token,
        req_to_token.stride(0),
        backend.cache_seqlens,
        backend.cu_seqlens_k,
        backend.nsa_cache_seqlens,
        backend.nsa_cu_seqlens_k,
        wide,
        wide.stride(0),
        wide if real is None else real,
        0 if real is None else real.stride(0),
        batch_size,
        columns,
        index_topk=index_topk,
        page_shift=0 if real is None else page_size.bit_length() - 1,
        live_only=live_only,
        scan=_SCAN,
        block=block,
        num_warps=warps,
    )
