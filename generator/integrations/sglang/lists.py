"""kv_indptr and kv_indices of a backend, which keeps them in two tensors for all captured batch sizes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...run.plan import Plan, bind
from ...spec.fields import MetadataBuffers
from .. import flashinfer
from ..attributes import has
from .captured import STEPS

INDICES = "cuda_graph_kv_indices"


class _Bound(NamedTuple):
    plan: Plan
    source: Tensor
    destination: Tensor


class Lists:
    """Refreshes the lists of a multi-step draft backend, or of a single Triton backend: one launch for all steps.

    A plan serves all batch sizes. A pool or lists that were exchanged get a new one.

    Args:
        backend: the backend.
        facts: arguments of onelaunch.bind.
    """

    def __init__(self, backend: Any, **facts: Any) -> None:
        self._backend, self._facts = backend, facts
        self._bound: dict[tuple[torch.dtype, torch.dtype], _Bound] = {}

    def prepare(
        self,
        bs: int,
        *,
        mode: str = "decode",
        seq_lens_dtype: torch.dtype = torch.int64,
        req_pool_indices_dtype: torch.dtype = torch.int64,
        source: Tensor | None = None,
    ) -> Plan:
        """The plan, made now if there is none. Must not be called inside a capture.

        Raises:
            ArgumentError: see flashinfer.bind_backends.
        """
        key = seq_lens_dtype, req_pool_indices_dtype
        if source is None:
            source = flashinfer.pool_of(self._backend)
        destination = getattr(self._backend, INDICES)
        bound = self._bound.get(key)
        if bound is None or bound.source is not source or bound.destination is not destination:
            facts = {"seq_lens_dtype": seq_lens_dtype, "req_pool_indices_dtype": req_pool_indices_dtype, **self._facts}
            bound = self._bound[key] = _Bound(self._bind(source, facts), source, destination)
        return bound.plan

    def run(
        self, bs: int, seq_lens: Tensor, req_pool_indices: Tensor, *, mode: str = "decode", source: Tensor | None = None
    ) -> list[tuple[Any, Any]]:
        """Refreshes the lists of the first bs requests.

        Args:
            bs: the batch size.
            seq_lens, req_pool_indices: int32 or int64, bs elements or more, of which the first bs count.
            mode: isn't looked at: the lengths are those of the lists.
            source: req_to_token; None is the backend's own.

        Returns:
            Each child, without metadata.

        Raises:
            ArgumentError: see flashinfer.bind_backends and Plan.run; nothing was written.
            LaunchError: CUDA refused the launch.
        """
        plan = self.prepare(
            bs, seq_lens_dtype=seq_lens.dtype, req_pool_indices_dtype=req_pool_indices.dtype, source=source
        )
        plan.run(seq_lens[:bs], req_pool_indices[:bs])
        return [(child, None) for child in getattr(self._backend, STEPS[0], [self._backend])]

    def _bind(self, source: Tensor, facts: dict[str, Any]) -> Plan:
        if has(self._backend, STEPS):
            return flashinfer.bind_backends(self._backend, source, **facts)
        lists = MetadataBuffers(kv_indptr=self._backend.kv_indptr, kv_indices=getattr(self._backend, INDICES))
        return bind([lists], req_to_token=source, **facts)
