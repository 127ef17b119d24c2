"""The options of `onelaunch replay`."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

# The interval in mode "sample". Only steps between the checked ones are timed, since a check fills the caches.
SAMPLE_EVERY = 16
TIME_EVERY = 16
TIME_PHASE = 8


class DeviceChoice(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Verify(StrEnum):
    every = "every"
    sample = "sample"
    none = "none"


class Writes(StrEnum):
    all = "all"
    verified = "verified"


class Extent(StrEnum):
    live = "live"
    full = "full"


@dataclass(frozen=True)
class ReplayOptions:
    """What to replay, and how. The fields are the options of the command.

    ``requests`` and ``max_steps`` limit the run; None is no limit. ``pages`` is the size of the KV pool in
    pages; None leaves it to the simulation.
    """

    trace: Path
    device: DeviceChoice = DeviceChoice.auto
    backends: int = 3
    max_batch: int = 64
    context_len: int = 16384
    requests: int | None = None
    max_steps: int | None = None
    verify: Verify = Verify.sample
    page_size: int = 64
    index_topk: int = 2048
    extent: Extent = Extent.live
    writes: Writes = Writes.all
    pages: int | None = None
    step_ms: float = 30.0
    preempt_probability: float = 0.0
    pad_batch: int = 1
    seed: int = 0
