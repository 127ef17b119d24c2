"""Buffers and inputs of a case, and the check of what a refresh wrote to them."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import onelaunch
import torch
from onelaunch import KernelConfig, MetadataBuffers
from onelaunch.inspect.traffic import traffic
from onelaunch.run.bind import make_plan
from onelaunch.spec import reference
from onelaunch.spec.fields import FIELDS
from torch import Tensor

from .cases import INDEX_TOPK, Extent

Call = Callable[[], object]
# Fills every word before a check; no token, length or sum has this value.
POISON = -858993460


def make_inputs(lengths: Sequence[int], width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """seq_lens and req_pool_indices, int64 [bs]; req_to_token, int32 [bs + 1, width]. The same in every run."""
    generator, bs = torch.Generator(device=device).manual_seed(1), len(lengths)
    pool = torch.randint(0, 2**30, (bs + 1, width), dtype=torch.int32, device=device, generator=generator)
    rows = torch.randperm(bs, device=device, generator=generator) + 1
    return torch.tensor(lengths, dtype=torch.int64, device=device), rows, pool


def poison(buffers: Sequence[MetadataBuffers], first_sums: int = POISON) -> None:
    """Fills the destinations with a value that no refresh writes.

    Args:
        first_sums: the first element of the running sums; 0 for implementations that don't write it.
    """
    for backend in buffers:
        for field, tensor in backend.items():
            tensor.fill_(POISON)
            if field.kind == "running_sum":
                tensor[0] = first_sums


def first_difference(index: int, name: str, got: Tensor, want: Tensor, undefined: Tensor | None = None) -> str:
    """The first element of a backend's field that differs from the reference, in words; "" if there is none.

    Args:
        index: the backend's.
        undefined: marks elements that aren't compared.
    """
    if torch.equal(got, want):
        return ""
    unequal = got != want if undefined is None else (got != want) & ~undefined
    if not unequal.any():
        return ""
    where = tuple(unequal.nonzero()[0].tolist())
    return f"backends[{index}].{name}{list(where)} is {int(got[where])}, the reference says {int(want[where])}"


class Scene:
    """Buffers and inputs of one shape.

    Args:
        lengths: tokens of each request.
        backends: N.
        width: table width; the row stride of req_to_token and of every page_indices.
        page_size: P.
        device: where; None is the current CUDA device.

    Attributes:
        inputs: seq_lens, req_pool_indices and req_to_token.
        buffers: the backends'.
        poisoned: called after the destinations were poisoned: what remembers their content forgets it.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        backends: int,
        width: int,
        page_size: int,
        device: torch.device | None = None,
    ) -> None:
        self.lengths, self.backends, self.width, self.page_size = lengths, backends, width, page_size
        self.device = device or torch.device("cuda", torch.cuda.current_device())
        self.poisoned: list[Call] = []
        bs = len(lengths)

        def new(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.int32, device=self.device)

        self.inputs = make_inputs(lengths, width, self.device)
        self.buffers = [
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

    @property
    def live(self) -> int:
        """Live words of one backend's page_indices."""
        return sum(min(length, self.width) for length in self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest request, at most the table's width."""
        return min(max(self.lengths), self.width)

    def bytes(self, extent: Extent = "live") -> int:
        """Bytes of one refresh: each input read once, each field written N times."""
        config = KernelConfig(num_backends=self.backends, page_size=self.page_size, extent=extent)
        return traffic(config, self.lengths, self.width).bytes

    def plan(
        self, extent: str = "live", buffers: Sequence[MetadataBuffers] | None = None, **settings: Any
    ) -> onelaunch.Plan:
        """A plan of the backends, or of other ``buffers``.

        Args:
            settings: those of bind(), and of the launch shape, such as threads.
        """
        given = {"index_topk": INDEX_TOPK, "page_size": self.page_size, "extent": extent, **settings}
        return make_plan(buffers or self.buffers, self.inputs[2], given)

    def refresh_call(
        self, extent: str = "live", buffers: Sequence[MetadataBuffers] | None = None, **settings: Any
    ) -> Call:
        """A call of onelaunch's plan; the arguments are those of plan()."""
        plan = self.plan(extent, buffers, **settings)
        seq_lens, rows, _ = self.inputs
        return lambda: plan.run(seq_lens, rows)

    def poison(self, first_sums: int = POISON) -> None:
        """Fills the destinations with a value that no refresh writes.

        Args:
            first_sums: the first element of the running sums; 0 for implementations that don't write it.
        """
        poison(self.buffers, first_sums)
        for forget in self.poisoned:
            forget()

    def fault(
        self, extent: str, max_len: int | None = None, fields: Container[str] = tuple(FIELDS), *, dead: bool = True
    ) -> str:
        """Compares every word of poisoned and refreshed destinations with the reference.

        Args:
            extent, max_len: as in reference.refresh.
            fields: names of the fields that were written; the others must still be poisoned.
            dead: whether columns after the live ones are compared too.

        Returns:
            The first wrong word, in words; "" if there is none.
        """
        seq_lens, rows, pool = self.inputs
        expected = [
            MetadataBuffers(**{field.name: torch.full_like(tensor, POISON) for field, tensor in backend.items()})
            for backend in self.buffers
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
        for index, (backend, wanted) in enumerate(zip(self.buffers, expected, strict=True)):
            for (field, got), (_, computed) in zip(backend.items(), wanted.items(), strict=True):
                want = computed if field.name in fields else torch.full_like(got, POISON)
                if field.kind == "table" and not dead:
                    unit = 1 if field.name == "page_indices" else self.page_size
                    live = (seq_lens + unit - 1) // unit
                    want = torch.where(torch.arange(got.shape[1], device=self.device) < live[:, None], want, got)
                if found := first_difference(index, field.name, got, want):
                    return found
        return ""
