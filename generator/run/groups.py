"""Groups of backends: one plan per group, launched side by side.

One launch for all backends reads each token once and stores it N times. With groups, every group reads the tokens
again, and its stream costs a fork and a join. So groups are for backends that don't fit one plan: backends with
different fields, or more than a kernel's parameters can address. All others are faster in one plan (measured: see
``tests/gpu/NOTES.md``).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError
from ..spec.fields import MetadataBuffers
from .bind import ArgumentNames, make_plan
from .destinations import backend_field, check_backends, check_offsets
from .memory import check_disjoint
from .plan import Plan


class Groups:
    """Plans that are launched side by side. Made by bind_groups().

    Attributes:
        plans: one plan per group.
        streams: one stream per group; None for the current one.
    """

    def __init__(self, plans: Sequence[Plan], streams: Sequence[Any]) -> None:
        self.plans, self.streams = tuple(plans), tuple(streams)
        self._forked = [stream for stream in streams if stream is not None]

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
        """Refreshes every group: one launch each, forked from the device's current stream and joined to it. Capturable.

        Args:
            seq_lens, req_pool_indices, extend_seq_lens, max_len: see Plan.run.

        Raises:
            ArgumentError: a tensor doesn't fit a group; nothing was written.
            LaunchError: CUDA refused a launch.
        """
        for plan in self.plans:
            plan.admit(seq_lens, req_pool_indices, extend_seq_lens, max_len=max_len)
        current = torch.cuda.current_stream(self.plans[0].device) if self._forked else None
        for stream in self._forked:  # pragma: gpu
            stream.wait_stream(current)
        try:
            for plan, stream in zip(self.plans, self.streams, strict=True):
                with nullcontext() if stream is None else torch.cuda.stream(stream):
                    plan.run(seq_lens, req_pool_indices, extend_seq_lens, max_len=max_len)
        finally:
            # Also after a refused launch: a graph capture must be joined by every stream that it forked to.
            for stream in self._forked:  # pragma: gpu
                current.wait_stream(stream)  # type: ignore[union-attr]


def bind_groups(
    backends: Sequence[MetadataBuffers],
    groups: Sequence[Sequence[int]],
    streams: Sequence[Any] | None = None,
    *,
    req_to_token: Tensor,
    seqlen_offsets: Sequence[int] | None = None,
    **settings: Any,
) -> Groups:
    """Binds groups of backends: one plan per group, each launched on its own stream.

    Args:
        backends: as in bind(), but only the backends of one group need the same fields.
        groups: indices into ``backends``, each exactly once: [[0, 1], [2]].
        streams: one torch.cuda.Stream, or None for the current stream, per group. None as a whole makes new streams for
            all groups but the last, which uses the current one. On the CPU it must be None: groups run in turn.
        req_to_token: as in bind().
        seqlen_offsets: one number per backend, as in bind().
        settings: the other arguments of bind(), without ``declare``.

    Raises:
        ArgumentError: groups or streams don't fit, or groups share memory.
        And the errors of bind().
    """
    check_backends(backends)
    _check_partition(groups, len(backends))
    offsets = check_offsets(seqlen_offsets, len(backends))
    if settings.get("declare"):
        raise ArgumentError(
            f"declare has {', '.join(map(repr, settings['declare']))}; groups take standard fields only, since a "
            "declared one may name a backend by its number. Bind it to a plan of its own with bind()."
        )
    plans = []
    for group in groups:
        chosen = {"seqlen_offsets": [offsets[index] for index in group]} if offsets else {}
        names = ArgumentNames(lambda index, name, group=group: backend_field(group[index], name))  # type: ignore[misc]
        plans.append(make_plan([backends[index] for index in group], req_to_token, {**settings, **chosen}, names))
    check_disjoint(
        [region for plan in plans for region in plan.regions],
        "groups run side by side. Put backends that share a tensor into one group.",
    )
    return Groups(plans, _streams(streams, plans[0].device, len(plans)))


def _check_partition(groups: Any, count: int) -> None:
    try:
        indices = sorted(index for group in groups for index in group)
        whole = indices == list(range(count)) and all(map(len, groups))
    except TypeError:
        whole = False
    if not whole:
        raise ArgumentError(
            f"groups is {groups!r}; it must be non-empty lists of indices, with each of the {count} backends exactly "
            "once, such as [[0, 1], [2]]."
        )


def _streams(streams: Sequence[Any] | None, device: torch.device, count: int) -> list[Any]:
    if device.type != "cuda":
        if streams is not None and any(stream is not None for stream in streams):
            raise ArgumentError(
                f"streams is {streams!r}; the backends are on {device}, which has no streams. Give None."
            )
        return [None] * count
    if streams is None:  # pragma: gpu
        return [*(torch.cuda.Stream(device) for _ in range(count - 1)), None]  # type: ignore[no-untyped-call]
    if len(streams) != count:  # pragma: gpu
        raise ArgumentError(f"streams has {len(streams)} elements and groups has {count}; give one for each group.")
    for index, stream in enumerate(streams):  # pragma: gpu
        if stream is not None and (not isinstance(stream, torch.cuda.Stream) or stream.device != device):
            raise ArgumentError(
                f"streams[{index}] is {stream!r}; it must be a torch.cuda.Stream of {device}, or None for the current "
                "one."
            )
    return list(streams)  # pragma: gpu
