"""kv_indptr and kv_indices of a backend, which keeps them in two tensors for all captured batch sizes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...run.declared import Written
from ...run.plan import Plan, bind
from ...spec.fields import Declaration, MetadataBuffers
from .. import flashinfer
from ..attributes import has
from .captured import STEPS
from .refresher import Ready

INDICES = "cuda_graph_kv_indices"


class Lists:
    """Refreshes the lists of a multi-step draft backend, or of a single Triton backend: one launch for all steps.

    Each captured batch size has a plan. A pool or lists that were exchanged get a new one.

    Args:
        backend: the backend.
        facts: arguments of onelaunch.bind.
    """

    def __init__(self, backend: Any, **facts: Any) -> None:
        self._backend, self._facts = backend, facts
        # By batch size and the dtypes of run()'s tensors.
        self._ready: dict[tuple[Any, ...], tuple[Ready, Tensor]] = {}

    def ready(
        self,
        bs: int,
        mode: str,
        seq_lens_dtype: torch.dtype,
        req_pool_indices_dtype: torch.dtype,
        source: Tensor | None = None,
    ) -> Ready:
        """A plan for a batch size. Must not be called inside a capture.

        Args:
            bs: the batch size.
            mode: isn't looked at: the lengths are those of the lists.
            seq_lens_dtype, req_pool_indices_dtype: of run()'s tensors.
            source: req_to_token; None is the backend's own.

        Raises:
            ArgumentError: see flashinfer.bind_backends.
        """
        backend = self._backend
        if source is None:
            source = flashinfer.pool_of(backend)
        facts = {"seq_lens_dtype": seq_lens_dtype, "req_pool_indices_dtype": req_pool_indices_dtype, **self._facts}
        plan = self._bind(source, facts)
        plan.exact = bs
        pairs = [(child, None) for child in getattr(backend, STEPS[0], [backend])]
        pool = getattr(backend, "req_to_token_pool", None)
        owner = pairs[0][0] if pool is None else pool
        held = [(backend, INDICES, getattr(backend, INDICES))]
        if owner.req_to_token is source:
            held.append((owner, "req_to_token", source))
        ready = Ready(bs, plan, pairs, held)
        self._ready[bs, seq_lens_dtype, req_pool_indices_dtype] = ready, source
        return ready

    def beside(
        self, bs: int, mode: str, declare: Mapping[str, Declaration | Written], added: int = 0, **facts: Any
    ) -> Ready:
        """A plan of its own for a batch size that also writes what is declared; see Refresher.beside.

        The lists have a request's tokens without those that are added. Of ``declare``, a single backend's qo_indptr and
        mask_indptr get the backend's own tensors.
        """
        backend = self._backend
        source = flashinfer.pool_of(backend)
        written = {name: each for name, each in declare.items() if isinstance(each, Written)}
        if not has(backend, STEPS):
            own = {name: getattr(backend, name, None) for name in ("qo_indptr", "mask_indptr") if name in declare}
            written |= {n: Written(declare[n], t) for n, t in own.items() if t is not None}  # type: ignore[arg-type]
        plan = self._bind(source, {**self._facts, **facts, "declare": written})
        pairs = [(child, None) for child in getattr(backend, STEPS[0], [backend])]
        return Ready(bs, plan, pairs, [(backend, INDICES, getattr(backend, INDICES))])

    def forget(self) -> None:
        """Plan.forget() of all plans: somebody else wrote what they write."""
        for ready, _ in self._ready.values():
            ready.plan.forget()

    def run(self, bs: int, seq_lens: Tensor, req_pool_indices: Tensor, source: Tensor | None = None) -> None:
        """Refreshes the lists of the first bs requests.

        Args:
            bs: the batch size.
            seq_lens, req_pool_indices: int32 or int64, bs elements or more, of which the first bs count.
            source: req_to_token; None is the backend's own.

        Raises:
            ArgumentError: see flashinfer.bind_backends and Plan.run; nothing was written.
            LaunchError: CUDA refused the launch.
        """
        ready, known = self._ready.get((bs, seq_lens.dtype, req_pool_indices.dtype), (None, None))
        if ready is None or (source is not None and source is not known) or not ready.run(seq_lens, req_pool_indices):
            ready = self.ready(bs, "", seq_lens.dtype, req_pool_indices.dtype, source)
            ready.plan.run(seq_lens[:bs], req_pool_indices[:bs])

    def _bind(self, source: Tensor, facts: dict[str, Any]) -> Plan:
        if has(self._backend, STEPS):
            return flashinfer.bind_backends(self._backend, source, **facts)
        lists = MetadataBuffers(kv_indptr=self._backend.kv_indptr, kv_indices=getattr(self._backend, INDICES))
        return bind([lists], req_to_token=source, **facts)
