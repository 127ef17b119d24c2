"""The check of a replay's destinations: every word compared with what the reference writes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
from onelaunch import MetadataBuffers
from torch import Tensor


@dataclass(frozen=True)
class Mismatch:
    """A wrong element: its place, its value, and the reference's."""

    step: int
    backend: int
    field: str
    index: tuple[int, ...]
    got: int
    expected: int

    def __str__(self) -> str:
        place = ", ".join(map(str, self.index))
        return (
            f"step {self.step}, backend {self.backend}: {self.field}[{place}] is {self.got}, "
            f"the reference says {self.expected}"
        )


class Checker:
    """Compares what a refresh wrote with what the reference writes, over the whole buffers.

    Before a checked step the destinations are filled with a value that no refresh writes, and so are shadow
    buffers, which the reference then refreshes: one backend's, as all backends get the same. Filled anew each
    time, because tables change little from step to step: an element that the plan didn't write would otherwise
    often hold the right value. With verified writes nothing may be poisoned: the shadow is refreshed in each step, and
    holds what all steps so far have left, as the destinations must.

    Attributes:
        steps, elements: what was checked.
        mismatches: wrong elements.
        first: the first wrong element, or None.
    """

    def __init__(
        self, real: list[MetadataBuffers], refresh: Callable[[list[MetadataBuffers]], None], verified: bool = False
    ) -> None:
        """``real`` are of one shape; ``refresh`` applies the reference for the current step to what it is given."""

        self._real = real
        self.verified = verified
        self._shadow = _like(real[0], torch.empty_like)
        self._refresh = refresh
        self.steps = 0
        self.elements = 0
        self.mismatches = 0
        self.first: Mismatch | None = None

    def before(self, step: int) -> None:
        """Poisons the destinations, and computes in the shadow what each of them must hold after ``step``, from 0."""
        # Negative, so it is no length and no slot; different in each step, so that an old value isn't taken for it.
        poison = -1 - step % 2**30
        for buffers in () if self.verified and step > 0 else (*self._real, self._shadow):
            for _, tensor in buffers.items():
                tensor.fill_(poison)
        self._refresh([self._shadow])

    @property
    def table(self) -> Tensor:
        """The shadow's page_indices."""
        assert self._shadow.page_indices is not None
        return self._shadow.page_indices

    def after(self, step: int) -> None:
        """Compares the destinations with the shadow."""

        self.steps += 1
        for backend, real in enumerate(self._real):
            for (field, got), (_, expected) in zip(real.items(), self._shadow.items(), strict=True):
                self.elements += got.numel()
                if torch.equal(got, expected):
                    continue
                places = (got != expected).nonzero()
                self.mismatches += len(places)
                if self.first is None:
                    index = tuple(places[0].tolist())
                    self.first = Mismatch(step, backend, field.name, index, int(got[index]), int(expected[index]))


def _like(buffers: MetadataBuffers, allocate: Callable[[Tensor], Tensor]) -> MetadataBuffers:
    return dataclasses.replace(buffers, **{field.name: allocate(tensor) for field, tensor in buffers.items()})
