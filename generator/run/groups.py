"""Groups of backends, each refreshed by a launch on a stream of its own.

One launch for all backends reads a request's tokens once and stores them N times; every group reads them again, and
streams cost a fork and a join. So groups are expected to lose, and are here to be measured (``tests/gpu/ways.py``;
the figures are in ``tests/gpu/NOTES.md``), and for backends that one plan can't hold: with other fields, or more of
them than the kernel's parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..spec.fields import MetadataBuffers
from .checks import check_disjoint
from .plan import Plan, backend_field, make_plan


class Groups:
    """Plans that are launched side by side. Made by bind_groups().

    Attributes:
        plans: a plan a group.
        streams: the stream of each, None for the current one.
    """

    def __init__(self, plans: Sequence[Plan], streams: Sequence[Any]) -> None:
        self.plans, self.streams = tuple(plans), tuple(streams)
        self._device = plans[0].device
        cuda: Any = torch.cuda  # its classes have no annotations
        self._joins: list[Any] = [None if stream is None else cuda.Event() for stream in streams]
        self._fork = cuda.Event() if any(stream is not None for stream in streams) else None

    @property
    def launches(self) -> int:
        """Kernel launches so far."""
        return sum(plan.launches for plan in self.plans)

    def run(
        self,
        seq_lens: Tensor,
        req_pool_indices: Tensor,
        extend_seq_lens: Tensor | None = None,
        *,
        max_len: int | None = None,
    ) -> None:
        """Refreshes every group: a launch each, forked from the device's current stream and joined to it. Capturable.

        Args:
            seq_lens, req_pool_indices, extend_seq_lens, max_len: see Plan.run.

        Raises:
            ArgumentError: a tensor doesn't fit some group; nothing was written.
            LaunchError: CUDA refused a launch.
        """
        for plan in self.plans:
            plan.admit(seq_lens, req_pool_indices, extend_seq_lens, max_len=max_len)
        if self._fork is None:
            for plan in self.plans:
                plan.run(seq_lens, req_pool_indices, extend_seq_lens, max_len=max_len)
            return
        current = torch.cuda.current_stream(self._device)  # pragma: gpu
        self._fork.record(current)  # pragma: gpu
        forked = []  # pragma: gpu
        try:  # pragma: gpu
            for plan, stream, join in zip(self.plans, self.streams, self._joins, strict=True):
                if stream is None:
                    plan.run(seq_lens, req_pool_indices, extend_seq_lens, max_len=max_len)
                    continue
                stream.wait_event(self._fork)
                forked.append((stream, join))
                with torch.cuda.stream(stream):
                    plan.run(seq_lens, req_pool_indices, extend_seq_lens, max_len=max_len)
        finally:  # pragma: gpu
            # After a refused launch too: no stream may be left out of what a capture joins.
            for stream, join in forked:
                join.record(stream)
                current.wait_event(join)


def bind_groups(
    backends: Sequence[MetadataBuffers],
    groups: Sequence[Sequence[int]],
    streams: Sequence[Any] | None = None,
    *,
    req_to_token: Tensor,
    seqlen_offsets: Sequence[int] | None = None,
    **facts: Any,
) -> Groups:
    """Binds groups of backends, a plan each, to be launched on streams of their own.

    Args:
        backends: as in bind(), but only the backends of a group need the same fields.
        groups: indices into ``backends``, each exactly once: [[0, 1], [2]].
        streams: a torch.cuda.Stream for each group, None in it for the current stream; None for a new stream for every
            group but the last. On the CPU None: groups run in turn.
        req_to_token: as in bind().
        seqlen_offsets: one number a backend, as in bind().
        facts: the other arguments of bind().

    Raises:
        ArgumentError: groups or streams don't fit, groups share memory, or see bind().
    """
    _check_partition(groups, len(backends))
    if seqlen_offsets is not None and (
        not isinstance(seqlen_offsets, Sequence) or len(seqlen_offsets) != len(backends)
    ):
        raise ArgumentError(
            f"seqlen_offsets is {seqlen_offsets!r}; it must be None, or one whole number for each of the "
            f"{len(backends)} backends."
        )
    plans = []
    for group in groups:

        def name_of(index: int, name: str, group: Sequence[int] = group) -> str:
            return backend_field(group[index], name)

        offsets = None if seqlen_offsets is None else [seqlen_offsets[index] for index in group]
        plans.append(
            make_plan(
                [backends[index] for index in group], req_to_token, seqlen_offsets=offsets, name_of=name_of, **facts
            )
        )
    check_disjoint(
        [region for plan in plans for region in plan.regions],
        "groups run side by side: put backends that share a tensor into one group.",
    )
    return Groups(plans, _streams(streams, plans[0].device, len(plans)))


def _check_partition(groups: Sequence[Sequence[int]], count: int) -> None:
    try:
        indices = sorted(index for group in groups for index in group)
    except TypeError:
        indices = []
    if indices != list(range(count)) or not all(groups):
        raise ArgumentError(
            f"groups is {groups!r}; it must be lists of indices in which each of the {count} backends is once, such as "
            "[[0, 1], [2]], and none of them empty."
        )


def _streams(streams: Sequence[Any] | None, device: torch.device, count: int) -> list[Any]:
    if device.type != "cuda":
        if streams is not None and any(stream is not None for stream in streams):
            raise ArgumentError(f"streams is {streams!r}; the backends are on {device}, which has none: leave it None.")
        return [None] * count
    if streams is None:  # pragma: gpu
        cuda: Any = torch.cuda  # its classes have no annotations
        return [*(cuda.Stream(device) for _ in range(count - 1)), None]
    streams = list(streams)  # pragma: gpu
    if len(streams) != count:  # pragma: gpu
        raise ArgumentError(f"streams has {len(streams)} elements and groups has {count}; give one a group.")
    for index, stream in enumerate(streams):  # pragma: gpu
        if stream is not None and (not isinstance(stream, torch.cuda.Stream) or stream.device != device):
            raise ArgumentError(
                f"streams[{index}] is {stream!r}; it must be a torch.cuda.Stream of {device}, or None for the current "
                "one."
            )
    return streams  # pragma: gpu
