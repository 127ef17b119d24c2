"""The bytes that a refresh reads and writes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ArgumentError
from ..spec.config import KernelConfig
from ..spec.vectors import live_columns

_BYTES = {"int32": 4, "int64": 8, "bool": 1}


# Multiprocessors of an H100, the default where a schedule's size depends on the device.
H100_SMS = 132


@dataclass(frozen=True)
class Written:
    """What a refresh writes of one field.

    Attributes:
        field: its name.
        shape: what is written of it, rows or rows x columns; a mean over rows and tensors where they differ.
        tensors: how many different tensors hold it.
        bytes: written in all of them.
    """

    field: str
    shape: tuple[float, ...]
    tensors: int
    bytes: int


@dataclass(frozen=True)
class Traffic:
    """The bytes of one refresh.

    Attributes:
        written: what it writes of each field.
        bytes_read: of all that it reads, each word once.
        width: columns of the tables, in tokens.
        rows: R, the rows of fields with one element per row; the requests in decode.
    """

    written: tuple[Written, ...]
    bytes_read: int
    width: int
    rows: int

    @property
    def bytes_written(self) -> int:
        """Bytes written to all backends."""
        return sum(field.bytes for field in self.written)

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return self.bytes_read + self.bytes_written


def traffic(
    config: KernelConfig,
    lengths: Sequence[int],
    width: int | None = None,
    *,
    rows: Sequence[int] | None = None,
    page_size: int = 64,
    index_kpool: int = 1,
    num_sms: int | None = None,
    num_sm_parts: int | None = None,
) -> Traffic:
    """Counts the bytes of one refresh: lengths, rows and tables read once, everything written to every backend.

    Args:
        config: the kernel.
        lengths: s of each request.
        width: columns of page_indices and of req_to_token, in tokens; None is the longest request's, with offsets and
            the tokens to verify.
        rows: rows of each request where the configuration doesn't say how many, in a draft_extend of variable extend
            lengths and in a copy of several rows; None is one each.
        page_size, index_kpool: of the tables that a copy copies; a copy's configuration doesn't say.
        num_sms: multiprocessors of paged_mqa_schedule_metadata; None is an H100's.
        num_sm_parts: rows of flashmla_metadata; None is num_sms. kv_indices has room for all tokens.

    Raises:
        ArgumentError: a number is negative, or rows are not one number per request.
    """
    copies = config.operation == "copy"
    num_sms = H100_SMS if num_sms is None else num_sms
    offsets = config.seqlen_offsets or (0,)
    verified = config.next_n if config.mode == "target_verify" and not copies else 0
    if width is None:
        width = max(lengths, default=0) + (max(offsets) + verified if lengths else 0)
    if config.mode == "decode":
        per_request = [1] * len(lengths)
    elif config.extend == "variable" or copies:
        per_request = [1] * len(lengths) if rows is None else list(rows)
    else:
        per_request = [config.next_n] * len(lengths)
    if min((width, num_sms, num_sm_parts or 0, *lengths, *per_request)) < 0:
        raise ArgumentError("A length, width or number of rows or multiprocessors is negative; give 0 or more.")
    if len(per_request) != len(lengths):
        raise ArgumentError(f"rows has {len(per_request)} numbers and lengths has {len(lengths)}; give one a request.")
    page = page_size if copies else config.page_size
    tokens_a_word = {
        "real_page_table": page,
        "pooled_real_page_table": page * (index_kpool if copies else config.index_kpool),
    }
    fixed = {
        "paged_mqa_schedule_metadata": (num_sms + 1, 2),
        "flashmla_metadata": (num_sms if num_sm_parts is None else num_sm_parts, 8),
    }

    def words(name: str, request: int, offset: int, whole: bool = not config.live) -> int:
        """The words that a request has in a row of a table, or in kv_indices, of a backend with this offset."""
        columns = width if whole else min(lengths[request] + offset + verified, width)
        return -(-columns // tokens_a_word.get(name, 1))

    requests, total = len(lengths), sum(per_request)
    written = []
    read = 0
    for name in config.fields:
        field, tensors = config.field(name), config.destinations(name)
        count = total if field.per == "row" else requests
        if field.own_rows is not None:
            count = requests * field.own_rows
        shape: tuple[float, ...]
        # What backends of different lengths share is written as far as the longest reaches.
        of_tensors = offsets if len(offsets) == tensors else (max(offsets),) * tensors
        if name in config.tables:
            whole = not config.live or (name == "real_page_table" and config.page_fill is not None)
            repeats = per_request if field.kind == "table" else [1] * requests
            in_all = sum(n * words(name, r, offset, whole) for offset in of_tensors for r, n in enumerate(repeats))
            mean = in_all / tensors
            shape = (count, mean / count if count else 0) if field.kind == "table" else (mean,)
        elif name in config.computed:
            each = per_request if field.per == "row" else [1] * requests
            in_all = sum(
                n * live_columns(config, name, length, offset + verified)
                for offset in of_tensors
                for n, length in zip(each, lengths, strict=True)
            )
            mean = in_all / tensors
            shape = (count, mean / count if count else 0) if field.kind == "table" else (mean,)
        else:
            size = fixed.get(name, (count + field.extra,))
            shape, in_all = size, tensors * math.prod(size)
        written.append(Written(name, shape, tensors, _BYTES[config.dtype(name)] * in_all))
        read += written[-1].bytes // tensors if copies else 0
    if not copies:
        if config.needs_lengths:
            read += requests * _BYTES[config.seq_lens_dtype]
        if config.extend == "variable":
            read += requests * _BYTES[config.extend_seq_lens_dtype]
        if config.tables:
            # A page's number comes from its first token, which page_indices' tokens include. Of a request without
            # rows nothing is read.
            finest = config.tables[0]
            tokens = sum(words(finest, r, max(offsets)) for r in range(requests) if per_request[r])
            read += requests * _BYTES[config.req_pool_indices_dtype] + tokens * _BYTES[config.req_to_token_dtype]
    return Traffic(tuple(written), read, width, total)
