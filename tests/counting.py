"""A plan that counts how often its binding checks arguments."""

from __future__ import annotations

from typing import Any

import onelaunch
import torch
from onelaunch import MetadataBuffers
from onelaunch.run.plan import Plan
from torch import Tensor


class Number(int):
    """An int that isn't exactly one."""


class CountingPlan:
    """Stands for a plan and returns the real one's words; counts how often the binding requests them."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.times = plan, 0

    def _check(self, *arguments: Any) -> list[int]:
        self.times += 1
        return self.plan._check(*arguments)

    def run(self, *arguments: Any) -> int:
        """How often the binding requested words in this call."""
        before = self.times
        self.plan._bound.run(self, *arguments)
        return self.times - before


def counting_plan(out: Tensor) -> CountingPlan:
    """A plan that writes lengths to ``out``, [8], and a table."""
    pool, table = (torch.zeros((8, 64), dtype=torch.int32, device=out.device) for _ in range(2))
    return CountingPlan(onelaunch.bind([MetadataBuffers(cache_seqlens=out, page_indices=table)], req_to_token=pool))


def inputs(device: torch.device, *lengths: int) -> tuple[Tensor, Tensor]:
    return torch.tensor(lengths, device=device), torch.arange(len(lengths), device=device)
