"""FlashMLA's schedule for sparse attention. It depends only on the batch size, so it is made once, not in each step."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..spec.parts import MAX_SM_PARTS, FlashMLAOrder
from ..spec.reference_schedules import flashmla_schedule
from .checks import MAX_BATCH, check_int


def sparse_flashmla_metadata(
    rows: int, topk: int, num_sm_parts: int, *, order: str = "2026", device: Any = "cpu"
) -> tuple[Tensor, Tensor]:
    """FlashMLA's tile schedule for sparse attention, and its num_splits: flashmla_metadata of equal lengths.

    Args:
        rows: rows of the batch, 0 or more.
        topk: tokens that every row attends to, 1 or more.
        num_sm_parts: parts, 1 to 512. FlashMLA of 2026 on sm_90 has max(SMs // s_q // (h_q // 64), 1).
        order: "2026" or "2025", see reference.flashmla_schedule.
        device: the device of the returned tensors.

    Returns:
        int32 [num_sm_parts, 8] and int32 [rows + 1].

    Raises:
        ArgumentError: a number or the order isn't allowed.
    """
    check_int("rows", rows, 0, MAX_BATCH)
    check_int("topk", topk, 1, 2**31 - 1)
    check_int("num_sm_parts", num_sm_parts, 1, MAX_SM_PARTS)
    if order not in (allowed := get_args(FlashMLAOrder)):
        raise ArgumentError(f"order is {order!r}; allowed: {', '.join(map(repr, allowed))}.")
    metadata, num_splits = flashmla_schedule([topk] * rows, num_sm_parts, order=order)
    return (
        torch.tensor(metadata, dtype=torch.int32, device=device),
        torch.tensor(num_splits, dtype=torch.int32, device=device),
    )
