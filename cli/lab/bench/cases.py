"""What to measure: shapes, and the lengths of their requests."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from onelaunch.errors import ConfigError

from ..extra import need

Extent = Literal["live", "full"]
INDEX_TOPK = 2048
# Columns of req_to_token for a context of 160k and the room of speculative decoding: odd, so rows are aligned to 4
# bytes only.
WIDE = 163_911
_ROOM = 71
MAX_BATCH, MAX_LENGTH = 2**20, 2**31 - 1
SHAPES = ("1x4k", "8x8k", "32x4k", "64x8k", "128x32k", "256x4k", "16x130k", "64x130k", "1x1M", "512x2k")
_UNITS = {"": 1, "k": 1024, "M": 1024 * 1024}


@dataclass(frozen=True)
class Case:
    """One shape to measure.

    Attributes:
        batch: requests.
        length: tokens of the longest request; of the longest short request for the kind "one-long".
        backends: N.
        width: columns of req_to_token and of every page_indices.
        page_size: P.
        extent: "live" or "full".
        kind: "uniform" draws lengths from ``length / 2`` to ``length``; "one-long" is that with one
            request 64 times as long, as far as the table is wide; otherwise the name of a trace.
    """

    batch: int
    length: int
    backends: int = 3
    width: int = WIDE
    page_size: int = 64
    extent: Extent = "live"
    kind: str = "uniform"

    @property
    def shape(self) -> str:
        """The shape in short, such as 64x8k."""
        return f"{self.batch}x{short(self.length)}"

    def __str__(self) -> str:
        kind = "" if self.kind == "uniform" else f" {self.kind}"
        return f"{self.shape}{kind} N={self.backends} width={self.width} page={self.page_size} {self.extent}"

    def lengths(self, traced: Sequence[int] = ()) -> list[int]:
        """The tokens of each request, the same in every run.

        Args:
            traced: lengths to draw from, for a kind that is a trace.
        """
        draw = random.Random(f"{self.batch} {self.length} {self.kind}")
        if self.kind not in ("uniform", "one-long"):
            return [min(draw.choice(traced), self.width) for _ in range(self.batch)]
        drawn = [draw.randint((self.length + 1) // 2, self.length) for _ in range(self.batch)]
        # One request has exactly the longest length.
        drawn[draw.randrange(self.batch)] = self.length * (64 if self.kind == "one-long" else 1)
        return [min(length, self.width) for length in drawn]

    def replace(self, **changes: Any) -> Case:
        """A copy with some attributes changed."""
        return dataclasses.replace(self, **changes)


def short(number: int) -> str:
    """A number with a binary unit: 8192 is 8k, 1048576 is 1M, 1000 is 1000."""
    for unit in ("M", "k"):
        if number and number % _UNITS[unit] == 0:
            return f"{number // _UNITS[unit]}{unit}"
    return str(number)


def parse_shape(text: str) -> tuple[int, int]:
    """Reads a shape: 64x8k is (64, 8192).

    Raises:
        ConfigError: it isn't of that form.
    """
    found = re.fullmatch(r"(\d{1,10})\s*[x×]\s*(\d{1,10})([kM]?)", text.strip())
    if not found or int(found[1]) < 1 or int(found[2]) < 1:
        raise ConfigError(f"the shape {text!r} isn't of the form BATCHxLENGTH, for example 64x8k.")
    batch, length = int(found[1]), int(found[2]) * _UNITS[found[3]]
    if batch > MAX_BATCH or length > MAX_LENGTH:
        raise ConfigError(f"the shape {text!r} is too large; allowed: BATCHxLENGTH up to {MAX_BATCH}x{MAX_LENGTH}.")
    return batch, length


def wide_enough(length: int) -> int:
    """The width of an engine's table that holds a request of this length: WIDE, or more for a longer one."""
    return max(WIDE, length + _ROOM)


def trace_lengths(path: Path) -> list[int]:
    """The lengths of a trace's requests halfway through their output.

    Raises:
        OnelaunchError: it can't be read, or numpy isn't installed.
    """
    need("numpy", "--trace")
    # Imported here because numpy is optional.
    from ..replay.traces import Trace

    trace = Trace.load(path)
    return [int(i) + int(o) // 2 for i, o in zip(trace.input_tokens, trace.output_tokens, strict=True)]
