"""What is measured: shapes, the lengths of their requests, and buffers for them in several sets."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onelaunch
import torch
from onelaunch import KernelConfig, MetadataBuffers
from onelaunch.errors import ConfigError
from onelaunch.inspect.traffic import traffic
from onelaunch.run.plan import make_plan
from onelaunch.spec import reference
from onelaunch.spec.fields import FIELDS
from torch import Tensor

Extent = Literal["live", "full"]
Call = Callable[[], object]

INDEX_TOPK = 2048
# The row of req_to_token of a context of 160k with the room that speculative decoding adds: odd, so rows are aligned
# to 4 bytes only.
WIDE = 163_911
_ROOM = 71
SHAPES = ("1x4k", "8x8k", "32x4k", "64x8k", "128x32k", "256x4k", "16x130k", "1x1M", "512x2k")
# Lies in every word before a check; no token, length or sum has this value.
POISON = -858993460
_UNITS = {"": 1, "k": 1024, "M": 1024 * 1024}


@dataclass(frozen=True)
class Case:
    """One shape to measure.

    Attributes:
        batch, length: requests, and the tokens that the longest of most of them has.
        backends: N.
        width: columns of req_to_token and of every page_indices.
        page_size: P.
        extent: "live" or "full".
        kind: "uniform" draws lengths from half the named length to the named length; "one-long" is that with one
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
        """Such as 64x8k."""
        return f"{self.batch}x{short(self.length)}"

    def __str__(self) -> str:
        kind = "" if self.kind == "uniform" else f" {self.kind}"
        return f"{self.shape}{kind} N={self.backends} width={self.width} page={self.page_size} {self.extent}"

    def lengths(self, traced: Sequence[int] = ()) -> list[int]:
        """The tokens of each request, the same in every run.

        Args:
            traced: lengths that a trace's requests reach, for a kind that is a trace.
        """
        draw = random.Random(f"{self.batch} {self.length} {self.kind}")
        if self.kind not in ("uniform", "one-long"):
            return [min(draw.choice(traced), self.width) for _ in range(self.batch)]
        drawn = [draw.randint((self.length + 1) // 2, self.length) for _ in range(self.batch)]
        # One has the named length, so that it is the longest.
        drawn[draw.randrange(self.batch)] = self.length * (64 if self.kind == "one-long" else 1)
        return [min(length, self.width) for length in drawn]

    def replace(self, **changes: Any) -> Case:
        """A copy with some facts changed."""
        return dataclasses.replace(self, **changes)


def short(number: int) -> str:
    """8192 is 8k, 1048576 is 1M, 1000 is 1000."""
    for unit in ("M", "k"):
        if number and number % _UNITS[unit] == 0:
            return f"{number // _UNITS[unit]}{unit}"
    return str(number)


def parse_shape(text: str) -> tuple[int, int]:
    """64x8k is (64, 8192).

    Raises:
        ConfigError: it isn't of that form.
    """
    found = re.fullmatch(r"(\d+)\s*[x×]\s*(\d+)([kM]?)", text.strip())
    if not found or int(found[1]) < 1 or int(found[2]) < 1:
        raise ConfigError(f"the shape {text!r} isn't of the form BATCHxLENGTH, for example 64x8k.")
    return int(found[1]), int(found[2]) * _UNITS[found[3]]


def wide_enough(length: int) -> int:
    """The width of an engine's table that holds a request of this length: WIDE, or more for a longer one."""
    return max(WIDE, length + _ROOM)


def trace_lengths(path: Path) -> list[int]:
    """The lengths that a trace's requests have half way through their output.

    Raises:
        OnelaunchError: it can't be read.
    """
    from .serving import Trace

    trace = Trace.load(path)
    return [int(i) + int(o) // 2 for i, o in zip(trace.input_tokens, trace.output_tokens, strict=True)]


class Scene:
    """Buffers and inputs of one shape, in several sets, so that a repeated call doesn't find its data in a cache.

    Args:
        lengths: tokens of each request.
        backends: N.
        width: table width; the row stride of req_to_token and of every page_indices.
        page_size: P.
        sets: how many.
        device: where; None is the current CUDA device.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        backends: int,
        width: int,
        page_size: int,
        sets: int,
        device: torch.device | None = None,
    ) -> None:
        self.lengths, self.backends, self.width, self.page_size, self.sets = lengths, backends, width, page_size, sets
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        bs = len(lengths)
        generator = torch.Generator(device=self.device).manual_seed(1)

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=self.device)

        self.inputs: list[tuple[Tensor, Tensor, Tensor]] = []
        self.buffers: list[list[MetadataBuffers]] = []
        for _ in range(sets):
            pool = torch.randint(0, 2**30, (bs + 1, width), dtype=torch.int32, device=self.device, generator=generator)
            seq_lens = torch.tensor(lengths, dtype=torch.int64, device=self.device)
            rows = torch.randperm(bs, device=self.device, generator=generator) + 1
            self.inputs.append((seq_lens, rows, pool))
            self.buffers.append(
                [
                    MetadataBuffers(
                        cache_seqlens=new(bs),
                        cu_seqlens_k=new(bs + 1),
                        page_indices=new(bs, width),
                        nsa_cache_seqlens=new(bs),
                        nsa_cu_seqlens_k=new(bs + 1),
                        real_page_table=None if page_size == 1 else new(bs, -(-width // page_size)),
                    )
                    for _ in range(backends)
                ]
            )

    @property
    def live(self) -> int:
        """Live words of page_indices, one backend."""
        return sum(min(length, self.width) for length in self.lengths)

    @property
    def longest(self) -> int:
        """The longest request, as far as the table is wide."""
        return min(max(self.lengths), self.width)

    def bytes(self, extent: Extent = "live") -> int:
        """Bytes that one refresh must move: what it reads once, everything written N times."""
        config = KernelConfig(num_backends=self.backends, page_size=self.page_size, extent=extent)
        return traffic(config, self.lengths, self.width).bytes

    def plans(self, extent: str = "live", **launch: Any) -> list[onelaunch.Plan]:
        """A plan for each set; ``launch`` are settings of the launch shape, such as threads."""
        settings = {"index_topk": INDEX_TOPK, "page_size": self.page_size, "extent": extent, **launch}
        return [
            make_plan(buffers, pool, settings)
            for buffers, (_, _, pool) in zip(self.buffers, self.inputs, strict=True)
        ]

    def refresh_calls(self, extent: str = "live", **facts: Any) -> list[Call]:
        """A call a set, of onelaunch's plan."""

        def call(bound: onelaunch.Plan, seq_lens: Tensor, rows: Tensor) -> Call:
            return lambda: bound.run(seq_lens, rows)

        return [
            call(bound, seq_lens, rows)
            for bound, (seq_lens, rows, _) in zip(self.plans(extent, **facts), self.inputs, strict=True)
        ]

    def poison(self, number: int, first_sums: int = POISON) -> None:
        """Fills a set's destinations with what nothing may leave there.

        Args:
            number: the set.
            first_sums: what the running sums begin with; 0 for those that never write it, as in engines.
        """
        for backend in self.buffers[number]:
            for field, tensor in backend.items():
                tensor.fill_(POISON)
                if field.kind == "cumulative":
                    tensor[0] = first_sums

    def fault(
        self, number: int, extent: str, max_len: int | None = None, fields: Container[str] = tuple(FIELDS)
    ) -> str:
        """Compares every word of a set, poisoned before, with the reference; "" if all agree.

        Args:
            extent, max_len: as in reference.refresh.
            fields: names of those to compare; the others must be as they were poisoned.
        """
        seq_lens, rows, pool = self.inputs[number]
        expected = [
            MetadataBuffers(**{field.name: torch.full_like(tensor, POISON) for field, tensor in backend.items()})
            for backend in self.buffers[number]
        ]
        reference.refresh(
            expected,
            seq_lens,
            rows,
            pool,
            index_topk=INDEX_TOPK,
            page_size=self.page_size,
            extent=extent,
            max_len=max_len,
        )
        for index, (backend, wanted) in enumerate(zip(self.buffers[number], expected, strict=True)):
            for (field, got), (_, computed) in zip(backend.items(), wanted.items(), strict=True):
                want = computed if field.name in fields else torch.full_like(got, POISON)
                if not torch.equal(got, want):
                    where = tuple((got != want).nonzero()[0].tolist())
                    return (
                        f"backends[{index}].{field.name}{list(where)} is {int(got[where])}, "
                        f"the reference says {int(want[where])}"
                    )
        return ""
