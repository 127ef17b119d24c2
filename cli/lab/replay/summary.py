"""The results of a replay."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checker import Mismatch


@dataclass(frozen=True)
class Distribution:
    """The distribution of a whole number over the run."""

    min: int
    median: int
    p95: int
    max: int

    @classmethod
    def of_counts(cls, counts: NDArray[np.int64]) -> Distribution:
        """The distribution of numbers that occurred so often each: int64 [largest number + 1], not all zero."""
        below = np.cumsum(counts)
        # A percentile is the smallest number that at least this share of the occurrences don't exceed.
        ranks = [1, *(max(1, -(-int(below[-1]) * percent // 100)) for percent in (50, 95)), int(below[-1])]
        low, median, p95, high = (int(i) for i in np.searchsorted(below, ranks))
        return cls(low, median, p95, high)


@dataclass(frozen=True)
class ReplaySummary:
    """The results of a replay.

    Attributes:
        trace, device, backends, extent, writes, verify, page_size, index_topk, seed: what was replayed, and how.
        requests: requests of the trace that were to be served; ``finished`` of them were.
        clipped_prompts: requests whose prompt was clipped to the context length.
        preemptions: times that a request lost its pages and queued again.
        queued_steps: steps before which a request waited for a place in the batch or for pages.
        steps: refreshes. ``launches``, which the plan counts, must be the same number.
        verified_steps, timed_steps: of these, how many were checked and how many were timed.
        batch, length: requests in a step, and tokens of a request in a step; padding requests aren't counted.
        bytes_written: bytes that the refreshes had to write, in all backends, without verified writes.
        tiles, tiles_written: tiles of page_indices that were read, and that changed and so were written.
        elements_checked: destination elements compared, including those that must stay untouched.
        mismatches: elements that differed from the reference.
        first_mismatch: the first of them, None if there is none.
        refresh_us, torch_us: median microseconds from call to completion on the device, for the plan and for
            the same refresh in tensor operations; None if no step was timed.
    """

    trace: str
    device: str
    backends: int
    extent: str
    writes: str
    verify: str
    page_size: int
    index_topk: int
    seed: int
    requests: int
    finished: int
    clipped_prompts: int
    preemptions: int
    queued_steps: int
    steps: int
    launches: int
    verified_steps: int
    timed_steps: int
    batch: Distribution
    length: Distribution
    bytes_written: int
    tiles: int | None
    tiles_written: int | None
    elements_checked: int
    mismatches: int
    first_mismatch: Mismatch | None
    refresh_us: float | None
    torch_us: float | None

    def to_dict(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return dataclasses.asdict(self)
