"""A stand-in for sgl_kernel.flash_attn, whose library has 1.1 GB: the functions that FA3's backend calls, in Triton.

Attention of paged queries with a row of the page table for each request. One program for each query token and head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _attention(
    q,
    k,
    v,
    out,
    table,
    lengths,
    starts,
    q_stride,
    kv_stride,
    table_stride,
    out_stride,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    request, row, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(starts + request)
    rows = tl.load(starts + request + 1) - first
    if row >= rows:
        return
    length = tl.load(lengths + request)
    if CAUSAL:
        length -= rows - 1 - row
    dims = tl.arange(0, DIM)
    query = tl.load(q + (first + row) * q_stride + head * DIM + dims).to(tl.float32) * scale
    highest = -float("inf")
    total = 0.0
    sums = tl.zeros((DIM,), tl.float32)
    for begin in range(0, length, BLOCK):
        token = begin + tl.arange(0, BLOCK)
        live = token < length
        page = tl.load(table + request * table_stride + token // PAGE, mask=live, other=0).to(tl.int64)
        at = (page * PAGE + token % PAGE)[:, None] * kv_stride + (head // GROUP) * DIM + dims[None, :]
        keys = tl.load(k + at, mask=live[:, None], other=0.0).to(tl.float32)
        scores = tl.where(live, tl.sum(keys * query[None, :], 1), -float("inf"))
        higher = tl.maximum(highest, tl.max(scores, 0))
        kept, weights = tl.exp(highest - higher), tl.exp(scores - higher)
        values = tl.load(v + at, mask=live[:, None], other=0.0).to(tl.float32)
        sums = sums * kept + tl.sum(weights[:, None] * values, 0)
        total = total * kept + tl.sum(weights, 0)
        highest = higher
    result = sums / tl.where(total > 0, total, 1.0)
    tl.store(out + (first + row) * out_stride + head * DIM + dims, result.to(out.dtype.element_ty))


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: None = None,
    v: None = None,
    qv: None = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    cache_seqlens: Any = None,
    cache_batch_idx: None = None,
    cache_leftpad: None = None,
    page_table: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k_new: Any = None,
    max_seqlen_q: int = 1,
    rotary_seqlens: None = None,
    q_descale: None = None,
    k_descale: None = None,
    v_descale: None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: None = None,
    softcap: float = 0.0,
    *ignored: Any,
    return_softmax_lse: bool = False,
    out: Tensor | None = None,
    **also_ignored: Any,
) -> Tensor:
    """Attention of q [tokens, heads, dim] over the pages of k_cache and v_cache [pages, page size, KV heads, dim].

    Raises:
        NotImplementedError: windows, soft caps, new keys or a tree's partial results are asked for.
    """
    if tuple(window_size) != (-1, -1) or softcap or return_softmax_lse or k is not None or qv is not None:
        raise NotImplementedError("the stand-in has plain paged attention alone")
    tokens, heads, dim = q.shape
    result = torch.empty_like(q) if out is None else out.view(tokens, heads, dim)
    assert q.stride(1) == k_cache.stride(2) == dim
    assert k_cache.stride() == v_cache.stride()
    grid = (cache_seqlens.shape[0], max(1, int(max_seqlen_q)), heads)
    _attention[grid](
        q,
        k_cache,
        v_cache,
        result,
        page_table,
        cache_seqlens,
        cu_seqlens_q,
        q.stride(0),
        k_cache.stride(1),
        page_table.stride(0),
        result.stride(0),
        softmax_scale or dim**-0.5,
        HEADS=heads,
        GROUP=heads // k_cache.shape[2],
        DIM=dim,
        PAGE=k_cache.shape[1],
        CAUSAL=bool(causal),
        BLOCK=64,
    )
    return result


def flash_attn_varlen_func(*arguments: Any, **keywords: Any) -> Tensor:
    raise NotImplementedError("the stand-in has paged attention alone")


def get_scheduler_metadata(*arguments: Any, **keywords: Any) -> None:
    """Returns no schedule, because this kernel needs none."""


def is_fa3_supported(device: Any = None) -> bool:
    return True
