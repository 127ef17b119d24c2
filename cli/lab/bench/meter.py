"""What a run of `onelaunch bench` needs of a device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from .cases import Case
from .scene import Call, Scene


class Meter(Protocol):
    """Buffers and timings on one device; cuda_meter.CudaMeter is the only one outside of tests.

    Timings are samples, each in microseconds a call.
    """

    device: torch.device

    def machine(self) -> dict[str, Any]: ...
    def scene(self, case: Case, lengths: Sequence[int]) -> Scene: ...
    def synchronize(self) -> None: ...
    def capture(self, calls: Sequence[Call]) -> Callable[[], None]: ...
    def warm_us(self, call: Call) -> list[float]: ...
    def cold_us(self, call: Call) -> list[float]: ...
    def eager_us(self, call: Call) -> tuple[list[float], list[float]]: ...
    def host_us(self, pieces: dict[str, Call]) -> dict[str, float]: ...
