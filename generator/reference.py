"""What every field means, in plain PyTorch. The kernels must agree with it element for element.

Formulas are SGLang's, read from its DSA/NSA attention backend (decode: ``cache_seqlens`` is the length as int32,
``page_indices`` the request's row of ``req_to_token``, the NSA lengths are clamped at ``index_topk``).
Written for clarity: whole-tensor operations, every row as wide as the longest. Works on any device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fields import FIELDS, MetadataBuffers


def running_sum(values: Tensor) -> Tensor:
    """int32 [n] -> int32 [n + 1]: 0, then the inclusive running sum, wrapping at 2^32 as int32 sums do."""
    out = torch.zeros(values.numel() + 1, dtype=torch.int32, device=values.device)
    out[1:] = torch.cumsum(values, dim=0, dtype=torch.int32)
    return out


def decode_lengths(seq_lens: Tensor, *, index_topk: int) -> dict[str, Tensor]:
    """The fields that follow from the lengths alone.

    Args:
        seq_lens: int32 or int64 [bs]; truncated to int32.
        index_topk: T.

    Returns:
        int32 tensors by field name: [bs], running sums [bs + 1].
    """
    cache = seq_lens.to(torch.int32)
    nsa = cache.clamp(max=index_topk)
    return {
        "cache_seqlens": cache,
        "cu_seqlens_k": running_sum(cache),
        "nsa_cache_seqlens": nsa,
        "nsa_cu_seqlens_k": running_sum(nsa),
        "seqlens_expanded": cache,
    }


def page_row(tokens: Tensor, page_size: int) -> Tensor:
    """int [..., columns] of tokens -> int32 [..., ceil(columns / page_size)]: the page of each page's first token."""
    return torch.div(tokens[..., ::page_size], page_size, rounding_mode="floor").to(torch.int32)


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
) -> None:
    """Refreshes the backends in place, and leaves every element alone that a kernel must leave alone.

    Args:
        backends: destinations; a field that is None isn't written.
        seq_lens, req_pool_indices: int32 or int64 [bs].
        req_to_token: int32 or int64 [pool rows, W].
        mode: "decode".
        index_topk, page_size: T and P.
        extent: "live" writes the columns below a request's length, "full" those below ``max_len``.
        max_len: bound on the columns; None is the width of the narrowest table.

    Raises:
        ValueError: an unknown mode or extent.
    """
    if mode != "decode":
        raise ValueError(f"mode is {mode!r}; the reference knows 'decode'.")
    if extent not in ("live", "full"):
        raise ValueError(f"extent is {extent!r}; allowed: 'live', 'full'.")
    bs = seq_lens.numel()
    values = decode_lengths(seq_lens, index_topk=index_topk)
    for buffers in backends:
        for name, value in values.items():
            destination = getattr(buffers, name)
            if destination is not None:
                destination[: value.numel()] = value
        columns = _columns(buffers, req_to_token, page_size, max_len)
        if extent == "full":
            counts = torch.full_like(values["cache_seqlens"], columns)
        else:
            counts = values["cache_seqlens"].clamp(0, columns)
        longest = int(counts.max()) if bs else 0
        tokens = req_to_token[:, :longest][req_pool_indices.long()]
        written = torch.arange(longest, device=counts.device) < counts[:, None]
        if buffers.page_indices is not None:
            _write(buffers.page_indices[:bs, :longest], tokens.to(torch.int32), written)
        # With pages of one token the real page table is page_indices itself: nothing else to write.
        if buffers.real_page_table is not None and page_size > 1:
            pages = page_row(tokens, page_size)
            _write(buffers.real_page_table[:bs, : pages.shape[1]], pages, written[:, ::page_size])


def _write(destination: Tensor, values: Tensor, where: Tensor) -> None:
    destination.copy_(torch.where(where, values, destination))


def _columns(buffers: MetadataBuffers, req_to_token: Tensor, page_size: int, max_len: int | None) -> int:
    widths = [req_to_token.shape[1]]
    if buffers.page_indices is not None:
        widths.append(buffers.page_indices.shape[1])
    elif buffers.real_page_table is not None:
        widths.append(buffers.real_page_table.shape[1] * page_size)
    if max_len is not None:
        widths.append(max_len)
    return min(widths)


def copy(
    precomputed: MetadataBuffers,
    destinations: Sequence[MetadataBuffers],
    *,
    bs: int,
    columns: int | None = None,
    page_columns: int | None = None,
) -> None:
    """Copies the first ``bs`` requests of every field that a destination has.

    Args:
        precomputed: the source; has every field that a destination has.
        destinations: written in place.
        bs: requests; running sums have one element more.
        columns, page_columns: columns of page_indices and real_page_table; None is the source's width.
    """
    limits = {"page_indices": columns, "real_page_table": page_columns}
    for buffers in destinations:
        for field, destination in buffers.items():
            source = getattr(precomputed, field.name)
            if FIELDS[field.name].kind == "table":
                limit = limits[field.name]
                count = source.shape[1] if limit is None else limit
                destination[:bs, :count] = source[:bs, :count]
            else:
                count = bs + 1 if FIELDS[field.name].kind == "cumulative" else bs
                destination[:count] = source[:count]
