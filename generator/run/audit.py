"""Audits: what a plan's destinations hold, compared with what a refresh would write, by a kernel that writes nothing.

It is the plan's own kernel with ``writes="audit"``: the same text, in which each store is a comparison. So it compares
what a run writes, and no more: columns after the live ones and rows after the batch, which a refresh leaves as they
are, aren't compared.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import ArgumentError, AuditError
from ..variables import AUDIT_VARIABLE
from .bound import zeros
from .checks import check_int
from .destinations import Destinations


class _Place(NamedTuple):
    """Where a destination lies. It doesn't keep the tensor alive."""

    name: str
    backend: int
    field: str
    address: int
    element_size: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def index_at(self, address: int) -> list[int] | None:
        """The index of the element at an address; None if the destination has none there."""
        rest, within = divmod(address - self.address, self.element_size)
        found = [0] * len(self.shape)
        for dim in sorted(range(len(self.shape)), key=self.strides.__getitem__, reverse=True):
            if self.shape[dim] > 1:
                found[dim], rest = divmod(rest, self.strides[dim])
        fits = all(0 <= at < size for at, size in zip(found, self.shape, strict=True))
        return found if fits and rest == within == 0 else None


class Places:
    """Where a plan's destinations lie, to name the element that an audit reports by its address."""

    def __init__(self, destinations: Destinations) -> None:
        self._places = [
            _Place(name, backend, field, tensor.data_ptr(), tensor.element_size(), tuple(tensor.shape), tensor.stride())
            for field in destinations.fields
            for name, backend, tensor in destinations.different(field)
        ]

    def error(self, address: int, found: int, expected: int) -> AuditError:
        """What an audit reported."""
        for place in self._places:
            index = place.index_at(address)
            if index is not None:
                row, column = [*index, None][:2]
                assert row is not None
                return AuditError(place.name, place.backend, place.field, row, column, found, expected)
        raise LookupError(f"an audit reported address {address:#x}, which is in none of the plan's destinations")


def audit_every(given: Any) -> int | None:
    """The number of runs from audit to audit: bind()'s argument, else the variable's. 0: only Plan.audit(). None: none.

    Raises:
        ArgumentError: it is no whole number, or below 0.
    """
    if given is not None:
        return check_int("audit_every", given, 0, None, ", or None for no audit")
    text = AUDIT_VARIABLE.read()
    if text and not text.isdecimal():
        raise ArgumentError(f"${AUDIT_VARIABLE} is {text!r}; allowed: a whole number, or unset for no audit.")
    return int(text) if text else None


def record(device: torch.device) -> Tensor:
    """The record that kernels report to, int64 [4], empty: what was found, and three numbers about it."""
    return zeros("the record of a plan", (4,), device)


def on_host(recorded: Tensor) -> Tensor:
    """Host memory for a copy of a record, to read without waiting: pinned for a GPU; the record itself on a CPU."""
    return zeros("the record of a plan", (4,), recorded.device, pinned=True) if recorded.is_cuda else recorded
