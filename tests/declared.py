"""For the tests of declared fields: a pool, a batch, and plans of nothing but declared fields."""

from __future__ import annotations

from typing import Any

import onelaunch
import torch
from onelaunch import MetadataBuffers
from torch import Tensor

POOL = torch.arange(40, dtype=torch.int32).view(4, 10)
LENGTHS, ROWS = torch.tensor([2, 0, 8]), torch.tensor([3, 1, 2])


def blank(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.full(shape, -7, dtype=dtype)


def bound(declare: dict[str, Any], count: int = 1, **settings: Any) -> onelaunch.Plan:
    return onelaunch.bind([MetadataBuffers()] * count, req_to_token=POOL, declare=declare, **settings)
