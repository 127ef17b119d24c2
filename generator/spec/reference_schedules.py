"""The schedules of DeepGEMM and FlashMLA in plain Python. The kernels must agree with them number for number."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence


def paged_mqa_schedule(
    lengths: Sequence[int], num_sms: int, *, atoms: int = 1, remainder: str = "last", split_cost: int = 0
) -> list[list[int]]:
    """DeepGEMM's schedule of paged MQA logits: where each SM begins, [num_sms + 1][2].

    An item of length l is ceil(l / 256) splits for each of its atoms, atom after atom, and the items follow one
    another. Multiprocessors get equal numbers of splits; some get one more, the last ones (DeepGEMM from 2026-06 on, on
    sm_90 and sm_120) or the first ones (before). An entry is the atom, counted over all items, and the split in it; the
    last entry is the end, (items * atoms, 0). A multiprocessor that gets no split begins at the end, too.

    With a split_cost, as on sm_100, a split is that many units of work, and the units are what multiprocessors get. An
    entry is an item's first query token, of which each item has ``atoms``, and the split that the first unit is of.

    Source: DeepGEMM's scheduler/sm90_paged_mqa_logits.cuh and scheduler/sm100_paged_mqa_logits.cuh of 2026-06; where
    no length is above 0, what its copy in vLLM 0.33.0 does (the other reads beyond its memory).

    Args:
        lengths: one an item; below 0 counts as 0.
        num_sms: multiprocessors, 1 or more.
        atoms: query atoms of an item; with a split_cost its query tokens.
        remainder: "last" or "first".
        split_cost: units of work of a split; 0 for one for each atom.

    Raises:
        ValueError: an unknown remainder.
    """
    if remainder not in ("last", "first"):
        raise ValueError(f"remainder is {remainder!r}; allowed: 'last', 'first'.")
    splits = [-(-max(length, 0) // 256) for length in lengths]
    ends = list(itertools.accumulate(n * (split_cost or atoms) for n in splits))
    end = [len(lengths) * atoms, 0]
    share, more = divmod(ends[-1] if ends else 0, num_sms)
    entries, start = [], 0
    for sm in range(num_sms):
        item = bisect.bisect_right(ends, start)
        before = ends[item - 1] if item else 0
        if item == len(ends):
            entries.append(list(end))
        elif split_cost:
            entries.append([item * atoms, (start - before) // split_cost])
        else:
            atom, split = divmod(start - before, splits[item])
            entries.append([item * atoms + atom, split])
        start += share + (sm >= num_sms - more if remainder == "last" else sm < more)
    return [*entries, end]


def flashmla_schedule(
    lengths: Sequence[int], num_sm_parts: int, *, order: str = "2026"
) -> tuple[list[list[int]], list[int]]:
    """FlashMLA's tile schedule: (metadata [num_sm_parts][8], num_splits [bs + 1]).

    A request of length l has max(l - 1, 0) // 64 + 1 blocks, and costs 5 more in every part that takes some of them.
    The parts take the requests' blocks in order: a part takes the remaining blocks of a request if they fit into its
    payload. If not, it takes as many as fit, if any, and ends. A part that ends with a request of length 0 ends before
    its block. num_splits is 0, then the running sum of the number of parts that share each request.

    The words of a row, in order "2026": first request, last request, first block, block after the last, number of
    earlier splits of the first request, whether the first request is split, whether the last one is, 0. In order
    "2025": first request, first block, last request, block after the last, number of earlier splits of the first
    request, 0, 0, 0. A part without work begins after the last request and ends with it; its first block says nothing:
    FlashMLA reads it beyond an array, where the first request's last block is. Without any request the last request is
    -1 and the blocks are 0.

    Source: FlashMLA's csrc/smxx/decode/get_decoding_sched_meta/get_decoding_sched_meta.cu of 2026-01.

    Args:
        lengths: one per request.
        num_sm_parts: parts, 1 or more.
        order: "2026" or "2025".

    Raises:
        ValueError: an unknown order.
    """
    if order not in ("2026", "2025"):
        raise ValueError(f"order is {order!r}; allowed: '2026', '2025'.")
    overhead = 5
    blocks = [max(length - 1, 0) // 64 + 1 for length in lengths]
    payload = -(-sum(n + overhead for n in blocks) // num_sm_parts) + overhead
    metadata, num_splits = [], [0]
    request = block = split = 0
    for _ in range(num_sm_parts):
        first, first_block, first_split, remain = request, block, split, payload
        while request < len(blocks):
            left = blocks[request] - block
            if remain < left + overhead:
                if remain > overhead:
                    block += remain - overhead
                    split += 1
                break
            remain -= left + overhead
            num_splits.append(num_splits[-1] + split + 1)
            request, block, split = request + 1, 0, 0
        splits_first, splits_last = first_block > 0, block > 0
        last = request if splits_last else request - 1
        stop_block = block if splits_last or last < 0 or lengths[last] == 0 else blocks[last]
        if first == last:
            splits_first = splits_last = splits_first or splits_last
        if blocks and first == len(blocks):
            first_block = blocks[0] - 1
        if order == "2026":
            metadata.append([first, last, first_block, stop_block, first_split, int(splits_first), int(splits_last), 0])
        else:
            metadata.append([first, first_block, last, stop_block, first_split, 0, 0, 0])
    return metadata, num_splits
