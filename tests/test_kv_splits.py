"""num_kv_splits by hand and in the kernel. test_kv_splits_triton.py compares the float arithmetic with Triton's."""

from __future__ import annotations

import pytest
import torch
from onelaunch import MetadataBuffers, bind
from onelaunch.spec.reference import kv_splits

NUMBERS = {"num_head": 32, "num_kv_head": 8, "max_kv_splits": 8, "device_core_count": 132}


@pytest.mark.parametrize(
    ("lengths", "changes", "splits"),
    [
        # Heads that share keys share a block, so 8 blocks per request. 132 * log2(640 / 64) = 438 fill the device.
        ([640], {}, [8]),
        ([640], {"max_kv_splits": 200}, [54]),  # ceil(438 / 8) = 55, so splits of 12
        # The log2 is at least 1. 600 * 8 blocks fill the device, and these lengths count as equal.
        ([100] * 599 + [81], {}, [1] * 600),
        # These lengths don't count as equal: splits are as long as the shortest request.
        ([100] * 599 + [80], {}, [2] * 599 + [2]),
        ([100] * 599 + [25], {}, [4] * 599 + [1]),
        # ceil(132 * 6 / (3 * 64)) = 5.
        ([4096] * 3, {"num_head": 64, "num_kv_head": 64, "max_kv_splits": 100}, [5] * 3),
        # A block has at most 16 heads: ceil(132 * 6 / (3 * 4)) = 66, so splits of 63.
        ([4096] * 3, {"num_head": 64, "num_kv_head": 1, "max_kv_splits": 100}, [66] * 3),
        # A length below 1 counts as 1.
        ([0, -5, 3], {}, [1, 1, 3]),
        ([], {}, []),
    ],
)
def test_by_hand(lengths: list[int], changes: dict[str, int], splits: list[int], device: torch.device) -> None:
    numbers = {**NUMBERS, **changes}
    given = torch.tensor(lengths, dtype=torch.int64, device=device)
    assert kv_splits(given, **numbers).tolist() == splits
    counts = torch.full((len(lengths) + 2,), -7, dtype=torch.int32, device=device)
    pool = torch.zeros((1, 1), dtype=torch.int32, device=device)
    bind([MetadataBuffers(num_kv_splits=counts)], req_to_token=pool, **numbers).run(given, torch.zeros_like(given))
    assert counts.tolist() == [*splits, -7, -7]


@pytest.mark.gpu
@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_every_length_up_to_16384(batch_size: int) -> None:
    """The kernel against the reference: a batch for each longest length, with random other lengths and many splits."""
    numbers = {"num_head": 2, "num_kv_head": 1, "max_kv_splits": 4096, "device_core_count": 132}
    longest = torch.arange(1, 2**14 + 1, device="cuda")
    lengths = (torch.rand((len(longest), batch_size), device="cuda") * longest[:, None]).long() + 1
    lengths = torch.minimum(lengths, longest[:, None])
    lengths[:, 0] = longest
    lengths[::2] = torch.maximum(lengths[::2], longest[::2, None] * 4 // 5)  # around the bound of "nearly equal"
    counts = torch.empty(batch_size, dtype=torch.int32, device="cuda")
    got = torch.empty_like(lengths, dtype=torch.int32)
    pool = torch.zeros((1, 1), dtype=torch.int32, device="cuda")
    plan = bind([MetadataBuffers(num_kv_splits=counts)], req_to_token=pool, **numbers)
    rows = torch.zeros(batch_size, dtype=torch.int64, device="cuda")
    for index, batch in enumerate(lengths):
        plan.run(batch, rows)
        got[index] = counts
    assert torch.equal(got, kv_splits(lengths, **numbers))
